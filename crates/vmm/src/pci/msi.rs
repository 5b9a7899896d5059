//! MSI in config space: where its registers are, and what the guest wrote to them.
//!
//! The whole capability is emulated: its messages are those of the guest's interrupt controller, which the device must
//! never see. (PCI Local Bus 3.0, 6.8.1.)

use vfio_migration_device::MsiMessage;

use super::config::ConfigSpace;
use super::registers::{
    CAP_MSI, EXTENDED, MSI_ADDRESS, MSI_CONTROL, MSI_ENABLE, MSI_MASKABLE, MSI_WIDE, MSI_WRITABLE,
};
use super::vectors::Target;

/// Where a function's MSI registers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MsiLayout {
    pub(super) capability: u16,
    /// Vectors that the function can ask for: a power of two, at most 32.
    pub(super) vectors: u16,
    /// Addresses have 64 bits.
    wide: bool,
    /// Each vector has a mask and a pending bit.
    maskable: bool,
}

impl MsiLayout {
    /// The layout, when the function has MSI and all of it lies in the first 256 bytes.
    pub(super) fn find(config: &ConfigSpace) -> Option<Self> {
        let capability = config.capabilities().into_iter().find(|cap| cap.id == CAP_MSI)?.offset;
        let control = config.u16(capability.checked_add(MSI_CONTROL)?);
        let layout = Self {
            capability,
            // Codes 6 and 7 are reserved.
            vectors: 1 << (control >> 1 & 7).min(5),
            wide: control & MSI_WIDE != 0,
            maskable: control & MSI_MASKABLE != 0,
        };
        (layout.end() <= EXTENDED).then_some(layout)
    }

    /// Takes its registers from the device.
    pub(super) fn emulate(&self, config: &mut ConfigSpace) {
        config.emulate(self.capability, &[0, 0, MSI_WRITABLE, 0]);
        config.emulate(self.capability + MSI_ADDRESS, &[0xfc, 0xff, 0xff, 0xff]);
        if self.wide {
            config.emulate(self.capability + MSI_ADDRESS + 4, &[0xff; 4]);
        }
        config.emulate(self.data(), &[0xff, 0xff]);
        if let Some(masks) = self.masks() {
            // What follows the data, up to the masks, is reserved.
            config.emulate(self.data() + 2, &[0, 0]);
            config.emulate(masks, &self.every_vector().to_le_bytes());
            config.emulate(masks + 4, &[0; 4]);
            config.set_u32(masks + 4, 0);
        }
    }

    /// First byte after its registers.
    pub(super) fn end(&self) -> u16 {
        self.masks().map_or(self.data() + 2, |masks| masks + 8)
    }

    /// The register of pending bits.
    pub(super) fn pending(&self) -> Option<u16> {
        self.masks().map(|masks| masks + 4)
    }

    /// Whether the guest has it enabled, and what it says of the vectors that it uses.
    pub(super) fn targets(&self, config: &ConfigSpace) -> (bool, Vec<Target>) {
        let control = config.u16(self.capability + MSI_CONTROL);
        let used = (1 << (control >> 4 & 7).min(5)).min(self.vectors);
        let low = u64::from(config.u32(self.capability + MSI_ADDRESS));
        let high = if self.wide { u64::from(config.u32(self.capability + MSI_ADDRESS + 4)) << 32 } else { 0 };
        let data = u32::from(config.u16(self.data()));
        let masks = self.masks().map_or(0, |masks| config.u32(masks));
        let target = |n: u16| {
            // The function changes the low bits of the data to tell its vectors apart.
            let message =
                MsiMessage { address: high | low, data: data & !u32::from(used - 1) | u32::from(n) };
            Target { message, masked: masks >> n & 1 != 0 }
        };
        (control & MSI_ENABLE != 0, (0..used).map(target).collect())
    }

    fn data(&self) -> u16 {
        self.capability + MSI_ADDRESS + if self.wide { 8 } else { 4 }
    }

    fn masks(&self) -> Option<u16> {
        self.maskable.then(|| self.data() + 4)
    }

    fn every_vector(&self) -> u32 {
        u32::MAX >> (32 - u32::from(self.vectors))
    }
}
