//! The machine's state as sections: `kvm.clock`, `kvm.vcpu.N`, `kvm.irqchip`, `kvm.pit`.
//!
//! # What the guest's clocks read across a move
//!
//! | clock | across the gap |
//! |---|---|
//! | TSC | goes on from the value it had when it was saved: the gap is not counted |
//! | kvmclock | the same |
//! | local APIC timer, PIT | keep what was left of their period |
//! | host-monotonic ports ([`crate::platform::CLOCK_LOW`]) | the host's `CLOCK_MONOTONIC`: the gap is visible in full on one host |
//!
//! A machine that is paused and resumed in place was never saved: its TSC and kvmclock counted on meanwhile.

use std::collections::BTreeMap;

use super::{KvmVm, chips, lock, vcpu};
use crate::error::VmmError;
use vfio_migration::Section;

/// Names and versions of the sections of a machine with `vcpus` vCPUs, for its manifest.
pub fn section_versions(vcpus: usize) -> BTreeMap<String, u32> {
    let chips = [chips::CLOCK, chips::IRQCHIP, chips::PIT];
    let chips = chips.into_iter().map(|(name, version)| (name.to_owned(), version));
    let vcpus = (0..vcpus).map(|index| (vcpu::section_name(index), vcpu::SECTION_VERSION));
    chips.chain(vcpus).collect()
}

impl KvmVm {
    /// All of the machine's own state, in the order in which it is to be loaded. RAM, devices and interrupt routes are
    /// not in it.
    ///
    /// # Errors
    /// The machine is not paused, or KVM does not tell.
    pub fn save_state(&self) -> Result<Vec<Section>, VmmError> {
        self.require_paused()?;
        // The clock first, and loaded first, since the vCPUs' clock pages are made from it.
        let mut sections = vec![self.save_clock()?];
        for vcpu in &self.vcpus {
            sections.push(lock(vcpu).save()?);
        }
        sections.push(self.save_irqchip()?);
        sections.push(self.save_pit()?);
        Ok(sections)
    }

    /// Loads what [`save_state`](Self::save_state) gave; sections of other names are left to their owners. Call it
    /// before interrupt routes and irqfds are set up, so that none of their interrupts is overwritten.
    ///
    /// The order is fixed, whatever order the sections come in: clock, vCPUs with their local APICs, then the IOAPIC
    /// and PICs, whose lines point at them, then the PIT, whose output is a line of both.
    ///
    /// # Errors
    /// The machine is not paused; a section is missing, twice there, damaged, or holds what this host cannot give. The
    /// machine must not be resumed then: it is to be thrown away, or loaded again in whole.
    pub fn load_state(&self, sections: &[Section]) -> Result<(), VmmError> {
        self.require_paused()?;
        self.load_clock(find(sections, chips::CLOCK.0)?)?;
        for vcpu in &self.vcpus {
            let mut vcpu = lock(vcpu);
            let section = find(sections, &vcpu.section_name())?;
            vcpu.load(section, &self.kvm)?;
        }
        if let Some(extra) =
            sections.iter().find(|section| section.name == vcpu::section_name(self.vcpus.len()))
        {
            let reason = format!("this machine has only {} vCPUs", self.vcpus.len());
            return Err(VmmError::section(&extra.name, reason));
        }
        self.load_irqchip(find(sections, chips::IRQCHIP.0)?)?;
        self.load_pit(find(sections, chips::PIT.0)?)
    }

    fn require_paused(&self) -> Result<(), VmmError> {
        if self.is_paused() {
            return Ok(());
        }
        Err(VmmError::Refused("the state of a machine that runs cannot be saved or loaded".to_owned()))
    }
}

fn find<'a>(sections: &'a [Section], name: &str) -> Result<&'a Section, VmmError> {
    let mut found = sections.iter().filter(|section| section.name == name);
    match (found.next(), found.next()) {
        (Some(section), None) => Ok(section),
        (None, _) => Err(VmmError::section(name, "it is missing")),
        (Some(_), Some(_)) => Err(VmmError::section(name, "it is there twice")),
    }
}
