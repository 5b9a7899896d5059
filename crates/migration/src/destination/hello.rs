//! P1: everything that can fail for lack of something fails here, with the guest still running at the source.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use vfio_migration_compat::{
    DeviceManifest, DeviceMap, MachineManifest, Policy, Reason, SessionCode, check_machines, exemptions,
};
use vfio_migration_device::ConfigRules;
use vfio_migration_engine::{Attempt, DestinationEvent};
use vfio_migration_types::{DeviceId, Failure, Phase, Side, error_chain};
use vfio_migration_wire as wire;

use crate::device_state::tracked::{all_answer, tracked};
use crate::incoming_machine::{IncomingDevice, IncomingFunction};
use crate::machine::MigratableDevice;
use crate::offer::{IncomingOffer, NotBuilt, digest_of_configuration};
use crate::ownership::journal::{Journal, JournalError, JournalSide, read_journal};
use crate::reasons::{self, left_behind, with_migration_known};
use crate::session::awaited::Request;
use crate::session::fail::InPhase;
use crate::session::work_error::WorkError;

use crate::destination::attempt::ArrivingDevice;
use crate::destination::worker::Worker;

impl Worker<'_, '_, '_> {
    /// Has the machine built, and judges what is offered by this side's rules.
    pub(super) fn reserve(
        &mut self,
        offer: wire::Offer,
        attempt: Option<Attempt>,
    ) -> Result<DestinationEvent, WorkError> {
        let phase = Phase::Hello;
        let refuse = |reason: Reason| DestinationEvent::Refused(reasons::to_wire(&[reason]));
        let Some(attempt) = attempt else {
            return Err(Failure::new(
                Side::Destination,
                phase,
                "there is no attempt yet: a defect of this program",
            )
            .into());
        };
        let offered = match MachineManifest::from_json(&offer.manifest) {
            Ok(offered) => offered,
            Err(error) => return Ok(refuse(Reason::new(SessionCode::Manifest, error_chain(&error)))),
        };
        // Before the journal, devices and RAM are looked at.
        if let Err(unexpected) = self.shared.expectation.judge_memory(offered.memory()) {
            let told = unexpected.told(self.shared.told_expectation);
            let _ = self.shared.unexpected.set(unexpected);
            return Ok(refuse(told));
        }
        let configuration = offer.configuration;
        if digest_of_configuration(&configuration) != offer.configuration_digest {
            let text = "the configuration that is offered is not the one that its digest is of";
            return Err(Failure::new(Side::Destination, phase, text).into());
        }
        let configuration_digest = (!configuration.is_empty()).then_some(offer.configuration_digest);
        let map = match map(offer.names) {
            Ok(map) => map,
            Err(text) => return Ok(refuse(Reason::new(SessionCode::Manifest, text))),
        };
        if let Some(reason) = self.take_journal(attempt)? {
            return Ok(refuse(reason));
        }
        let Some(build) = self.build.take() else {
            return Err(Failure::new(
                Side::Destination,
                phase,
                "a second machine was asked for: a defect of this program",
            )
            .into());
        };
        let Attempt { vm, attempt, epoch } = attempt;
        let offer = IncomingOffer {
            vm,
            attempt,
            epoch,
            manifest: offered.clone(),
            configuration,
            configuration_digest,
        };
        let wait = self.shared.answers.wait(None, Request::Machine, None);
        let built = build(&offer);
        drop(wait);
        let machine = match built {
            Ok(machine) => machine,
            Err(NotBuilt::Refused(reason)) => return Ok(refuse(*reason)),
            Err(NotBuilt::OfDevice(failure)) => return Err((*failure).into()),
            Err(NotBuilt::Failed(text)) => return Err(Failure::new(Side::Destination, phase, text).into()),
        };
        self.ram_hold = Some(machine.ram().hold(format!("a session in which VM {vm} comes is under way")));
        let mut later = BTreeSet::new();
        let devices = machine.incoming_devices().into_iter().map(|IncomingDevice { device, pci }| {
            let pci = match pci {
                IncomingFunction::Made(function) => Some(function),
                IncomingFunction::None => None,
                IncomingFunction::Later => {
                    later.insert(device.id().clone());
                    None
                }
            };
            tracked(MigratableDevice { device, pci }, &self.shared.answers)
        });
        let mut devices: Vec<_> = devices.collect();
        all_answer(&devices).map_err(|error| error.in_phase(Side::Destination, phase))?;
        let wait = self.shared.answers.wait(None, Request::Manifest, None);
        let own = machine.manifest();
        drop(wait);
        let mut own = own.map_err(|error| error.in_phase(Side::Destination, phase))?;
        // The source judges the same config space, and these rules hold.
        own.config_rules.extend(self.options.policy.config_mask.iter().cloned());
        let policy = self.policy();
        let report = check_machines(&offered, &with_migration_known(&own, &devices), &map, &policy);
        let mut besides = Vec::new();
        if vm.names_a_vm() && machine.id() != vm {
            let text = format!(
                "VM {vm} is offered, and this machine is for VM {}: give both the same identity",
                machine.id()
            );
            besides.push(Reason::new(SessionCode::VmId, text));
        }
        for device in &offered.devices {
            let name =
                map.destination(&device.id).or_else(|| self.options.policy.map.destination(&device.id));
            let name = name.unwrap_or(&device.id);
            let Some(at) = devices.iter().position(|moved| moved.device.id() == name) else {
                if own.devices.iter().any(|device| device.id == *name) {
                    let text = format!("device {name} is in the manifest and not in the machine");
                    besides.push(Reason::new(SessionCode::DeviceMissing, text));
                }
                continue;
            };
            let moved = devices.swap_remove(at);
            let name = device.id.clone();
            let pci_later = later.contains(moved.device.id());
            let alone = self.options.device_alone || pci_later || moved.pci.is_some();
            if let Some(reason) = left_behind(&own, &moved, &policy).filter(|_| !alone) {
                let text = format!("at the destination: {}", reason.text);
                besides.push(Reason { device: Some(name.to_string()), text, ..reason });
            }
            let stands = own.devices.iter().find(|own| own.id == *moved.device.id());
            let rules = stands.map(|own| config_rules(device, own, &policy)).unwrap_or_default();
            self.devices.push(ArrivingDevice {
                name,
                moved,
                rules,
                session: None,
                pci_later,
                pci_state: None,
                touched: false,
            });
        }
        let report = reasons::with(report, besides);
        if !reasons::permits(&report, self.options.from_file.is_some()) {
            return Ok(DestinationEvent::Refused(reasons::to_wire(&report.reasons)));
        }
        let manifest =
            own.to_json().map_err(|error| Failure::new(Side::Destination, phase, error_chain(&error)))?;
        // Pages that the source never sends, because they were never written there, must read as zero here.
        machine.ram().clear().map_err(|error| error.in_phase(Side::Destination, phase))?;
        let total = machine.ram().size();
        self.shared.ram_total.store(total, Ordering::Relaxed);
        self.machine = Some(machine);
        let (reasons, identity) = (reasons::to_wire(&report.reasons), offered.identity_digest());
        Ok(DestinationEvent::Reserved { manifest, reasons, identity })
    }

    /// This side's policy. How the source's devices track their writes and stop is the source's to judge: its operator
    /// may allow what costs downtime there, and this side loses nothing by it.
    fn policy(&self) -> Policy {
        let mut policy = self.options.policy.clone();
        reasons::allow(&mut policy, &reasons::DIRTY, "the source judges it");
        reasons::allow(&mut policy, &reasons::PEERS, "the source judges it");
        policy
    }

    /// Opens the VM's journal; the reason, if by what it says the VM may not be taken under this epoch. A rehearsal only
    /// reads it.
    fn take_journal(&mut self, attempt: Attempt) -> Result<Option<Reason>, WorkError> {
        let failed = |error: JournalError| error.in_phase(Side::Destination, Phase::Hello);
        let dir = self.options.state_dir.as_deref();
        let _wait = self.shared.answers.wait(None, Request::Journal, None);
        if !attempt.vm.names_a_vm() {
            // A question about no VM is about no journal.
            return Ok(None);
        }
        let known = if self.shared.rehearsal.load(Ordering::Acquire) {
            dir.map_or(Ok(None), |dir| read_journal(dir, attempt.vm)).map_err(failed)?
        } else {
            let journal = Journal::open(dir, attempt.vm, JournalSide::Destination).map_err(failed)?;
            let known = journal.read().map_err(failed)?;
            self.journal = Some(journal);
            Some(known)
        };
        let refused = known.and_then(|known| known.epochs().may_take(attempt.epoch, attempt.attempt).err());
        Ok(refused.map(|over| Reason::new(SessionCode::Ownership, over.to_string())))
    }
}

/// Rules for the bytes of config space that are compared while the guest is paused: as the verdict of the two manifests has them.
fn config_rules(source: &DeviceManifest, own: &DeviceManifest, policy: &Policy) -> ConfigRules {
    ConfigRules { rules: exemptions(source, own, &[], policy).into_iter().map(Into::into).collect() }
}

/// The map that came with an offer.
fn map(names: Vec<(String, String)>) -> Result<DeviceMap, String> {
    let id = |name: String| {
        DeviceId::new(name).map_err(|error| format!("in the map of devices: {}", error_chain(&error)))
    };
    names.into_iter().map(|(from, to)| Ok((id(from)?, id(to)?))).collect::<Result<DeviceMap, _>>()
}
