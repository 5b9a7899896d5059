//! The journal, ownership on disk: one file per VM, written before the message that it covers.
//!
//! A record is written to a temporary file, synced, renamed over the old one, and the directory synced: after a crash
//! the file holds the old record or the new one. A process that restarts has lost its guest's RAM; from the journal it
//! learns what it was, and can report that to whoever asks.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::SystemTime;

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use vfio_migration_engine::ownership::{DestinationRecord, KnownEpochs, SourceRecord};
use vfio_migration_types::{Epoch, VmId, rfc3339};

use crate::channel::binding::SessionKey;
use crate::regular_file::{FileError, open_regular, open_regular_to_append};
use crate::session::lock::lock;

/// Layout of a journal that is written.
const VERSION: u32 = 3;

/// A journal file: the records of one VM on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JournalFile {
    /// Layout of this file: 3. Those of layout 1, which have no notes, and 2, which have no key, are read too.
    pub version: u32,
    /// The VM whose records they are.
    pub vm: VmId,
    /// The latest attempt to send it away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<SourceRecord>,
    /// The latest attempt to take it in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination: Option<DestinationRecord>,
    /// When and why `source` was written: for a person, nothing is decided by it.
    #[serde(default, rename = "source-note", skip_serializing_if = "Option::is_none")]
    pub source_note: Option<JournalNote>,
    /// The same of `destination`.
    #[serde(default, rename = "destination-note", skip_serializing_if = "Option::is_none")]
    pub destination_note: Option<JournalNote>,
    /// The secret of `destination`'s session, where TLS gave one: by it a process that was started since knows its source.
    #[serde(default, rename = "destination-key", skip_serializing_if = "Option::is_none")]
    pub(crate) destination_key: Option<SessionKey>,
}

/// When and why a record was written. Times are RFC 3339, by the host's wall clock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalNote {
    /// When the attempt began.
    pub began: String,
    /// When this record was written.
    pub written: String,
    /// Why the attempt was given up, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Most bytes that are read of a journal: what one has is a few thousand.
const LARGEST: u64 = 1 << 20;
/// Longest reason in a note, in characters. Part of it may be the peer's text.
const LONGEST_REASON: usize = 1000;

impl JournalNote {
    /// A note of now. `before` is that of the attempt's last record, unless this is its first; `began`: when the attempt did, where the
    /// session is this process's.
    fn now(before: Option<&Self>, began: Option<&str>, reason: Option<String>) -> Self {
        let written = rfc3339(SystemTime::now());
        let began = began.or(before.map(|before| before.began.as_str()));
        Self {
            began: began.unwrap_or(&written).to_owned(),
            written,
            reason: reason.map(|reason| reason.chars().take(LONGEST_REASON).collect()),
        }
    }
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
    /// What is at the file's path is no regular file.
    #[error(transparent)]
    NotRegular(FileError),
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
    Memory(Box<Mutex<JournalFile>>),
    Directory {
        dir: PathBuf,
        /// Held for the session; the kernel releases it when the process dies.
        _session: File,
    },
}

/// Reads the records of a VM in a state directory; `None` when it has none.
pub fn read_journal(dir: &Path, vm: VmId) -> Result<Option<JournalFile>, JournalError> {
    let path = dir.join(format!("{vm}.json"));
    #[cfg(any(test, feature = "fault-injection"))]
    crate::held_file::wait(&path);
    let file = match open_regular(&path) {
        Err(FileError::System { source, .. }) if source.kind() == ErrorKind::NotFound => return Ok(None),
        file => file.map_err(not_opened)?,
    };
    let mut text = Vec::new();
    file.take(LARGEST).read_to_end(&mut text).map_err(failed("reading", &path))?;
    match serde_json::from_slice::<JournalFile>(&text) {
        Ok(file) if matches!(file.version, 1..=VERSION) && file.vm == vm => Ok(Some(file)),
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
            return Ok(Self {
                vm,
                place: JournalPlace::Memory(Box::new(Mutex::new(JournalFile::empty(vm)))),
            });
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

    /// Whether there is no state directory, which could keep a write waiting.
    pub(crate) fn is_in_memory(&self) -> bool {
        matches!(self.place, JournalPlace::Memory(_))
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
    pub(crate) fn write_source(
        &self,
        record: SourceRecord,
        began: Option<&str>,
        reason: Option<String>,
    ) -> Result<(), JournalError> {
        self.change(|file| {
            let same = file.source.as_ref().is_some_and(|before| before.attempt == record.attempt);
            let before = file.source_note.take().filter(|_| same);
            file.source_note = Some(JournalNote::now(before.as_ref(), began, reason));
            file.source = Some(record);
        })
    }

    /// Writes the destination's record, and its session's secret. On return they are on disk.
    pub(crate) fn write_destination(
        &self,
        record: DestinationRecord,
        key: Option<SessionKey>,
        began: Option<&str>,
        reason: Option<String>,
    ) -> Result<(), JournalError> {
        self.change(|file| {
            let same = file.destination.as_ref().is_some_and(|before| before.attempt == record.attempt);
            let before = file.destination_note.take().filter(|_| same);
            file.destination_note = Some(JournalNote::now(before.as_ref(), began, reason));
            file.destination = Some(record);
            file.destination_key = key;
        })
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
                file.version = VERSION;
                replace(dir, &file)?;
            }
        }
        Ok(())
    }
}

impl JournalFile {
    pub(crate) fn empty(vm: VmId) -> Self {
        Self {
            version: VERSION,
            vm,
            source: None,
            destination: None,
            source_note: None,
            destination_note: None,
            destination_key: None,
        }
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
    // What a process that died has left there, or anybody put there, is not written to.
    match std::fs::remove_file(&temporary) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(failed("removing", &temporary)(error));
        }
        _ => {}
    }
    // What it holds of a session's secret is our user's alone.
    let mut out = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(failed("creating", &temporary))?;
    out.write_all(&text).map_err(failed("writing", &temporary))?;
    out.sync_all().map_err(failed("syncing", &temporary))?;
    std::fs::rename(&temporary, &path).map_err(failed("replacing", &path))?;
    let directory = File::open(dir).map_err(failed("opening", dir))?;
    directory.sync_all().map_err(failed("syncing", dir))
}

fn open_lock(path: &Path) -> Result<File, JournalError> {
    open_regular_to_append(path).map_err(not_opened)
}

fn not_opened(error: FileError) -> JournalError {
    match error {
        FileError::System { doing, path, source } => JournalError::File { doing, path, source },
        error => JournalError::NotRegular(error),
    }
}

fn failed<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(std::io::Error) -> JournalError + 'a {
    move |source| JournalError::File { doing, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

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
        source.write_source(source_record(SourceState::Released, 3), None, None).unwrap();
        destination
            .write_destination(destination_record(DestinationState::Owner, 4), None, None, None)
            .unwrap();
        let file = read_journal(dir.path(), VM).unwrap().unwrap();
        assert_eq!(file.epochs().released, Some(Epoch(3)));
        assert_eq!(file.owned_epoch(), Some(Epoch(5)));
        assert_eq!(source.read().unwrap(), file);
    }

    #[test]
    fn a_record_says_when_its_attempt_began_and_why_it_ended() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(Some(dir.path()), VM, JournalSide::Source).unwrap();
        journal.write_source(source_record(SourceState::Sending, 3), None, None).unwrap();
        let began = journal.read().unwrap().source_note.unwrap();
        assert_eq!((&began.began, &began.reason), (&began.written, &None));
        journal.write_source(source_record(SourceState::Owner, 3), None, Some("x".repeat(5000))).unwrap();
        let ended = journal.read().unwrap().source_note.unwrap();
        assert_eq!(ended.began, began.began);
        assert!(ended.written >= ended.began);
        assert_eq!(ended.reason.unwrap().len(), LONGEST_REASON);
        let another = SourceRecord { attempt: AttemptId([1; 16]), ..source_record(SourceState::Sending, 3) };
        journal.write_source(another, Some("2026-01-02T03:04:05.000Z"), None).unwrap();
        let note = journal.read().unwrap().source_note.unwrap();
        assert_eq!(
            note.began, "2026-01-02T03:04:05.000Z",
            "an attempt of its own, which knows when it began"
        );
    }

    #[test]
    fn a_journal_of_layout_1_is_read_and_written_as_layout_3() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(format!("{VM}.json"));
        let old = format!(
            r#"{{"version": 1, "vm": "{VM}", "source": {{"vm": "{VM}", "attempt": {:?}, "epoch": 3,
                "state": "released", "peer": "fd:26"}}}}"#,
            [9; 16]
        );
        std::fs::write(&path, old).unwrap();
        let journal = Journal::open(Some(dir.path()), VM, JournalSide::Destination).unwrap();
        assert_eq!(journal.read().unwrap().source.unwrap().attempt, AttemptId([9; 16]));
        journal
            .write_destination(destination_record(DestinationState::Reserved, 4), None, None, None)
            .unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(r#""version": 3"#) && text.contains(&"09".repeat(16)), "{text}");
        let file = journal.read().unwrap();
        assert_eq!(file.source.unwrap().peer, "fd:26");
        assert_eq!(file.source_note, None, "nobody knows when");
    }

    #[test]
    fn a_session_s_key_is_kept_with_its_record_and_for_our_user_alone() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(Some(dir.path()), VM, JournalSide::Destination).unwrap();
        let key: SessionKey = serde_json::from_value("5a".repeat(32).into()).unwrap();
        for state in [DestinationState::Reserved, DestinationState::Owner] {
            journal.write_destination(destination_record(state, 4), Some(key.clone()), None, None).unwrap();
            assert_eq!(journal.read().unwrap().destination_key, Some(key.clone()));
        }
        let path = dir.path().join(format!("{VM}.json"));
        assert_eq!(std::fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(format!("{key:?}"), "SessionKey(..)");
        // The next attempt's record comes with its own key, or none.
        journal
            .write_destination(destination_record(DestinationState::Reserved, 5), None, None, None)
            .unwrap();
        assert_eq!(journal.read().unwrap().destination_key, None);
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
        assert!(journal.write_source(source_record(SourceState::Sending, 0), None, None).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"{\"version\": 1, \"vm\"");
    }
}
