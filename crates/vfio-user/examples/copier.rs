//! A PCI device that copies guest memory by DMA, raises an MSI-X vector when it is done, logs what it wrote, and migrates.
//!
//! `cargo run --example copier -- /tmp/a.sock`, the same with `/tmp/b.sock`, and `cargo run --example migrate -- /tmp/a.sock /tmp/b.sock`
//! moves it from the one process to the other.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard};

use vfio_user_peer::{
    Backend, DeviceInfo, DmaMapping, Errno, IovaRange, IrqAction, IrqInfo, IrqRequest, IrqRequestData,
    MigrationFlags, MigrationState, RegionInfo, Server, StopHandle, irq_index, region_index,
};

/// BAR0: the registers, little-endian; the MSI-X table and its pending bits behind them are the VMM's to emulate.
const BAR0_SIZE: u64 = 4096;
/// u64: bus address to copy from.
const SOURCE: usize = 0;
/// u64: bus address to copy to.
const TARGET: usize = 8;
/// u64: number of bytes, at most 1 MiB. A write to its first byte starts the copy, which is done when the write returns.
const LENGTH: usize = 16;
/// u64, read only: copies that were made.
const COPIES: usize = 24;
/// Length of the registers. They are all that migrates besides what the guest wrote to config space.
const REGISTERS: usize = 32;
const LARGEST_COPY: u64 = 1 << 20;
/// Page size of the log.
const PAGE: u64 = 4096;

/// Config space: identity; BAR0, 32 bits of memory; MSI-X with one vector, its table at 0x800 of BAR0, its pending bits at 0xc00.
fn config_space() -> [u8; 256] {
    let mut config = [0; 256];
    let parts: [(usize, &[u8]); 6] = [
        (0x00, &[0x34, 0x12, 0x09, 0x0c]),
        // Status: there is a list of capabilities.
        (0x06, &[0x10, 0x00]),
        // Class: a processing accelerator.
        (0x09, &[0x00, 0x00, 0x12]),
        (0x2c, &[0x34, 0x12, 0x09, 0x0c]),
        (0x34, &[0x40]),
        (0x40, &[0x11, 0, 0, 0, 0x00, 0x08, 0, 0, 0x00, 0x0c, 0, 0]),
    ];
    for (at, bytes) in parts {
        config[at..at + bytes.len()].copy_from_slice(bytes);
    }
    config
}

/// Bits of config space that a guest may set: PCI_COMMAND, BAR0's address (which tells its size), MSI-X's enable and function mask.
fn writable(offset: usize) -> u8 {
    match offset {
        0x04 => 0x06,
        0x05 => 0x04,
        0x11 => 0xf0,
        0x12 | 0x13 => 0xff,
        0x43 => 0xc0,
        _ => 0,
    }
}

struct State {
    registers: [u8; REGISTERS],
    config: [u8; 256],
    /// Memory of the client that the device may reach, with the file behind it.
    maps: BTreeMap<u64, (DmaMapping, File)>,
    vector: Option<File>,
    /// The first addresses of pages that were written; `None` while nothing is logged.
    log: Option<BTreeSet<u64>>,
    mig: MigrationState,
    /// State on its way out, or in.
    stream: Vec<u8>,
}

/// The device.
pub(crate) struct Copier(Mutex<State>);

impl Default for Copier {
    fn default() -> Self {
        Self(Mutex::new(State {
            registers: [0; REGISTERS],
            config: config_space(),
            maps: BTreeMap::new(),
            vector: None,
            log: None,
            mig: MigrationState::Running,
            stream: Vec::new(),
        }))
    }
}

impl State {
    fn register(&self, at: usize) -> u64 {
        self.registers[at..].first_chunk().map_or(0, |raw| u64::from_le_bytes(*raw))
    }

    /// The file that `[iova, iova + len)` lies in, and where.
    fn place(&self, iova: u64, len: u64, write: bool) -> Result<(&File, u64), Errno> {
        let (_, (mapping, file)) = self.maps.range(..=iova).next_back().ok_or(Errno::FAULT)?;
        let inside = (iova - mapping.iova).checked_add(len).is_some_and(|end| end <= mapping.len);
        let allowed = if write { mapping.prot.write } else { mapping.prot.read };
        let at = mapping.offset.checked_add(iova - mapping.iova).filter(|_| inside && allowed);
        at.map(|at| (file, at)).ok_or(Errno::FAULT)
    }

    fn copy(&mut self) -> Result<(), Errno> {
        let (source, target, len) = (self.register(SOURCE), self.register(TARGET), self.register(LENGTH));
        // A stopped device touches no memory. Its bus is off until the guest sets bus master in PCI_COMMAND.
        let off = self.config[0x04] & 0x04 == 0;
        if !self.mig.is_active() || off || len == 0 || len > LARGEST_COPY {
            return Err(Errno::INVAL);
        }
        let mut data = vec![0; usize::try_from(len).map_err(|_| Errno::INVAL)?];
        let (file, at) = self.place(source, len, false)?;
        file.read_exact_at(&mut data, at).map_err(|_| Errno::IO)?;
        let (file, at) = self.place(target, len, true)?;
        let written = file.write_all_at(&data, at).map_err(|_| Errno::IO);
        // What failed may have been written in part.
        if let Some(log) = &mut self.log {
            log.extend((target / PAGE..=(target + len - 1) / PAGE).map(|number| number * PAGE));
        }
        written?;
        let copies = self.register(COPIES) + 1;
        self.registers[COPIES..].copy_from_slice(&copies.to_le_bytes());
        match self.vector.as_ref() {
            Some(mut vector) => vector.write_all(&1u64.to_ne_bytes()).map_err(|_| Errno::IO),
            None => Ok(()),
        }
    }
}

impl Copier {
    fn state(&self) -> Result<MutexGuard<'_, State>, Errno> {
        self.0.lock().map_err(|_| Errno::IO)
    }
}

/// Where an access lies in a region of `size` bytes; the server has checked that it does.
fn range(offset: u64, len: usize, size: usize) -> Result<std::ops::Range<usize>, Errno> {
    let at = usize::try_from(offset).map_err(|_| Errno::INVAL)?;
    at.checked_add(len).filter(|end| *end <= size).map(|end| at..end).ok_or(Errno::INVAL)
}

impl Backend for Copier {
    fn device_info(&self) -> DeviceInfo {
        DeviceInfo {
            resettable: true,
            pci: true,
            num_regions: region_index::COUNT,
            num_irqs: irq_index::COUNT,
        }
    }

    fn region_info(&self, index: u32) -> Result<RegionInfo, Errno> {
        let size = match index {
            0 => BAR0_SIZE,
            region_index::CONFIG => 256,
            _ => 0,
        };
        Ok(RegionInfo { size, read: size > 0, write: size > 0, ..RegionInfo::default() })
    }

    fn irq_info(&self, index: u32) -> Result<IrqInfo, Errno> {
        let there = index == irq_index::MSIX;
        Ok(IrqInfo { count: there.into(), eventfd: there, ..IrqInfo::default() })
    }

    fn region_read(&self, index: u32, offset: u64, into: &mut [u8]) -> Result<(), Errno> {
        let state = self.state()?;
        if index == region_index::CONFIG {
            into.copy_from_slice(&state.config[range(offset, into.len(), 256)?]);
        } else {
            // Beyond the registers BAR0 reads as zero.
            into.fill(0);
            let at = usize::try_from(offset).map_err(|_| Errno::INVAL)?;
            let there = state.registers.get(at..).unwrap_or_default();
            into.iter_mut().zip(there).for_each(|(to, from)| *to = *from);
        }
        Ok(())
    }

    fn region_write(&self, index: u32, offset: u64, from: &[u8]) -> Result<(), Errno> {
        let mut state = self.state()?;
        if index == region_index::CONFIG {
            for (at, byte) in range(offset, from.len(), 256)?.zip(from) {
                state.config[at] = (state.config[at] & !writable(at)) | (byte & writable(at));
            }
            return Ok(());
        }
        let written = range(offset, from.len(), COPIES)?;
        let starts = written.contains(&LENGTH);
        state.registers[written].copy_from_slice(from);
        if starts { state.copy() } else { Ok(()) }
    }

    fn set_irqs(&self, request: IrqRequest) -> Result<(), Errno> {
        self.state()?.vector = match (request.action, request.data) {
            (IrqAction::Trigger, IrqRequestData::Eventfd(fds)) => fds.into_iter().next().map(File::from),
            (IrqAction::Trigger, IrqRequestData::Disconnect) => None,
            (IrqAction::Trigger, IrqRequestData::None) if request.count == 0 => None,
            _ => return Err(Errno::INVAL),
        };
        Ok(())
    }

    fn dma_map(&self, mut mapping: DmaMapping) -> Result<(), Errno> {
        // Memory without a file would be asked for by messages, through the `DmaChannel` of `client_connected`.
        let file = File::from(mapping.fd.take().ok_or(Errno::OPNOTSUPP)?);
        self.state()?.maps.insert(mapping.iova, (mapping, file));
        Ok(())
    }

    fn dma_unmap(&self, iova: u64, _len: u64) -> Result<(), Errno> {
        self.state()?.maps.remove(&iova).map(drop).ok_or(Errno::NOENT)
    }

    fn reset(&self) -> Result<(), Errno> {
        let mut state = self.state()?;
        state.registers = [0; REGISTERS];
        state.config = config_space();
        state.mig = MigrationState::Running;
        state.stream.clear();
        Ok(())
    }

    fn migration_flags(&self) -> Result<MigrationFlags, Errno> {
        Ok(MigrationFlags::default())
    }

    fn mig_state(&self) -> Result<MigrationState, Errno> {
        Ok(self.state()?.mig)
    }

    fn set_mig_state(&self, to: MigrationState) -> Result<(), Errno> {
        let mut state = self.state()?;
        let stream = std::mem::take(&mut state.stream);
        if to == MigrationState::StopCopy {
            state.stream = [&state.registers[..], &state.config[..]].concat();
        } else if state.mig == MigrationState::Resuming {
            // Whatever came is loaded whole, or not at all.
            let (registers, rest) = stream.split_first_chunk().ok_or(Errno::INVAL)?;
            let config: &[u8; 256] = rest.try_into().map_err(|_| Errno::INVAL)?;
            (state.registers, state.config) = (*registers, *config);
        }
        state.mig = to;
        Ok(())
    }

    fn mig_data_read(&self, into: &mut [u8]) -> Result<usize, Errno> {
        let mut state = self.state()?;
        let count = into.len().min(state.stream.len());
        into.iter_mut().zip(state.stream.drain(..count)).for_each(|(to, from)| *to = from);
        Ok(count)
    }

    fn mig_data_write(&self, from: &[u8]) -> Result<(), Errno> {
        let mut state = self.state()?;
        if state.stream.len() + from.len() > REGISTERS + 256 {
            return Err(Errno::INVAL);
        }
        state.stream.extend_from_slice(from);
        Ok(())
    }

    fn dma_logging_supported(&self) -> bool {
        true
    }

    fn dma_logging_start(&self, _page_size: u64, _ranges: &[IovaRange]) -> Result<u64, Errno> {
        self.state()?.log = Some(BTreeSet::new());
        Ok(PAGE)
    }

    fn dma_logging_stop(&self) -> Result<(), Errno> {
        self.state()?.log = None;
        Ok(())
    }

    fn dma_logging_report(&self, range: IovaRange, page_size: u64, bitmap: &mut [u64]) -> Result<(), Errno> {
        let mut state = self.state()?;
        let log = state.log.as_mut().ok_or(Errno::INVAL)?;
        // The server has checked that pages of the log are no larger than those that are asked for, and the range's end.
        for page in log.extract_if(range.iova..=range.iova + (range.len - 1), |_| true) {
            let bit = usize::try_from((page - range.iova) / page_size).map_err(|_| Errno::INVAL)?;
            *bitmap.get_mut(bit / 64).ok_or(Errno::INVAL)? |= 1 << (bit % 64);
        }
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("usage: copier SOCKET")?;
    let server = Server::bind(&path)?;
    eprintln!("serving on {path}");
    Ok(server.serve(&Copier::default(), &StopHandle::new()?)?)
}
