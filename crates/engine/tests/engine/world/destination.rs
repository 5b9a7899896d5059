//! The destination's session and machine, simulated.

use std::time::Duration;

use vfio_migration_engine::ownership::DestinationState;
use vfio_migration_engine::{DestinationAction, DestinationEvent, DestinationOutcome, Time};
use vfio_migration_types::{CancelCause, GuestOutcome};
use vfio_migration_wire::{Applied, Message, Ready, Running};

use super::script::{Direction, Sabotage};
use super::{EPOCH, Guest, Happening, World, failed};

#[derive(Debug)]
pub struct Side {
    pub guest: Guest,
    pub ever_started: bool,
    pub started_at: Option<Time>,
    pub disk: Option<DestinationState>,
    writing: Option<DestinationState>,
    pub outcome: Option<DestinationOutcome>,
    pub ended_at: Option<Time>,
    pub killed: bool,
    pub restarted: bool,
    pub actions: Vec<String>,
    action: u64,
    busy: bool,
    pub question: Option<u64>,
    pub reserved: bool,
    device_bytes: u64,
    loaded_until: Time,
}

impl Default for Side {
    fn default() -> Self {
        Self {
            guest: Guest::None,
            ever_started: false,
            started_at: None,
            disk: None,
            writing: None,
            outcome: None,
            ended_at: None,
            killed: false,
            restarted: false,
            actions: Vec::new(),
            action: 0,
            busy: false,
            question: None,
            reserved: false,
            device_bytes: 0,
            loaded_until: Time::ZERO,
        }
    }
}

impl Side {
    pub(super) fn interrupted_by_kill(&mut self, torn: bool) {
        if let (true, Some(state)) = (torn, self.writing.take()) {
            self.disk = Some(state);
        }
    }
}

impl World {
    /// Bulk is loaded in the background; its end is reported in order.
    pub(super) fn destination_hears(&mut self, message: Message) {
        let loads = match &message {
            Message::InitialSent { device, generation } => {
                let load = self.script.devices[usize::from(*device)].load;
                self.other.loaded_until = self.other.loaded_until.max(self.now) + load;
                self.other.device_bytes += self.script.devices[usize::from(*device)].initial;
                Some(DestinationEvent::InitialLoaded { device: *device, generation: *generation })
            }
            Message::EndIteration { iteration } => {
                self.other.loaded_until = self.other.loaded_until.max(self.now) + Duration::from_micros(500);
                Some(DestinationEvent::Applied(Applied {
                    iteration: *iteration,
                    device_bytes: self.other.device_bytes,
                    device_ns: self.other.device_bytes / 2,
                }))
            }
            _ => None,
        };
        self.tell_destination(DestinationEvent::Peer(message));
        if let Some(event) = loads {
            let number = self.other.action;
            self.at(self.other.loaded_until, Happening::DestinationAnswer(number + 100, event));
        }
    }

    pub(super) fn destination_action(&mut self, action: DestinationAction) {
        match &action {
            DestinationAction::Send(message) => return self.destination_says(message.clone()),
            DestinationAction::Answer(message) => {
                if let Some(question) = self.other.question {
                    self.answer(question, message.clone());
                }
                return;
            }
            DestinationAction::Finish(outcome) => {
                self.other.outcome = Some(outcome.clone());
                self.other.ended_at = Some(self.now);
                return self.close(false);
            }
            _ => {}
        }
        let index = self.other.actions.len();
        self.other.actions.push(format!("{action:?}"));
        let interrupts = matches!(
            action,
            DestinationAction::Journal(DestinationState::Aborted) | DestinationAction::Release
        );
        if interrupts {
            self.other.action += 1_000_000;
            if self.script.late_answers && self.other.busy {
                let event = DestinationEvent::Failed(failed("interrupted"));
                self.after(Duration::ZERO, Happening::Destination(event));
            }
        }
        self.other.busy = true;
        self.other.action += 1;
        let number = self.other.action;
        if self.script.destination_cancel_at_action == Some(index) {
            self.at(self.now, Happening::Destination(DestinationEvent::Cancel(CancelCause::Operator)));
        }
        let script = self.script.clone();
        if let DestinationAction::Start { .. } = action {
            // From here on a device may run.
            self.other.ever_started = true;
            if self.other.disk != Some(DestinationState::Owner) {
                self.violated("Start without OWNER in the journal");
            }
        }
        let start_fails = script.start_fails && matches!(action, DestinationAction::Start { .. });
        if start_fails || self.script.destination_fails_at == Some(index) {
            let event = DestinationEvent::Failed(failed("scripted failure at the destination"));
            return self.after(script.action, Happening::DestinationAnswer(number, event));
        }
        let (delay, event) = match action {
            DestinationAction::Reserve(_) => {
                self.other.reserved = true;
                match &script.refuse {
                    Some(reasons) => (script.action, DestinationEvent::Refused(reasons.clone())),
                    None => {
                        let (manifest, reasons, identity) = (b"{}".to_vec(), Vec::new(), [0; 32]);
                        (script.action, DestinationEvent::Reserved { manifest, reasons, identity })
                    }
                }
            }
            DestinationAction::BeginResuming => (script.action, DestinationEvent::ResumingBegun),
            DestinationAction::TakeLocks => (script.action, DestinationEvent::LocksTaken),
            DestinationAction::Load { totals } => {
                let verify = if totals.ram_digest.is_some() { script.digest } else { Duration::ZERO };
                let mut ready = Ready {
                    ram_pages: totals.ram_pages,
                    ram_digest: totals.ram_digest,
                    verify_ns: u64::try_from(verify.as_nanos()).unwrap(),
                    sections: totals.sections,
                    devices: totals.devices,
                    vectors: 2,
                };
                if let Some(corrupt) = script.corrupt.filter(|_| !script.corrupt_by_liar) {
                    corrupt.apply(&mut ready);
                }
                (script.arc + verify, DestinationEvent::Loaded(ready))
            }
            DestinationAction::Journal(state) => {
                self.other.writing = Some(state);
                (script.journal, DestinationEvent::Journaled(state))
            }
            DestinationAction::Start { epoch, run_guest } => {
                assert_eq!(epoch, EPOCH.next());
                let guest = if run_guest { GuestOutcome::Running } else { GuestOutcome::Paused };
                let running = Running { epoch, guest, boot_id: [1; 16], at_ns: 1 };
                (script.arc, DestinationEvent::Started(running))
            }
            DestinationAction::Release => (script.action, DestinationEvent::Released),
            other => panic!("{other:?}"),
        };
        self.after(delay, Happening::DestinationAnswer(number, event));
    }

    pub(super) fn destination_answer(&mut self, action: u64, event: DestinationEvent) {
        if self.destination.is_none() {
            return;
        }
        if action + 500_000 < self.other.action {
            return self.note(format!("interrupted: {event:?}"));
        }
        if !matches!(event, DestinationEvent::InitialLoaded { .. } | DestinationEvent::Applied(_)) {
            self.other.busy = false;
        }
        match &event {
            DestinationEvent::Journaled(state) => {
                self.other.writing = None;
                if self.script.sabotage != Some(Sabotage::JournalLies) {
                    self.other.disk = Some(*state);
                }
            }
            DestinationEvent::Started(running) => {
                self.other.guest = if running.guest.runs() { Guest::Runs } else { Guest::Paused };
                self.other.started_at = Some(self.now);
            }
            DestinationEvent::Released => self.other.reserved = false,
            _ => {}
        }
        self.tell_destination(event);
    }

    fn destination_says(&mut self, mut message: Message) {
        match &message {
            Message::Declined(_) if self.other.disk != Some(DestinationState::Aborted) => {
                self.violated("DECLINED without ABORTED in the journal");
            }
            Message::Running(_) if self.other.disk != Some(DestinationState::Owner) => {
                self.violated("RUNNING without OWNER in the journal");
            }
            Message::Ready(_)
                if self.script.rehearse.is_none() && self.other.disk != Some(DestinationState::Ready) =>
            {
                self.violated("READY without READY in the journal");
            }
            _ => {}
        }
        if let (Message::Ready(ready), true, Some(corrupt)) =
            (&mut message, self.script.corrupt_by_liar, self.script.corrupt)
        {
            corrupt.apply(ready);
        }
        self.send(Direction::ToSource, message);
    }
}
