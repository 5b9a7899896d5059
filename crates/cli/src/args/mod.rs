//! The command line.

pub(crate) mod ask;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use vfio_migration_device::host::Roots;

use self::ask::{Check, Describe, Explain, Rehearse, pair};
use crate::units;

const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 usage, 3 incompatible, 4 ownership unresolved.";
const UNITS_AND_EXIT_CODES: &str = "Sizes take K, M, G (powers of two); times take us, ms, s.\n\
Exit codes: 0 done, 1 failed, 2 usage, 3 incompatible, 4 ownership unresolved.";

/// Live migration for guests that own VFIO devices.
#[derive(Debug, Parser)]
#[command(name = "vfio-migrate", version, propagate_version = true, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    /// Say more on stderr; twice for everything. RUST_LOG works too.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Show it: a running guest and its PCI devices move live between processes, and the guest checks that nothing was lost.
    Demo(Demo),
    /// Serve a sample PCI device over vfio-user.
    Device(Device),
    /// Run a guest, or wait for one to arrive.
    Vm(Vm),
    /// Ask a running `vm` to move to another.
    Migrate(Migrate),
    /// Find out what a migration of a running `vm` would come to, without moving anything.
    Rehearse(Rehearse),
    /// Say what a device, a `vm` or this host is, as a manifest that `check` compares.
    Describe(Describe),
    /// Ask whether something can move, and get every reason why not.
    Check(Check),
    /// Say what a reason's code means, and what to do about it.
    Explain(Explain),
    /// Save the guest of a running `vm`, or a device alone, into a file.
    Save(Save),
    /// Load what `save --device` wrote into a device. For a whole guest: `vm --restore`.
    Restore(Restore),
    /// Show how a `vm` and its migration stand.
    Status(Status),
    /// Cancel the migration of a running `vm`: its guest goes on where it is.
    Cancel(Target),
    /// Let a migration go on that waits before its switchover.
    Continue(Target),
    /// Change the limits of a migration while it runs.
    Set(Set),
    /// Pause the guest of a running `vm`.
    Stop(Target),
    /// Let the guest of a running `vm` run.
    Cont(Target),
    /// End a running `vm`, and a guest that is there with it.
    Quit(Target),
    /// Let a running `vm`, whose guest has left, wait for a guest again.
    Incoming(Incoming),
    /// List the VFIO devices of this host, and why each can or cannot migrate.
    Devices(Devices),
    /// Examine this host: what it lacks for migrating VFIO devices, and what fixes it.
    Doctor(Doctor),
    /// Print a shell completion script.
    Completions {
        /// For which shell.
        shell: clap_complete::Shell,
    },
    /// Write the man pages, completions and JSON schemas that are checked in.
    #[command(hide = true)]
    Generate {
        /// Top of the tree to write into.
        dir: PathBuf,
    },
}

impl Verb {
    /// Whether a program reads the answer. The demo has a report for failures too, and is not asked here.
    pub(crate) fn json(&self) -> bool {
        match self {
            Self::Migrate(Migrate { target, .. })
            | Self::Status(Status { target, .. })
            | Self::Set(Set { target, .. })
            | Self::Incoming(Incoming { target, .. })
            | Self::Rehearse(Rehearse { target, .. })
            | Self::Cancel(target)
            | Self::Continue(target)
            | Self::Stop(target)
            | Self::Cont(target)
            | Self::Quit(target) => target.json,
            Self::Save(options) => options.json,
            Self::Restore(options) => options.json,
            Self::Devices(options) => options.json,
            Self::Doctor(options) => options.json,
            Self::Describe(options) => options.json,
            Self::Check(options) => options.json,
            Self::Explain(options) => options.json,
            Self::Demo(_)
            | Self::Device(_)
            | Self::Vm(_)
            | Self::Completions { .. }
            | Self::Generate { .. } => false,
        }
    }
}

/// Options of `demo`.
#[derive(Args, Clone, Debug)]
#[command(
    after_help = "The source VM, the destination VM and every device server run as processes of their own on this \
host. Sizes take K, M, G (powers of two); times take us, ms, s.\nExit codes: 0 verified, 1 not, 2 usage, 3 incompatible, \
4 ownership unresolved."
)]
pub(crate) struct Demo {
    /// Guest RAM.
    #[arg(long, default_value = "512M", value_parser = units::size, value_name = "SIZE")]
    pub(crate) memory: u64,
    /// RAM that the guest dirties each second.
    #[arg(long, default_value = "50M", value_parser = units::size, value_name = "SIZE")]
    pub(crate) dirty_rate: u64,
    /// Internal state of each device.
    #[arg(long, default_value = "64M", value_parser = units::size, value_name = "SIZE")]
    pub(crate) device_state: u64,
    /// Internal state that each device changes each second.
    #[arg(long, default_value = "1M", value_parser = units::size, value_name = "SIZE")]
    pub(crate) device_dirty_rate: u64,
    /// Number of devices.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8), value_name = "N")]
    pub(crate) devices: u8,
    /// How the two VMs talk.
    #[arg(long, default_value = "tcp", value_enum)]
    pub(crate) transport: Transport,
    /// Longest time the guest may stand still. A ceiling, not a target.
    #[arg(long, default_value = "300ms", value_parser = units::time, value_name = "TIME")]
    pub(crate) downtime_limit: Duration,
    /// Devices that can only be saved while stopped.
    #[arg(long)]
    pub(crate) no_precopy: bool,
    /// Use the software guest even where KVM answers.
    #[arg(long)]
    pub(crate) software: bool,
    /// Sabotage one thing on purpose, to see that the guest notices.
    #[arg(long = "break", value_enum, value_name = "WHAT")]
    pub(crate) sabotage: Option<Break>,
    /// With --break: leave the engine's own check on, where there is one, to see that it notices first.
    #[arg(long, requires = "sabotage")]
    pub(crate) strict: bool,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Transports of the demo.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Transport {
    /// TCP on loopback.
    Tcp,
    /// A unix socket.
    Unix,
}

impl Transport {
    /// As reports name it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Unix => "unix",
        }
    }
}

/// What `demo --break` sabotages, below the engine's own checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Break {
    /// Dirty bits of pages that the guest wrote are dropped from the last report.
    DirtyLog,
    /// The device's own dirty log leaves pages out.
    DeviceLog,
    /// Device bytes are altered late in the stream, framing and digests made to match.
    DeviceTail,
    /// One interrupt is not connected again at the destination.
    Interrupt,
    /// A stale copy of a page is applied after its last.
    PageOrder,
    /// A device is stopped before its peer stopped writing to it.
    P2pOrder,
}

/// What the sample device can do wrong, and what ends every help text.
fn device_help() -> String {
    let lines = vfio_migration_sim::FAULT_FORMS.iter().map(|(form, what)| format!("  {form:<40}{what}\n"));
    format!("Faults:\n{}\n{UNITS_AND_EXIT_CODES}", lines.collect::<String>())
}

/// Options of `device`.
#[derive(Args, Clone, Debug)]
#[command(after_help = device_help())]
pub(crate) struct Device {
    /// Where to listen.
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: PathBuf,
    /// Internal state.
    #[arg(long, default_value = "64M", value_parser = units::size, value_name = "SIZE")]
    pub(crate) state_size: u64,
    /// Internal state changed each second.
    #[arg(long, default_value = "1M", value_parser = units::size, value_name = "SIZE")]
    pub(crate) state_dirty_rate: u64,
    /// Pace of the DMA engine: one descriptor each.
    #[arg(long, default_value = "500us", value_parser = units::time, value_name = "TIME")]
    pub(crate) dma_interval: Duration,
    /// No PRE_COPY: the state can only be saved while the device is stopped.
    #[arg(long)]
    pub(crate) no_precopy: bool,
    /// No peer-to-peer states.
    #[arg(long)]
    pub(crate) no_p2p: bool,
    /// No log of DMA writes.
    #[arg(long)]
    pub(crate) no_dirty_log: bool,
    /// Plain vfio-user, without the x-vfio-migrate extension.
    #[arg(long)]
    pub(crate) no_extension: bool,
    /// Model it claims to be.
    #[arg(long, default_value = vfio_migration_sim::MODEL, value_name = "NAME")]
    pub(crate) model: String,
    /// Version of the model it claims, MAJOR.MINOR.PATCH.
    #[arg(long = "model-version", default_value = "1.0.0", value_name = "X.Y.Z")]
    pub(crate) model_version: String,
    /// A parameter of the model that it claims to have. May be given more than once.
    #[arg(long = "param", value_name = "NAME=VALUE", value_parser = pair)]
    pub(crate) parameters: Vec<(String, String)>,
    /// Misbehave on purpose; may be given more than once. All are listed below.
    #[arg(long, value_name = "FAULT")]
    pub(crate) fault: Vec<String>,
    /// Leave when stdin reaches its end.
    #[arg(long, hide = true)]
    pub(crate) exit_with_stdin: bool,
}

/// Options of `vm`.
#[derive(Args, Clone, Debug)]
#[command(after_help = UNITS_AND_EXIT_CODES)]
pub(crate) struct Vm {
    /// Guest RAM.
    #[arg(long, default_value = "512M", value_parser = units::size, value_name = "SIZE")]
    pub(crate) memory: u64,
    /// A device: vfio-user:SOCKET,id=NAME, vfio:0000:01:00.0,id=NAME, vfio:/dev/vfio/devices/vfio0,id=NAME or
    /// mdev:UUID,id=NAME. May be given more than once.
    #[arg(long, value_name = "DEVICE")]
    pub(crate) device: Vec<String>,
    /// Wait for a guest to arrive at this address instead of starting one: unix:PATH, tcp:HOST:PORT or fd:N.
    #[arg(long, value_name = "URI")]
    pub(crate) incoming: Option<String>,
    /// Bring back the guest that `save` wrote into this file, instead of starting one.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["incoming", "paused"])]
    pub(crate) restore: Option<PathBuf>,
    /// Control socket.
    #[arg(long, value_name = "PATH")]
    pub(crate) control: Option<PathBuf>,
    /// Identity of the VM. Without it a guest that starts gets a random one, and a guest that arrives keeps its own.
    #[arg(long, value_name = "UUID")]
    pub(crate) uuid: Option<vfio_migration_types::VmId>,
    /// Where the ownership journal lives. Without it a lost commit cannot be told from a lost answer after a crash.
    #[arg(long, value_name = "DIR")]
    pub(crate) state_dir: Option<PathBuf>,
    /// RAM that the guest dirties each second.
    #[arg(long, default_value = "50M", value_parser = units::size, value_name = "SIZE")]
    pub(crate) dirty_rate: u64,
    /// Start the guest standing still.
    #[arg(long)]
    pub(crate) paused: bool,
    /// Use the software guest even where KVM answers.
    #[arg(long)]
    pub(crate) software: bool,
    /// Refuse to run without KVM, instead of falling back to the software guest.
    #[arg(long, conflicts_with = "software")]
    pub(crate) require_kvm: bool,
    /// File (TOML or JSON) that says what this site allows and asks for, of guests that come and of guests that go.
    #[arg(long, value_name = "FILE")]
    pub(crate) policy: Option<PathBuf>,
    /// Config-space bytes to compare or not, over the default mask: OFFSET+LEN=compare|ignore. May be given more than once.
    #[arg(long, value_name = "RULE")]
    pub(crate) config_rule: Vec<String>,
    /// Sabotage, for the demo.
    #[arg(long, hide = true, value_enum)]
    pub(crate) sabotage: Option<Break>,
    /// Leave when stdin reaches its end.
    #[arg(long, hide = true)]
    pub(crate) exit_with_stdin: bool,
}

/// Which `vm`.
#[derive(Args, Clone, Debug)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct Target {
    /// Control socket of the `vm`.
    #[arg(long, value_name = "PATH")]
    pub(crate) control: PathBuf,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of `incoming`.
#[derive(Args, Clone, Debug)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct Incoming {
    #[command(flatten)]
    pub(crate) target: Target,
    /// Where to listen: unix:PATH, tcp:HOST:PORT (an IPv6 address in brackets) or fd:N of the `vm`.
    #[arg(value_name = "URI")]
    pub(crate) uri: String,
}

/// Options of `status`.
#[derive(Args, Clone, Debug)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct Status {
    #[command(flatten)]
    pub(crate) target: Target,
    /// Keep showing it until the migration ends.
    #[arg(long)]
    pub(crate) watch: bool,
}

/// Options of `migrate`.
#[derive(Args, Clone, Debug)]
#[command(after_help = UNITS_AND_EXIT_CODES)]
pub(crate) struct Migrate {
    #[command(flatten)]
    pub(crate) target: Target,
    /// Where to: unix:PATH, tcp:HOST:PORT (an IPv6 address in brackets) or fd:N of the `vm`.
    #[arg(value_name = "URI")]
    pub(crate) uri: String,
    /// Longest time the guest may stand still. A ceiling, not a target.
    #[arg(long, default_value = "300ms", value_parser = units::time, value_name = "TIME")]
    pub(crate) downtime_limit: Duration,
    /// Bytes each second at most, while the guest runs.
    #[arg(long, value_parser = units::size, value_name = "SIZE")]
    pub(crate) bandwidth: Option<u64>,
    /// Give up when the guest is still running here after this time.
    #[arg(long, value_parser = units::time, value_name = "TIME")]
    pub(crate) give_up: Option<Duration>,
    /// Stop before the switchover and wait for `continue`; the guest keeps running meanwhile.
    #[arg(long)]
    pub(crate) pause_before_switchover: bool,
    /// Compare digests of all RAM before the guest runs at the destination; the guest stands still meanwhile.
    #[arg(long)]
    pub(crate) verify: bool,
    /// Move even a device that logs no DMA: all of RAM is sent while the guest stands still.
    #[arg(long)]
    pub(crate) allow_all_dirty: bool,
    /// A device that has another name at the destination. May be given more than once.
    #[arg(long, value_name = "NAME=NAME", value_parser = pair)]
    pub(crate) map: Vec<(String, String)>,
    /// Post-copy is not possible for VFIO devices, and refused with the reason.
    #[arg(long, hide = true)]
    pub(crate) post_copy: bool,
    /// Return once the migration has begun.
    #[arg(long)]
    pub(crate) detach: bool,
}

/// Options of `save`.
#[derive(Args, Clone, Debug)]
#[command(
    after_help = "vm --restore FILE brings a guest back, restore --device DEVICE FILE a device.\n\
Exit codes: 0 done, 1 failed, 2 usage, 3 incompatible (also: the device has no migration), 4 ownership unresolved.",
    group = clap::ArgGroup::new("what").args(["control", "device"]).required(true)
)]
pub(crate) struct Save {
    /// Control socket of the `vm` whose guest is saved.
    #[arg(long, value_name = "PATH")]
    pub(crate) control: Option<PathBuf>,
    /// The device that is saved, without a guest: vfio-user:SOCKET, vfio:0000:01:00.0, vfio:/dev/vfio/devices/vfio0 or
    /// mdev:UUID, each with ,id=NAME if it is to have another name than `dev0`.
    #[arg(long, value_name = "DEVICE", conflicts_with_all = ["stop", "verify", "allow_all_dirty"])]
    pub(crate) device: Option<String>,
    /// With --device: read all of its state while it stands, as if it had no PRE_COPY.
    #[arg(long, conflicts_with = "control")]
    pub(crate) stop_copy_only: bool,
    /// File to write. It appears whole or not at all.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: PathBuf,
    /// Replace a file that is there.
    #[arg(long)]
    pub(crate) force: bool,
    /// End the guest here: from then on it lives in the file. Otherwise it goes on.
    #[arg(long)]
    pub(crate) stop: bool,
    /// Write a digest of all RAM too, which the restore compares; the guest stands still meanwhile.
    #[arg(long)]
    pub(crate) verify: bool,
    /// Save even a device that logs no DMA: all of RAM is written while the guest stands still.
    #[arg(long)]
    pub(crate) allow_all_dirty: bool,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of `restore`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "Exit codes: 0 done, 1 failed, 2 usage, 3 the file and the device do not fit.")]
pub(crate) struct Restore {
    /// The device: as for `save --device`. Without an id it takes the name that the file gives it.
    #[arg(long, value_name = "DEVICE")]
    pub(crate) device: String,
    /// What `save --device` wrote.
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// Save it again into this file once it is loaded, before it runs: for a driver that resets its device when it is
    /// closed, there is no later.
    #[arg(long, value_name = "FILE")]
    pub(crate) save_again: Option<PathBuf>,
    /// Leave it in STOP, as it was loaded, instead of letting it run.
    #[arg(long)]
    pub(crate) leave_stopped: bool,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of `set`.
#[derive(Args, Clone, Debug)]
#[command(
    after_help = UNITS_AND_EXIT_CODES,
    group = clap::ArgGroup::new("limits").args(["downtime_limit", "bandwidth"]).required(true).multiple(true)
)]
pub(crate) struct Set {
    #[command(flatten)]
    pub(crate) target: Target,
    /// New limit on the downtime.
    #[arg(long, value_parser = units::time, value_name = "TIME")]
    pub(crate) downtime_limit: Option<Duration>,
    /// New cap on bytes each second; 0 for none.
    #[arg(long, value_parser = units::size, value_name = "SIZE")]
    pub(crate) bandwidth: Option<u64>,
}

/// Options of `devices`.
#[derive(Args, Clone, Debug)]
#[command(
    after_help = "No device of the host is opened without --probe: opening one resets it. Whether a driver has migration \
is then unknown, unless the driver is known to have none. A vfio-user server that is named is connected to, and left as \
it is.\n\
Exit codes: 0 listed, 1 failed, 2 usage."
)]
pub(crate) struct Devices {
    /// Devices of the host to look at alone, by PCI address, mdev UUID or file under /dev/vfio; and sockets of vfio-user
    /// servers to ask.
    #[arg(value_name = "DEVICE|SOCKET")]
    pub(crate) targets: Vec<PathBuf>,
    /// Open each listed device that a VFIO driver has and nobody uses, ask it, and close it. Opening a device resets it;
    /// one that is in use is left alone.
    #[arg(long)]
    pub(crate) probe: bool,
    /// Every PCI function, also one that has nothing to do with VFIO.
    #[arg(long)]
    pub(crate) all: bool,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) root: Root,
}

/// Options of `doctor`.
#[derive(Args, Clone, Debug)]
#[command(
    after_help = "Exit codes: 0 a device of kernel VFIO can migrate in principle, 1 something needed is missing \
(vfio-user alone needs only memfd; see its line), 2 usage."
)]
pub(crate) struct Doctor {
    /// RAM of the guest that is meant: the limit on locked memory must have room for it.
    #[arg(long, value_parser = units::size, value_name = "SIZE")]
    pub(crate) memory: Option<u64>,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) root: Root,
}

/// Which host is looked at.
#[derive(Args, Clone, Debug)]
pub(crate) struct Root {
    /// Folder that has another host's sys, dev, proc, boot and lib/modules, for tests.
    #[arg(long = "root", hide = true, value_name = "DIR")]
    dir: Option<PathBuf>,
}

impl Root {
    /// The host's trees.
    pub(crate) fn roots(&self) -> Roots {
        self.dir.as_deref().map_or_else(Roots::default, Roots::under)
    }
}
