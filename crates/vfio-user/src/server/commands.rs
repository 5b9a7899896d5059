//! Commands about the device, checked before the back end sees them.

use std::os::fd::{AsRawFd, OwnedFd};

use rustix::io::Errno;

use super::backend::{IrqRequest, IrqRequestData};
use super::session::{Reply, Session, to_usize};
use crate::codec::{
    self, DmaMapPayload, DmaUnmapPayload, InfoPayload, IoFdEntry, IoFdsPayload, IrqSetPayload, RegionAccess,
    RegionInfoPayload, irq_flags,
};
use crate::migration_state::MigrationState;
use crate::model::{DmaMapping, IoFdKind, IrqAction, RegionInfo};

type Answer = Result<Reply, Errno>;

/// The errno for a malformed request.
pub(super) fn bad(_: codec::CodecError) -> Errno {
    Errno::INVAL
}

impl Session<'_> {
    pub(super) fn device_info(&self, body: &[u8]) -> Answer {
        // What follows the struct is for later versions to add to it; some clients send as much as argsz says.
        InfoPayload::decode_prefix(body).map_err(bad)?;
        let info = self.backend.device_info();
        let reset = if info.resettable { codec::DEVICE_FLAGS_RESET } else { 0 };
        let pci = if info.pci { codec::DEVICE_FLAGS_PCI } else { 0 };
        let argsz = size_u32(InfoPayload::SIZE);
        let reply = InfoPayload { argsz, flags: reset | pci, index: info.num_regions, count: info.num_irqs };
        Ok(reply.to_vec().into())
    }

    pub(super) fn region_info(&self, body: &[u8]) -> Answer {
        let ask = RegionInfoPayload::decode_prefix(body).map_err(bad)?;
        let info = self.region(ask.index)?;
        if info.areas.len() > codec::MAX_MMAP_AREAS {
            return Err(Errno::OVERFLOW);
        }
        let caps = if info.areas.is_empty() { Vec::new() } else { codec::encode_sparse_areas(&info.areas) };
        let need = RegionInfoPayload::SIZE + caps.len();
        // Capabilities and the descriptor are all of them there or none: QEMU refuses FLAG_CAPS without an offset.
        let whole = need <= to_usize(ask.argsz);
        let caps = if whole { caps } else { Vec::new() };
        let flag = |set: bool, flag: u32| if set { flag } else { 0 };
        let mut flags = flag(info.read, codec::REGION_FLAG_READ)
            | flag(info.write, codec::REGION_FLAG_WRITE)
            | flag(info.mmap && info.fd.is_some(), codec::REGION_FLAG_MMAP);
        flags |= flag(!caps.is_empty(), codec::REGION_FLAG_CAPS);
        let reply = RegionInfoPayload {
            argsz: size_u32(need),
            flags,
            index: ask.index,
            cap_offset: if caps.is_empty() { 0 } else { size_u32(RegionInfoPayload::SIZE) },
            size: info.size,
            offset: info.offset,
        };
        let mut out = reply.to_vec();
        out.extend_from_slice(&caps);
        let fds = info.fd.into_iter().filter(|_| info.mmap && whole).collect();
        Ok(Reply { body: out, fds })
    }

    pub(super) fn region_io_fds(&self, body: &[u8]) -> Answer {
        let ask = IoFdsPayload::decode_prefix(body).map_err(bad)?;
        if ask.flags != 0 || ask.count != 0 {
            return Err(Errno::INVAL);
        }
        self.region(ask.index)?;
        let entries = self.backend.region_io_fds(ask.index)?;
        if entries.len() > codec::MAX_IO_FDS {
            return Err(Errno::OVERFLOW);
        }
        let need = IoFdsPayload::SIZE + entries.len() * IoFdEntry::SIZE;
        let count = size_u32(entries.len());
        let mut out = IoFdsPayload { argsz: size_u32(need), flags: 0, index: ask.index, count }.to_vec();
        if need > to_usize(ask.argsz) {
            return Ok(out.into());
        }
        let mut reply = Reply::default();
        for entry in entries {
            // Entries that share a descriptor share its place.
            let raw = entry.fd.as_raw_fd();
            let place = reply.fds.iter().position(|fd| fd.as_raw_fd() == raw);
            let place = place.unwrap_or_else(|| {
                reply.fds.push(entry.fd);
                reply.fds.len() - 1
            });
            let (kind, flags, value) = match entry.kind {
                IoFdKind::Eventfd { flags, datamatch } => (codec::IO_FD_EVENTFD, flags, datamatch),
                IoFdKind::Regionfd { flags, user_data } => (codec::IO_FD_REGIONFD, flags, user_data),
            };
            let fd_index = size_u32(place);
            let (offset, size) = (entry.offset, entry.size);
            IoFdEntry { offset, size, fd_index, kind, flags, padding: 0, value }.encode(&mut out);
        }
        // There is no way to send them in parts.
        if reply.fds.len() > self.terms.client_fds {
            return Err(Errno::TOOBIG);
        }
        reply.body = out;
        Ok(reply)
    }

    pub(super) fn irq_info(&self, body: &[u8]) -> Answer {
        let ask = InfoPayload::decode_prefix(body).map_err(bad)?;
        let info = self.irq(ask.index)?;
        let flag = |set: bool, flag: u32| if set { flag } else { 0 };
        let flags = flag(info.eventfd, irq_flags::INFO_EVENTFD)
            | flag(info.maskable, irq_flags::INFO_MASKABLE)
            | flag(info.automasked, irq_flags::INFO_AUTOMASKED)
            | flag(info.noresize, irq_flags::INFO_NORESIZE);
        let argsz = size_u32(InfoPayload::SIZE);
        Ok(InfoPayload { argsz, flags, index: ask.index, count: info.count }.to_vec().into())
    }

    pub(super) fn set_irqs(&mut self, body: &[u8], fds: Vec<OwnedFd>) -> Answer {
        let (ask, data) = IrqSetPayload::decode_with_rest(body).map_err(bad)?;
        let info = self.irq(ask.index)?;
        let action = irq_flags::action(ask.flags).ok_or(Errno::INVAL)?;
        let end = ask.start.checked_add(ask.count).ok_or(Errno::INVAL)?;
        if end > info.count || to_usize(ask.count) > codec::MAX_IRQS {
            return Err(Errno::INVAL);
        }
        let count = to_usize(ask.count);
        let sort = ask.flags & (irq_flags::DATA_NONE | irq_flags::DATA_BOOL | irq_flags::DATA_EVENTFD);
        if sort != irq_flags::DATA_BOOL && !data.is_empty()
            || sort != irq_flags::DATA_EVENTFD && !fds.is_empty()
        {
            return Err(Errno::INVAL);
        }
        let disable = ask.count == 0;
        let data = match sort {
            irq_flags::DATA_NONE if disable && (action != IrqAction::Trigger || ask.start != 0) => {
                return Err(Errno::INVAL);
            }
            irq_flags::DATA_NONE => IrqRequestData::None,
            _ if disable => return Err(Errno::INVAL),
            irq_flags::DATA_BOOL if data.len() == count => {
                IrqRequestData::Bool(data.iter().map(|wanted| *wanted != 0).collect())
            }
            irq_flags::DATA_EVENTFD if fds.is_empty() => IrqRequestData::Disconnect,
            irq_flags::DATA_EVENTFD if fds.len() == count => IrqRequestData::Eventfd(fds),
            _ => return Err(Errno::INVAL),
        };
        if matches!(data, IrqRequestData::Eventfd(_)) {
            // Before the device has it: one that fails half way keeps what it has connected so far.
            self.irqs.insert(ask.index);
        }
        self.backend.set_irqs(IrqRequest {
            index: ask.index,
            start: ask.start,
            count: ask.count,
            action,
            data,
        })?;
        Ok(Reply::default())
    }

    pub(super) fn region_read(&mut self, body: &[u8]) -> Answer {
        let access = RegionAccess::decode_exact(body).map_err(bad)?;
        let count = self.checked(&access)?;
        let mut out = self.take_scratch();
        access.encode(&mut out);
        out.resize(RegionAccess::SIZE + count, 0);
        if count > 0 {
            let into = out.get_mut(RegionAccess::SIZE..).unwrap_or_default();
            self.backend.region_read(access.region, access.offset, into)?;
        }
        Ok(out.into())
    }

    pub(super) fn region_write(&self, body: &[u8]) -> Answer {
        let (access, data) = RegionAccess::decode_with_rest(body).map_err(bad)?;
        let count = self.checked(&access)?;
        if data.len() != count {
            return Err(Errno::INVAL);
        }
        if count > 0 {
            self.backend.region_write(access.region, access.offset, data)?;
        }
        Ok(access.to_vec().into())
    }

    pub(super) fn region_write_multi(&self, body: &[u8]) -> Answer {
        let writes = codec::decode_multi(body).map_err(bad)?;
        // All are checked before the first is done: a refusal then means that nothing happened.
        for write in &writes {
            let codec_access =
                RegionAccess { offset: write.offset, region: write.region, count: write.count };
            self.checked(&codec_access)?;
        }
        let mut done: u64 = 0;
        for write in &writes {
            let data = write.data.get(..to_usize(write.count)).ok_or(Errno::INVAL)?;
            match self.backend.region_write(write.region, write.offset, data) {
                Ok(()) => done += 1,
                Err(errno) if done == 0 => return Err(errno),
                // The reply can say how many were done, not why no more.
                Err(_) => break,
            }
        }
        Ok(done.to_ne_bytes().to_vec().into())
    }

    pub(super) fn dma_map(&mut self, body: &[u8], mut fds: Vec<OwnedFd>) -> Answer {
        let ask = DmaMapPayload::decode_exact(body).map_err(bad)?;
        let (prot, can_map) = codec::prot_of_flags(ask.flags).ok_or(Errno::INVAL)?;
        let page = self.terms.page;
        let aligned = ask.iova.is_multiple_of(page) && ask.len.is_multiple_of(page);
        if ask.len == 0 || !aligned || fds.len() > 1 {
            return Err(Errno::INVAL);
        }
        let last = ask.iova.checked_add(ask.len - 1).ok_or(Errno::OVERFLOW)?;
        ask.offset.checked_add(ask.len).ok_or(Errno::OVERFLOW)?;
        // Mappings do not overlap, so only the last that begins at or before this one's end can be in the way.
        let before = self.maps.range(..=last).next_back();
        if before.is_some_and(|(iova, len)| iova.saturating_add(len - 1) >= ask.iova) {
            return Err(Errno::EXIST);
        }
        if self.maps.len() >= self.terms.max_dma_maps {
            return Err(Errno::NOSPC);
        }
        // A file that cannot be mapped is of no use here: its memory is reached by messages.
        let fd = fds.pop().filter(|_| can_map);
        let (iova, len, offset) = (ask.iova, ask.len, ask.offset);
        self.backend.dma_map(DmaMapping { iova, len, prot, fd, offset })?;
        self.maps.insert(iova, len);
        Ok(Reply::default())
    }

    pub(super) fn dma_unmap(&mut self, body: &[u8]) -> Answer {
        let ask = DmaUnmapPayload::decode_exact(body).map_err(bad)?;
        match ask.flags {
            0 => {
                if self.maps.get(&ask.iova) != Some(&ask.len) {
                    return Err(Errno::NOENT);
                }
                self.backend.dma_unmap(ask.iova, ask.len)?;
                self.maps.remove(&ask.iova);
            }
            codec::DMA_UNMAP_ALL if ask.iova == 0 && ask.len == 0 => {
                while let Some((iova, len)) = self.maps.first_key_value().map(|(iova, len)| (*iova, *len)) {
                    self.backend.dma_unmap(iova, len)?;
                    self.maps.remove(&iova);
                }
            }
            _ => return Err(Errno::INVAL),
        }
        Ok(ask.to_vec().into())
    }

    pub(super) fn reset(&self, body: &[u8]) -> Answer {
        if !body.is_empty() {
            return Err(Errno::INVAL);
        }
        self.backend.reset()?;
        // A device that says it was reset and is not running is not what the client must build on.
        match self.backend.mig_state() {
            Ok(MigrationState::Running) => {}
            Ok(_) => return Err(Errno::IO),
            // It has no migration.
            Err(_) => {}
        }
        Ok(Reply::default())
    }

    fn region(&self, index: u32) -> Result<RegionInfo, Errno> {
        if index >= self.backend.device_info().num_regions {
            return Err(Errno::INVAL);
        }
        self.backend.region_info(index)
    }

    fn irq(&self, index: u32) -> Result<crate::model::IrqInfo, Errno> {
        if index >= self.backend.device_info().num_irqs {
            return Err(Errno::INVAL);
        }
        self.backend.irq_info(index)
    }

    /// The length of an access that lies within its region and the limits.
    fn checked(&self, access: &RegionAccess) -> Result<usize, Errno> {
        let size = self.region(access.region)?.size;
        let end = access.offset.checked_add(u64::from(access.count)).ok_or(Errno::INVAL)?;
        let count = to_usize(access.count);
        if end > size || count > self.terms.max_xfer {
            return Err(Errno::INVAL);
        }
        Ok(count)
    }
}

/// A length that was bounded before.
pub(super) fn size_u32(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}
