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

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use vfio_migration::Section;

use super::lock::lock;
use super::vcpu;
use super::vm::KvmVm;
use crate::error::VmmError;
use crate::section::{SectionReader, SectionWriter};

const IRQCHIP: (&str, u32) = ("kvm.irqchip", 1);
const PIT: (&str, u32) = ("kvm.pit", 1);
const CLOCK: (&str, u32) = ("kvm.clock", 1);

const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// Names and versions of the sections of a machine with `vcpus` vCPUs, for its manifest.
pub fn section_versions(vcpus: usize) -> BTreeMap<String, u32> {
    let chips = [CLOCK, IRQCHIP, PIT];
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
        self.load_clock(find(sections, CLOCK.0)?)?;
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
        self.load_irqchip(find(sections, IRQCHIP.0)?)?;
        self.load_pit(find(sections, PIT.0)?)
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

/// The chips that KVM models: interrupt controllers, timer, clock.
impl KvmVm {
    /// Both PICs and the IOAPIC, in this order, each as KVM gives it.
    fn save_irqchip(&self) -> Result<Section, VmmError> {
        let mut writer = SectionWriter::default();
        for chip_id in CHIPS {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            self.fd.get_irqchip(&mut chip).map_err(VmmError::kvm("read an interrupt controller"))?;
            writer.abi(&chip);
        }
        Ok(writer.finish(IRQCHIP.0.to_owned(), IRQCHIP.1))
    }

    fn load_irqchip(&self, section: &Section) -> Result<(), VmmError> {
        let mut reader = SectionReader::open(section, IRQCHIP.1)?;
        let chips = CHIPS.map(|id| (id, reader.abi::<kvm_irqchip>("irqchip")));
        let mut parsed = Vec::with_capacity(CHIPS.len());
        for (id, chip) in chips {
            let chip = chip?;
            if chip.chip_id != id {
                return Err(reader.error(format!("chip {} stands in the place of chip {id}", chip.chip_id)));
            }
            parsed.push(chip);
        }
        reader.end()?;
        for chip in &parsed {
            self.fd.set_irqchip(chip).map_err(VmmError::kvm("load an interrupt controller"))?;
        }
        Ok(())
    }

    /// The state of the timer, an 8254.
    fn save_pit(&self) -> Result<Section, VmmError> {
        let mut writer = SectionWriter::default();
        writer.abi(&self.fd.get_pit2().map_err(VmmError::kvm("read the timer"))?);
        Ok(writer.finish(PIT.0.to_owned(), PIT.1))
    }

    fn load_pit(&self, section: &Section) -> Result<(), VmmError> {
        let mut reader = SectionReader::open(section, PIT.1)?;
        let pit: kvm_pit_state2 = reader.abi("pit")?;
        reader.end()?;
        self.fd.set_pit2(&pit).map_err(VmmError::kvm("load the timer"))
    }

    /// kvmclock: nanoseconds since the guest began, as one `u64`.
    fn save_clock(&self) -> Result<Section, VmmError> {
        let clock = self.fd.get_clock().map_err(VmmError::kvm("read the guest's clock"))?;
        let mut writer = SectionWriter::default();
        writer.u64(clock.clock);
        Ok(writer.finish(CLOCK.0.to_owned(), CLOCK.1))
    }

    /// Without `KVM_CLOCK_REALTIME`: the clock goes on where it was, see `docs/guest-clock.md`.
    fn load_clock(&self, section: &Section) -> Result<(), VmmError> {
        let mut reader = SectionReader::open(section, CLOCK.1)?;
        let clock = kvm_clock_data { clock: reader.u64()?, ..Default::default() };
        reader.end()?;
        self.fd.set_clock(&clock).map_err(VmmError::kvm("load the guest's clock"))
    }
}
