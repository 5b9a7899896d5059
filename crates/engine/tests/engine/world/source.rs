//! The source's session and machine, simulated.

use std::time::Duration;

use vfio_migration_engine::ownership::SourceState;
use vfio_migration_engine::{
    Barrier, DeviceProgress, IterationReport, SourceAction, SourceEvent, SourceOutcome, Time,
};
use vfio_migration_types::CancelCause;
use vfio_migration_wire::{DeviceTotal, FinalEnd, Message};

use super::script::{Direction, Sabotage, Script};
use super::{Guest, Happening, World, failed};

#[derive(Debug)]
pub struct Side {
    pub guest: Guest,
    guest_ran: bool,
    pub disk: SourceState,
    writing: Option<SourceState>,
    pub outcome: Option<SourceOutcome>,
    pub ended_at: Option<Time>,
    pub killed: bool,
    /// Actions that are answered, begun so far, names included.
    pub actions: Vec<String>,
    action: u64,
    busy: bool,
    ram_dirty: u64,
    dirtied_at: Time,
    devices: Vec<DeviceProgress>,
    pub paused_at: Option<Time>,
    pub resumed_at: Option<Time>,
    pub stopped: Duration,
    pub dirty_logging: bool,
    pub holds_locks: bool,
}

impl Side {
    pub fn new(script: &Script) -> Self {
        let devices = script.devices.iter().map(|device| DeviceProgress {
            initial_left: (device.flags.pre_copy && device.precopy_info).then_some(device.initial),
            dirty_left: (device.flags.pre_copy && device.precopy_info).then_some(0),
            stop_copy: Some(device.stop_copy),
            generation: 0,
            initial_sent: false,
        });
        Self {
            guest: if script.guest_runs { Guest::Runs } else { Guest::Paused },
            guest_ran: script.guest_runs,
            disk: SourceState::Owner,
            writing: None,
            outcome: None,
            ended_at: None,
            killed: false,
            actions: Vec::new(),
            action: 0,
            busy: false,
            ram_dirty: script.ram,
            dirtied_at: Time::ZERO,
            devices: devices.collect(),
            paused_at: None,
            resumed_at: None,
            stopped: Duration::ZERO,
            dirty_logging: false,
            holds_locks: true,
        }
    }

    pub(super) fn interrupted_by_kill(&mut self, torn: bool) {
        if let (true, Some(state)) = (torn, self.writing.take()) {
            self.disk = state;
        }
    }

    fn dirty(&mut self, script: &Script, now: Time) {
        let time = now.saturating_sub(self.dirtied_at);
        self.dirtied_at = now;
        if self.guest != Guest::Runs {
            return;
        }
        let amount = |rate: u64| u64::try_from(u128::from(rate) * time.as_nanos() / 1_000_000_000).unwrap();
        let fresh = amount(script.ram_dirty_rate);
        self.ram_dirty = self.ram_dirty.max((self.ram_dirty + fresh).min(script.ram_working_set));
        for (device, script) in self.devices.iter_mut().zip(&script.devices) {
            if let Some(dirty) = &mut device.dirty_left {
                *dirty = (*dirty + amount(script.dirty_rate)).min(script.dirty_most);
            }
        }
    }
}

impl World {
    pub(super) fn source_action(&mut self, action: SourceAction) {
        match &action {
            SourceAction::Send(message) => return self.source_says(message.clone()),
            SourceAction::Finish(outcome) => {
                self.side.outcome = Some(outcome.clone());
                self.side.ended_at = Some(self.now);
                return self.close(true);
            }
            _ => {}
        }
        let index = self.side.actions.len();
        self.side.actions.push(format!("{action:?}"));
        let interrupts = action == SourceAction::RollBack;
        if interrupts {
            self.side.action += 1_000_000;
            if self.script.late_answers && self.side.busy {
                let event = SourceEvent::Failed(failed("interrupted"));
                self.after(Duration::ZERO, Happening::Source(event));
            }
        }
        self.side.busy = true;
        self.side.action += 1;
        let number = self.side.action;
        let script = self.script.clone();
        if self.script.source_fails_at == Some(index) {
            let event = match action {
                // It says what it could not do.
                SourceAction::RollBack => SourceEvent::RolledBack {
                    reset: vec![],
                    not_reset: vec![],
                    locks_lost: vec!["disk0".to_owned()],
                    restored: false,
                },
                _ => SourceEvent::Failed(failed("scripted failure at the source")),
            };
            return self.after(script.action, Happening::SourceAnswer(number, event));
        }
        let now = self.now;
        let (delay, event) = match action {
            SourceAction::SetUp => {
                self.side.dirty_logging = true;
                (script.action, SourceEvent::SetUp { devices: self.side.devices.clone() })
            }
            SourceAction::SendIteration { iteration } => {
                self.side.dirty(&script, now);
                let report = self.iteration();
                self.after(report.took, Happening::SourceAnswer(number, SourceEvent::IterationSent(report)));
                if self.script.cancel_at_action == Some(index) {
                    self.at(now, Happening::Source(SourceEvent::Cancel(CancelCause::Operator)));
                }
                let _ = iteration;
                return;
            }
            SourceAction::Judge(_) => match &script.refuse_here {
                Some(reasons) => (script.judging, SourceEvent::Refused(reasons.clone())),
                None => (script.judging, SourceEvent::Judged),
            },
            SourceAction::Pause => {
                let (guest_ran, identity) = (self.side.guest_ran, [u8::from(script.changed); 32]);
                (script.action, SourceEvent::Paused { guest_ran, identity })
            }
            SourceAction::Devices(barrier) => {
                (script.arc, SourceEvent::Reached { barrier, devices: self.side.devices.clone() })
            }
            SourceAction::Resume => (script.action, SourceEvent::Resumed),
            SourceAction::SendFinal { verify } => {
                let device: u64 = self
                    .side
                    .devices
                    .iter()
                    .map(|device| device.dirty_left.unwrap_or(0) + device.stop_copy.unwrap_or(0))
                    .sum();
                let digest = if verify { script.digest } else { Duration::ZERO };
                let took = time(self.side.ram_dirty + device, script.bandwidth) + script.action;
                let totals = FinalEnd {
                    ram_pages: 1234,
                    ram_digest: verify.then_some([3; 32]),
                    sections: 5,
                    devices: vec![DeviceTotal { bytes: 77, digest: [4; 32] }; script.devices.len()],
                };
                (took + digest, SourceEvent::FinalSent { totals, verify: digest })
            }
            SourceAction::ReleaseLocks => (script.action, SourceEvent::LocksReleased),
            SourceAction::Journal(state) => {
                self.side.writing = Some(state);
                (script.journal, SourceEvent::Journaled(state))
            }
            SourceAction::RollBack => (
                script.arc + script.action,
                SourceEvent::RolledBack {
                    reset: vec![],
                    not_reset: vec![],
                    locks_lost: vec![],
                    restored: true,
                },
            ),
            SourceAction::AskAgain => return self.ask(),
            SourceAction::CleanUp => (script.action, SourceEvent::CleanedUp),
            other => panic!("{other:?}"),
        };
        self.after(delay, Happening::SourceAnswer(number, event));
        if self.script.cancel_at_action == Some(index) {
            self.at(now, Happening::Source(SourceEvent::Cancel(CancelCause::Operator)));
        }
    }

    fn iteration(&mut self) -> IterationReport {
        let script = &self.script;
        let mut bytes = self.side.ram_dirty;
        self.side.ram_dirty = 0;
        for (device, script) in self.side.devices.iter_mut().zip(&script.devices) {
            bytes += device.dirty_left.unwrap_or(0) + device.initial_left.unwrap_or(0);
            device.dirty_left = device.dirty_left.map(|_| 0);
            device.initial_left = device.initial_left.map(|_| 0);
            device.initial_sent |= script.flags.pre_copy && script.precopy_info;
        }
        let took = time(bytes, script.bandwidth) + Duration::from_micros(200);
        IterationReport { wire_bytes: bytes, took, ..IterationReport::default() }
    }

    /// What an action does to the world, at its end.
    pub(super) fn source_answer(&mut self, action: u64, mut event: SourceEvent) {
        if self.source.is_none() {
            return;
        }
        if action + 500_000 < self.side.action {
            return self.note(format!("interrupted: {event:?}"));
        }
        let script = self.script.clone();
        self.side.busy = false;
        match &mut event {
            SourceEvent::IterationSent(report) => self.iteration_ends(report),
            SourceEvent::Paused { .. } => {
                self.side.dirty(&script, self.now);
                self.side.guest = Guest::Paused;
                self.side.paused_at = Some(self.now);
            }
            SourceEvent::Resumed => self.source_runs(),
            SourceEvent::Reached { barrier: Barrier::P2p, devices } => {
                for (device, script) in self.side.devices.iter_mut().zip(&mut self.script.devices) {
                    if script.reinit_at_p2p > 0 {
                        script.reinit_at_p2p -= 1;
                        device.generation += 1;
                        device.initial_left = Some(script.initial);
                        device.initial_sent = false;
                    }
                }
                devices.clone_from(&self.side.devices);
            }
            SourceEvent::LocksReleased => self.side.holds_locks = false,
            SourceEvent::Journaled(state) => {
                self.side.writing = None;
                if script.sabotage != Some(Sabotage::JournalLies) {
                    self.side.disk = *state;
                }
            }
            SourceEvent::RolledBack { restored, .. } => {
                self.side.dirty_logging = false;
                self.side.holds_locks = true;
                if *restored && script.sabotage != Some(Sabotage::RollbackForgetsTheGuest) {
                    self.source_runs();
                }
            }
            SourceEvent::CleanedUp => {
                self.side.dirty_logging = false;
                self.side.guest = Guest::None;
            }
            _ => {}
        }
        self.tell_source(event);
    }

    fn source_runs(&mut self) {
        if self.side.guest_ran {
            self.side.dirtied_at = self.now;
            self.side.guest = Guest::Runs;
            self.side.resumed_at = Some(self.now);
            if let Some(paused_at) = self.side.paused_at {
                self.side.stopped = self.now - paused_at;
            }
        }
    }

    fn iteration_ends(&mut self, report: &mut IterationReport) {
        let script = self.script.clone();
        self.side.dirty(&script, self.now);
        let iteration = u32::try_from(
            self.side.actions.iter().filter(|action| action.starts_with("SendIteration")).count(),
        )
        .unwrap();
        for (index, device) in self.side.devices.clone().iter().enumerate() {
            let (Ok(number), true) = (u16::try_from(index), device.initial_sent) else { continue };
            let sent = format!("InitialSent {{ device: {number}, generation: {} }}", device.generation);
            if !self.link.to_destination.contains(&sent) {
                self.source_says(Message::InitialSent { device: number, generation: device.generation });
            }
        }
        self.source_says(Message::EndIteration { iteration });
        for (device, script) in self.side.devices.iter_mut().zip(&script.devices) {
            if script.reinit_at.contains(&iteration) {
                device.generation += 1;
                device.initial_left = Some(script.initial);
                device.initial_sent = false;
            }
        }
        report.ram_left = self.side.ram_dirty;
        report.devices.clone_from(&self.side.devices);
    }

    fn source_says(&mut self, mut message: Message) {
        if let (Message::Begin { lease }, true) = (&mut message, self.script.stale_lease) {
            lease[0] ^= 1;
        }
        if matches!(message, Message::Commit(_)) && self.side.disk != SourceState::Committing {
            self.violated("COMMIT without COMMITTING in the journal");
        }
        self.send(Direction::ToDestination, message);
    }
}

fn time(bytes: u64, bandwidth: u64) -> Duration {
    let ns = u128::from(bytes) * 1_000_000_000 / u128::from(bandwidth);
    Duration::from_nanos(u64::try_from(ns).unwrap())
}
