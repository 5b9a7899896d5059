//! P5 and P6: the last of everything is loaded and verified, the storage locked, and READY said.

use vfio_migration_types::Phase;
use vfio_migration_wire::{Final, FinalEnd, Message, Ready};

use super::{Destination, State};
use crate::api::{DestinationAction, Time};
use crate::failure::{compare, failure};
use crate::ownership::{DestinationState, DestinationStep};

/// What P5 and P6 remember.
#[derive(Debug, Default)]
pub(super) struct Last {
    pub(super) guest_ran: bool,
    locks: Locks,
    totals: Option<FinalEnd>,
    pub(super) ready: Option<Ready>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Locks {
    #[default]
    Theirs,
    Taking,
    Ours,
}

impl Destination {
    pub(super) fn on_final(&mut self, last: Final, now: Time) {
        if last.identity != self.incoming.identity {
            let text = "the source's machine is not what was compared any more: its manifest has changed since the offer";
            let remedy = "migrate again, so that what it is now is compared";
            return self.abort(failure(Phase::Quiesce, text, remedy), now);
        }
        self.last.guest_ran = last.guest_ran;
        self.phase = Phase::Final;
        self.state = State::Last;
    }

    pub(super) fn on_locks_free(&mut self, now: Time) {
        if self.last.locks != Locks::Theirs {
            return self
                .abort(failure(self.phase, "the source freed its locks twice: protocol error", ""), now);
        }
        self.last.locks = Locks::Taking;
        self.act(State::Last, DestinationAction::TakeLocks);
    }

    pub(super) fn on_locks_taken(&mut self, now: Time) {
        if self.last.locks != Locks::Taking {
            return self.abort(self.error("the session took locks unasked: a defect of this program"), now);
        }
        self.busy = false;
        self.last.locks = Locks::Ours;
        self.load_when_complete();
    }

    pub(super) fn on_final_end(&mut self, totals: FinalEnd, now: Time) {
        // A rehearsal leaves the locks where they are.
        let locked = self.last.locks != Locks::Theirs || self.rehearses();
        if self.last.totals.is_some() || !locked {
            let text = "the source ended the final pass twice, or before it freed its locks: protocol error";
            return self.abort(failure(self.phase, text, ""), now);
        }
        self.last.totals = Some(totals);
        self.load_when_complete();
    }

    fn load_when_complete(&mut self) {
        let locked = self.last.locks == Locks::Ours || self.rehearses();
        let Some(totals) = self.last.totals.clone().filter(|_| locked) else { return };
        self.phase = Phase::Ready;
        self.act(State::Verifying, DestinationAction::Load { totals });
    }

    pub(super) fn on_loaded(&mut self, ready: Ready, now: Time) {
        self.busy = false;
        let Some(totals) = &self.last.totals else { return };
        // The source compares too. Here it is caught before READY is in the journal.
        if let Err(cause) = compare(totals, &ready, &[]) {
            return self.abort(cause, now);
        }
        if self.rehearses() {
            self.send(Message::Ready(ready));
            self.state = State::Ready;
            return self.owe("END_REHEARSAL", now);
        }
        self.last.ready = Some(ready);
        self.journal_step(State::JournalReady, DestinationStep::Ready, now);
    }

    pub(super) fn on_ready_journaled(&mut self, now: Time) {
        self.busy = false;
        self.journal = Some(DestinationState::Ready);
        let Some(ready) = self.last.ready.clone() else { return };
        self.teardown.source_may_have_committed = true;
        self.send(Message::Ready(ready));
        self.state = State::Ready;
        self.owe("COMMIT", now);
    }
}
