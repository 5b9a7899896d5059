//! P7: the journal before COMMIT is sent; and asking again, over a new connection each time, when its answer was lost.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vfio_migration_engine::ownership::{SourceRecord, SourceState};
use vfio_migration_engine::{SourceAction, SourceEvent};
use vfio_migration_types::{Failure, Phase, Side, error_chain};
use vfio_migration_wire::Message;

use crate::channel::binding::NO_PROOF;
use crate::channel::connect::{self, ConnectError};
use crate::channel::error::ChannelError;
use crate::channel::link::Link;
use crate::channel::reader::Reader;
use crate::control::Undone;
use crate::session::abandon::{NoThread, Unanswered, answer_unless};
use crate::session::awaited::Request;
use crate::session::fail::{InPhase, STATE_DIR};
use crate::session::lock::lock;
use crate::session::threads::no_thread;
use crate::session::work_error::WorkError;
use crate::unresolved::{CommitAnswer, PendingCommit};
use crate::uri::Uri;

use crate::source::worker::Worker;

impl PendingCommit for Worker {
    fn ask(&mut self, at: Option<&Uri>, given_up: &dyn Fn() -> bool) -> Result<CommitAnswer, Failure> {
        let failed = |why: String| Failure::new(Side::Source, Phase::Commit, why);
        let uri = at.unwrap_or(&self.plan.uri);
        if !self.can_reach(uri) {
            return Err(failed(FD_ENDED.into()).with_remedy("ask at an address"));
        }
        match self.ask_at(uri, given_up) {
            Ok(Message::Declined(cause)) => Ok(CommitAnswer::Declined(cause)),
            Ok(Message::Running(running)) if running.epoch == self.plan.epoch.next() => {
                Ok(CommitAnswer::Running(running.guest))
            }
            Ok(Message::Abort(failure)) => Err(failure),
            Ok(other) => Err(failed(format!("the destination's answer decides nothing: {other:?}"))),
            Err(Ok(WorkError::Failed(failure))) => Err(failure),
            Err(Ok(WorkError::Interrupted | WorkError::Link)) => Err(failed("asking was given up".into())),
            Err(Err(why)) => Err(failed(why)),
        }
    }

    fn has_moved(&mut self) -> Vec<Failure> {
        let steps = [SourceAction::Journal(SourceState::Released), SourceAction::CleanUp];
        let failed = |step| match self.guarded(step) {
            Err(WorkError::Failed(failure)) => Some(failure),
            _ => None,
        };
        steps.into_iter().filter_map(failed).collect()
    }

    fn go_back(&mut self, cause: &Failure) -> Result<(bool, Vec<Failure>), Failure> {
        *lock(&self.shared.journal_reason) = Some(cause.to_string());
        match self.guarded(SourceAction::Journal(SourceState::Owner)) {
            Ok(_) => {}
            Err(WorkError::Failed(failure)) => return Err(failure),
            Err(WorkError::Interrupted | WorkError::Link) => {
                let text = "the journal was not written";
                return Err(Failure::new(Side::Source, Phase::Commit, text));
            }
        }
        if let Ok(Some(event)) = self.guarded(SourceAction::RollBack) {
            self.note_not_undone(&event);
        }
        let Undone { restored, failures } = lock(&self.shared.undone).clone();
        Ok((restored, failures))
    }
}

/// Longest wait for one answer: the engine asks again.
const PATIENCE: Duration = Duration::from_secs(5);
const FD_ENDED: &str = "a connection that was handed over cannot be made again";
/// Time after which a waiter looks again whether it was replaced.
const SLICE: Duration = Duration::from_millis(100);

impl Worker {
    /// Asks once. The answer is the destination's, or the loss of the connection.
    pub(super) fn ask_again(&mut self) -> Option<SourceEvent> {
        self.shared.interrupt.clear();
        if !self.can_reach(&self.plan.uri) {
            return Some(SourceEvent::LinkLost(FD_ENDED.into()));
        }
        let replaced = || self.shared.interrupt.raised() || self.shared.ended.load(Ordering::Acquire);
        match self.ask_at(&self.plan.uri, replaced) {
            Ok(message) => Some(SourceEvent::Peer(message)),
            Err(Ok(WorkError::Interrupted)) => None,
            Err(Ok(_)) => Some(SourceEvent::LinkLost("asking what became of COMMIT failed".into())),
            Err(Err(why)) => Some(SourceEvent::LinkLost(why)),
        }
    }

    /// Whether a further connection to the destination can be made.
    fn can_reach(&self, uri: &Uri) -> bool {
        !matches!(uri, Uri::Fd(_)) || self.plan.options.further_connections.is_some()
    }

    fn ask_at(&self, uri: &Uri, replaced: impl Fn() -> bool) -> Result<Message, Result<WorkError, String>> {
        let limit = self.plan.options.connect_timeout.min(PATIENCE);
        let options = &self.plan.options;
        let (security, peers) = (options.security.as_ref(), &options.unix_peers);
        let connected = match (&options.further_connections, uri) {
            (Some(factory), Uri::Fd(_)) => {
                connect::by_factory(factory, uri, security, peers, limit, &replaced)
            }
            _ => connect::connect(uri, security, peers, limit, &replaced),
        };
        let socket = connected.map_err(|error| match error {
            ConnectError::Cancelled => Ok(WorkError::Interrupted),
            error => Err(error_chain(&error)),
        })?;
        let told = |error: ChannelError| Err(error_chain(&error));
        let link = Link::new(socket).map_err(told)?;
        let proof = self.session_key.as_ref().and_then(|key| key.proof(&link)).unwrap_or(NO_PROOF);
        link.send(&self.record(SourceState::Committing).query(proof)).map_err(told)?;
        let mut reader = Reader::new(&link, Side::Destination);
        let until = Instant::now() + PATIENCE;
        loop {
            match reader.first() {
                Ok(Some(message)) => return Ok(message),
                Ok(None) => {}
                Err(error) => return Err(told(error)),
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Err(format!("the destination did not answer within {PATIENCE:?}")));
            }
            if replaced() {
                return Err(Ok(WorkError::Interrupted));
            }
            reader.wait(left.min(SLICE));
        }
    }

    /// The journal's record for `state`.
    pub(super) fn record(&self, state: SourceState) -> SourceRecord {
        SourceRecord {
            vm: self.machine.id(),
            attempt: self.plan.attempt,
            epoch: self.plan.epoch,
            state,
            peer: self.plan.info.peer.to_owned(),
        }
    }

    pub(super) fn write_journal(&mut self, state: SourceState) -> Result<(), WorkError> {
        if state == SourceState::Committing {
            // Before the record is on disk, not after: from here only the engine lets the guest run.
            if let Some(paused) = &mut self.paused {
                paused.keep_paused();
            }
        }
        let record = self.record(state);
        let (began, reason) = (self.plan.info.began.clone(), lock(&self.shared.journal_reason).take());
        let failed = |failure: Failure| WorkError::Failed(failure);
        let phase = state.phase();
        // Only before the decision is there a cancel. An abandoned write keeps the VM's journal locked until it ends, and
        // whichever of SENDING and OWNER is last on disk, the guest is this side's.
        if !matches!(state, SourceState::Sending | SourceState::Owner) {
            return self
                .plan
                .journal
                .write_source(record, Some(&began), reason)
                .map_err(|error| failed(error.in_phase(Side::Source, phase)));
        }
        let sending = state == SourceState::Sending;
        if self.journal_hangs {
            let text = "the state directory did not answer when it was written before";
            return Err(failed(Failure::new(Side::Source, phase, text).with_remedy(STATE_DIR)));
        }
        // A session without a state directory has nothing to wait for.
        if self.plan.journal.is_in_memory() {
            let written = self.plan.journal.write_source(record, Some(&began), reason);
            return written.map_err(|error| failed(error.in_phase(Side::Source, phase)));
        }
        let journal = Arc::clone(&self.plan.journal);
        let _wait = self.plan.answers.wait(None, Request::Journal, None);
        let given_up = || sending && self.shared.interrupt.raised();
        match answer_unless(given_up, None, move || journal.write_source(record, Some(&began), reason)) {
            Ok(written) => written.map_err(|error| failed(error.in_phase(Side::Source, phase))),
            Err(Unanswered::NoThread(NoThread(error))) => {
                Err(failed(no_thread(Side::Source, phase, "journal", &error)))
            }
            Err(Unanswered::GivenUp | Unanswered::Late) => {
                self.journal_hangs = true;
                Err(WorkError::Interrupted)
            }
        }
    }
}
