//! Payloads of the commands about the device: regions, interrupts, DMA.

use super::{CodecError, MAX_IO_FDS, MAX_MMAP_AREAS, MAX_MULTI_WRITES, payload, split};
use crate::model::{MmapArea, Prot, RegionWrite};

/// `VFIO_DEVICE_FLAGS_RESET`.
pub const DEVICE_FLAGS_RESET: u32 = 1 << 0;
/// `VFIO_DEVICE_FLAGS_PCI`.
pub const DEVICE_FLAGS_PCI: u32 = 1 << 1;
/// `VFIO_REGION_INFO_FLAG_READ`.
pub const REGION_FLAG_READ: u32 = 1 << 0;
/// `VFIO_REGION_INFO_FLAG_WRITE`.
pub const REGION_FLAG_WRITE: u32 = 1 << 1;
/// `VFIO_REGION_INFO_FLAG_MMAP`.
pub const REGION_FLAG_MMAP: u32 = 1 << 2;
/// `VFIO_REGION_INFO_FLAG_CAPS`.
pub const REGION_FLAG_CAPS: u32 = 1 << 3;
/// `VFIO_USER_IO_FD_TYPE_IOEVENTFD`.
pub const IO_FD_EVENTFD: u32 = 0;
/// `VFIO_USER_IO_FD_TYPE_IOREGIONFD`.
pub const IO_FD_REGIONFD: u32 = 1;
/// `VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP`: gone from the protocol, refused.
pub const DMA_UNMAP_DIRTY_BITMAP: u32 = 1 << 0;
/// `VFIO_DMA_UNMAP_FLAG_ALL`: everything, with address and size 0.
pub const DMA_UNMAP_ALL: u32 = 1 << 1;

const DMA_READABLE: u32 = 1 << 0;
const DMA_WRITEABLE: u32 = 1 << 1;
/// libvfio-user since 2026-06: the descriptor can be mapped.
const DMA_MMAP: u32 = 1 << 2;
/// libvfio-user since 2026-06: the descriptor can be read and written as a file.
const DMA_FILE_IO: u32 = 1 << 3;
/// `VFIO_REGION_INFO_CAP_SPARSE_MMAP`.
const CAP_SPARSE_MMAP: u16 = 1;
/// The most capabilities of one region that are followed: a chain that is longer goes in circles.
const MAX_CAPABILITIES: usize = 64;

/// Flags of GET_IRQ_INFO and SET_IRQS.
pub mod irq_flags {
    use crate::model::IrqAction;

    /// `VFIO_IRQ_INFO_EVENTFD`.
    pub const INFO_EVENTFD: u32 = 1 << 0;
    /// `VFIO_IRQ_INFO_MASKABLE`.
    pub const INFO_MASKABLE: u32 = 1 << 1;
    /// `VFIO_IRQ_INFO_AUTOMASKED`.
    pub const INFO_AUTOMASKED: u32 = 1 << 2;
    /// `VFIO_IRQ_INFO_NORESIZE`.
    pub const INFO_NORESIZE: u32 = 1 << 3;
    /// `VFIO_IRQ_SET_DATA_NONE`.
    pub const DATA_NONE: u32 = 1 << 0;
    /// `VFIO_IRQ_SET_DATA_BOOL`.
    pub const DATA_BOOL: u32 = 1 << 1;
    /// `VFIO_IRQ_SET_DATA_EVENTFD`.
    pub const DATA_EVENTFD: u32 = 1 << 2;
    /// `VFIO_IRQ_SET_ACTION_MASK`.
    pub const ACTION_MASK: u32 = 1 << 3;
    /// `VFIO_IRQ_SET_ACTION_UNMASK`.
    pub const ACTION_UNMASK: u32 = 1 << 4;
    /// `VFIO_IRQ_SET_ACTION_TRIGGER`.
    pub const ACTION_TRIGGER: u32 = 1 << 5;

    /// The flag of an action.
    pub fn of_action(action: IrqAction) -> u32 {
        match action {
            IrqAction::Mask => ACTION_MASK,
            IrqAction::Unmask => ACTION_UNMASK,
            IrqAction::Trigger => ACTION_TRIGGER,
        }
    }

    /// The one action among `flags`; `None` if there are none, several, or unknown flags.
    pub fn action(flags: u32) -> Option<IrqAction> {
        match flags & !(DATA_NONE | DATA_BOOL | DATA_EVENTFD) {
            ACTION_MASK => Some(IrqAction::Mask),
            ACTION_UNMASK => Some(IrqAction::Unmask),
            ACTION_TRIGGER => Some(IrqAction::Trigger),
            _ => None,
        }
    }
}

payload! {
    /// DMA_MAP. No reply payload.
    DmaMapPayload {
        /// Length of this struct.
        argsz: u32,
        /// Bit 0 readable, bit 1 writeable; bits 2 and 3 say what can be done with the descriptor: mapped, read and
        /// written as a file.
        flags: u32,
        /// Offset in the descriptor's file.
        offset: u64,
        /// First bus address of the range.
        iova: u64,
        /// Length in bytes.
        len: u64,
    }
}

payload! {
    /// DMA_UNMAP, and its reply.
    DmaUnmapPayload {
        /// Room for the reply.
        argsz: u32,
        /// [`DMA_UNMAP_ALL`] or 0.
        flags: u32,
        /// First bus address of the range.
        iova: u64,
        /// Length in bytes.
        len: u64,
    }
}

payload! {
    /// DEVICE_GET_INFO (`index`, `count` are `num_regions`, `num_irqs` there) and DEVICE_GET_IRQ_INFO, and their replies.
    InfoPayload {
        /// Room for the reply; in the reply what it needs.
        argsz: u32,
        /// `VFIO_DEVICE_FLAGS_*` or `VFIO_IRQ_INFO_*`.
        flags: u32,
        /// Interrupt type; number of regions.
        index: u32,
        /// Number of interrupts; number of interrupt types.
        count: u32,
    }
}

payload! {
    /// DEVICE_GET_REGION_INFO, and the front of its reply (`struct vfio_region_info`).
    RegionInfoPayload {
        /// Room for the reply; in the reply what it needs, capabilities included.
        argsz: u32,
        /// `VFIO_REGION_INFO_FLAG_*`.
        flags: u32,
        /// Index of the region.
        index: u32,
        /// Offset of the first capability from the start of this struct; 0 for none.
        cap_offset: u32,
        /// Size in bytes.
        size: u64,
        /// Offset in the descriptor's file.
        offset: u64,
    }
}

payload! {
    /// DEVICE_GET_REGION_IO_FDS, and the front of its reply.
    IoFdsPayload {
        /// Room for the reply; in the reply what it needs.
        argsz: u32,
        /// Reserved: zero.
        flags: u32,
        /// Index of the region.
        index: u32,
        /// Number of entries.
        count: u32,
    }
}

payload! {
    /// An entry of the reply to DEVICE_GET_REGION_IO_FDS.
    IoFdEntry {
        /// First byte in the region.
        offset: u64,
        /// Length of the accesses, or 0.
        size: u64,
        /// Index of the reply's descriptor.
        fd_index: u32,
        /// [`IO_FD_EVENTFD`] or [`IO_FD_REGIONFD`].
        kind: u32,
        /// The mechanism's flags.
        flags: u32,
        /// Reserved: zero.
        padding: u32,
        /// `datamatch` or `user_data`.
        value: u64,
    }
}

payload! {
    /// The front of DEVICE_SET_IRQS. No reply payload.
    IrqSetPayload {
        /// Length of this struct and the data after it.
        argsz: u32,
        /// See [`irq_flags`].
        flags: u32,
        /// Index of the interrupt type.
        index: u32,
        /// First interrupt.
        start: u32,
        /// Number of interrupts.
        count: u32,
    }
}

payload! {
    /// The front of REGION_READ and REGION_WRITE, and of their replies.
    RegionAccess {
        /// Offset in the region.
        offset: u64,
        /// Index of the region.
        region: u32,
        /// Number of bytes.
        count: u32,
    }
}

payload! {
    /// The front of DMA_READ and DMA_WRITE, and of their replies.
    DmaAccess {
        /// First bus address of the access.
        address: u64,
        /// Number of bytes.
        count: u64,
    }
}

payload! {
    /// One write of REGION_WRITE_MULTI.
    WriteOne {
        /// Offset in the region.
        offset: u64,
        /// Index of the region.
        region: u32,
        /// Number of bytes, at most 8.
        count: u32,
        /// The bytes, in memory order.
        data: u64,
    }
}

payload! {
    /// `struct vfio_info_cap_header`.
    CapHeader {
        /// Capability id.
        id: u16,
        /// Version of the capability.
        version: u16,
        /// Offset of the next from the start of the region info; 0 for none.
        next: u32,
    }
}

/// Rights as DMA_MAP has them.
pub fn dma_flags(prot: Prot) -> u32 {
    (if prot.read { DMA_READABLE } else { 0 }) | (if prot.write { DMA_WRITEABLE } else { 0 })
}

/// Rights from DMA_MAP's flags, and whether a descriptor that comes with them can be mapped: where nothing is said of it, it
/// can. `None` for flags that are not defined.
pub fn prot_of_flags(flags: u32) -> Option<(Prot, bool)> {
    let known = DMA_READABLE | DMA_WRITEABLE | DMA_MMAP | DMA_FILE_IO;
    let prot = Prot { read: flags & DMA_READABLE != 0, write: flags & DMA_WRITEABLE != 0 };
    let can_map = flags & (DMA_MMAP | DMA_FILE_IO) != DMA_FILE_IO;
    (flags & !known == 0).then_some((prot, can_map))
}

/// The sparse mmap capability for `areas`, as it stands right behind a [`RegionInfoPayload`].
pub fn encode_sparse_areas(areas: &[MmapArea]) -> Vec<u8> {
    let mut out = Vec::with_capacity(16 + areas.len() * 16);
    CapHeader { id: CAP_SPARSE_MMAP, version: 1, next: 0 }.encode(&mut out);
    out.extend_from_slice(&u32::try_from(areas.len()).unwrap_or(u32::MAX).to_ne_bytes());
    out.extend_from_slice(&0u32.to_ne_bytes());
    for area in areas {
        out.extend_from_slice(&area.offset.to_ne_bytes());
        out.extend_from_slice(&area.size.to_ne_bytes());
    }
    out
}

/// The mappable areas that the capabilities in `body`, the whole reply that begins with `info`, list. Areas lie within the region.
///
/// # Errors
/// The chain leaves the reply or goes in circles, an area leaves the region, or there are more than [`MAX_MMAP_AREAS`].
pub fn decode_sparse_areas(info: &RegionInfoPayload, body: &[u8]) -> Result<Vec<MmapArea>, CodecError> {
    let mut areas = Vec::new();
    if info.flags & REGION_FLAG_CAPS == 0 {
        return Ok(areas);
    }
    let mut at = info.cap_offset;
    for _ in 0..MAX_CAPABILITIES {
        if at == 0 {
            return Ok(areas);
        }
        let start = usize::try_from(at).ok().filter(|start| *start >= RegionInfoPayload::SIZE);
        let cap = start.and_then(|start| body.get(start..));
        let cap = cap.ok_or_else(|| CodecError::Invalid(format!("a capability at {at}")))?;
        let (header, rest) = CapHeader::decode_with_rest(cap)?;
        if header.id == CAP_SPARSE_MMAP {
            decode_areas(info.size, rest, &mut areas)?;
        }
        at = header.next;
    }
    Err(CodecError::Invalid("region capabilities in a circle".into()))
}

fn decode_areas(size: u64, bytes: &[u8], areas: &mut Vec<MmapArea>) -> Result<(), CodecError> {
    let (count, rest) = split::<4>(bytes)?;
    let (_, mut rest) = split::<4>(rest)?;
    let count = u32::from_ne_bytes(*count);
    let in_all = usize::try_from(count).unwrap_or(usize::MAX).saturating_add(areas.len());
    if in_all > MAX_MMAP_AREAS {
        let what = format!("{in_all} mappable areas of one region, where {MAX_MMAP_AREAS} are the most");
        return Err(CodecError::Invalid(what));
    }
    for _ in 0..count {
        let (offset, tail) = split::<8>(rest)?;
        let (len, tail) = split::<8>(tail)?;
        rest = tail;
        let area = MmapArea { offset: u64::from_ne_bytes(*offset), size: u64::from_ne_bytes(*len) };
        if area.offset.checked_add(area.size).is_none_or(|end| end > size) {
            return Err(CodecError::Invalid(format!("a mappable area {area:x?} in a region of {size:#x}")));
        }
        areas.push(area);
    }
    Ok(())
}

/// The entries of the reply `body` to DEVICE_GET_REGION_IO_FDS. Entries may be longer than this version knows. libvfio-user's
/// are of 48 bytes, and those of eventfds have their `datamatch` at the end of it, behind an offset in a file of its own.
///
/// # Errors
/// The entries do not fit the reply, or there are more than [`MAX_IO_FDS`].
pub fn decode_io_fds(body: &[u8]) -> Result<Vec<IoFdEntry>, CodecError> {
    let (head, rest) = IoFdsPayload::decode_with_rest(body)?;
    let count = usize::try_from(head.count).unwrap_or(usize::MAX);
    if count == 0 {
        return Ok(Vec::new());
    }
    if count > MAX_IO_FDS {
        let what = format!("{count} descriptors for accesses to one region, where {MAX_IO_FDS} are the most");
        return Err(CodecError::Invalid(what));
    }
    let stride = rest.len() / count;
    if stride < IoFdEntry::SIZE {
        return Err(CodecError::Truncated { need: count.saturating_mul(IoFdEntry::SIZE), have: rest.len() });
    }
    let entry = |bytes| {
        let (mut entry, rest) = IoFdEntry::decode_with_rest(bytes)?;
        if let (IO_FD_EVENTFD, Ok((datamatch, _))) = (entry.kind, split::<8>(rest)) {
            entry.value = u64::from_ne_bytes(*datamatch);
        }
        Ok(entry)
    };
    rest.chunks_exact(stride).take(count).map(entry).collect()
}

/// REGION_WRITE_MULTI with `writes`.
pub fn encode_multi(writes: &[RegionWrite]) -> Vec<u8> {
    let mut out = Vec::with_capacity(8 + writes.len() * WriteOne::SIZE);
    out.extend_from_slice(&(writes.len() as u64).to_ne_bytes());
    for write in writes {
        let RegionWrite { offset, region, count, data } = *write;
        WriteOne { offset, region, count, data: u64::from_ne_bytes(data) }.encode(&mut out);
    }
    out
}

/// The writes of a REGION_WRITE_MULTI.
///
/// # Errors
/// There are too many, a write is of no byte or more than 8, or `body` is not exactly as long as they need.
pub fn decode_multi(body: &[u8]) -> Result<Vec<RegionWrite>, CodecError> {
    let (count, mut rest) = split::<8>(body)?;
    let count = u64::from_ne_bytes(*count);
    if count > MAX_MULTI_WRITES as u64 {
        return Err(CodecError::Invalid(format!("{count} writes in one message")));
    }
    let mut writes = Vec::new();
    for _ in 0..count {
        let (one, tail) = WriteOne::decode_with_rest(rest)?;
        rest = tail;
        if one.count == 0 || one.count > 8 {
            return Err(CodecError::Invalid(format!("a small write of {} bytes", one.count)));
        }
        let WriteOne { offset, region, count, data } = one;
        writes.push(RegionWrite { offset, region, count, data: data.to_ne_bytes() });
    }
    if !rest.is_empty() {
        return Err(CodecError::Invalid(format!("{} bytes behind the writes", rest.len())));
    }
    Ok(writes)
}

/// How many writes the reply to a REGION_WRITE_MULTI says were done.
///
/// # Errors
/// `body` is too short.
pub fn decode_multi_reply(body: &[u8]) -> Result<u64, CodecError> {
    split::<8>(body).map(|(done, _)| u64::from_ne_bytes(*done))
}
