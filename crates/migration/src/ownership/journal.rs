//! The journal, ownership on disk: one file per VM, written before the message that it covers.
//!
//! A record is written to a temporary file, synced, renamed over the old one, and the directory synced: after a crash
//! the file holds the old record or the new one. A process that restarts has lost its guest's RAM; from the journal it
//! learns what it was, and can report that to whoever asks.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use vfio_migration_engine::ownership::{DestinationRecord, KnownEpochs, SourceRecord};
use vfio_migration_types::{Epoch, VmId};

use crate::session::lock::lock;

/// A journal file: the records of one VM on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JournalFile {
    /// Layout of this file: 1.
    pub version: u32,
    /// The VM whose records they are.
    pub vm: VmId,
    /// The latest attempt to send it away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<SourceRecord>,
    /// The latest attempt to take it in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination: Option<DestinationRecord>,
}

/// The journal could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// A file operation failed.
    #[error("{doing} {path} failed")]
    File {
        /// The file operation that failed, as a verb.
        doing: &'static str,
        /// The file that it failed on.
        path: PathBuf,
        /// The system's error, with its errno.
        #[source]
        source: std::io::Error,
    },
    /// The file is not a journal.
    #[error("{path} is no journal of this version; move it away if you know who owns the VM")]
    Content {
        /// The file that cannot be read.
        path: PathBuf,
        /// The parser's error, with its place.
        #[source]
        source: serde_json::Error,
    },
    /// Another session of the same VM runs.
    #[error("another migration of VM {vm} is under way here")]
    Busy {
        /// The VM that is busy.
        vm: VmId,
    },
}

/// A host's two records of a VM, of which a session writes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum JournalSide {
    Source,
    Destination,
}

/// A journal of one VM, open for one session of one side. While it is open no other session can open it.
#[derive(Debug)]
pub(crate) struct Journal {
    vm: VmId,
    place: JournalPlace,
}

#[derive(Debug)]
enum JournalPlace {
    Memory(Mutex<JournalFile>),
    Directory {
        dir: PathBuf,
        /// Held for the session; the kernel releases it when the process dies.
        _session: File,
    },
}

/// Reads the records of a VM in a state directory; `None` when it has none.
pub fn read_journal(dir: &Path, vm: VmId) -> Result<Option<JournalFile>, JournalError> {
    let path = dir.join(format!("{vm}.json"));
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(JournalError::File { doing: "reading", path, source }),
    };
    match serde_json::from_slice::<JournalFile>(&text) {
        Ok(file) if file.version == 1 && file.vm == vm => Ok(Some(file)),
        Ok(_) => {
            let source = serde::de::Error::custom("another version, or another VM's file");
            Err(JournalError::Content { path, source })
        }
        Err(source) => Err(JournalError::Content { path, source }),
    }
}

impl Journal {
    /// Opens the journal of `vm` in `dir`, which is made if it is not there, or one in memory alone.
    pub(crate) fn open(dir: Option<&Path>, vm: VmId, side: JournalSide) -> Result<Self, JournalError> {
        let Some(dir) = dir else {
            return Ok(Self { vm, place: JournalPlace::Memory(Mutex::new(JournalFile::empty(vm))) });
        };
        std::fs::create_dir_all(dir).map_err(failed("making", dir))?;
        let name = match side {
            JournalSide::Source => format!("{vm}.source.lock"),
            JournalSide::Destination => format!("{vm}.destination.lock"),
        };
        let session = open_lock(&dir.join(name))?;
        match flock(&session, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(JournalError::Busy { vm }),
            Err(errno) => return Err(failed("locking", dir)(errno.into())),
        }
        Ok(Self { vm, place: JournalPlace::Directory { dir: dir.to_owned(), _session: session } })
    }

    /// The file's content now.
    pub(crate) fn read(&self) -> Result<JournalFile, JournalError> {
        match &self.place {
            JournalPlace::Memory(file) => Ok(lock(file).clone()),
            JournalPlace::Directory { dir, .. } => {
                Ok(read_journal(dir, self.vm)?.unwrap_or_else(|| JournalFile::empty(self.vm)))
            }
        }
    }

    /// Writes the source's record. On return it is on disk.
    pub(crate) fn write_source(&self, record: SourceRecord) -> Result<(), JournalError> {
        self.change(|file| file.source = Some(record))
    }

    /// Writes the destination's record. On return it is on disk.
    pub(crate) fn write_destination(&self, record: DestinationRecord) -> Result<(), JournalError> {
        self.change(|file| file.destination = Some(record))
    }

    fn change(&self, change: impl FnOnce(&mut JournalFile)) -> Result<(), JournalError> {
        match &self.place {
            JournalPlace::Memory(file) => change(&mut lock(file)),
            JournalPlace::Directory { dir, .. } => {
                // Both sides of one VM may keep their journals here: each change reads, changes and writes alone.
                let path = dir.join(format!("{}.lock", self.vm));
                let alone = open_lock(&path)?;
                flock(&alone, FlockOperation::LockExclusive)
                    .map_err(|errno| failed("locking", &path)(errno.into()))?;
                let mut file = self.read()?;
                change(&mut file);
                replace(dir, &file)?;
            }
        }
        Ok(())
    }
}

impl JournalFile {
    fn empty(vm: VmId) -> Self {
        Self { version: 1, vm, source: None, destination: None }
    }

    /// Epochs of the VM, as far as this host's records know.
    pub fn epochs(&self) -> KnownEpochs {
        KnownEpochs::of(self.source.as_ref(), self.destination.as_ref())
    }

    /// The epoch under which this host owns the VM, as far as the journal knows.
    pub fn owned_epoch(&self) -> Option<Epoch> {
        self.epochs().owned
    }
}

fn replace(dir: &Path, file: &JournalFile) -> Result<(), JournalError> {
    let path = dir.join(format!("{}.json", file.vm));
    let temporary = dir.join(format!("{}.json.tmp", file.vm));
    let text = serde_json::to_vec_pretty(file)
        .map_err(|source| JournalError::Content { path: path.clone(), source })?;
    let mut out = File::create(&temporary).map_err(failed("creating", &temporary))?;
    out.write_all(&text).map_err(failed("writing", &temporary))?;
    out.sync_all().map_err(failed("syncing", &temporary))?;
    std::fs::rename(&temporary, &path).map_err(failed("replacing", &path))?;
    let directory = File::open(dir).map_err(failed("opening", dir))?;
    directory.sync_all().map_err(failed("syncing", dir))
}

fn open_lock(path: &Path) -> Result<File, JournalError> {
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).write(true).open(path).map_err(failed("opening", path))
}

fn failed<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(std::io::Error) -> JournalError + 'a {
    move |source| JournalError::File { doing, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use vfio_migration_engine::ownership::{DestinationState, SourceState};
    use vfio_migration_types::AttemptId;

    use super::*;

    const VM: VmId = VmId([7; 16]);

    fn source_record(state: SourceState, epoch: u64) -> SourceRecord {
        SourceRecord {
            vm: VM,
            attempt: AttemptId([9; 16]),
            epoch: Epoch(epoch),
            state,
            peer: "tcp:host:1".into(),
        }
    }

    fn destination_record(state: DestinationState, epoch: u64) -> DestinationRecord {
        DestinationRecord {
            vm: VM,
            attempt: AttemptId([9; 16]),
            epoch: Epoch(epoch),
            state,
            peer: "unix:/a".into(),
        }
    }

    #[test]
    fn records_survive_and_both_sides_share_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let source = Journal::open(Some(dir.path()), VM, JournalSide::Source).unwrap();
        let destination = Journal::open(Some(dir.path()), VM, JournalSide::Destination).unwrap();
        source.write_source(source_record(SourceState::Released, 3)).unwrap();
        destination.write_destination(destination_record(DestinationState::Owner, 4)).unwrap();
        let file = read_journal(dir.path(), VM).unwrap().unwrap();
        assert_eq!(file.epochs().released, Some(Epoch(3)));
        assert_eq!(file.owned_epoch(), Some(Epoch(5)));
        assert_eq!(source.read().unwrap(), file);
    }

    #[test]
    fn one_session_per_vm_and_side() {
        let dir = tempfile::tempdir().unwrap();
        let first = Journal::open(Some(dir.path()), VM, JournalSide::Source).unwrap();
        let second = Journal::open(Some(dir.path()), VM, JournalSide::Source);
        assert!(matches!(second, Err(JournalError::Busy { vm: VM })));
        drop(first);
        Journal::open(Some(dir.path()), VM, JournalSide::Source).unwrap();
    }

    #[test]
    fn a_damaged_file_is_named_and_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(format!("{VM}.json"));
        std::fs::write(&path, b"{\"version\": 1, \"vm\"").unwrap();
        let journal = Journal::open(Some(dir.path()), VM, JournalSide::Source).unwrap();
        assert!(matches!(journal.read(), Err(JournalError::Content { .. })));
        assert!(journal.write_source(source_record(SourceState::Sending, 0)).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"{\"version\": 1, \"vm\"");
    }
}
