//! Bus 0: config accesses find their function, memory accesses find their BAR.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use vfio_migration_types::Gpa;

use super::bars::{Bar, BarWindows, Hit};
use super::devfn::Devfn;
use super::host::PciHost;
use super::registers::HEADER_TYPE;
use super::vfio::VfioPciFunction;

/// Config mechanism 1 (PCI 3.0, 3.2.2.3.2): the address register, and the window to the dword that it names.
const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;
const CONFIG_ENABLE: u32 = 0x8000_0000;
/// The memory-mapped config space of one bus (PCIe 5.0, 7.2.2): 32 devices of 8 functions of 4 KiB.
const ECAM_LEN: u64 = 1 << 20;
/// Bit of the header type (PCI 3.0, 6.2.1): there are further functions in this slot.
const MULTI_FUNCTION: u8 = 0x80;

/// Config space of the host bridge at 00:00.0: vendor and device of our own, class 06 00 00.
const HOST_BRIDGE: [u8; 16] = [0x46, 0x56, 0x42, 0x48, 0, 0, 0, 0, 0, 0, 0x00, 0x06, 0, 0, 0, 0];

/// Each byte of a read that no device claims.
const UNCLAIMED: u8 = 0xff;

/// BARs found no place.
#[derive(Debug, thiserror::Error)]
#[error("no room for BAR {bar} ({size:#x} bytes) of the device at {devfn}")]
pub struct PlaceError {
    /// Place of the device on bus 0.
    pub devfn: Devfn,
    /// BAR number.
    pub bar: u8,
    /// Size of the BAR in bytes.
    pub size: u64,
}

/// PCI bus 0: the host bridge in slot 0, functions 0 to 7 in each slot from 1.
///
/// Whether a slot has several functions is for the bus to say: it answers for that bit of a header type, whatever the device's
/// own says of where it is on its host.
#[derive(Debug)]
pub struct PciBus {
    host: Arc<PciHost>,
    /// Start of the memory-mapped config space.
    ecam: Gpa,
    address: AtomicU32,
    functions: RwLock<Vec<Arc<VfioPciFunction>>>,
}

impl PciBus {
    /// Slots of the bus that functions can be in.
    pub const SLOTS: u8 = 31;
    /// Functions of a slot.
    pub const FUNCTIONS: u8 = 8;

    /// A bus with its host bridge alone, whose memory-mapped config space is the mebibyte at `ecam`.
    pub fn new(host: Arc<PciHost>, ecam: Gpa) -> Self {
        Self { host, ecam, address: AtomicU32::new(0), functions: RwLock::default() }
    }

    /// The way to the guest that all functions share.
    pub fn host(&self) -> &Arc<PciHost> {
        &self.host
    }

    /// Puts a function at the place that it was made for, which must be free.
    pub fn add(&self, function: Arc<VfioPciFunction>) {
        self.functions.write().unwrap_or_else(PoisonError::into_inner).push(function);
    }

    /// The functions, in the order in which they came.
    pub fn functions(&self) -> Vec<Arc<VfioPciFunction>> {
        self.functions.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The address register of config mechanism 1: part of the machine's state.
    pub fn config_address(&self) -> u32 {
        self.address.load(Ordering::Relaxed)
    }

    /// Puts the address register back.
    pub fn set_config_address(&self, address: u32) {
        self.address.store(address, Ordering::Relaxed);
    }

    /// Gives every BAR an address, as firmware does before a guest starts: 64-bit prefetchable ones in the high
    /// window, other memory in the low one, I/O in ports, the largest first; and every function that has a pin the number
    /// of its interrupt. Decode stays off until the guest turns it on.
    pub fn place_bars(&self) -> Result<(), PlaceError> {
        let functions = self.functions();
        let mut bars: Vec<(&VfioPciFunction, Bar)> = functions
            .iter()
            .flat_map(|function| function.bars().iter().map(|bar| (&**function, *bar)))
            .collect();
        bars.sort_by_key(|(_, bar)| std::cmp::Reverse(bar.size));
        let BarWindows { low, high, small, ports } = self.host.windows;
        // What is free of each: first, and past the last.
        let mut low = (low.start().0, low.end());
        // Large ones apart: all small ones are within reach of a guest that maps the window's begin alone.
        let (middle, end) = (high.start().0.saturating_add(small).min(high.end()), high.end());
        let mut high = (high.start().0, middle);
        let mut large = (middle, end);
        let mut ports = (ports.start(), ports.end());
        for (function, bar) in bars {
            // One page of memory at least, so that no two BARs share one.
            let (window, least) = match bar {
                Bar { io: true, .. } => (&mut ports, 1),
                Bar { wide: true, prefetchable: true, size, .. } if size < small => (&mut high, 4096),
                Bar { wide: true, prefetchable: true, .. } => (&mut large, 4096),
                _ => (&mut low, 4096),
            };
            let place = window.0.checked_next_multiple_of(bar.size).and_then(|start| {
                let end = start.checked_add(bar.size).filter(|end| *end <= window.1)?;
                window.0 = end.checked_next_multiple_of(least)?;
                Some(start)
            });
            let no_room = || PlaceError { devfn: function.devfn(), bar: bar.index, size: bar.size };
            function.set_bar(bar, place.ok_or_else(no_room)?);
        }
        functions.iter().for_each(|function| function.set_line());
        Ok(())
    }

    fn function(&self, devfn: Devfn) -> Option<Arc<VfioPciFunction>> {
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        functions.iter().find(|function| function.devfn() == devfn).cloned()
    }

    fn has_several(&self, slot: u8) -> bool {
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        functions.iter().filter(|function| function.devfn().slot() == slot).nth(1).is_some()
    }

    fn config_read(&self, devfn: Devfn, register: u16, into: &mut [u8]) {
        into.fill(UNCLAIMED);
        if devfn == Devfn::in_slot(0) {
            for (index, byte) in into.iter_mut().enumerate() {
                let at = usize::from(register) + index;
                *byte = HOST_BRIDGE.get(at).copied().unwrap_or(if at < 256 { 0 } else { 0xff });
            }
        } else if let Some(function) = self.function(devfn) {
            function.config_read(register, into);
            let header_type = HEADER_TYPE.checked_sub(register).map(usize::from);
            if let Some(header_type) = header_type.and_then(|at| into.get_mut(at)) {
                let several = self.has_several(devfn.slot());
                *header_type = *header_type & !MULTI_FUNCTION | if several { MULTI_FUNCTION } else { 0 };
            }
        }
    }

    fn config_write(&self, devfn: Devfn, register: u16, from: &[u8]) {
        if let Some(function) = self.function(devfn) {
            function.config_write(register, from);
        }
    }

    /// The I/O BAR in which all of `len` ports from `port` lie.
    fn at_port(&self, port: u16, len: usize) -> Option<(Arc<VfioPciFunction>, Hit)> {
        let hit = self.host.ports.find(port.into(), len)?;
        Some((self.function(hit.devfn)?, hit))
    }

    /// Function and register behind the data window of mechanism 1.
    fn selected(&self, port: u16) -> Option<(Devfn, u16)> {
        let address = self.config_address();
        let bus = address >> 16 & 0xff;
        let [low, middle, ..] = address.to_le_bytes();
        let register = u16::from(low & 0xfc) + (port - CONFIG_DATA);
        (address & CONFIG_ENABLE != 0 && bus == 0).then_some((Devfn::new(middle >> 3, middle & 7), register))
    }

    /// Function and register behind an address in the memory-mapped config space.
    fn in_ecam(&self, gpa: Gpa, len: usize) -> Option<(Devfn, u16)> {
        let offset = gpa.offset_from(self.ecam)?;
        offset.checked_add(u64::try_from(len).ok()?).filter(|end| *end <= ECAM_LEN)?;
        let device = u8::try_from(offset >> 15 & 0x1f).ok()?;
        let function = u8::try_from(offset >> 12 & 7).ok()?;
        Some((Devfn::new(device, function), u16::try_from(offset & 0xfff).ok()?))
    }
}

/// An access to the data window stays inside of its dword.
fn in_data_window(port: u16, len: usize) -> bool {
    (CONFIG_DATA..CONFIG_DATA + 4).contains(&port) && usize::from(port - CONFIG_DATA) + len <= 4
}

/// What the guest accesses. Called from vCPU threads, at several at once. What nobody answers reads as ones and swallows
/// writes, as on a PC.
impl PciBus {
    /// An `in` from `port`; `data` is filled in whole.
    pub fn pio_read(&self, port: u16, data: &mut [u8]) {
        data.fill(UNCLAIMED);
        if port == CONFIG_ADDRESS && data.len() == 4 {
            data.copy_from_slice(&self.config_address().to_le_bytes());
        } else if in_data_window(port, data.len())
            && let Some((devfn, register)) = self.selected(port)
        {
            self.config_read(devfn, register, data);
        } else if let Some((function, hit)) = self.at_port(port, data.len()) {
            function.bar_read(hit.bar, hit.offset, data);
        }
    }

    /// An `out` to `port`.
    pub fn pio_write(&self, port: u16, data: &[u8]) {
        if let (CONFIG_ADDRESS, Ok(dword)) = (port, <[u8; 4]>::try_from(data)) {
            self.set_config_address(u32::from_le_bytes(dword));
        } else if in_data_window(port, data.len())
            && let Some((devfn, register)) = self.selected(port)
        {
            self.config_write(devfn, register, data);
        } else if let Some((function, hit)) = self.at_port(port, data.len()) {
            function.bar_write(hit.bar, hit.offset, data);
        }
    }

    /// A load from `gpa`; `data` is filled in whole.
    pub fn mmio_read(&self, gpa: Gpa, data: &mut [u8]) {
        data.fill(UNCLAIMED);
        if let Some((devfn, register)) = self.in_ecam(gpa, data.len()) {
            // A qword is two dwords: config space knows no more.
            for (at, part) in (register..).step_by(4).zip(data.chunks_mut(4)) {
                self.config_read(devfn, at, part);
            }
        } else if let Some(hit) = self.host.addresses.find(gpa.0, data.len())
            && let Some(function) = self.function(hit.devfn)
        {
            function.bar_read(hit.bar, hit.offset, data);
        }
    }

    /// A store to `gpa`.
    pub fn mmio_write(&self, gpa: Gpa, data: &[u8]) {
        if let Some((devfn, register)) = self.in_ecam(gpa, data.len()) {
            for (at, part) in (register..).step_by(4).zip(data.chunks(4)) {
                self.config_write(devfn, at, part);
            }
        } else if let Some(hit) = self.host.addresses.find(gpa.0, data.len())
            && let Some(function) = self.function(hit.devfn)
        {
            function.bar_write(hit.bar, hit.offset, data);
        }
    }
}
