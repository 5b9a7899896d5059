//! State of the machine's chips that KVM models: interrupt controllers, timer, clock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};

use super::KvmVm;
use crate::error::VmmError;
use crate::section::{Reader, Writer};
use vfio_migration::Section;

pub(super) const IRQCHIP: (&str, u32) = ("kvm.irqchip", 1);
pub(super) const PIT: (&str, u32) = ("kvm.pit", 1);
pub(super) const CLOCK: (&str, u32) = ("kvm.clock", 1);

const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

impl KvmVm {
    /// Both PICs and the IOAPIC, in this order, each as KVM gives it.
    pub(super) fn save_irqchip(&self) -> Result<Section, VmmError> {
        let mut writer = Writer::default();
        for chip_id in CHIPS {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            self.fd.get_irqchip(&mut chip).map_err(VmmError::kvm("read an interrupt controller"))?;
            writer.abi(&chip);
        }
        Ok(writer.finish(IRQCHIP.0.to_owned(), IRQCHIP.1))
    }

    pub(super) fn load_irqchip(&self, section: &Section) -> Result<(), VmmError> {
        let mut reader = Reader::open(section, IRQCHIP.1)?;
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

    /// The 8254.
    pub(super) fn save_pit(&self) -> Result<Section, VmmError> {
        let mut writer = Writer::default();
        writer.abi(&self.fd.get_pit2().map_err(VmmError::kvm("read the timer"))?);
        Ok(writer.finish(PIT.0.to_owned(), PIT.1))
    }

    pub(super) fn load_pit(&self, section: &Section) -> Result<(), VmmError> {
        let mut reader = Reader::open(section, PIT.1)?;
        let pit: kvm_pit_state2 = reader.abi("pit")?;
        reader.end()?;
        self.fd.set_pit2(&pit).map_err(VmmError::kvm("load the timer"))
    }

    /// kvmclock: nanoseconds since the guest began, as one `u64`.
    pub(super) fn save_clock(&self) -> Result<Section, VmmError> {
        let clock = self.fd.get_clock().map_err(VmmError::kvm("read the guest's clock"))?;
        let mut writer = Writer::default();
        writer.u64(clock.clock);
        Ok(writer.finish(CLOCK.0.to_owned(), CLOCK.1))
    }

    /// Without `KVM_CLOCK_REALTIME`: the clock goes on where it was, see `docs/guest-clock.md`.
    pub(super) fn load_clock(&self, section: &Section) -> Result<(), VmmError> {
        let mut reader = Reader::open(section, CLOCK.1)?;
        let clock = kvm_clock_data { clock: reader.u64()?, ..Default::default() };
        reader.end()?;
        self.fd.set_clock(&clock).map_err(VmmError::kvm("load the guest's clock"))
    }
}
