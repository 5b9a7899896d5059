//! The command line: the verbs, and which options each of them takes.

pub(crate) mod ask;
#[cfg(test)]
mod documented;
pub(crate) mod moves;
pub(crate) mod serve;
pub(crate) mod tls;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use self::ask::{
    CheckCommand, DescribeCommand, DevicesCommand, DoctorCommand, ExplainCommand, HistoryCommand,
};
use self::moves::{
    IncomingCommand, MigrateCommand, QuitCommand, RehearseCommand, RestoreCommand, SaveCommand, SetCommand,
    StatusCommand,
};
use self::serve::{DemoCommand, DeviceCommand, VmCommand};
use self::tls::TlsCommand;
use crate::target::VmTarget;
use crate::words::EXIT_CODES;

const FILE_EXIT_CODES: &str = "Exit codes: 0 done, 1 it cannot be written, 2 usage.";

/// Live migration for guests that own VFIO devices.
#[derive(Debug, Parser)]
#[command(name = "vfio-migrate", version, propagate_version = true, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    /// Say more on stderr; twice for everything. RUST_LOG works too.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
    #[command(subcommand)]
    pub(crate) verb: CliVerb,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum CliVerb {
    /// Show it: a running guest and its PCI devices move live between processes, and the guest checks that nothing was lost.
    Demo(DemoCommand),
    /// Serve a sample PCI device over vfio-user.
    Device(DeviceCommand),
    /// Run a guest, or wait for one to arrive.
    Vm(VmCommand),
    /// Ask a running `vm` to move to another.
    Migrate(MigrateCommand),
    /// Find out what a migration of a running `vm` would come to, without moving anything.
    Rehearse(RehearseCommand),
    /// Say what a device, a `vm` or this host is, as a manifest that `check` compares.
    Describe(DescribeCommand),
    /// Ask whether something can move, and get every reason why not.
    Check(CheckCommand),
    /// Say what a reason's code means, and what to do about it.
    Explain(ExplainCommand),
    /// Save the guest of a running `vm`, or a device alone, into a file.
    Save(SaveCommand),
    /// Load what `save --device` wrote into a device. For a whole guest: `vm --restore`.
    Restore(RestoreCommand),
    /// Show a `vm` and its migration, or the VMs of a state directory.
    Status(StatusCommand),
    /// List the migrations, rehearsals, saves and restores that a state directory has seen, without any `vm`.
    History(HistoryCommand),
    /// Cancel the migration of a running `vm`: its guest goes on where it is. A receiver (`vm --incoming`, `incoming`) that waits, or has a
    /// guest half way, takes none any more until `incoming` lets it wait again; the guest goes on at its source.
    Cancel(VmTarget),
    /// Let a migration go on that waits before its switchover.
    Continue(VmTarget),
    /// Change the limits of a migration while it runs.
    Set(SetCommand),
    /// Pause the guest of a running `vm`.
    Stop(VmTarget),
    /// Let the guest of a running `vm` run: also one that a session left paused, which is started again, or whose owner is not known, which
    /// the destination is asked for again.
    Cont(VmTarget),
    /// End a `vm`; with --force also one whose guest is there, and ends with it.
    Quit(QuitCommand),
    /// Let a running `vm`, whose guest has left, wait for a guest again.
    Incoming(IncomingCommand),
    /// List the VFIO devices of this host, and why each can or cannot migrate.
    Devices(DevicesCommand),
    /// Examine this host: what it lacks for migrating VFIO devices, and what fixes it.
    Doctor(DoctorCommand),
    /// Make certificates for hosts that have none, and say what those that are there are worth.
    Tls(TlsCommand),
    /// Print a shell completion script.
    #[command(after_help = FILE_EXIT_CODES)]
    Completions {
        /// For which shell.
        shell: clap_complete::Shell,
    },
    /// Write the man pages of all verbs into a folder.
    #[command(after_help = FILE_EXIT_CODES)]
    Man {
        /// The folder, for example ~/.local/share/man/man1. It is made if it is not there.
        #[arg(value_name = "DIR")]
        dir: PathBuf,
    },
    /// Write the man pages, completions and JSON schemas that are checked in.
    #[command(hide = true)]
    Generate {
        /// Top of the tree to write into.
        dir: PathBuf,
    },
}

impl CliVerb {
    /// Whether a program reads the answer. The demo has a report for failures too, and is not asked here.
    pub(crate) fn json(&self) -> bool {
        match self {
            Self::Migrate(MigrateCommand { target, .. })
            | Self::Set(SetCommand { target, .. })
            | Self::Incoming(IncomingCommand { target, .. })
            | Self::Rehearse(RehearseCommand { target, .. })
            | Self::Quit(QuitCommand { target, .. })
            | Self::Cancel(target)
            | Self::Continue(target)
            | Self::Stop(target)
            | Self::Cont(target) => target.json,
            Self::Status(options) => options.json,
            Self::History(options) => options.json,
            Self::Save(options) => options.json,
            Self::Restore(options) => options.json,
            Self::Devices(options) => options.json,
            Self::Doctor(options) => options.json,
            Self::Describe(options) => options.json,
            Self::Check(options) => options.json,
            Self::Explain(options) => options.json,
            Self::Tls(options) => options.json(),
            Self::Demo(_)
            | Self::Device(_)
            | Self::Vm(_)
            | Self::Completions { .. }
            | Self::Man { .. }
            | Self::Generate { .. } => false,
        }
    }
}
