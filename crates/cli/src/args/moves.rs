//! The command line of what moves a guest or a device: `migrate`, `rehearse`, `save`, `restore`, and what steers it.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::target::Target;
use crate::units;
use crate::words::{EXIT_CODES, UNITS_AND_EXIT_CODES, pair};

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

/// Options of `rehearse`.
#[derive(Args, Clone, Debug)]
#[command(
    after_help = "Everything up to the switchover is done for real, and undone: nothing moves, and the guest does not \
notice, but with --pause, where it stands for as long as it would.\nSizes take K, M, G (powers of two); times take us, \
ms, s.\nExit codes: 0 it would move, 1 failed, 2 usage, 3 it would not."
)]
pub(crate) struct Rehearse {
    #[command(flatten)]
    pub(crate) target: Target,
    /// Where to: unix:PATH, tcp:HOST:PORT (an IPv6 address in brackets) or fd:N of the `vm`.
    #[arg(long, value_name = "URI")]
    pub(crate) to: String,
    /// Let the guest stand too, for as long as it would, so that all of it is measured.
    #[arg(long)]
    pub(crate) pause: bool,
    /// Longest time the guest may stand still.
    #[arg(long, default_value = "300ms", value_parser = units::time, value_name = "TIME")]
    pub(crate) downtime_limit: Duration,
    /// Bytes each second at most.
    #[arg(long, value_parser = units::size, value_name = "SIZE")]
    pub(crate) bandwidth: Option<u64>,
    /// End after this time, whatever has been found.
    #[arg(long, value_parser = units::time, value_name = "TIME")]
    pub(crate) give_up: Option<Duration>,
    /// A device that has another name at the destination. May be given more than once.
    #[arg(long, value_name = "NAME=NAME", value_parser = pair)]
    pub(crate) map: Vec<(String, String)>,
    /// As `migrate` takes it.
    #[arg(long)]
    pub(crate) allow_all_dirty: bool,
}
