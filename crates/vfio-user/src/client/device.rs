//! Requests about the device: regions, interrupts, DMA mappings, reset.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::connection::Client;
use crate::codec::{
    self, Command, DmaMapPayload, DmaUnmapPayload, InfoPayload, IoFdsPayload, IrqSetPayload, RegionAccess,
    RegionInfoPayload, irq_flags,
};
use crate::conn::SocketMessage;
use crate::error::ClientError;
use crate::model::{DeviceInfo, IoFd, IoFdKind, IrqAction, IrqData, IrqInfo, Prot, RegionInfo, RegionWrite};

/// Room that is offered for a region's capabilities in the first request; most replies fit.
const FIRST_REGION_REPLY: u32 = 4096;
/// The most that a server may need for a region's capabilities, or for its table of descriptors.
const MAX_INFO_REPLY: u32 = 1 << 20;

impl Client {
    /// Number of regions and interrupt types of the device.
    pub fn device_info(&self) -> Result<DeviceInfo, ClientError> {
        let ask = InfoPayload { argsz: size_u32(InfoPayload::SIZE), flags: 0, index: 0, count: 0 };
        let reply = self.request(Command::DEVICE_GET_INFO, &ask.to_vec(), &[], InfoPayload::SIZE)?;
        let info: InfoPayload = self.parse(&reply, InfoPayload::decode_prefix)?;
        Ok(DeviceInfo {
            resettable: info.flags & codec::DEVICE_FLAGS_RESET != 0,
            pci: info.flags & codec::DEVICE_FLAGS_PCI != 0,
            num_regions: info.index,
            num_irqs: info.count,
        })
    }

    /// Size, rights, mappable parts and descriptor of region `index`.
    pub fn region_info(&self, index: u32) -> Result<RegionInfo, ClientError> {
        let mut argsz = FIRST_REGION_REPLY;
        loop {
            let ask = RegionInfoPayload { argsz, index, ..RegionInfoPayload::default() };
            let mut reply = self.request(
                Command::DEVICE_GET_REGION_INFO,
                &ask.to_vec(),
                &[],
                usize::try_from(argsz).unwrap_or(usize::MAX),
            )?;
            let info = self.parse(&reply, RegionInfoPayload::decode_prefix)?;
            if info.index != index {
                return Err(self.lie(&reply, format!("region {} instead of {index}", info.index)));
            }
            if let Some(more) = self.more_room(&reply, argsz, info.argsz)? {
                argsz = more;
                continue;
            }
            let areas = self.parse(&reply, |body| codec::decode_sparse_areas(&info, body))?;
            let mmap = info.flags & codec::REGION_FLAG_MMAP != 0;
            let fd = (!reply.fds.is_empty()).then(|| Arc::new(reply.fds.swap_remove(0)));
            if mmap && fd.is_none() {
                return Err(self.lie(&reply, "a mappable region without a descriptor"));
            }
            return Ok(RegionInfo {
                size: info.size,
                read: info.flags & codec::REGION_FLAG_READ != 0,
                write: info.flags & codec::REGION_FLAG_WRITE != 0,
                mmap,
                areas,
                offset: info.offset,
                fd: fd.filter(|_| mmap),
            });
        }
    }

    /// Descriptors to which accesses to parts of region `index` may go. Empty where the server offers none, and where it is
    /// not asked because it would lose step; a server that does not know the command refuses with EINVAL or ENOTSUP.
    pub fn region_io_fds(&self, index: u32) -> Result<Vec<IoFd>, ClientError> {
        if self.basics_only {
            return Ok(Vec::new());
        }
        let mut argsz = FIRST_REGION_REPLY;
        loop {
            let ask = IoFdsPayload { argsz, flags: 0, index, count: 0 };
            let reply = self.request(
                Command::DEVICE_GET_REGION_IO_FDS,
                &ask.to_vec(),
                &[],
                usize::try_from(argsz).unwrap_or(usize::MAX),
            )?;
            let table = self.parse(&reply, IoFdsPayload::decode_prefix)?;
            if table.index != index {
                return Err(self.lie(&reply, format!("region {} instead of {index}", table.index)));
            }
            if let Some(more) = self.more_room(&reply, argsz, table.argsz)? {
                argsz = more;
                continue;
            }
            return self.io_fds(reply);
        }
    }

    /// Count and abilities of interrupt type `index`.
    pub fn irq_info(&self, index: u32) -> Result<IrqInfo, ClientError> {
        let ask = InfoPayload { argsz: size_u32(InfoPayload::SIZE), flags: 0, index, count: 0 };
        let reply = self.request(Command::DEVICE_GET_IRQ_INFO, &ask.to_vec(), &[], InfoPayload::SIZE)?;
        let info: InfoPayload = self.parse(&reply, InfoPayload::decode_prefix)?;
        if info.index != index {
            return Err(self.lie(&reply, format!("interrupt type {} instead of {index}", info.index)));
        }
        if usize::try_from(info.count).is_ok_and(|count| count > codec::MAX_IRQS) {
            let what =
                format!("{} interrupts of one type, where {} are the most", info.count, codec::MAX_IRQS);
            return Err(self.lie(&reply, what));
        }
        Ok(IrqInfo {
            count: info.count,
            eventfd: info.flags & irq_flags::INFO_EVENTFD != 0,
            maskable: info.flags & irq_flags::INFO_MASKABLE != 0,
            automasked: info.flags & irq_flags::INFO_AUTOMASKED != 0,
            noresize: info.flags & irq_flags::INFO_NORESIZE != 0,
        })
    }

    /// Does `action` to interrupts of type `index` from `start`. Eventfds go in as few messages as `max_msg_fds` allows;
    /// when a later one is refused, the earlier ones stay connected.
    pub fn set_irqs(
        &self,
        index: u32,
        start: u32,
        action: IrqAction,
        data: IrqData<'_>,
    ) -> Result<(), ClientError> {
        let action = irq_flags::of_action(action);
        match data {
            IrqData::None(count) => {
                self.irq_message(index, start, count, action | irq_flags::DATA_NONE, &[], &[])
            }
            IrqData::Disconnect(count) => {
                self.irq_message(index, start, count, action | irq_flags::DATA_EVENTFD, &[], &[])
            }
            IrqData::Bool(wanted) => {
                let count = self.fit("interrupts in one request", wanted.len(), codec::MAX_IRQS)?;
                let data: Vec<u8> = wanted.iter().map(|wanted| u8::from(*wanted)).collect();
                self.irq_message(index, start, count, action | irq_flags::DATA_BOOL, &data, &[])
            }
            IrqData::Eventfd(fds) => {
                self.fit("interrupts in one request", fds.len(), codec::MAX_IRQS)?;
                let per_message = self.fds_per_message();
                let mut start = start;
                for fds in fds.chunks(per_message) {
                    let count = size_u32(fds.len());
                    self.irq_message(index, start, count, action | irq_flags::DATA_EVENTFD, &[], fds)?;
                    start = start.saturating_add(count);
                }
                Ok(())
            }
        }
    }

    /// Connects `eventfds` to the interrupts of type `index` from `start`.
    pub fn irq_connect(
        &self,
        index: u32,
        start: u32,
        eventfds: &[BorrowedFd<'_>],
    ) -> Result<(), ClientError> {
        self.set_irqs(index, start, IrqAction::Trigger, IrqData::Eventfd(eventfds))
    }

    /// Disconnects the eventfds of `count` interrupts of type `index` from `start`.
    pub fn irq_disconnect(&self, index: u32, start: u32, count: u32) -> Result<(), ClientError> {
        self.set_irqs(index, start, IrqAction::Trigger, IrqData::Disconnect(count))
    }

    /// Disables interrupt type `index` altogether.
    pub fn irq_disable(&self, index: u32) -> Result<(), ClientError> {
        self.set_irqs(index, 0, IrqAction::Trigger, IrqData::None(0))
    }

    /// Has the device raise `count` interrupts of type `index` from `start`.
    pub fn irq_trigger(&self, index: u32, start: u32, count: u32) -> Result<(), ClientError> {
        self.set_irqs(index, start, IrqAction::Trigger, IrqData::None(count))
    }

    /// Masks `count` interrupts of type `index` from `start`.
    pub fn irq_mask(&self, index: u32, start: u32, count: u32) -> Result<(), ClientError> {
        self.set_irqs(index, start, IrqAction::Mask, IrqData::None(count))
    }

    /// Unmasks `count` interrupts of type `index` from `start`.
    pub fn irq_unmask(&self, index: u32, start: u32, count: u32) -> Result<(), ClientError> {
        self.set_irqs(index, start, IrqAction::Unmask, IrqData::None(count))
    }

    /// Fills `into` from region `index` at `offset`, in pieces of at most the negotiated size.
    pub fn region_read(&self, index: u32, offset: u64, into: &mut [u8]) -> Result<(), ClientError> {
        let mut at = offset;
        for piece in into.chunks_mut(self.piece()) {
            let count = size_u32(piece.len());
            let ask = RegionAccess { offset: at, region: index, count };
            let reply =
                self.request(Command::REGION_READ, &ask.to_vec(), &[], RegionAccess::SIZE + piece.len())?;
            let (access, data) = self.parse(&reply, RegionAccess::decode_with_rest)?;
            if access.count != count || data.len() != piece.len() {
                let what = format!("{} bytes ({} announced) instead of {count}", data.len(), access.count);
                return Err(self.lie(&reply, what));
            }
            piece.copy_from_slice(data);
            at = at.wrapping_add(u64::from(count));
            self.conn.recycle(reply);
        }
        Ok(())
    }

    /// Writes `from` to region `index` at `offset`, in pieces of at most the negotiated size, and of at most 32 KiB to a server
    /// that does not speak the extension. Returns when the device took it.
    pub fn region_write(&self, index: u32, offset: u64, from: &[u8]) -> Result<(), ClientError> {
        let mut at = offset;
        for piece in from.chunks(self.piece_behind(RegionAccess::SIZE)) {
            let count = size_u32(piece.len());
            let ask = RegionAccess { offset: at, region: index, count };
            let reply =
                self.request_parts(Command::REGION_WRITE, &[&ask.to_vec(), piece], &[], RegionAccess::SIZE)?;
            let access = self.parse(&reply, RegionAccess::decode_prefix)?;
            if access.count != count {
                return Err(self.lie(&reply, format!("{} bytes written instead of {count}", access.count)));
            }
            at = at.wrapping_add(u64::from(count));
        }
        Ok(())
    }

    /// Does several small writes by one message, in order. Needs `write_multiple` negotiated.
    pub fn region_write_multi(&self, writes: &[RegionWrite]) -> Result<(), ClientError> {
        if !self.negotiated.write_multiple {
            return Err(ClientError::NotNegotiated("REGION_WRITE_MULTI"));
        }
        for writes in writes.chunks(codec::MAX_MULTI_WRITES) {
            let reply = self.request(Command::REGION_WRITE_MULTI, &codec::encode_multi(writes), &[], 8)?;
            let done = self.parse(&reply, codec::decode_multi_reply)?;
            if done != writes.len() as u64 {
                return Err(self.lie(&reply, format!("{done} writes done of {}", writes.len())));
            }
        }
        Ok(())
    }

    /// Lets the device reach `len` bytes at bus address `iova`. With a file (and the offset in it of the first byte) the
    /// server maps it; without, it asks for the memory through the [`DmaHandler`](super::DmaHandler).
    pub fn dma_map(
        &self,
        iova: u64,
        len: u64,
        prot: Prot,
        file: Option<(BorrowedFd<'_>, u64)>,
    ) -> Result<(), ClientError> {
        let page = match self.negotiated.pgsizes {
            0 => 1,
            sizes => 1 << sizes.trailing_zeros(),
        };
        if let Some(value) = [iova, len].into_iter().find(|value: &u64| !value.is_multiple_of(page)) {
            let what = "an address or length of a DMA mapping (the limit is what it must be a multiple of)";
            return Err(ClientError::Limit { what, value, limit: page });
        }
        let maps = self.maps.load(Ordering::Relaxed);
        if maps >= self.negotiated.max_dma_maps {
            let (value, limit) = (u64::from(maps) + 1, u64::from(self.negotiated.max_dma_maps));
            return Err(ClientError::Limit { what: "the number of DMA mappings", value, limit });
        }
        let ask = DmaMapPayload {
            argsz: size_u32(DmaMapPayload::SIZE),
            flags: codec::dma_flags(prot),
            offset: file.map_or(0, |(_, offset)| offset),
            iova,
            len,
        };
        let fds: Vec<BorrowedFd<'_>> = file.iter().map(|(fd, _)| *fd).collect();
        self.request(Command::DMA_MAP, &ask.to_vec(), &fds, 0)?;
        self.maps.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Takes back a mapping, exactly as it was made. When this returns the device does not touch it any more.
    pub fn dma_unmap(&self, iova: u64, len: u64) -> Result<(), ClientError> {
        let ask = DmaUnmapPayload { argsz: size_u32(DmaUnmapPayload::SIZE), flags: 0, iova, len };
        self.request(Command::DMA_UNMAP, &ask.to_vec(), &[], DmaUnmapPayload::SIZE)?;
        // Saturating: a server may grant what was never mapped.
        let less = |maps: u32| Some(maps.saturating_sub(1));
        let _ = self.maps.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        Ok(())
    }

    /// Takes back every mapping.
    pub fn dma_unmap_all(&self) -> Result<(), ClientError> {
        let argsz = size_u32(DmaUnmapPayload::SIZE);
        let ask = DmaUnmapPayload { argsz, flags: codec::DMA_UNMAP_ALL, iova: 0, len: 0 };
        self.request(Command::DMA_UNMAP, &ask.to_vec(), &[], DmaUnmapPayload::SIZE)?;
        self.maps.store(0, Ordering::Relaxed);
        Ok(())
    }

    /// Resets the device. Kernel devices and this crate's server are in RUNNING afterwards; libvfio-user keeps the
    /// migration state, so ask, or use [`reset_to_running`](Self::reset_to_running).
    pub fn reset(&self) -> Result<(), ClientError> {
        self.request(Command::DEVICE_RESET, &[], &[], 0).map(drop)
    }

    /// How much room to offer in a second request, where the reply needs more than it was offered in the first.
    fn more_room(
        &self,
        reply: &SocketMessage,
        offered: u32,
        needed: u32,
    ) -> Result<Option<u32>, ClientError> {
        let what = match needed {
            _ if needed <= offered => return Ok(None),
            _ if offered != FIRST_REGION_REPLY => {
                format!("a reply that needs {needed} bytes, after it had the {offered} that it needed before")
            }
            _ if needed > MAX_INFO_REPLY => {
                format!("a reply that needs {needed} bytes, where {MAX_INFO_REPLY} are the most")
            }
            _ => return Ok(Some(needed)),
        };
        Err(self.lie(reply, what))
    }

    fn irq_message(
        &self,
        index: u32,
        start: u32,
        count: u32,
        flags: u32,
        data: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ClientError> {
        let argsz = size_u32(IrqSetPayload::SIZE + data.len());
        let ask = IrqSetPayload { argsz, flags, index, start, count };
        self.request_parts(Command::DEVICE_SET_IRQS, &[&ask.to_vec(), data], fds, 0).map(drop)
    }

    fn io_fds(&self, reply: SocketMessage) -> Result<Vec<IoFd>, ClientError> {
        let entries = self.parse(&reply, codec::decode_io_fds)?;
        let command = reply.header.command;
        let fds: Vec<Arc<_>> = reply.fds.into_iter().map(Arc::new).collect();
        let lie = |what: String| ClientError::Protocol { command, what };
        let mut out = Vec::with_capacity(entries.len());
        for entry in entries {
            let fd = usize::try_from(entry.fd_index).ok().and_then(|index| fds.get(index));
            let fd = fd.ok_or_else(|| lie(format!("descriptor {} of {}", entry.fd_index, fds.len())))?;
            let kind = match entry.kind {
                codec::IO_FD_EVENTFD => IoFdKind::Eventfd { flags: entry.flags, datamatch: entry.value },
                codec::IO_FD_REGIONFD => IoFdKind::Regionfd { flags: entry.flags, user_data: entry.value },
                // A mechanism of a later version: the accesses still work as messages.
                _ => continue,
            };
            out.push(IoFd { offset: entry.offset, size: entry.size, kind, fd: Arc::clone(fd) });
        }
        Ok(out)
    }

    fn fds_per_message(&self) -> usize {
        // A server that takes no descriptors at all says so by refusing the first.
        usize::try_from(self.negotiated.max_msg_fds.clamp(1, codec::MAX_MSG_FDS)).unwrap_or(1)
    }
}

/// A length that this crate bounded before.
pub(super) fn size_u32(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}
