//! The source's state: where it is, what each phase remembers, and the steps that all phases share.

use std::collections::VecDeque;
use std::time::Duration;

use vfio_migration_types::{Epoch, Failure, Phase, Side};
use vfio_migration_wire::{FEATURE_VERIFY, FinalEnd, HelloReply, Lease, Message, Ready, Running};

use crate::api::{Abort, DeviceProgress, RehearsalResult, SourceAction, SourceConfig, SourceOutcome, Time};
use crate::convergence::DowntimeModel;
use crate::expected::{ExpectedAnswer, work_timeout};
use crate::failure::{failure, with_device};
use crate::ownership::{SourceState, SourceStep};

/// The source's engine: it takes events and gives actions. See the [crate's documentation](crate).
#[derive(Debug)]
pub struct SourceEngine {
    pub(super) config: SourceConfig,
    pub(super) state: State,
    /// The state that the journal on disk has, as far as it has been confirmed.
    pub(super) journal: SourceState,
    pub(super) phase: Phase,
    pub(super) phases: Vec<(Phase, Time)>,
    pub(super) actions: VecDeque<SourceAction>,
    /// Whether the connection is up: without it nothing is sent.
    pub(super) link: bool,
    pub(super) negotiated: Option<HelloReply>,
    /// The destination's reservation for this attempt.
    pub(super) lease: Lease,
    /// The answer that the destination must give next, and by when.
    pub(super) timer: Option<ExpectedAnswer>,
    pub(super) model: DowntimeModel,
    pub(super) rounds: Rounds,
    pub(super) pause: Pause,
    pub(super) commit: SourceCommit,
    pub(super) rollback: Option<SourceRollback>,
    /// When pre-copy or the pause was given up for what it would cost, or a rehearsal had found what it would.
    pub(super) concluded_at: Option<Time>,
    pub(super) rehearsal: RehearsalState,
}

/// The source's state. Each waits for exactly one thing, but for [`State::SettingUp`], which waits for two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Idle,
    Hello,
    Offered,
    Judging,
    JournalSending,
    SettingUp {
        set_up: bool,
        begun: bool,
    },
    Sending,
    Waiting,
    Pausing,
    ToP2p,
    Retreating,
    Resuming,
    ToStopCopy,
    SendingFinal,
    ReleasingLocks,
    AwaitingReady,
    /// The destination looks for the page that differs, instead of saying READY.
    DigestingRam,
    JournalCommitting,
    AwaitingRunning,
    Asking,
    AskingLater,
    JournalReleased,
    CleaningUp,
    /// DECLINED after COMMIT: the journal says OWNER before anything runs.
    JournalDeclined,
    RollingBack,
    JournalOwner,
    /// A rehearsal is at its end, and is being undone.
    Undoing,
    /// The rehearsal is undone here; the destination has not reported so yet.
    AwaitingRehearsed,
    Done,
}

/// P3: the iterations sent and acknowledged, and each device's progress.
#[derive(Debug)]
pub(super) struct Rounds {
    pub(super) iteration: u32,
    pub(super) wire_bytes: u64,
    pub(super) began: Time,
    /// Time at which the iteration under way, or the last, began.
    pub(super) round_began: Time,
    /// Time at which the next one begins, unless an event lets P4 begin first.
    pub(super) next: Option<Time>,
    pub(super) waiting: Option<WaitKind>,
    /// The operator has been waited for: the word to continue is for that wait, whatever is waited for when it comes.
    pub(super) operator_asked: bool,
    /// Time for which only the operator has been waited for, up to `operator_since`.
    pub(super) operator_waited: Duration,
    /// Since when only the operator has been waited for; `None`: something else is, or nothing.
    pub(super) operator_since: Option<Time>,
    pub(super) continued: bool,
    /// Per device: as last seen.
    pub(super) progress: Vec<DeviceProgress>,
    /// Per device: the generation whose initial bytes were acknowledged last.
    pub(super) acknowledged: Vec<Option<u32>>,
    pub(super) applied: u32,
    /// An iteration whose way there and back is being timed, and when it had been sent.
    pub(super) probe: Option<(u32, Time)>,
    /// Since when an APPLIED has been due; `None`: none is.
    pub(super) applied_expected: Option<Time>,
    /// The same for INITIAL_LOADED: a destination may go on applying RAM while a device hangs.
    pub(super) initial_expected: Option<Time>,
}

/// A reason why P3 does not end yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WaitKind {
    Initial,
    Convergence,
    Operator,
}

/// P4 and P5: the pause of the guest, up to the totals of the final pass.
#[derive(Debug, Default)]
pub(super) struct Pause {
    /// Time at which the pause was ordered.
    pub(super) asked_at: Option<Time>,
    /// Time at which the vCPUs were paused.
    pub(super) paused_at: Option<Time>,
    pub(super) guest_ran: bool,
    /// Of the manifest, just before the pause.
    pub(super) identity: [u8; 32],
    pub(super) predicted: Duration,
    /// The watchdog has ended the attempt.
    pub(super) over_limit: bool,
    /// The device whose answer has been waited for most of the pause, as a failure of its own.
    pub(super) awaited: Option<Failure>,
    /// Time spent on digests, which is no downtime.
    pub(super) verify: Duration,
    /// The digests are done, so the watchdog knows what to leave out.
    pub(super) source_digested: bool,
    pub(super) destination_digested: bool,
    pub(super) retreats: u32,
    pub(super) totals: Option<FinalEnd>,
}

/// P6 to P9: READY, COMMIT, the questions about it, and RUNNING.
#[derive(Debug, Default)]
pub(super) struct SourceCommit {
    pub(super) ready_at: Option<Time>,
    pub(super) running_at: Option<Time>,
    pub(super) ready: Option<Ready>,
    pub(super) running: Option<Running>,
    pub(super) left_undone: Vec<Failure>,
    /// The message that came while COMMITTING was on its way to the disk.
    pub(super) early: Option<EarlyAnswer>,
    pub(super) committed_at: Option<Time>,
    /// Since when its answer is asked for anew.
    pub(super) asked_since: Option<Time>,
    /// The process of this side ends, by this, and waits for the answer until then.
    pub(super) ends: Option<(String, Time)>,
    pub(super) ask_at: Option<Time>,
    pub(super) backoff: Duration,
}

/// The destination's message while COMMITTING is on its way to the disk: no COMMIT is sent after it.
#[derive(Clone, Debug)]
pub(super) enum EarlyAnswer {
    /// The destination will never run the guest.
    Declined(Failure),
    /// The destination gave up, or sent something illegal: the question is asked instead of sending COMMIT.
    Unclear,
}

/// An abort under way.
#[derive(Debug)]
pub(super) struct SourceRollback {
    pub(super) outcome: Abort,
    /// The journal says OWNER already.
    pub(super) journaled: bool,
}

/// The end of a rehearsal.
#[derive(Debug, Default)]
pub(super) struct RehearsalState {
    pub(super) result: RehearsalResult,
    /// The operator does not wait for the end.
    pub(super) cancelled: Option<Failure>,
    /// REHEARSED, if it came before this side was undone: what the destination could not release.
    pub(super) rehearsed: Option<Option<Failure>>,
    /// What this side could not undo by its end, since it was late.
    pub(super) late: Option<Failure>,
}

/// ABORT to the destination: due, or not to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AbortNotice {
    Send,
    /// Said, and the operator wanted it.
    SendCancelled,
    /// LIMITS_UNMET in its place.
    SendUnmet,
    /// Not sent: the destination knows, or cannot be reached.
    Omit,
}

impl SourceEngine {
    /// Asks for an action whose answer `state` waits for.
    pub(super) fn act(&mut self, state: State, action: SourceAction) {
        self.state = state;
        self.actions.push_back(action);
    }

    /// Journals the state that `step` leads to; what cannot be journaled is not done.
    pub(super) fn journal_step(&mut self, state: State, step: SourceStep) {
        match self.journal.next(step) {
            Ok(next) => self.act(state, SourceAction::Journal(next)),
            Err(error) => {
                self.abort(failure(Side::Source, self.phase, error.to_string(), ""), AbortNotice::Send)
            }
        }
    }

    pub(super) fn send(&mut self, message: Message) {
        if self.link {
            self.actions.push_back(SourceAction::Send(message));
        }
    }

    /// The destination must send `what` within `peer_timeout`.
    pub(super) fn expect_by(&mut self, what: &'static str, now: Time) {
        self.timer = Some(ExpectedAnswer::within(self.config.peer_timeout, what, now));
    }

    /// The destination must send `what`, and has work to do before it can.
    pub(super) fn expect_work(&mut self, what: &'static str, now: Time) {
        let timeout = work_timeout(self.config.peer_timeout);
        self.timer = Some(ExpectedAnswer::within(timeout, what, now));
    }

    pub(super) fn enter(&mut self, phase: Phase, now: Time) {
        self.phase = phase;
        self.phases.push((phase, now));
    }

    pub(super) fn finish(&mut self, outcome: SourceOutcome) {
        self.state = State::Done;
        self.timer = None;
        self.actions.push_back(SourceAction::Finish(outcome));
    }

    pub(super) fn unresolved(&mut self, why: String) {
        self.finish(SourceOutcome::Unresolved(why));
    }

    /// Whether the attempt can still be given up. `false`: it is too late, or already under way.
    pub(super) fn can_cancel(&self) -> bool {
        !matches!(
            self.state,
            State::JournalCommitting
                | State::AwaitingRunning
                | State::Asking
                | State::AskingLater
                | State::JournalReleased
                | State::CleaningUp
                | State::JournalDeclined
                | State::RollingBack
                | State::JournalOwner
                | State::Undoing
                | State::AwaitingRehearsed
                | State::Done
        )
    }

    /// Both sides agreed to compare digests of all RAM.
    pub(super) fn verify(&self) -> bool {
        self.config.verify
            && self.negotiated.is_some_and(|negotiated| negotiated.features & FEATURE_VERIFY != 0)
    }

    pub(super) fn next_epoch(&self) -> Epoch {
        self.config.epoch.next()
    }

    pub(super) fn with_device(&self, index: usize, failure: Failure) -> Failure {
        with_device(&self.config.devices, index, failure)
    }
}

impl State {
    /// Iterations have been sent, so their acknowledgements may come.
    pub(super) fn has_iterated(self) -> bool {
        matches!(
            self,
            Self::Sending
                | Self::Waiting
                | Self::Pausing
                | Self::ToP2p
                | Self::Retreating
                | Self::Resuming
                | Self::ToStopCopy
                | Self::SendingFinal
                | Self::ReleasingLocks
                | Self::AwaitingReady
                | Self::DigestingRam
        )
    }
}
