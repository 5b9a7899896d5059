//! Restoring: a destination runs against a player.

use std::fs::File;
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vfio_migration_compat::{DeviceManifest, MachineManifest, Reason, SessionCode};
use vfio_migration_engine::ownership::SourceState;
use vfio_migration_types::{AttemptId, Epoch, Failure, Phase, Side, VmId, error_chain};

use super::check::{Checked, check};
use super::file::{Frames, failed};
use super::file::{HEAD_LEN, TRAILER_LEN};
use super::play::play;
use super::{DeviceState, SnapshotError, states};
use crate::channel::credit::Credit;
use crate::channel::link::Link;
use crate::channel::liveness::keep_alive_until;
use crate::channel::transport::Socket;
use crate::destination::Destination;
use crate::device_file::KIND;
use crate::error::IncomingError;
use crate::incoming_machine::IncomingMachine;
use crate::offer::{Arrived, IncomingOffer, NotBuilt};
use crate::options::DestinationOptions;
use crate::ownership::journal::read_journal;
use crate::ownership::status::{VmOwnership, ownership_at};
use crate::regular_file;
use crate::session::fail::InPhase;
use crate::session::threads::{no_thread, set_up, spawn};

/// A file that was found to be a whole, sound snapshot.
#[derive(Debug)]
pub struct Snapshot {
    file: File,
    path: PathBuf,
    checked: Checked,
}

impl Snapshot {
    /// Opens a file and checks all of it: digest, frames, order, totals. Nothing is given to anybody yet.
    ///
    /// # Errors
    /// It is no regular file, no snapshot, damaged, cut short, too long, or of a later layout.
    pub fn open(path: &Path) -> Result<Self, SnapshotError> {
        let file = regular_file::open_regular(path)?;
        let checked = check(&file, path)?;
        Ok(Self { file, path: path.into(), checked })
    }

    /// The VM that it is of.
    pub fn vm(&self) -> VmId {
        self.checked.hello.vm
    }

    /// The attempt that saved it.
    pub fn attempt(&self) -> AttemptId {
        self.checked.hello.attempt
    }

    /// The epoch under which the VM was saved.
    pub fn epoch(&self) -> Epoch {
        self.checked.hello.epoch
    }

    /// The manifest of the machine that was saved.
    pub fn manifest(&self) -> &MachineManifest {
        &self.checked.manifest
    }

    /// Whether the guest ran when it was saved, and will when it is restored.
    pub fn guest_ran(&self) -> bool {
        self.checked.guest_ran
    }

    /// The device, if the file is of a device alone ([`save_device`](crate::save_device)) and of no VM.
    pub fn device(&self) -> Option<&DeviceManifest> {
        match self.checked.manifest.devices.as_slice() {
            [device] if self.checked.manifest.machine == KIND => Some(device),
            _ => None,
        }
    }

    /// Path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the file.
    pub fn bytes(&self) -> u64 {
        HEAD_LEN + self.checked.frames + TRAILER_LEN
    }

    /// BLAKE3 digest of the file without its last 32 bytes, which are it.
    pub fn digest(&self) -> [u8; 32] {
        self.checked.digest
    }

    /// The state of each device, in the manifest's order.
    pub fn device_states(&self) -> Vec<DeviceState> {
        states(&self.checked.totals.devices)
    }

    /// Bytes of state of each device, in the manifest's order.
    pub fn device_bytes(&self) -> Vec<u64> {
        self.checked.totals.devices.iter().map(|total| total.bytes).collect()
    }

    /// Restores it into the machine that `build` gives, as [`Destination::accept`] takes in a guest: the same rules of what
    /// fits, the same order of loading, and an epoch that moves on. With a state directory, a VM that belongs elsewhere by
    /// its journal is refused, and so is a snapshot that was restored before; one that the guest was moved into
    /// ([`SaveOptions::stop`](super::SaveOptions)) brings it back.
    ///
    /// # Errors
    /// As those of [`Destination::accept`].
    pub fn restore<M: IncomingMachine + 'static>(
        self,
        options: DestinationOptions,
        build: impl FnOnce(&IncomingOffer) -> Result<M, NotBuilt> + Send,
    ) -> Result<Arrived, IncomingError> {
        let _threads = set_up(options.thread_setup.as_ref());
        self.check_owner(&options)?;
        let not_begun = |error: SnapshotError| {
            IncomingError::NotBegun(Failure::new(Side::Destination, Phase::Hello, error_chain(&error)))
        };
        let (here, there) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .map_err(|errno| not_begun(failed("making a socket for", &self.path)(errno.into())))?;
        let frames = Frames::new(self.file, &self.path, self.checked.frames).map_err(not_begun)?;
        let credits: Vec<Credit> = self.checked.manifest.devices.iter().map(|_| Credit::default()).collect();
        let options = DestinationOptions { from_file: Some(self.path.clone()), ..options };
        let mut destination = Destination::over(here, options)?;
        let link = Link::new(Box::new(Socket::new(there))).map_err(|error| {
            IncomingError::NotBegun(Failure::new(Side::Destination, Phase::Hello, error_chain(&error)))
        })?;
        std::thread::scope(|scope| {
            let (done, waits) = std::sync::mpsc::channel();
            let (link, checked, credits) = (&link, &self.checked, credits.as_slice());
            let playing = spawn(scope, "player", move || {
                play(link, frames, checked, credits);
                drop(done);
            });
            let alive = spawn(scope, "keep-alive", move || keep_alive_until(link, &waits));
            if let Err(error) = playing.and(alive) {
                link.shutdown();
                let failure = no_thread(Side::Destination, Phase::Hello, "reading of the file", &error);
                return Err(IncomingError::NotBegun(failure));
            }
            let arrived = destination.accept(build);
            // Whatever the player waits for, nobody sends it any more.
            link.shutdown();
            arrived
        })
    }

    /// As for a start: not while a commit is undecided, nor once the guest belongs to somebody else.
    fn check_owner(&self, options: &DestinationOptions) -> Result<(), IncomingError> {
        let Some(dir) = &options.state_dir else { return Ok(()) };
        let vm = self.vm();
        let refuse =
            |text: String| Err(IncomingError::Refused(vec![Reason::new(SessionCode::Ownership, text)]));
        let unreadable = |error: crate::ownership::journal::JournalError| {
            IncomingError::NotBegun(error.in_phase(Side::Destination, Phase::Hello))
        };
        match ownership_at(dir, vm).map_err(unreadable)? {
            VmOwnership::Unknown | VmOwnership::Ours(_) => Ok(()),
            VmOwnership::Elsewhere { epoch, peer } => {
                let journal = read_journal(dir, vm).map_err(unreadable)?;
                let into_this_file = journal.and_then(|journal| journal.source).is_some_and(|source| {
                    source.state == SourceState::Released && source.attempt == self.checked.hello.attempt
                });
                if into_this_file {
                    return Ok(());
                }
                if peer.starts_with("file:") {
                    return refuse(format!(
                        "VM {vm} was saved into {peer} (epoch {}): what was saved before is not started here",
                        epoch.0
                    ));
                }
                refuse(format!(
                    "VM {vm} belongs to another host (epoch {}, {peer}): what was saved before it moved is not started here",
                    epoch.0
                ))
            }
            VmOwnership::Undecided { epoch, peer } => refuse(format!(
                "the commit of VM {vm} to {peer} (epoch {}) is undecided: it may run there",
                epoch.0
            )),
        }
    }
}
