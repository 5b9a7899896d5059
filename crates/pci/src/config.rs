//! A function's config space as the guest sees it.
//!
//! Bytes are of three kinds: emulated here (header, MSI, MSI-X control), read and written through to the device (what lies
//! in capabilities), and read-only. BARs never reach the device: where they are is the VMM's affair.

use vfio_migration_device::MsiMessage;

use super::registers::{
    BAR0, CACHE_LINE_SIZE, CAP_MSI, CAP_MSIX, CAPABILITY_LIST, COMMAND, COMMAND_WRITABLE, EXTENDED,
    HEADER_END, INTERRUPT_LINE, LATENCY_TIMER, MSI_ADDRESS, MSI_CONTROL, MSI_ENABLE, MSI_MASKABLE, MSI_WIDE,
    MSI_WRITABLE, MSIX_CAP_LEN, MSIX_CONTROL, MSIX_ENABLE, MSIX_MASK_ALL, MSIX_PBA, MSIX_TABLE, ROM_ADDRESS,
    STATUS, STATUS_CAP_LIST,
};
use super::vectors::VectorTarget;

/// A capability in the list of the first 256 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ConfigCapability {
    pub(super) id: u8,
    pub(super) offset: u16,
}

/// Place of a function's MSI-X table and pending bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MsixLayout {
    pub(super) capability: u16,
    pub(super) vectors: u16,
    pub(super) table: (u8, u64),
    pub(super) pba: (u8, u64),
}

/// Config space: bytes, and which of their bits the guest may write.
#[derive(Clone, Debug)]
pub(super) struct ConfigSpace {
    bytes: Vec<u8>,
    writable: Vec<u8>,
    /// Bytes that are the device's: read and written there.
    through: Vec<bool>,
    /// Number of bytes that the device has.
    device_len: usize,
}

impl ConfigSpace {
    /// From the device's own bytes, 256 or 4096; everything emulated starts as after a reset.
    pub(super) fn new(mut bytes: Vec<u8>) -> Self {
        let mut writable = vec![0; bytes.len()];
        let mut through: Vec<bool> =
            (0..bytes.len()).map(|offset| offset >= usize::from(HEADER_END)).collect();
        let zero = (COMMAND..COMMAND + 2)
            .chain(CACHE_LINE_SIZE..LATENCY_TIMER + 1)
            .chain(BAR0..BAR0 + 24)
            .chain(ROM_ADDRESS..ROM_ADDRESS + 4)
            .chain(INTERRUPT_LINE..INTERRUPT_LINE + 1);
        for offset in zero {
            bytes[usize::from(offset)] = 0;
        }
        for offset in [CACHE_LINE_SIZE, LATENCY_TIMER, INTERRUPT_LINE] {
            writable[usize::from(offset)] = 0xff;
        }
        writable[usize::from(COMMAND)..][..2].copy_from_slice(&COMMAND_WRITABLE.to_le_bytes());
        through[usize::from(STATUS)..][..2].fill(true);

        let device_len = bytes.len();
        let mut space = Self { bytes, writable, through, device_len };
        if let Some(capability) = space.capabilities().into_iter().find(|cap| cap.id == CAP_MSIX) {
            let at = usize::from(capability.offset);
            if at + usize::from(MSIX_CAP_LEN) <= usize::from(EXTENDED) {
                space.through[at..][..usize::from(MSIX_CAP_LEN)].fill(false);
                let control = usize::from(capability.offset + MSIX_CONTROL);
                space.writable[control + 1] = ((MSIX_ENABLE | MSIX_MASK_ALL) >> 8) as u8;
                space.bytes[control + 1] &= !space.writable[control + 1];
            }
        }
        if let Some(layout) = MsiLayout::find(&space) {
            layout.emulate(&mut space);
        }
        space
    }

    /// The device has no more bytes of its own than the first `len`.
    pub(super) fn end_of_device(&mut self, len: usize) {
        self.device_len = len;
        self.through.iter_mut().skip(len).for_each(|through| *through = false);
    }

    /// Emulates the bytes from `offset` here, each with the bits that the guest may write, which start as 0.
    pub(super) fn emulate(&mut self, offset: u16, writable: &[u8]) {
        let at = usize::from(offset);
        for (index, bits) in writable.iter().enumerate() {
            if let Some(byte) = self.bytes.get_mut(at + index) {
                *byte &= !bits;
                self.writable[at + index] = *bits;
                self.through[at + index] = false;
            }
        }
    }

    /// Sets the dword at `offset`, whatever the guest may write of it.
    pub(super) fn set_u32(&mut self, offset: u16, value: u32) {
        if let Some(bytes) = self.bytes.get_mut(usize::from(offset)..).and_then(|rest| rest.first_chunk_mut())
        {
            *bytes = value.to_le_bytes();
        }
    }

    /// Makes `bits` of the dword at `offset` writable and sets the rest of it to `fixed`: a BAR.
    pub(super) fn define_bar(&mut self, offset: u16, bits: u32, fixed: u32) {
        let at = usize::from(offset);
        self.bytes[at..][..4].copy_from_slice(&(fixed & !bits).to_le_bytes());
        self.writable[at..][..4].copy_from_slice(&bits.to_le_bytes());
    }

    /// Size in bytes.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// All bytes, as last known.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The 16 bits at `offset`; all ones outside.
    pub(super) fn u16(&self, offset: u16) -> u16 {
        self.array(offset).map_or(u16::MAX, u16::from_le_bytes)
    }

    /// The 32 bits at `offset`; all ones outside.
    pub(super) fn u32(&self, offset: u16) -> u32 {
        self.array(offset).map_or(u32::MAX, u32::from_le_bytes)
    }

    fn array<const N: usize>(&self, offset: u16) -> Option<[u8; N]> {
        self.bytes.get(usize::from(offset)..)?.first_chunk().copied()
    }

    /// How many of `len` bytes at `offset` are to be read from the device: none where none of them is its own, else as
    /// many as it has there.
    pub(super) fn of_device(&self, offset: u16, len: usize) -> usize {
        let own = self.through.iter().skip(offset.into()).take(len).any(|through| *through);
        if own { self.device_len.saturating_sub(offset.into()).min(len) } else { 0 }
    }

    /// Takes fresh bytes of the device for those at `offset` that are its own.
    pub(super) fn refresh(&mut self, offset: u16, fresh: &[u8]) {
        let at = usize::from(offset);
        let own = self.through.iter().skip(at);
        for ((byte, fresh), own) in self.bytes.iter_mut().skip(at).zip(fresh).zip(own) {
            if *own {
                *byte = *fresh;
            }
        }
    }

    /// Copies out; all ones outside.
    pub(super) fn read(&self, offset: u16, into: &mut [u8]) {
        for (index, byte) in into.iter_mut().enumerate() {
            *byte = self.bytes.get(usize::from(offset) + index).copied().unwrap_or(0xff);
        }
    }

    /// Writes the emulated writable bits. Returns the span of the device's own bytes in `from`, to be written there.
    pub(super) fn write<'a>(&mut self, offset: u16, from: &'a [u8]) -> Option<(u16, &'a [u8])> {
        let at = usize::from(offset);
        for (index, value) in from.iter().enumerate() {
            let Some((byte, mask)) = self.bytes.get_mut(at + index).zip(self.writable.get(at + index)) else {
                break;
            };
            *byte = *byte & !mask | value & mask;
        }
        let own = |index: &usize| self.through.get(at + index).copied().unwrap_or(false);
        let first = (0..from.len()).find(own)?;
        // An access is at most a dword inside of one, and kinds change at dwords but for COMMAND and STATUS.
        let last = (first..from.len()).take_while(own).last()?;
        Some((u16::try_from(at + first).ok()?, from.get(first..=last)?))
    }

    /// Loads what is emulated from a saved config space of the same size, and leaves the device's own bytes.
    pub(super) fn load(&mut self, saved: &[u8]) {
        for ((byte, mask), saved) in self.bytes.iter_mut().zip(&self.writable).zip(saved) {
            *byte = *byte & !mask | saved & mask;
        }
    }

    /// The capability list, as far as it is sane: within bounds, and without a loop.
    pub(super) fn capabilities(&self) -> Vec<ConfigCapability> {
        let mut out: Vec<ConfigCapability> = Vec::new();
        if self.u16(STATUS) & STATUS_CAP_LIST == 0 {
            return out;
        }
        let mut next = self.bytes.get(usize::from(CAPABILITY_LIST)).copied().unwrap_or(0) & !3;
        while u16::from(next) >= HEADER_END && out.iter().all(|cap| cap.offset != u16::from(next)) {
            let [id, following] = self.array(next.into()).unwrap_or_default();
            out.push(ConfigCapability { id, offset: next.into() });
            next = following & !3;
        }
        out
    }

    /// The extended capabilities, as far as they are sane: ids and offsets.
    pub(super) fn extended_capabilities(&self) -> Vec<(u16, u16)> {
        let mut out: Vec<(u16, u16)> = Vec::new();
        let mut next = EXTENDED;
        while next >= EXTENDED
            && usize::from(next) + 4 <= self.len()
            && out.iter().all(|(_, offset)| *offset != next)
        {
            let header = self.u32(next);
            out.push(((header & 0xffff) as u16, next));
            next = u16::try_from(header >> 20).unwrap_or(0) & !3;
        }
        out
    }

    /// Takes capabilities of this kind out of the list, for a function that cannot serve them: a guest that found one would
    /// enable it, and hear nothing.
    pub(super) fn hide(&mut self, id: u8) {
        loop {
            let list = self.capabilities();
            let Some(at) = list.iter().position(|cap| cap.id == id) else { return };
            let pointer = match at.checked_sub(1).and_then(|before| list.get(before)) {
                Some(before) => before.offset + 1,
                None => CAPABILITY_LIST,
            };
            let next = list.get(at + 1).map_or(0, |next| next.offset);
            self.emulate(pointer, &[0]);
            if let Some(byte) = self.bytes.get_mut(usize::from(pointer)) {
                [*byte, _] = next.to_le_bytes();
            }
        }
    }

    /// Place of MSI-X, when the function has it and its structures lie in memory BARs.
    pub(super) fn msix(&self) -> Option<MsixLayout> {
        let capability = self.capabilities().into_iter().find(|cap| cap.id == CAP_MSIX)?.offset;
        if capability + MSIX_CAP_LEN > EXTENDED {
            return None;
        }
        // Bits 0-2 name the BAR, the rest is the offset.
        let place = |register: u16| {
            let value = self.u32(capability + register);
            ((value & 7) as u8, u64::from(value & !7))
        };
        let vectors = (self.u16(capability + MSIX_CONTROL) & 0x7ff) + 1;
        Some(MsixLayout { capability, vectors, table: place(MSIX_TABLE), pba: place(MSIX_PBA) })
    }
}

/// Place of a function's MSI registers, and what the guest wrote to them.
///
/// The whole capability is emulated: its messages are those of the guest's interrupt controller, which the device must
/// never see. (PCI Local Bus 3.0, 6.8.1.)
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

    /// Has the function ask for no more than the `offered` vectors of its device; `None` when there are none.
    pub(super) fn limited(self, offered: u32, config: &mut ConfigSpace) -> Option<Self> {
        let code = offered.min(self.vectors.into()).checked_ilog2()?;
        let limited = Self { vectors: 1 << code, ..self };
        let control = self.capability + MSI_CONTROL;
        let byte = config.bytes.get_mut(usize::from(control))?;
        *byte = *byte & !0xe | u8::try_from(code << 1).ok()?;
        limited.emulate(config);
        Some(limited)
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
    pub(super) fn targets(&self, config: &ConfigSpace) -> (bool, Vec<VectorTarget>) {
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
            VectorTarget { message, masked: masks >> n & 1 != 0 }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::fakes::sample_config;

    #[test]
    fn the_capability_list_is_walked_and_loops_end() {
        let mut bytes = sample_config();
        let space = ConfigSpace::new(bytes.clone());
        let ids: Vec<u8> = space.capabilities().iter().map(|cap| cap.id).collect();
        assert_eq!(ids, [CAP_MSIX, super::super::registers::CAP_VENDOR]);
        bytes[0x51] = 0x40;
        assert_eq!(ConfigSpace::new(bytes.clone()).capabilities().len(), 2);
        bytes[0x34] = 0xfc;
        bytes[0xfc] = CAP_MSIX;
        assert_eq!(ConfigSpace::new(bytes).msix(), None);
    }

    #[test]
    fn only_writable_bits_change() {
        let mut space = ConfigSpace::new(sample_config());
        assert_eq!(space.write(0, &[0xff; 4]), None);
        assert_eq!(space.u32(0), 0x4d53_5646);
        assert_eq!(space.write(COMMAND, &[0xff; 4]), Some((STATUS, &[0xff; 2][..])));
        assert_eq!(space.u16(COMMAND), COMMAND_WRITABLE);
        assert_eq!(space.write(0x52, &[1, 2]), Some((0x52, &[1, 2][..])));
        assert_eq!(space.write(0xffff, &[1]), None);
        let mut out = [0; 2];
        space.read(0xff, &mut out);
        assert_eq!(out, [0, 0xff]);
    }
}
