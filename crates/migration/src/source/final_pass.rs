//! P5: the last of everything, with every writer stopped.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vfio_migration_device::PciState;
use vfio_migration_memory::Holes;
use vfio_migration_types::{Failure, Phase, Side, error_chain};
use vfio_migration_wire::{Bulk, DeviceTotal, FinalEnd, limits};

use crate::device_state::tracked::ask_pci;
use crate::machine::{MachineError, Section};
use crate::session::fail::InPhase;
use crate::session::work_error::WorkError;

use crate::source::worker::Worker;

impl Worker {
    /// Sends the machine's state, the last pages and each device's state to its end. Returns the totals, and how long
    /// the digest of RAM took.
    pub(super) fn send_final(&mut self, verify: bool) -> Result<(FinalEnd, Duration), WorkError> {
        let phase = Phase::Final;
        // First, because reading a machine out may write its RAM (paravirtual clocks), and the last report sees that.
        let sections = self.read_machine()?;
        self.report_dirty(phase)?;
        // Where nobody knows what somebody wrote, everything that has ever been written counts.
        if self.dirty.add_unseen(&self.devices, &self.ram, phase)? {
            self.counters.ram.left.store(self.dirty.left(), Ordering::Relaxed);
        }
        let pages = self.dirty.take();
        self.ram_pages += self.send_all(&pages, Holes::Possible, phase)?;
        for section in &sections {
            let bulk = Bulk::Section { name: &section.name, version: section.version, bytes: &section.bytes };
            self.link.send_bulk(&bulk).map_err(|error| WorkError::sending(error, Side::Source, phase))?;
        }
        let (ram_digest, took) = if verify {
            let begun = Instant::now();
            let digest = self.ram.digest().map_err(|error| error.in_phase(Side::Source, phase))?;
            (Some(digest), begun.elapsed())
        } else {
            (None, Duration::ZERO)
        };
        let devices = self.devices.iter().map(|device| device.total()).collect::<Option<Vec<DeviceTotal>>>();
        let devices = devices
            .ok_or_else(|| Failure::new(Side::Source, phase, "a device's state was not read to its end"))?;
        let sections = u32::try_from(sections.len()).unwrap_or(u32::MAX);
        Ok((FinalEnd { ram_pages: self.ram_pages, ram_digest, sections, devices }, took))
    }

    /// The machine's sections: first each device's PCI state, whose reading drains the interrupts of masked vectors,
    /// then the VMM's own, interrupt controller included.
    fn read_machine(&mut self) -> Result<Vec<Section>, WorkError> {
        let phase = Phase::Final;
        let mut sections = Vec::new();
        for (moved, config) in self.functions.iter().zip(std::mem::take(&mut self.configs)) {
            let (Some(pci), Some(config)) = (&moved.pci, config) else { continue };
            let state = ask_pci(&self.plan.answers, moved, || pci.save_interrupts(config));
            let state = state.map_err(|error| error.in_phase(Side::Source, phase))?;
            let bytes = state.encode().map_err(|error| {
                Failure::new(Side::Source, phase, error_chain(&error)).of_device(pci.id())
            })?;
            sections.push(Section { name: PciState::section_name(pci.id()), version: 1, bytes });
        }
        let Some(paused) = &self.paused else {
            return Err(Failure::new(
                Side::Source,
                phase,
                "the machine's state was asked for while the guest runs",
            )
            .into());
        };
        let own = self.machine.save(paused).map_err(|error| error.in_phase(Side::Source, phase))?;
        for section in &own {
            check(section).map_err(|error| error.in_phase(Side::Source, phase))?;
        }
        sections.extend(own);
        let names: BTreeSet<&str> = sections.iter().map(|section| section.name.as_str()).collect();
        if names.len() != sections.len()
            || u32::try_from(sections.len()).is_ok_and(|count| count > limits::SECTIONS)
        {
            let text = format!("the machine saved {} sections of {} names", sections.len(), names.len());
            return Err(Failure::new(Side::Source, phase, text).into());
        }
        // The destination refuses more: better reported here, with the reason.
        let bytes: u64 = sections.iter().map(|section| section.bytes.len() as u64).sum();
        if bytes > limits::SECTIONS_BYTES {
            let text = format!(
                "the machine saved {bytes} bytes of state, and a migration carries at most {}",
                limits::SECTIONS_BYTES
            );
            return Err(Failure::new(Side::Source, phase, text).into());
        }
        Ok(sections)
    }
}

/// A section that the stream cannot carry is the VMM's mistake, and reported as such.
fn check(section: &Section) -> Result<(), MachineError> {
    let name = &section.name;
    let wrong = if name.is_empty() || name.len() > limits::SECTION_NAME {
        "its name is not 1 to 128 bytes long"
    } else if !name.bytes().all(|byte| byte.is_ascii_graphic()) {
        "its name is not graphic ASCII"
    } else if name.starts_with("pci.") {
        "names that begin with 'pci.' are the library's"
    } else if section.bytes.len() > limits::SECTION {
        "it is longer than 16 MiB"
    } else {
        return Ok(());
    };
    Err(MachineError::new(format!("saving the section '{}'", name.escape_debug()), wrong))
}
