//! The destination's state: where it is, what each phase remembers, and the steps that all phases share.

use std::collections::VecDeque;

use vfio_migration_types::{Epoch, Failure, PauseCause, Phase, Side};
use vfio_migration_wire::{
    Accept, FEATURE_ASK, FEATURE_REHEARSE, FinalEnd, HelloReply, Message, Ready, Reason, Running,
};

use crate::api::{Attempt, DestinationAction, DestinationConfig, DestinationOutcome, Time};
use crate::expected::{ExpectedAnswer, work_timeout};
use crate::failure::failure;
use crate::ownership::{DestinationState, DestinationStep};

/// The destination's engine: it takes events and gives actions. See the [crate's documentation](crate).
#[derive(Debug)]
pub struct DestinationEngine {
    pub(super) config: DestinationConfig,
    pub(super) state: State,
    /// The state that the journal on disk has, as far as it has been confirmed; `None`: nothing yet.
    pub(super) journal: Option<DestinationState>,
    pub(super) phase: Phase,
    pub(super) actions: VecDeque<DestinationAction>,
    /// An action that will be answered is under way.
    pub(super) busy: bool,
    /// Whether the connection is up: without it nothing is sent.
    pub(super) link: bool,
    pub(super) attempt: Option<Attempt>,
    pub(super) negotiated: Option<HelloReply>,
    /// The message that must come next, with its deadline.
    pub(super) timer: Option<ExpectedAnswer>,
    pub(super) reservation: Reservation,
    pub(super) iterations: IterationCounts,
    pub(super) beginning: Beginning,
    pub(super) final_pass: FinalPass,
    pub(super) commit: DestinationCommit,
    pub(super) rollback: DestinationRollback,
}

/// The destination's state: the step that it is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    AwaitingHello,
    AwaitingOffer,
    Reserving,
    JournalReserved,
    AwaitingBegin,
    JournalLoading,
    Opening,
    /// P3: iterations are received.
    Loading,
    /// P5: the final pass is received; the storage locks may be on their way.
    FinalPass,
    Verifying,
    JournalReady,
    /// READY is sent; COMMIT is waited for.
    Ready,
    JournalOwner,
    Starting,
    /// The guest is ours; questions are still answered.
    Owner,
    JournalAborted,
    Releasing,
    /// Everything is released, but a source that may have sent COMMIT can still ask what became of it.
    Lingering,
    Done,
}

/// P1: the answer to the offer, and which machine it was given for.
#[derive(Debug, Default)]
pub(super) struct Reservation {
    /// ACCEPT as it will be sent.
    pub(super) accept: Accept,
    /// Digest of the identity that was judged.
    pub(super) identity: [u8; 32],
}

/// P3: whether anything of the guest has come.
#[derive(Debug, Default)]
pub(super) struct Beginning {
    /// Time at which the source was told that it may send.
    pub(super) open_since: Option<Time>,
    /// The first of the guest is here.
    pub(super) has_come: bool,
}

/// P3: how many iterations have ended and have been applied.
#[derive(Debug, Default)]
pub(super) struct IterationCounts {
    /// The last iteration whose end has come.
    pub(super) ended: u32,
    /// The last iteration that was applied.
    pub(super) applied: u32,
}

/// P5 and P6: the storage locks, what the source sent and what was loaded of it.
#[derive(Debug, Default)]
pub(super) struct FinalPass {
    /// Why the guest is to be paused here; `None`: it is to run.
    pub(super) paused: Option<PauseCause>,
    pub(super) locks: LockHandover,
    pub(super) totals: Option<FinalEnd>,
    pub(super) ready: Option<Ready>,
}

/// The owner of the storage locks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum LockHandover {
    #[default]
    Theirs,
    Taking,
    Ours,
}

/// P7 and P8: RUNNING, and the question that waits for the decision.
#[derive(Debug, Default)]
pub(super) struct DestinationCommit {
    /// RUNNING as it was sent, to be sent again to a source that asks.
    pub(super) running: Option<Running>,
    /// A question came while the answer was being decided.
    pub(super) asked: bool,
}

/// An abort: its cause, and what the source knows of it.
#[derive(Debug, Default)]
pub(super) struct DestinationRollback {
    pub(super) cause: Option<Failure>,
    /// It is this side's operator who gave the attempt up.
    pub(super) cancelled: bool,
    /// It was being given up already when the operator did.
    pub(super) cancelled_late: bool,
    pub(super) refused: Option<Vec<Reason>>,
    /// The source has found that its limits cannot be met.
    pub(super) limits_unmet: bool,
    /// The same of a rehearsal.
    pub(super) obstacle: Option<Failure>,
    /// The rehearsal has come to its end.
    pub(super) rehearsed: bool,
    /// RESERVE was asked for: there may be something to release.
    pub(super) something_reserved: bool,
    /// READY was sent, or COMMIT received.
    pub(super) source_may_have_committed: bool,
    /// The source reports that it gives up: it has not committed, and will not.
    pub(super) source_gave_up: bool,
    /// REFUSE or DECLINED was sent: no ABORT follows.
    pub(super) source_notified: bool,
    /// ABORTED was asked of the journal.
    pub(super) journal_asked: bool,
    /// An action was under way when the abort began; its answer may still come.
    pub(super) interrupted: bool,
}

impl DestinationEngine {
    /// Asks for an action whose answer `state` waits for.
    pub(super) fn act(&mut self, state: State, action: DestinationAction) {
        self.state = state;
        self.busy = true;
        self.actions.push_back(action);
    }

    /// Journals the state that `step` leads to; what cannot be journaled is not done.
    pub(super) fn journal_step(&mut self, state: State, step: DestinationStep, now: Time) {
        let Some(journal) = self.journal else {
            return self.abort(self.error("nothing was journaled: a defect of this program"), now);
        };
        match journal.next(step) {
            Ok(next) => self.act(state, DestinationAction::Journal(next)),
            Err(error) => self.abort(self.error(&error.to_string()), now),
        }
    }

    pub(super) fn send(&mut self, message: Message) {
        if self.link {
            self.actions.push_back(DestinationAction::Send(message));
        }
    }

    pub(super) fn answer(&mut self, message: Message) {
        self.actions.push_back(DestinationAction::Answer(message));
    }

    /// The source must send `what` within `peer_timeout`.
    pub(super) fn expect_by(&mut self, what: &'static str, now: Time) {
        self.timer = Some(ExpectedAnswer::within(self.config.peer_timeout, what, now));
    }

    /// `what` must come, and there is work to do before it can.
    pub(super) fn expect_work(&mut self, what: &'static str, now: Time) {
        let timeout = work_timeout(self.config.peer_timeout);
        self.timer = Some(ExpectedAnswer::within(timeout, what, now));
    }

    pub(super) fn finish(&mut self, outcome: DestinationOutcome) {
        self.timer = None;
        self.busy = false;
        self.actions.push_back(DestinationAction::Finish(outcome));
    }

    /// Whether this is a rehearsal: nothing is journaled, no COMMIT is taken.
    pub(super) fn is_rehearsal(&self) -> bool {
        self.negotiated.is_some_and(|negotiated| negotiated.features & FEATURE_REHEARSE != 0)
    }

    /// Whether the source only asks: nothing comes after ACCEPT but the end.
    pub(super) fn only_asks(&self) -> bool {
        self.negotiated.is_some_and(|negotiated| only_asks(negotiated.features))
    }

    /// The epoch that a commit begins.
    pub(super) fn next_epoch(&self) -> Option<Epoch> {
        self.attempt.map(|attempt| attempt.epoch.next())
    }

    pub(super) fn error(&self, text: &str) -> Failure {
        failure(Side::Destination, self.phase, text, "")
    }
}

/// Whether `features` are those of a source that only asks. Without the first the second means nothing.
pub(super) fn only_asks(features: u64) -> bool {
    let both = FEATURE_REHEARSE | FEATURE_ASK;
    features & both == both
}
