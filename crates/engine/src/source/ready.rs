//! P6: READY is compared with what was sent.

use std::time::Duration;

use vfio_migration_types::{Phase, Side};
use vfio_migration_wire::{Message, Ready};

use super::state::{AbortNotice, Pause, SourceEngine, State};
use crate::api::{SourceEvent, Time};
use crate::failure::compare;
use crate::ownership::SourceStep;

impl SourceEngine {
    pub(super) fn on_ready(&mut self, ready: Ready, now: Time) {
        self.timer = None;
        let Some(totals) = &self.pause.totals else { return };
        if let Err(cause) = compare(Side::Source, totals, &ready, &self.config.devices) {
            return self.abort(cause, AbortNotice::Send);
        }
        self.commit.ready = Some(ready);
        self.commit.ready_at = Some(now);
        if self.config.rehearse.is_some() {
            return self.end_rehearsal(None, now);
        }
        self.enter(Phase::Commit, now);
        self.journal_step(State::JournalCommitting, SourceStep::Commit);
    }

    /// Digests take their time; it is known only when they are done, and counted before the watchdog looks.
    pub(super) fn note_verify(&mut self, event: &SourceEvent) {
        let verify = match (self.state, event) {
            (State::SendingFinal, SourceEvent::FinalSent { verify, .. }) => *verify,
            (State::AwaitingReady, SourceEvent::Peer(Message::Ready(ready))) => {
                Duration::from_nanos(ready.verify_ns)
            }
            _ => return,
        };
        if self.verify() {
            self.pause.verify = self.pause.verify.saturating_add(verify);
        }
        // From here on the watchdog may look: the digest is done.
        self.pause.digesting_ends(self.state);
    }
}

impl Pause {
    fn digesting_ends(&mut self, state: State) {
        match state {
            State::SendingFinal => self.source_digested = true,
            State::AwaitingReady => self.destination_digested = true,
            _ => {}
        }
    }
}
