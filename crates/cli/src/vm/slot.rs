//! The slot for the guest and the session that may be under way, under one lock.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vfio_migration::{
    AwaitedAnswer, Control, Failure, IncomingControl, PendingRollback, Progress, UnresolvedMigration,
};
use vfio_migration_types::{Epoch, VmId};
use vfio_migration_vmm::machine::ReferenceMachine;

use crate::address::Address;
use crate::control::awaited::{AwaitedInfo, sentence};
use crate::control::failure::FailureInfo;
use crate::control::protocol::{MigrationInfo, MigrationStatus};
use crate::control::refused::Refused;
use crate::exit::CliError;

/// Time after which the end of the process does not wait for a session that something holds up.
const HELD_UP: Duration = Duration::from_millis(300);
/// Interval at which its thread is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// The place of the guest, and with it the work that the process may begin.
#[derive(Clone, Debug, Default)]
pub(super) enum Slot {
    /// The guest is here, running or paused.
    Here { machine: Arc<ReferenceMachine>, epoch: Epoch },
    /// No guest yet: its machine is being built.
    Preparing,
    /// No guest yet: this address waits for it. Without a machine, since something for it cannot be had just now, a guest that
    /// came would be refused.
    Awaited { machine: Option<Arc<ReferenceMachine>>, at: Address, not_ready: Option<String> },
    /// The guest has left, and its devices are being closed: for those who ask the migration is still under way.
    Leaving(LeftGuest),
    /// The guest has left: `to` there, or to that file.
    Left { left: LeftGuest, to: String },
    /// There is no guest, and none is awaited.
    #[default]
    Empty,
    /// Nobody knows which side owns the guest: it is paused here. The text says what is known, and what can be done.
    Unresolved {
        machine: Arc<ReferenceMachine>,
        epoch: Epoch,
        text: String,
        unresolved: Box<UnresolvedMigration>,
    },
    /// This side owns the guest, which a session left paused: it could not be started here, or not be let go on.
    OwnedNotStarted { machine: Arc<ReferenceMachine>, epoch: Epoch },
    /// No guest came the one time that it was waited for.
    Failed,
    /// The process is ending.
    Ended,
}

/// What is known of a guest once its machine is gone.
#[derive(Clone, Copy, Debug)]
pub(super) struct LeftGuest {
    pub(super) vm: VmId,
    /// Bytes of its RAM.
    pub(super) memory: u64,
    /// The epoch under which it is another's.
    pub(super) epoch: Epoch,
}

impl Slot {
    /// Why nothing can be done that takes a guest which is here and runs, or may run: `doing`, as in "could move".
    pub(super) fn refusal(&self, doing: &str) -> Refused {
        let nobody =
            |why: String| Refused::generic(format!("there is no guest here that could {doing}{why}"));
        match self {
            Self::Unresolved { text, .. } => Refused::generic(text.clone()),
            Self::Here { .. } => Refused::generic("the guest is here"),
            Self::OwnedNotStarted { .. } => Refused::generic(
                "a session left the guest paused here: `cont` tries to start it, and before that it can be neither moved nor saved; `quit --force` ends it with its process",
            ),
            Self::Preparing | Self::Awaited { .. } => nobody(": one is awaited".into()),
            Self::Leaving(_) => nobody(": it is leaving".into()),
            Self::Left { to, .. } => nobody(format!(": it has left for {to}")),
            Self::Empty | Self::Failed | Self::Ended => nobody(String::new()),
        }
    }

    /// The machine, in whichever state its guest is.
    pub(super) fn machine(&self) -> Option<&Arc<ReferenceMachine>> {
        match self {
            Self::Here { machine, .. }
            | Self::Unresolved { machine, .. }
            | Self::OwnedNotStarted { machine, .. } => Some(machine),
            Self::Awaited { machine, .. } => machine.as_ref(),
            Self::Preparing
            | Self::Leaving(_)
            | Self::Left { .. }
            | Self::Empty
            | Self::Failed
            | Self::Ended => None,
        }
    }

    /// The epoch under which this side owns the guest.
    pub(super) fn epoch(&self) -> Epoch {
        match self {
            Self::Here { epoch, .. }
            | Self::Unresolved { epoch, .. }
            | Self::OwnedNotStarted { epoch, .. }
            | Self::Leaving(LeftGuest { epoch, .. })
            | Self::Left { left: LeftGuest { epoch, .. }, .. } => *epoch,
            Self::Preparing | Self::Awaited { .. } | Self::Empty | Self::Failed | Self::Ended => Epoch(0),
        }
    }
}

/// The handle that steers a session, whichever way the guest goes.
#[derive(Clone, Debug)]
pub(super) enum Steering {
    Outgoing(Control),
    Incoming(IncomingControl),
}

impl Steering {
    /// Progress of the session that is under way, or of the last that was.
    pub(super) fn progress(&self) -> Option<Progress> {
        match self {
            Self::Outgoing(control) => Some(control.progress()),
            Self::Incoming(control) => control.progress().or(control.last_progress()),
        }
    }
}

/// The guest and its migration, under one lock, so that the two never contradict each other.
#[derive(Debug, Default)]
pub(super) struct VmState(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    slot: Slot,
    steering: Option<Steering>,
    /// The report of the last migration, once it has ended.
    ended: Option<MigrationInfo>,
    /// The handle of the session that `thread` runs. It outlives `steering`: after a guest has arrived, the thread answers for a
    /// while a source that lost the answer to its COMMIT, and is stopped by this.
    last: Option<Steering>,
    /// That what it left is undone was said.
    rollback_told: bool,
    /// What it left is undone, with which a guest that it had left paused went on.
    resumed: bool,
    thread: Option<JoinHandle<()>>,
}

/// What a session had left to be undone is over.
#[derive(Debug)]
pub(super) struct RollbackEnd {
    /// What could not be undone.
    pub(super) failures: Vec<Failure>,
    /// The session's report, which says so from now on.
    pub(super) last: MigrationInfo,
    /// A guest that the session had left paused went on with it.
    pub(super) resumed: bool,
}

impl State {
    /// A guest that waits, paused, for what its session left to be undone is let go on with the end of that: it is here again.
    fn settle(&mut self) {
        let Slot::OwnedNotStarted { machine, epoch } = &self.slot else { return };
        let restored = matches!(self.pending_rollback(), PendingRollback::Ended { restored: true, .. });
        if restored && self.steering.is_none() {
            machine.release();
            self.slot = Slot::Here { machine: machine.clone(), epoch: *epoch };
            self.resumed = true;
        }
    }

    fn pending_rollback(&self) -> PendingRollback {
        match &self.last {
            Some(Steering::Outgoing(control)) => control.pending_rollback(),
            Some(Steering::Incoming(_)) | None => PendingRollback::None,
        }
    }
}

impl VmState {
    /// What the last session left to be undone behind its end.
    pub(super) fn pending_rollback(&self) -> PendingRollback {
        self.lock().pending_rollback()
    }

    /// How what the last session left to be undone ended. Once, and not when another session has begun.
    pub(super) fn rollback_ended(&self) -> Option<RollbackEnd> {
        let mut state = self.lock();
        let PendingRollback::Ended { failures, .. } = state.pending_rollback() else { return None };
        if state.steering.is_some() || std::mem::replace(&mut state.rollback_told, true) {
            return None;
        }
        let resumed = state.resumed;
        let ended = state.ended.as_mut()?;
        ended.left_undone = failures.iter().map(FailureInfo::from).collect();
        // Nothing else is wrong with a rehearsal that came to its end.
        if ended.status == MigrationStatus::Rehearsed && !ended.incompatible {
            ended.error = failures.first().map(ToString::to_string);
        }
        Some(RollbackEnd { failures, last: ended.clone(), resumed })
    }

    /// Why nothing can be done with the guest in `slot` that takes one which is here and runs, or may run.
    pub(super) fn refusal(&self, slot: &Slot, doing: &str) -> Refused {
        match (slot, self.pending_rollback()) {
            (Slot::OwnedNotStarted { .. }, PendingRollback::UnderWay(awaited)) => still_undone(&awaited),
            _ => slot.refusal(doing),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.settle();
        state
    }

    /// Reads the slot, the session under way, and how the last one ended, all of one moment.
    pub(super) fn read<T>(
        &self,
        read: impl FnOnce(&Slot, Option<&Steering>, Option<&MigrationInfo>) -> T,
    ) -> T {
        let state = self.lock();
        read(&state.slot, state.steering.as_ref(), state.ended.as_ref())
    }

    pub(super) fn slot(&self) -> Slot {
        self.lock().slot.clone()
    }

    /// The handle of the session under way, or of the last that was.
    pub(super) fn last_steering(&self) -> Option<Steering> {
        self.lock().last.clone()
    }

    /// The guest that the last session left paused was started `at` this time.
    pub(super) fn set_started(&self, at: String) {
        if let Some(ended) = &mut self.lock().ended {
            ended.started = Some(at);
        }
    }

    pub(super) fn steering(&self) -> Option<Steering> {
        self.lock().steering.clone()
    }

    /// Replaces the slot if it `fits`; returns what was in it, or else what is in it.
    pub(super) fn put_if(&self, fits: impl FnOnce(&Slot) -> bool, slot: Slot) -> Result<Slot, Slot> {
        let mut state = self.lock();
        if fits(&state.slot) {
            // The old machine is dropped by the caller, after the lock is gone: closing its devices takes a moment.
            Ok(std::mem::replace(&mut state.slot, slot))
        } else {
            Err(state.slot.clone())
        }
    }

    /// Begins a migration unless one is under way, if the slot `fits`; the slot then `becomes` something else.
    pub(super) fn begin(
        &self,
        steering: Steering,
        fits: impl FnOnce(&Slot) -> bool,
        becomes: Option<Slot>,
        spawn: impl FnOnce() -> std::io::Result<JoinHandle<()>>,
    ) -> Result<(), BeginError> {
        let mut state = self.lock();
        if state.steering.is_some() {
            return Err(BeginError::UnderWay);
        }
        if !fits(&state.slot) {
            return Err(BeginError::Changed);
        }
        if let PendingRollback::UnderWay(awaited) = state.pending_rollback() {
            return Err(BeginError::RollbackPending(awaited));
        }
        // The thread of the last session has at most a late question to answer, which its journal answers too.
        if let Some(Steering::Incoming(control)) = state.last.take() {
            control.cancel();
        }
        if let Some(thread) = state.thread.take() {
            let _ = thread.join();
        }
        // The new thread needs this lock to end, so what is set after its start is set before its end.
        state.thread = Some(spawn().map_err(BeginError::Thread)?);
        state.last = Some(steering.clone());
        (state.rollback_told, state.resumed) = (false, false);
        state.steering = Some(steering);
        if let Some(slot) = becomes {
            state.slot = slot;
        }
        Ok(())
    }

    /// Ends a session of a wait that goes on: `info` is how.
    pub(super) fn end_attempt(&self, info: MigrationInfo) {
        self.lock().ended = Some(info);
    }

    /// Ends a wait to which nobody had come: the last session stays what it was.
    pub(super) fn end_wait(&self, slot: Slot) {
        let mut state = self.lock();
        state.steering = None;
        let old = std::mem::replace(&mut state.slot, slot);
        drop(state);
        drop(old);
    }

    /// Ends the session under way: `info` is how, `slot` where the guest is now if that changed.
    pub(super) fn end(&self, info: MigrationInfo, slot: Option<Slot>) {
        let mut state = self.lock();
        state.steering = None;
        state.ended = Some(info);
        let old = slot.map(|slot| std::mem::replace(&mut state.slot, slot));
        drop(state);
        drop(old);
    }

    /// Cancels what is under way, as the process is to end `by` this.
    pub(super) fn cancel_at_end(&self, by: &str) {
        match self.lock().last.clone() {
            Some(Steering::Outgoing(control)) => control.process_ends(by),
            Some(Steering::Incoming(control)) => control.process_ends(by),
            None => {}
        }
    }

    /// Waits for the session's thread to end. One that is cancelled and held up by what does not answer is left to itself after a
    /// while: the answers that it waits for are returned.
    pub(super) fn join(&self) -> Vec<AwaitedAnswer> {
        let (thread, session) = {
            let mut state = self.lock();
            (state.thread.take(), state.last.clone())
        };
        let Some(thread) = thread else { return Vec::new() };
        let mut held_up = None;
        while !thread.is_finished() {
            let progress = session.as_ref().and_then(Steering::progress);
            let awaited = progress.filter(|progress| progress.cancelling).map(|progress| progress.awaited);
            match awaited.filter(|awaited| !awaited.is_empty()) {
                Some(awaited) => {
                    let since = held_up.get_or_insert_with(Instant::now);
                    if since.elapsed() >= HELD_UP {
                        return awaited;
                    }
                }
                None => held_up = None,
            }
            std::thread::sleep(LOOK_EVERY);
        }
        let _ = thread.join();
        Vec::new()
    }
}

/// The reason why no migration was begun.
#[derive(Debug)]
pub(super) enum BeginError {
    UnderWay,
    /// The last session is still being undone.
    RollbackPending(Vec<AwaitedAnswer>),
    /// The guest is no longer where it was.
    Changed,
    Thread(std::io::Error),
}

impl BeginError {
    /// The refusal of the request; `changed` is its text where the guest is no longer where it was.
    pub(super) fn refused(self, changed: &str) -> Refused {
        match self {
            Self::UnderWay => Refused::new("MigrationActive", "a migration is already under way"),
            Self::RollbackPending(awaited) => still_undone(&awaited),
            Self::Changed => Refused::generic(changed),
            Self::Thread(error) => Refused::generic(CliError::caused("cannot make a thread", &error).text),
        }
    }
}

/// The last session is still being undone, which waits for these answers.
pub(super) fn still_undone(awaited: &[AwaitedAnswer]) -> Refused {
    let awaited: Vec<_> = awaited.iter().map(AwaitedInfo::from).collect();
    let text = format!(
        "the last session is still being undone: {}; another can begin once it has, and a guest that it left paused goes on then (`status` tells); `quit --force` waits for nothing, and ends a guest that is here",
        sentence(&awaited)
    );
    Refused::new("MigrationActive", text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_of_two_gets_the_place() {
        let state = VmState::default();
        let free = |slot: &Slot| matches!(slot, Slot::Empty | Slot::Failed);
        assert!(matches!(state.put_if(free, Slot::Preparing), Ok(Slot::Empty)));
        assert!(matches!(state.put_if(free, Slot::Preparing), Err(Slot::Preparing)));
        assert!(matches!(state.slot(), Slot::Preparing));
    }
}
