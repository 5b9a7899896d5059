//! P7: the journal, and from it the answer to a source that lost the answer to its COMMIT.

use std::path::Path;
use std::time::Instant;

use vfio_migration_engine::Attempt;
use vfio_migration_engine::ownership::{DestinationRecord, DestinationState, QueryAnswer, answer_query};
use vfio_migration_types::{Epoch, Failure, GuestOutcome, Phase, RateLimit, Side, Told, error_chain};
use vfio_migration_wire::{Message, Running};

use crate::channel::binding::SessionKey;
use crate::channel::greeting::Question;
use crate::channel::link::Link;
use crate::destination::worker::Worker;
use crate::ownership::journal::{Journal, JournalFile, JournalSide, read_journal};
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
    pub(super) source: SessionSource,
}

/// The source of a session, as its connection tells it from everybody else.
#[derive(Clone, Debug)]
pub(super) struct SessionSource {
    /// How the connection was secured, and who the source proved to be.
    security: ConnectionSecurity,
    key: Option<SessionKey>,
}

impl SessionSource {
    pub(super) fn of(link: &Link, key: Option<&SessionKey>) -> Self {
        Self { security: link.security(), key: key.cloned() }
    }

    /// Whether it is the source who asks, in a process whose connections are secured like `security`.
    fn asks(&self, question: &Question, security: Option<&Security>) -> bool {
        is_bound(self.key.as_ref(), question)
            && question.link.security().is_of(&self.security, security.is_some_and(Security::proves_names))
    }
}

/// Whether a question comes from within the session that has `key`. Of a session without one everybody may have been in it.
fn is_bound(key: Option<&SessionKey>, question: &Question) -> bool {
    key.is_none_or(|key| key.is_proved(&question.link, question.proof))
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
            .write_destination(
                record.clone(),
                self.shared.session_key.clone(),
                Some(&self.shared.began),
                given_up,
            )
            .map_err(|error| error.in_phase(Side::Destination, phase))?;
        *lock(&self.shared.record) = Some(record);
        Ok(())
    }
}

/// Refuses a question of somebody else than `source`: the answer may be that nobody will ever run the guest here. Says whether it did.
pub(super) fn refuse_stranger(
    question: &Question,
    source: &SessionSource,
    security: Option<&Security>,
) -> bool {
    let is_stranger = !source.asks(question, security);
    if is_stranger {
        refuse(question);
    }
    is_stranger
}

/// Whether who asks proves that he was in the session, by what the journal has of it; `None`: it has nothing that could be proved.
pub(super) fn is_proved_by_journal(state_dir: Option<&Path>, question: &Question) -> Option<bool> {
    let file = read_journal(state_dir?, question.about.vm).ok()??;
    let asked = file.destination.as_ref().is_some_and(|record| record.attempt == question.about.attempt);
    let key = file.destination_key.as_ref().filter(|_| asked)?;
    Some(is_bound(Some(key), question))
}

/// Refuses a question of somebody else than the source.
pub(super) fn refuse(question: &Question) {
    let _ = question.link.send(&Message::Abort(stranger()));
    question.link.shutdown_write();
}

fn stranger() -> Failure {
    Failure::new(Side::Destination, Phase::Commit, "only the source of a migration is told what became of it")
}

/// Answers one question. An outcome that is not known is answered as unknown, which decides nothing.
/// What is said of it is said as often as `told` lets it: whoever may ask, asks as often as he likes.
pub(super) fn answer(
    known: Option<&KnownOutcome>,
    state_dir: Option<&Path>,
    question: &Question,
    told: &mut RateLimit<String>,
) {
    let Question { link, about, .. } = question;
    let message = answer_to(known, state_dir, question);
    let sent = link.send(&message);
    link.shutdown_write();
    let answered = match sent {
        Ok(()) => format!("and was told {message:?}"),
        Err(error) => format!("and could not be told {message:?}: {}", error_chain(&error)),
    };
    if let Some(Told { what, left_out }) = told.take(answered, Instant::now()) {
        tracing::info!(vm = %about.vm, attempt = %about.attempt, left_out, "a source asked what became of its COMMIT, {what}");
    }
}

fn answer_to(known: Option<&KnownOutcome>, state_dir: Option<&Path>, question: &Question) -> Message {
    let query = question.about;
    let unknown = |text: String| Message::Abort(Failure::new(Side::Destination, Phase::Commit, text));
    let own = known.filter(|known| known.record.attempt == query.attempt);
    let record = match (own, state_dir) {
        (Some(known), _) => Some(known.record.clone()),
        (None, Some(dir)) => match read_journal(dir, query.vm) {
            Ok(file) => {
                let file = file.unwrap_or_else(|| JournalFile::empty(query.vm));
                let asked = file.destination.as_ref().is_some_and(|record| record.attempt == query.attempt);
                if asked && !is_bound(file.destination_key.as_ref(), question) {
                    return Message::Abort(stranger());
                }
                file.destination
            }
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
    let JournalFile { destination: record, destination_key: key, .. } =
        journal.read().map_err(|error| error_chain(&error))?;
    match answer_query(record.as_ref(), query.vm, query.attempt, query.epoch) {
        QueryAnswer::Running { epoch } => Ok(Message::Running(untold(epoch))),
        QueryAnswer::Decline(cause) => Ok(Message::Declined(cause)),
        QueryAnswer::AbortThenDecline(cause) => {
            let Some(record) = record else { return Err("there is no record".into()) };
            let record = DestinationRecord { state: DestinationState::Aborted, ..record };
            let reason = "the source asked what became of it, and it had come to nothing".to_owned();
            journal
                .write_destination(record, key, None, Some(reason))
                .map_err(|error| error_chain(&error))?;
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
