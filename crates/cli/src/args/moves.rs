//! The command line of what moves a guest or a device: `migrate`, `rehearse`, `save`, `restore`, and what steers it.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::bandwidth::Bandwidth;
use crate::incoming_options::IncomingOptions;
use crate::move_options::{FileOptions, MoveOptions, SwitchoverOptions};
use crate::target::{AnswerTimeout, VmTarget};
use crate::units;
use crate::words::{EXIT_CODES, UNITS_AND_EXIT_CODES, socket_path};

/// What Ctrl-C does to a migration that a verb waits for.
const CTRL_C: &str = "Ctrl-C (SIGINT, SIGTERM) cancels the migration, and the guest goes on here, unless it is too late for that; the \
command waits for the end and tells it. A second one ends the command at once, and leaves the migration to the vm. A command that is killed, or that was told \
to --detach, cancels nothing.";

/// What a session takes from its process.
const OF_THE_VM: &str = "What is not said here is as the vm was started: --tls-creds, --tls-pin, --insecure-plaintext. Always its own are --allow-uid and \
--allow-gid, which say whose process may be at the other end of a unix socket, --policy and --config-rule, --uuid and --state-dir.";

/// Options of `incoming`.
#[derive(Args, Clone, Debug)]
#[command(after_help = format!("{OF_THE_VM} So are --memory, and --expect and --once where they are not said here.\n{EXIT_CODES}"))]
pub(crate) struct IncomingCommand {
    #[command(flatten)]
    pub(crate) target: VmTarget,
    /// Where to listen: unix:PATH, tcp:HOST:PORT (an IPv6 address in brackets), fd:N, a socket, connected
    /// or listening, that the `vm` was started with, or fd:NAME, a connected one that was passed to it (getfd).
    #[arg(value_name = "URI")]
    pub(crate) uri: String,
    #[command(flatten)]
    pub(crate) options: IncomingOptions,
}

/// Options of `status`.
#[derive(Args, Clone, Debug)]
#[command(after_help = EXIT_CODES, group = clap::ArgGroup::new("whose").args(["control", "state_dir"]).required(true))]
pub(crate) struct StatusCommand {
    /// Control socket of the `vm`.
    #[arg(long, value_name = "PATH", value_parser = socket_path())]
    pub(crate) control: Option<PathBuf>,
    /// State directory of `vm`s, which need not run: who owns each VM by its journal, and how its last session ended.
    #[arg(long, value_name = "DIR", conflicts_with = "watch")]
    pub(crate) state_dir: Option<PathBuf>,
    /// Keep showing it until the migration ends.
    #[arg(long)]
    pub(crate) watch: bool,
    #[command(flatten)]
    pub(crate) patience: AnswerTimeout,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of `migrate`.
#[derive(Args, Clone, Debug)]
#[command(after_help = format!("{OF_THE_VM}\n{CTRL_C}\n{UNITS_AND_EXIT_CODES}"))]
pub(crate) struct MigrateCommand {
    #[command(flatten)]
    pub(crate) target: VmTarget,
    /// Where to: unix:PATH, tcp:HOST:PORT (an IPv6 address in brackets), fd:N, a
    /// connected socket that the `vm` was started with, or fd:NAME, one that was passed to it (getfd).
    #[arg(value_name = "URI")]
    pub(crate) uri: String,
    #[command(flatten)]
    pub(crate) options: MoveOptions,
    #[command(flatten)]
    pub(crate) switchover: SwitchoverOptions,
    /// Return once the migration has begun.
    #[arg(long)]
    pub(crate) detach: bool,
}

/// Options of `save`.
#[derive(Args, Clone, Debug)]
#[command(
    after_help = "vm --restore FILE brings a guest back, restore --device DEVICE FILE a device. Ctrl-C cancels \
it: a guest goes on here, and no file is left.\n\
Exit codes: 0 done, 1 failed, 2 usage, 3 incompatible (also: the device has no migration), 4 ownership unresolved.",
    group = clap::ArgGroup::new("what").args(["control", "device"]).required(true)
)]
pub(crate) struct SaveCommand {
    /// Control socket of the `vm` whose guest is saved.
    #[arg(long, value_name = "PATH", value_parser = socket_path())]
    pub(crate) control: Option<PathBuf>,
    /// The device that is saved, without a guest: vfio-user:SOCKET, vfio:0000:01:00.0, vfio:/dev/vfio/devices/vfio0 or
    /// mdev:UUID, each with ,id=NAME if it is to have another name than `dev0`, ,pre-copy=off, ,timeout=30s or ,vf-token=UUID as in `vm`.
    #[arg(long, value_name = "DEVICE", conflicts_with_all = ["stop", "verify"])]
    pub(crate) device: Option<String>,
    /// With --device: read all of its state while it is stopped, as if it had no PRE_COPY.
    #[arg(long, conflicts_with = "control")]
    pub(crate) stop_copy_only: bool,
    /// File to write. It appears whole or not at all.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: PathBuf,
    #[command(flatten)]
    pub(crate) options: FileOptions,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of `restore`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "Exit codes: 0 done, 1 failed, 2 usage, 3 the file and the device do not fit.")]
pub(crate) struct RestoreCommand {
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
pub(crate) struct SetCommand {
    #[command(flatten)]
    pub(crate) target: VmTarget,
    /// New limit on the downtime.
    #[arg(long, value_parser = units::some_time, value_name = "TIME")]
    pub(crate) downtime_limit: Option<Duration>,
    /// New cap on bytes each second; none lifts it.
    #[arg(long, value_name = "SIZE|none")]
    pub(crate) bandwidth: Option<Bandwidth>,
}

/// Options of `quit`.
#[derive(Args, Clone, Debug)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct QuitCommand {
    #[command(flatten)]
    pub(crate) target: VmTarget,
    /// End a guest that is here with it. Without this, a `vm` whose guest is here, running or paused, does not quit.
    #[arg(long)]
    pub(crate) force: bool,
}

/// Options of `rehearse`.
#[derive(Args, Clone, Debug)]
#[command(
    after_help = format!("Everything up to the switchover is done for real, and undone: nothing moves, and the guest does not \
notice, but with --pause, where it is paused for as long as it would be. Ctrl-C cancels it.\n{OF_THE_VM}\nSizes take K, M, G (powers of two); times take us, \
ms, s.\nExit codes: 0 it would move, 1 failed, 2 usage, 3 it would not.")
)]
pub(crate) struct RehearseCommand {
    #[command(flatten)]
    pub(crate) target: VmTarget,
    /// Where to: unix:PATH, tcp:HOST:PORT (an IPv6 address in brackets), fd:N, a
    /// connected socket that the `vm` was started with, or fd:NAME, one that was passed to it (getfd).
    #[arg(long, value_name = "URI")]
    pub(crate) to: String,
    /// Pause the guest too, for as long as it would be paused, so that all of it is measured.
    #[arg(long)]
    pub(crate) pause: bool,
    #[command(flatten)]
    pub(crate) options: MoveOptions,
}
