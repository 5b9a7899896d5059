//! P6: everything that was received is put where it belongs, in the one order that works.
//!
//! Interrupts are configured by ioctl and config space is emulated, so neither is in a device's own state. They go back
//! while the devices are still in RESUMING, behind the interrupt controller's state: config space, BARs and
//! PCI_COMMAND, then all routes in one commit, then each device's eventfds, and only then RESUMING → STOP.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use vfio_migration_device::{PciError, PciState};
use vfio_migration_engine::ram_differs;
use vfio_migration_memory::GuestRam;
use vfio_migration_types::{Failure, PAGE_SIZE, Phase, RamOffset, Run, Side, error_chain};
use vfio_migration_wire::{DeviceTotal, FinalEnd, Message, RamDigests, Ready};

use crate::incoming_machine::{IncomingMachine, MachineState};
use crate::machine::{Machine, Section};
use crate::ram::digests::{ComparedDigests, FirstDifference, digest_chunks, find_first_difference};
use crate::session::fail::InPhase;
use crate::session::lock::lock;
use crate::session::parallel::for_each_device_parallel;
use crate::session::work_error::{self, WorkError};

use crate::destination::attempt::ArrivingDevice;
use crate::destination::worker::Worker;
use crate::device_state::receive::DeviceReceiver;
use crate::device_state::tracked::ask_pci;

const PHASE: Phase = Phase::Ready;
/// Time that the search may take, beside twice that of the digest of all RAM: its first round is as long as that, on both
/// sides at once. The guest is paused meanwhile.
const SEARCH_LIMIT: Duration = Duration::from_secs(2);
/// Time after which a wait looks whether it was interrupted.
const SLICE: Duration = Duration::from_millis(20);

impl Worker<'_, '_, '_> {
    /// Loads and verifies. On success nothing but COMMIT is missing.
    pub(super) fn load(&mut self, totals: &FinalEnd) -> Result<Ready, WorkError> {
        let machine = self.machine(PHASE)?;
        let Some(sink) = self.shared.sink.get() else {
            return Err(Failure::new(
                Side::Destination,
                PHASE,
                "nothing was received: a defect of this program",
            )
            .into());
        };
        let begun = Instant::now();
        let devices = self.devices_loaded(&sink.devices, totals)?;
        self.step("device state", begun.elapsed());

        let begun = Instant::now();
        // Before anything here writes RAM (loading a paravirtual clock may).
        let ram = machine.ram();
        let ram_digest = match totals.ram_digest {
            Some(_) => Some(ram.digest().map_err(|error| error.in_phase(Side::Destination, PHASE))?),
            None => None,
        };
        let verify = begun.elapsed();
        self.shared.interrupt.check()?;
        if let (Some(sent), Some(got)) = (totals.ram_digest, ram_digest)
            && sent != got
        {
            return Err(self.ram_differs(&ram, sent, got, verify)?.into());
        }

        let begun = Instant::now();
        let sections = std::mem::take(&mut *lock(&sink.sections));
        let count = u32::try_from(sections.len()).unwrap_or(u32::MAX);
        if count != totals.sections {
            let text =
                format!("{count} sections of machine state arrived where {} were sent", totals.sections);
            return Err(Failure::new(Side::Destination, PHASE, text).into());
        }
        let sections = self.take_pci_states(sections)?;
        let machine = self.finish(machine.as_ref(), sections)?;
        self.step("machine state", begun.elapsed());

        let vectors = self.put_interrupts_back(machine.as_ref())?;

        let begun = Instant::now();
        let finished =
            for_each_device_parallel(self.devices.iter_mut(), |incoming| match incoming.session.take() {
                Some(session) => {
                    session.finish().map_err(|error| error.in_phase(Side::Destination, PHASE).into())
                }
                None => Ok(()),
            });
        work_error::worst_of(finished)?;
        self.step("devices RESUMING to STOP", begun.elapsed());

        Ok(Ready {
            ram_pages: sink.ram.pages(),
            ram_digest,
            verify_ns: if ram_digest.is_some() {
                u64::try_from(verify.as_nanos()).unwrap_or(u64::MAX)
            } else {
                0
            },
            sections: count,
            devices,
            vectors,
        })
    }

    /// Waits for the devices' threads, and takes their sessions back.
    fn devices_loaded(
        &mut self,
        queues: &[Arc<DeviceReceiver>],
        totals: &FinalEnd,
    ) -> Result<Vec<DeviceTotal>, WorkError> {
        if totals.devices.len() != queues.len() {
            let text = format!("the source sent {} devices where {} are", totals.devices.len(), queues.len());
            return Err(Failure::new(Side::Destination, PHASE, text).into());
        }
        let mut loaded = Vec::with_capacity(queues.len());
        for ((incoming, queue), sent) in self.devices.iter_mut().zip(queues).zip(&totals.devices) {
            let (session, total) = queue.complete(&self.shared.interrupt)?;
            incoming.session = Some(session);
            if total != *sent {
                let text =
                    format!("{} bytes of state were written where {} were sent", total.bytes, sent.bytes);
                return Err(Failure::new(Side::Destination, PHASE, text)
                    .of_device(incoming.moved.device.id())
                    .into());
            }
            loaded.push(total);
        }
        Ok(loaded)
    }

    /// Makes the machine of its state, and takes the functions that come with it.
    fn finish(
        &mut self,
        machine: &dyn IncomingMachine,
        sections: Vec<Section>,
    ) -> Result<Arc<dyn Machine>, WorkError> {
        let function = |incoming: &ArrivingDevice| {
            Some((incoming.moved.device.id().clone(), incoming.pci_state.clone()?))
        };
        let functions = self.devices.iter().filter_map(function).collect();
        let machine = machine
            .finish(MachineState { sections, functions })
            .map_err(|error| error.in_phase(Side::Destination, PHASE))?;
        *lock(&self.shared.finished) = Some(Arc::clone(&machine));
        let mut devices = Vec::new();
        for incoming in self.devices.iter_mut().filter(|incoming| incoming.pci_later) {
            if devices.is_empty() {
                devices = machine.devices();
            }
            let id = incoming.moved.device.id();
            let finished = devices.iter().find(|finished| finished.device.id() == id);
            let Some(function) = finished.and_then(|finished| finished.pci.clone()) else {
                let text = "the finished machine has no PCI function for it";
                return Err(Failure::new(Side::Destination, PHASE, text).of_device(id).into());
            };
            incoming.moved.pci = Some(function);
        }
        Ok(machine)
    }

    /// Gives each device its PCI state; what is left is the machine's own.
    fn take_pci_states(&mut self, mut sections: Vec<Section>) -> Result<Vec<Section>, WorkError> {
        for incoming in &mut self.devices {
            if incoming.moved.pci.is_none() && !incoming.pci_later {
                continue;
            }
            let id = incoming.moved.device.id();
            let name = PciState::section_name(&incoming.name);
            let at = sections.iter().position(|section| section.name == name);
            let Some(section) = at.map(|at| sections.remove(at)) else {
                return Err(Failure::new(Side::Destination, PHASE, "the source sent no PCI state for it")
                    .of_device(id)
                    .into());
            };
            if section.version != 1 {
                let text =
                    format!("its PCI state has version {}, and this side reads version 1", section.version);
                return Err(Failure::new(Side::Destination, PHASE, text).of_device(id).into());
            }
            let state = PciState::decode(&section.bytes)
                .map_err(|error| Failure::new(Side::Destination, PHASE, error_chain(&error)).of_device(id))?;
            incoming.pci_state = Some(state);
        }
        if let Some(left) = sections.iter().find(|section| section.name.starts_with("pci.")) {
            let text = format!("the section '{}' belongs to no device of this machine", left.name);
            return Err(Failure::new(Side::Destination, PHASE, text).into());
        }
        Ok(sections)
    }

    fn put_interrupts_back(&mut self, machine: &dyn Machine) -> Result<u32, WorkError> {
        let begun = Instant::now();
        let functions: Vec<_> = self
            .devices
            .iter()
            .filter_map(|incoming| {
                let state = incoming.pci_state.as_ref()?;
                let moved = &incoming.moved;
                Some((moved.pci.as_ref()?, state, &incoming.rules, moved))
            })
            .collect();
        let answers = &self.shared.answers;
        // Each function has a BAR mapped by every other device: of n devices that is n times n - 1 requests, which go to n servers
        // at once.
        let restored = for_each_device_parallel(&functions, |(pci, state, rules, moved)| {
            ask_pci(answers, moved, || pci.restore_config(state, rules))
        });
        let restored = restored.into_iter().collect::<Result<Vec<()>, PciError>>();
        restored.map_err(|error| error.in_phase(Side::Destination, PHASE))?;
        self.step("config space and BARs", begun.elapsed());

        let begun = Instant::now();
        let router = machine.irq_router();
        for (pci, state, _, moved) in &functions {
            let staged = ask_pci(answers, moved, || pci.stage_interrupts(state));
            staged.map_err(|error| error.in_phase(Side::Destination, PHASE))?;
        }
        router.commit().map_err(|error| -> Failure {
            Failure::new(
                Side::Destination,
                PHASE,
                format!("committing the interrupt routes failed: {}", error_chain(error.as_ref())),
            )
        })?;
        self.step("interrupt routes", begun.elapsed());

        let begun = Instant::now();
        // Each gives its own device eventfds, behind the one commit of all routes: requests to n servers, at once.
        let connected = for_each_device_parallel(&functions, |(pci, state, _, moved)| {
            ask_pci(answers, moved, || pci.connect_interrupts(state))
        });
        let connected = connected.into_iter().collect::<Result<Vec<u32>, PciError>>();
        let connected = connected.map_err(|error| error.in_phase(Side::Destination, PHASE))?;
        let vectors = connected.into_iter().fold(0, u32::saturating_add);
        self.step("interrupts connected", begun.elapsed());
        Ok(vectors)
    }
}

impl Worker<'_, '_, '_> {
    /// The failure of RAM that differs, with the first page that does, if it can be found in time. `digesting` is the time
    /// that the digest of all RAM took.
    pub(super) fn ram_differs(
        &self,
        ram: &GuestRam,
        sent: [u8; 32],
        got: [u8; 32],
        digesting: Duration,
    ) -> Result<Failure, WorkError> {
        let limit = SEARCH_LIMIT.saturating_add(digesting.saturating_mul(2));
        let until = Instant::now() + limit;
        let answers = self.shared.received.digests.open();
        let found = find_first_difference(ram.size() / PAGE_SIZE, |pages| {
            self.ask_digests(ram, pages, &answers, until)
        })?;
        let found = match found {
            FirstDifference::Page { page, logs } => {
                let offset = RamOffset(page * PAGE_SIZE);
                let gpa = ram
                    .gpa_of(offset)
                    .map_or_else(String::new, |gpa| format!("guest address {:#x}, ", gpa.0));
                let logs = if logs.is_empty() { "no log of the source".to_owned() } else { logs };
                format!(
                    "; the first page that differs is at {gpa}RAM offset {:#x}, for these logs to report: {logs}",
                    offset.0
                )
            }
            FirstDifference::None => {
                "; page by page they agree now: RAM is written on one side while the guest is paused"
                    .to_owned()
            }
            FirstDifference::Unknown => String::new(),
            FirstDifference::Unanswered => {
                format!("; the page was not found within {} ms", limit.as_millis())
            }
        };
        Ok(ram_differs(Side::Destination, sent, Some(got), &found))
    }

    fn ask_digests(
        &self,
        ram: &GuestRam,
        pages: Run,
        answers: &Receiver<RamDigests>,
        until: Instant,
    ) -> Result<Option<ComparedDigests>, WorkError> {
        let Run { first, count } = pages;
        self.link
            .send(&Message::DigestRam { first, count })
            .map_err(|error| WorkError::sending(error, Side::Destination, PHASE))?;
        let interrupt = &self.shared.interrupt;
        // Ours while the source digests too.
        let ours =
            digest_chunks(ram, pages, interrupt, |error| error.in_phase(Side::Destination, PHASE).into())?;
        loop {
            interrupt.check()?;
            match answers.recv_timeout(SLICE) {
                Ok(theirs) => return Ok(Some(ComparedDigests { theirs, ours })),
                Err(RecvTimeoutError::Timeout) if Instant::now() < until => {}
                Err(_) => return Ok(None),
            }
        }
    }
}
