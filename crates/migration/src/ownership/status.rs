//! Ownership of a VM by the journal of a state directory: for a process that starts, and has no guest yet.
//!
//! A process that restarts has lost its guest's RAM. Whether the VM may be started anew here, from its disks, is
//! decided by its journal: never while a COMMIT is undecided, and never once the guest belongs to another host.

use std::path::Path;

use vfio_migration_engine::ownership::SourceState;
use vfio_migration_types::{Epoch, VmId};

use crate::ownership::journal::{JournalError, JournalFile, read_journal};

/// The owner of a VM, as far as this host's journal knows.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VmOwnership {
    /// Nothing is written of it.
    Unknown,
    /// The VM was ours under this epoch when its process ended. It may be started anew, under the same epoch.
    Ours(Epoch),
    /// The VM is another host's: it moved there, or it was only offered to this one.
    Elsewhere {
        /// The epoch under which the other owns it.
        epoch: Epoch,
        /// Address that it went to, or came from; `file:` and a path for a file that it was saved into.
        peer: String,
    },
    /// COMMIT may have been sent, and its outcome is not known here: a person, or the other side, decides.
    Undecided {
        /// The epoch that the COMMIT would begin.
        epoch: Epoch,
        /// Address that the COMMIT was sent to.
        peer: String,
    },
}

/// Reads who owns `vm` from the journal in `dir`.
///
/// # Errors
/// The journal cannot be read, or makes no sense: then nobody should start the VM.
pub fn ownership_at(dir: &Path, vm: VmId) -> Result<VmOwnership, JournalError> {
    Ok(read_journal(dir, vm)?.map_or(VmOwnership::Unknown, |file| of(&file)))
}

fn of(file: &JournalFile) -> VmOwnership {
    let epochs = file.epochs();
    let (sent, offered) = (file.source.as_ref(), file.destination.as_ref());
    // What was committed to counts only if the VM was not taken in since.
    let committing = sent.filter(|sent| sent.state == SourceState::Committing);
    if let Some(sent) = committing.filter(|sent| epochs.owned <= Some(sent.epoch)) {
        return VmOwnership::Undecided { epoch: sent.epoch.next(), peer: sent.peer.clone() };
    }
    match (epochs.owned, epochs.released.zip(sent), offered) {
        (Some(epoch), ..) => VmOwnership::Ours(epoch),
        (None, Some((released, sent)), _) => {
            VmOwnership::Elsewhere { epoch: released.next(), peer: sent.peer.clone() }
        }
        (None, None, Some(offered)) => {
            VmOwnership::Elsewhere { epoch: offered.epoch, peer: offered.peer.clone() }
        }
        (None, None, None) => VmOwnership::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use vfio_migration_engine::ownership::{DestinationRecord, DestinationState, SourceRecord};
    use vfio_migration_types::AttemptId;

    use super::*;

    const VM: VmId = VmId([7; 16]);

    fn file(sent: Option<(u64, SourceState)>, taken: Option<(u64, DestinationState)>) -> JournalFile {
        let attempt = AttemptId([1; 16]);
        let peer = || "tcp:there:1".to_owned();
        JournalFile {
            version: 1,
            vm: VM,
            source: sent.map(|(epoch, state)| SourceRecord {
                vm: VM,
                attempt,
                epoch: Epoch(epoch),
                state,
                peer: peer(),
            }),
            destination: taken.map(|(epoch, state)| DestinationRecord {
                vm: VM,
                attempt,
                epoch: Epoch(epoch),
                state,
                peer: peer(),
            }),
            ..JournalFile::empty(VM)
        }
    }

    #[test]
    fn what_each_journal_means() {
        let elsewhere = |epoch| VmOwnership::Elsewhere { epoch: Epoch(epoch), peer: "tcp:there:1".into() };
        let undecided = |epoch| VmOwnership::Undecided { epoch: Epoch(epoch), peer: "tcp:there:1".into() };
        use DestinationState::{Aborted, Loading, Owner as Arrived, Ready};
        use SourceState::{Committing, Owner, Released, Sending};
        for (sent, taken, standing) in [
            (None, None, VmOwnership::Unknown),
            (Some((0, Owner)), None, VmOwnership::Ours(Epoch(0))),
            (Some((0, Sending)), None, VmOwnership::Ours(Epoch(0))),
            (Some((0, Committing)), None, undecided(1)),
            (Some((0, Released)), None, elsewhere(1)),
            (None, Some((0, Loading)), elsewhere(0)),
            (None, Some((0, Ready)), elsewhere(0)),
            (None, Some((0, Aborted)), elsewhere(0)),
            (None, Some((0, Arrived)), VmOwnership::Ours(Epoch(1))),
            // It went away, and came back.
            (Some((0, Released)), Some((1, Arrived)), VmOwnership::Ours(Epoch(2))),
            (Some((0, Released)), Some((1, Ready)), elsewhere(1)),
            // It came, and went away again.
            (Some((1, Released)), Some((0, Arrived)), elsewhere(2)),
            (Some((1, Committing)), Some((0, Arrived)), undecided(2)),
            (Some((1, Owner)), Some((0, Arrived)), VmOwnership::Ours(Epoch(1))),
        ] {
            assert_eq!(of(&file(sent, taken)), standing, "{sent:?} {taken:?}");
        }
    }

    #[test]
    fn a_journal_that_makes_no_sense_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(ownership_at(dir.path(), VM).unwrap(), VmOwnership::Unknown);
        for text in ["", "{}", "nonsense", r#"{"version":4,"vm":"07070707-0707-0707-0707-070707070707"}"#] {
            std::fs::write(dir.path().join(format!("{VM}.json")), text).unwrap();
            assert!(ownership_at(dir.path(), VM).is_err(), "{text}");
        }
    }
}
