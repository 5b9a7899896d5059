//! P7: the journal, and from it the answer to a source that lost the answer to its COMMIT.

use std::path::Path;

use vfio_migration_engine::Attempt;
use vfio_migration_engine::ownership::{DestinationRecord, DestinationState, QueryAnswer, answer_query};
use vfio_migration_types::{Epoch, Failure, GuestOutcome, Phase, Side, error_chain};
use vfio_migration_wire::{Message, Running};

use crate::channel::link::Link;
use crate::destination::worker::Worker;
use crate::ownership::journal::{Journal, JournalSide, read_journal};
use crate::session::awaited::Request;
use crate::session::fail::InPhase;
use crate::session::lock::lock;
use crate::session::work_error::WorkError;
use crate::tls::config::Security;
use crate::tls::security::ConnectionSecurity;

/// The outcome of the latest attempt.
#[derive(Clone, Debug)]
pub(super) struct KnownOutcome {
    pub(super) record: DestinationRecord,
    pub(super) running: Option<Running>,
    /// How its connection was secured, and who the source was.
    pub(super) security: ConnectionSecurity,
}

impl Worker<'_, '_, '_> {
    pub(super) fn write_journal(
        &self,
        state: DestinationState,
        attempt: Option<Attempt>,
        given_up: Option<String>,
    ) -> Result<(), WorkError> {
        let phase = state.phase();
        let (Some(journal), Some(attempt)) = (&self.journal, attempt) else {
            return Err(Failure::new(
                Side::Destination,
                phase,
                "there is no journal yet: a defect of this program",
            )
            .into());
        };
        let record = DestinationRecord {
            vm: attempt.vm,
            attempt: attempt.attempt,
            epoch: attempt.epoch,
            state,
            peer: self.shared.peer.clone(),
        };
        let _wait = self.shared.answers.wait(None, Request::Journal, None);
        journal
            .write_destination(record.clone(), given_up)
            .map_err(|error| error.in_phase(Side::Destination, phase))?;
        *lock(&self.shared.record) = Some(record);
        Ok(())
    }
}

/// Refuses a question of somebody else than the source of `session`: the answer may be that nobody will ever run the guest here.
/// Says whether it did.
pub(super) fn refuse_stranger(link: &Link, session: &ConnectionSecurity, security: &Security) -> bool {
    if link.security().is_of(session, security.proves_names()) {
        return false;
    }
    tracing::warn!(peer = %link.peer(), "somebody else than its source asked what became of a migration");
    let text = "only the source of a migration is told what became of it";
    let _ = link.send(&Message::Abort(Failure::new(Side::Destination, Phase::Commit, text)));
    link.shutdown_write();
    true
}

/// Answers one question. An outcome that is not known is answered as unknown, which decides nothing.
pub(super) fn answer(known: Option<&KnownOutcome>, state_dir: Option<&Path>, link: &Link, query: Attempt) {
    let message = answer_to(known, state_dir, query);
    tracing::info!(vm = %query.vm, attempt = %query.attempt, ?message, "a source asked what became of its COMMIT");
    if let Err(error) = link.send(&message) {
        tracing::warn!(error = %error_chain(&error), "the answer could not be sent");
    }
    link.shutdown_write();
}

fn answer_to(known: Option<&KnownOutcome>, state_dir: Option<&Path>, query: Attempt) -> Message {
    let unknown = |text: String| Message::Abort(Failure::new(Side::Destination, Phase::Commit, text));
    let own = known.filter(|known| known.record.attempt == query.attempt);
    let record = match (own, state_dir) {
        (Some(known), _) => Some(known.record.clone()),
        (None, Some(dir)) => match read_journal(dir, query.vm) {
            Ok(file) => file.and_then(|file| file.destination),
            Err(error) => return unknown(error_chain(&error)),
        },
        (None, None) => None,
    };
    match answer_query(record.as_ref(), query.vm, query.attempt, query.epoch) {
        QueryAnswer::Running { epoch } => {
            Message::Running(own.and_then(|known| known.running.clone()).unwrap_or_else(|| untold(epoch)))
        }
        QueryAnswer::Decline(cause) => Message::Declined(cause),
        QueryAnswer::AbortThenDecline(cause) => abort(state_dir, query, cause).unwrap_or_else(unknown),
        QueryAnswer::Unknown(cause) => Message::Abort(cause),
        _ => unknown("the journal says something that this version does not know".into()),
    }
}

/// ABORTED goes to the disk before the answer. Not while another session holds the VM's journal: it may be about to
/// own the VM; and not before the record has been read again with the journal held, for one may have ended since.
fn abort(state_dir: Option<&Path>, query: Attempt, cause: Failure) -> Result<Message, String> {
    // Without a directory the one record is this process's own, whose session has ended.
    let Some(dir) = state_dir else { return Ok(Message::Declined(cause)) };
    let journal = Journal::open(Some(dir), query.vm, JournalSide::Destination)
        .map_err(|error| error.in_phase(Side::Destination, Phase::Commit).text)?;
    let record = journal.read().map_err(|error| error_chain(&error))?.destination;
    match answer_query(record.as_ref(), query.vm, query.attempt, query.epoch) {
        QueryAnswer::Running { epoch } => Ok(Message::Running(untold(epoch))),
        QueryAnswer::Decline(cause) => Ok(Message::Declined(cause)),
        QueryAnswer::AbortThenDecline(cause) => {
            let Some(record) = record else { return Err("there is no record".into()) };
            let record = DestinationRecord { state: DestinationState::Aborted, ..record };
            let reason = "the source asked what became of it, and it had come to nothing".to_owned();
            journal.write_destination(record, Some(reason)).map_err(|error| error_chain(&error))?;
            Ok(Message::Declined(cause))
        }
        QueryAnswer::Unknown(cause) => Ok(Message::Abort(cause)),
        _ => Err("the journal says something that this version does not know".into()),
    }
}

/// Another process's guest: it is owned, and that is all that is known.
fn untold(epoch: Epoch) -> Running {
    Running { epoch, guest: GuestOutcome::Unknown, boot_id: [0; 16], at_ns: 0 }
}
