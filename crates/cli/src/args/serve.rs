//! The command line of what runs on after it was started: `demo`, `device`, `vm`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use vfio_migration_types::{DEVICES_MAX, VmId};

use crate::peer_options::PeerOptions;
use crate::tls_options::{LAYOUT, TlsOptions};
use crate::units;
use crate::words::{UNITS_AND_EXIT_CODES, pair, socket_path, vm_id};

/// Options of `demo`.
#[derive(Args, Clone, Debug)]
#[command(
    after_help = "The source VM, the destination VM and every device server run as processes of their own on this \
host. Sizes take K, M, G (powers of two); times take us, ms, s.\nExit codes: 0 verified, 1 not, 2 usage, 3 incompatible, \
4 ownership unresolved, 5 moved but not running there."
)]
pub(crate) struct DemoCommand {
    /// Guest RAM.
    #[arg(long, default_value = "512M", value_parser = units::size, value_name = "SIZE")]
    pub(crate) memory: u64,
    /// RAM that the guest dirties each second; 0 for none.
    #[arg(long, default_value = "50M", value_parser = units::size, value_name = "SIZE")]
    pub(crate) dirty_rate: u64,
    /// Internal state of each device, besides its registers.
    #[arg(long, default_value = "64M", value_parser = units::size, value_name = "SIZE")]
    pub(crate) device_state: u64,
    /// Internal state that each device changes each second; 0 for none.
    #[arg(long, default_value = "1M", value_parser = units::size, value_name = "SIZE")]
    pub(crate) device_dirty_rate: u64,
    /// Number of devices, up to 64. Each has a server on either side, with memory for its state.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=i64::from(DEVICES_MAX)), value_name = "N")]
    pub(crate) devices: u8,
    /// How the two VMs talk.
    #[arg(long, default_value = "tcp", value_enum)]
    pub(crate) transport: DemoTransport,
    /// Longest time the guest may be paused. A ceiling, not a target. 300ms for up to 8 devices, and as much again for each 8 more.
    #[arg(long, value_parser = units::some_time, value_name = "TIME")]
    pub(crate) downtime_limit: Option<Duration>,
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
pub(crate) enum DemoTransport {
    /// TCP on loopback.
    Tcp,
    /// A unix socket.
    Unix,
}

impl DemoTransport {
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
pub(crate) struct DeviceCommand {
    /// Where to listen.
    #[arg(long, value_name = "PATH", value_parser = socket_path())]
    pub(crate) socket: PathBuf,
    /// Internal state, besides its registers.
    #[arg(long, default_value = "64M", value_parser = units::size, value_name = "SIZE")]
    pub(crate) state_size: u64,
    /// Internal state changed each second; 0 for none.
    #[arg(long, default_value = "1M", value_parser = units::size, value_name = "SIZE")]
    pub(crate) state_dirty_rate: u64,
    /// Pace of the DMA engine: one descriptor each.
    #[arg(long, default_value = "500us", value_parser = units::some_time, value_name = "TIME")]
    pub(crate) dma_interval: Duration,
    /// No migration at all.
    #[arg(long)]
    pub(crate) no_migration: bool,
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
    /// A further field of its manifest, JSON or text: said, and nothing else. May be given more than once.
    #[arg(long = "field", value_name = "NAME=JSON", value_parser = pair)]
    pub(crate) fields: Vec<(String, String)>,
    /// A byte of config space that it has otherwise than other sample devices: 0x8=2 is another PCI revision. May be given more than
    /// once.
    #[arg(long, value_name = "OFFSET=VALUE")]
    pub(crate) config_byte: Vec<String>,
    /// Misbehave on purpose; may be given more than once. All are listed below.
    #[arg(long, value_name = "FAULT")]
    pub(crate) fault: Vec<String>,
    /// Leave when stdin reaches its end.
    #[arg(long, hide = true)]
    pub(crate) exit_with_stdin: bool,
}

/// Options of `vm`.
#[derive(Args, Clone, Debug)]
#[command(after_help = format!("{LAYOUT}\n{UNITS_AND_EXIT_CODES}"))]
pub(crate) struct VmCommand {
    /// Guest RAM. A guest that arrives or is restored brings its size with it, unless this says another; one that is started has
    /// 512M.
    #[arg(long, value_parser = units::size, value_name = "SIZE")]
    pub(crate) memory: Option<u64>,
    /// A device: vfio-user:SOCKET,id=NAME, vfio:0000:01:00.0,id=NAME, vfio:/dev/vfio/devices/vfio0,id=NAME or
    /// mdev:UUID,id=NAME. Behind it: slot=N, its slot on the guest's PCI bus, 1 to 31 (else the first that is free; to be the same
    /// on both sides); pre-copy=off, for a device whose PRE_COPY is broken; timeout=30s, the longest wait for a vfio-user device to change its
    /// migration state; vf-token=UUID, for a virtual function that has
    /// one (vfio by address). May be given up to 64 times.
    #[arg(long, value_name = "DEVICE")]
    pub(crate) device: Vec<String>,
    /// Wait for a guest to arrive at this address instead of starting one: unix:PATH, tcp:HOST:PORT or fd:N,
    /// a socket, connected or listening, that this process is started with.
    #[arg(long, value_name = "URI")]
    pub(crate) incoming: Option<String>,
    /// With --incoming: wait for one migration only, and no longer if it fails or is refused.
    #[arg(long, requires = "incoming")]
    pub(crate) once: bool,
    /// Bring back the guest that `save` wrote into this file, instead of starting one.
    #[arg(long, value_name = "FILE", conflicts_with = "incoming")]
    pub(crate) restore: Option<PathBuf>,
    /// Control socket: for the user that this process runs as, and root.
    #[arg(long, value_name = "PATH", value_parser = socket_path())]
    pub(crate) control: Option<PathBuf>,
    /// Group, by name or number, whose members may use the control socket too.
    #[arg(long, value_name = "GROUP", requires = "control")]
    pub(crate) control_group: Option<String>,
    /// Group, by name or number, whose members may ask over the control socket and get its events, and no more: for monitors.
    #[arg(long, value_name = "GROUP", requires = "control")]
    pub(crate) control_read_group: Option<String>,
    /// Identity of the VM. Without it a guest that starts gets a random one, and a guest that arrives keeps its own.
    #[arg(long, value_name = "UUID", value_parser = vm_id)]
    pub(crate) uuid: Option<VmId>,
    /// Where the ownership journal lives. Without it a lost commit cannot be told from a lost answer after a crash.
    #[arg(long, value_name = "DIR")]
    pub(crate) state_dir: Option<PathBuf>,
    /// RAM that the guest dirties each second; 0 for none.
    #[arg(long, default_value = "50M", value_parser = units::size, value_name = "SIZE")]
    pub(crate) dirty_rate: u64,
    /// Start the guest paused, also one that is restored or that --incoming waits for: `cont` lets it run. Not one that `incoming`
    /// waits for later.
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
    /// File (TOML or JSON) that says who may come to a VM that waits, for what, with which VM, from which epoch on, how large and how
    /// often. It is read anew for each source that comes; while it is missing or wrong, nobody is taken.
    #[arg(long, value_name = "FILE")]
    pub(crate) expect: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) tls: TlsOptions,
    #[command(flatten)]
    pub(crate) peers: PeerOptions,
    /// Bytes of config space to compare or not, over the default and the policy's rules: OFFSET+LEN=compare|ignore. `check`, `rehearse` and
    /// `migrate` go by them alike. May be given more than once.
    #[arg(long, value_name = "RULE")]
    pub(crate) config_rule: Vec<String>,
    /// Sabotage, for the demo.
    #[arg(long, hide = true, value_enum)]
    pub(crate) sabotage: Option<Break>,
    /// Leave when stdin reaches its end.
    #[arg(long, hide = true)]
    pub(crate) exit_with_stdin: bool,
}
