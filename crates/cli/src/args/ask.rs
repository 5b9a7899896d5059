//! The command line of what asks whether something can move: `describe`, `check`, `explain`, `history`,
//! `devices`, `doctor`.

use std::num::NonZeroU64;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use vfio_migration::Pin;
use vfio_migration_types::VmId;

use crate::peer_options::PeerOptions;
use crate::target::AnswerTimeout;
use crate::tls_options::TlsOptions;
use crate::units;
use crate::words::{HostRoot, pair};

const SIDES: &str = "A side is a file (a manifest of `describe`, or a list of KEY=VALUE), the socket of a vfio-user server, \
vm:SOCKET for the control socket of a running `vm`, vfio:ADDRESS or mdev:UUID for a device of this host, or, as DST, the \
address that a `vm` waits for a guest at: tcp:HOST:PORT or unix:PATH.\n\
Exit codes: 0 it can move, live or by a snapshot as the verdict says, 1 failed, 2 usage, 3 the verdict is no or, with --live, \
snapshot-only: what `rehearse` and `migrate` exit with for the same reasons.";

/// Options of `describe`.
#[derive(Args, Clone, Debug)]
#[command(
    after_help = "Without --probe no device of this host is opened, since that resets it: what only an open device tells is \
null. A vfio-user server is connected to, and left as it is.\n\
With --host the kernel's devices are listed anyway; name what this host has besides: the sockets of vfio-user servers that no \
`vm` uses, and vm:SOCKET of running VMs for the vfio-user devices that these use.\nExit codes: 0 described, 1 failed, 2 usage.",
    group = clap::ArgGroup::new("what").args(["devices", "host"]).required(true).multiple(true)
)]
pub(crate) struct DescribeCommand {
    /// The socket of a vfio-user server, vm:SOCKET for a running `vm`, vfio:ADDRESS, mdev:UUID, or a manifest's file.
    #[arg(value_name = "DEVICE")]
    pub(crate) devices: Vec<String>,
    /// This host: what it has and can give, with the vfio-user devices that are named.
    #[arg(long)]
    pub(crate) host: bool,
    /// Open devices of this host that a VFIO driver has and nobody uses, which resets them, and ask them.
    #[arg(long)]
    pub(crate) probe: bool,
    /// Name to give it.
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// File (TOML) that says what cannot be read: fields of the manifest, by device.
    #[arg(long, value_name = "FILE")]
    pub(crate) site: Option<PathBuf>,
    /// How to write it.
    #[arg(long, value_enum, default_value = "manifest")]
    pub(crate) format: Format,
    /// File to write, instead of stdout. It appears whole or not at all. A regular file that is there, or that a symbolic link
    /// there leads to, is replaced.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    /// Print JSON. A manifest is JSON anyway.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) patience: AnswerTimeout,
    #[command(flatten)]
    pub(crate) root: HostRoot,
}

/// How `describe` writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// The manifest, JSON.
    Manifest,
    /// Kubernetes node labels, JSON.
    NodeLabels,
    /// Attributes of Kubernetes resources, JSON.
    ResourceAttributes,
    /// Lines of KEY=VALUE.
    List,
}

/// Options of `check`.
#[derive(Args, Clone, Debug)]
#[command(after_help = SIDES)]
pub(crate) struct CheckCommand {
    /// Two sides: what is to move, and where to. With --matrix or --baseline: a pool, as manifests of hosts and machines, folders
    /// of them, or vm:SOCKET.
    #[arg(value_name = "SRC DST", required = true, num_args = 1..)]
    pub(crate) sides: Vec<String>,
    /// Which devices of which hosts can go to which hosts; where machines are named, which machine to which host, or without a host
    /// to which machine. Whatever it says, the exit code is 0.
    #[arg(long, conflicts_with_all = ["baseline", "map"])]
    pub(crate) matrix: bool,
    /// The newest version of each model, and the values of its parameters, that every host and machine of the pool can load.
    #[arg(long, conflicts_with = "map")]
    pub(crate) baseline: bool,
    /// With --baseline: of this model alone.
    #[arg(long, value_name = "MODEL", requires = "baseline")]
    pub(crate) model: Option<String>,
    /// File (TOML or JSON) that says what this site allows and asks for.
    #[arg(long, value_name = "FILE")]
    pub(crate) policy: Option<PathBuf>,
    /// A device that has another name at the destination. May be given more than once.
    #[arg(long, value_name = "NAME=NAME", value_parser = pair)]
    pub(crate) map: Vec<(String, String)>,
    /// Open devices of this host that are named, if nobody uses them, which resets them, and ask them.
    #[arg(long, conflicts_with_all = ["matrix", "baseline"])]
    pub(crate) probe: bool,
    #[command(flatten)]
    pub(crate) tls: TlsOptions,
    #[command(flatten)]
    pub(crate) peers: PeerOptions,
    /// With --tls-creds: name that the receiver's certificate must have, where it is not the host in its address.
    #[arg(long, value_name = "NAME", requires = "tls_creds")]
    pub(crate) tls_hostname: Option<String>,
    /// Whether it can move live: exit with 3 for what can only be saved and restored, too.
    #[arg(long, conflicts_with_all = ["matrix", "baseline"])]
    pub(crate) live: bool,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) patience: AnswerTimeout,
    #[command(flatten)]
    pub(crate) root: HostRoot,
}

/// Options of `explain`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "Exit codes: 0 explained, 1 there is no such code, 2 usage.")]
pub(crate) struct ExplainCommand {
    /// Code of a reason. Without it: all of them.
    #[arg(value_name = "CODE")]
    pub(crate) code: Option<String>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of `devices`.
#[derive(Args, Clone, Debug)]
#[command(
    after_help = "No device of the host is opened without --probe: opening one resets it. Whether a driver has migration \
is then unknown, unless the driver is known to have none. A vfio-user server that is named is connected to, and left as \
it is.\n\
Exit codes: 0 listed, 1 failed, 2 usage."
)]
pub(crate) struct DevicesCommand {
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
    pub(crate) patience: AnswerTimeout,
    #[command(flatten)]
    pub(crate) root: HostRoot,
}

/// Options of `history`.
#[derive(Args, Clone, Debug)]
#[command(
    after_help = "The records are lines of JSON in DIR/history.jsonl, and in DIR/history.jsonl.1 those before the file had 1 \
MiB.\nExit codes: 0 listed, 1 failed, 2 usage."
)]
pub(crate) struct HistoryCommand {
    /// State directory of the `vm`s.
    #[arg(long, value_name = "DIR")]
    pub(crate) state_dir: PathBuf,
    /// Only sessions of this VM.
    #[arg(long, value_name = "UUID")]
    pub(crate) vm: Option<VmId>,
    /// Only the last N.
    #[arg(long, value_name = "N")]
    pub(crate) last: Option<usize>,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of `doctor`.
#[derive(Args, Clone, Debug)]
#[command(
    after_help = "Exit codes: 0 a device of kernel VFIO can migrate in principle, 1 something needed is missing \
(vfio-user alone needs only memfd; see its line), 2 usage."
)]
pub(crate) struct DoctorCommand {
    /// RAM of the guest that is meant: the limit on locked memory must have room for it.
    #[arg(long, value_parser = units::some_size, value_name = "SIZE")]
    pub(crate) memory: Option<NonZeroU64>,
    /// Folder of certificates that is meant, as `vm` takes it: whether they can be used, and until when.
    #[arg(long, value_name = "DIR")]
    pub(crate) tls_creds: Option<PathBuf>,
    /// With --tls-creds: the keys that are trusted and no CA, as `vm` takes them. May be given more than once.
    #[arg(long = "tls-pin", value_name = "PIN", requires = "tls_creds")]
    pub(crate) tls_pins: Vec<Pin>,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) root: HostRoot,
}
