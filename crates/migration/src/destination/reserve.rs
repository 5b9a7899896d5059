//! P1 and P2: everything that can fail for lack of something fails here, with the guest still running at the source.

use std::sync::Arc;

use vfio_migration_compat::{Allow, DeviceMap, MachineManifest, Policy, Severity, Verdict, check_machines};
use vfio_migration_engine::{Attempt, DestinationEvent};
use vfio_migration_types::Phase;
use vfio_migration_wire::Refusal;

use crate::fail::{self, InPhase, sentence};
use crate::journal::{Journal, Side};
use crate::stop::{self, Stop};
use crate::together::together;
use crate::{Machine, Offer};

use super::device_queue::DeviceQueue;
use super::receive::Sink;
use super::worker::{Incoming, Worker};

impl Worker<'_, '_, '_> {
    /// Has the machine built, and compares it with what is offered.
    pub(super) fn reserve(
        &mut self,
        manifest: &[u8],
        attempt: Option<Attempt>,
    ) -> Result<DestinationEvent, Stop> {
        let phase = Phase::Hello;
        let refuse =
            |code: &str, text: String| DestinationEvent::Refused(vec![Refusal { code: code.into(), text }]);
        let Some(attempt) = attempt else {
            return Err(fail::plain(phase, "there is no attempt yet: a defect of this program").into());
        };
        let offered = match MachineManifest::from_json(manifest) {
            Ok(offered) => offered,
            Err(error) => return Ok(refuse("manifest", sentence(&error))),
        };
        let journal = Journal::open(self.options.state_dir.as_deref(), attempt.vm, Side::Destination)
            .map_err(|error| error.in_phase(phase))?;
        let known = journal.read().map_err(|error| error.in_phase(phase))?;
        if let Some(owned) = known.owned_epoch().filter(|owned| *owned > attempt.epoch) {
            let text = format!(
                "this host owns the VM under epoch {}, later than the epoch {} of the source",
                owned.0, attempt.epoch.0
            );
            return Ok(refuse("ownership", text));
        }
        self.journal = Some(journal);
        let Some(build) = self.build.take() else {
            return Err(fail::plain(phase, "a second machine was asked for: a defect of this program").into());
        };
        let Attempt { vm, attempt, epoch } = attempt;
        let offer = Offer { vm, attempt, epoch, manifest: offered.clone() };
        let machine = match build(&offer) {
            Ok(machine) => machine,
            Err(reason) => return Ok(refuse(&reason.code, reason.text)),
        };
        let reasons = self.fit(&offer, machine.as_ref())?;
        if !reasons.is_empty() {
            return Ok(DestinationEvent::Refused(reasons));
        }
        let mut reasons = Vec::new();
        let mut own = machine.devices();
        for device in &offered.devices {
            let Some(at) = own.iter().position(|moved| *moved.device.id() == device.id) else {
                let text = format!("device {} is in the manifest and not in the machine", device.id);
                reasons.push(Refusal { code: "device-missing".into(), text });
                continue;
            };
            let moved = own.swap_remove(at);
            if let Err(why) = moved.device.capabilities() {
                let text = format!("device {} cannot migrate: {}", device.id, why.0);
                reasons.push(Refusal { code: "device-not-migratable".into(), text });
            }
            self.devices.push(Incoming { moved, session: None, pci_state: None, touched: false });
        }
        for moved in own {
            let text = format!("device {} is here and not at the source", moved.device.id());
            reasons.push(Refusal { code: "device-extra".into(), text });
        }
        if !reasons.is_empty() {
            return Ok(DestinationEvent::Refused(reasons));
        }
        clear(machine.as_ref()).map_err(|error| error.in_phase(phase))?;
        let total = machine.ram().size();
        self.wires.ram_total.store(total, std::sync::atomic::Ordering::Relaxed);
        self.machine = Some(machine);
        Ok(DestinationEvent::Reserved)
    }

    /// Opens a resuming session on every device, all at once, and a queue before each.
    pub(super) fn begin_resuming(&mut self) -> Result<(), Stop> {
        let phase = Phase::Setup;
        let machine = self.machine(phase)?;
        let begun = together(self.devices.iter_mut(), |incoming| {
            incoming.touched = true;
            incoming.session =
                Some(incoming.moved.device.begin_resuming().map_err(|error| error.in_phase(phase))?);
            Ok(())
        });
        stop::all(begun)?;
        let queues: Vec<Arc<DeviceQueue>> = (0..)
            .zip(&self.devices)
            .map(|(index, incoming)| {
                Arc::new(DeviceQueue::new(
                    index,
                    incoming.moved.device.id().clone(),
                    self.options.device_window,
                ))
            })
            .collect();
        let sink = Sink {
            ram: machine.ram(),
            pinned: self.pinned,
            queues: queues.clone(),
            sections: Default::default(),
            written: Arc::default(),
        };
        let written = Arc::clone(&sink.written);
        for (incoming, queue) in self.devices.iter_mut().zip(&queues) {
            let Some(session) = incoming.session.take() else { continue };
            let (queue, link, events) = (Arc::clone(queue), Arc::clone(&self.link), self.events.clone());
            let written = Arc::clone(&written);
            self.scope.spawn(move || queue.write_to(session, &link, &events, &written));
        }
        if self.wires.sink.set(sink).is_err() {
            return Err(fail::plain(phase, "the sessions were opened twice: a defect of this program").into());
        }
        queues.iter().try_for_each(|queue| queue.open(&self.link))
    }

    /// Every reason against.
    fn fit(&mut self, offer: &Offer, machine: &dyn Machine) -> Result<Vec<Refusal>, Stop> {
        let own = machine.manifest().map_err(|error| error.in_phase(Phase::Hello))?;
        self.pinned = own.devices.iter().any(|device| device.backend == "kernel");
        // Snapshots come this way too, and what cannot move live may be restored. What is only the source's choice was made there:
        // whether all memory may count as dirty, and whether its devices write into each other at all.
        let source_chose = Allow { code: "p2p-missing".into(), ..Allow::default() };
        let policy = Policy { allow: vec![source_chose], ..Policy::default() };
        let report = check_machines(&offer.manifest, &own, &DeviceMap::new(), &policy);
        let against = report.reasons.into_iter().filter(|reason| reason.severity == Severity::No);
        let mut reasons: Vec<Refusal> =
            against.map(|reason| Refusal { code: reason.code, text: reason.text }).collect();
        if report.verdict == Verdict::No && reasons.is_empty() {
            reasons.push(Refusal { code: "unfit".into(), text: "the machines do not fit each other".into() });
        }
        if machine.id() != offer.vm {
            let text = format!(
                "VM {} is offered, and this machine is for VM {}: give both the same identity",
                offer.vm,
                machine.id()
            );
            reasons.push(Refusal { code: "vm-id".into(), text });
        }
        Ok(reasons)
    }
}

/// What the source never sends, because it was never written there, must read as zero here. Written in place: pages
/// may be pinned already.
fn clear(machine: &dyn Machine) -> Result<(), vfio_migration_memory::MemoryError> {
    let ram = machine.ram();
    ram.data_extents()?.into_iter().try_for_each(|extent| ram.zero_in_place(extent))
}
