//! The device as a PCI function of the guest: config space and MSI-X of this VMM's own.
//!
//! Config space is a copy of the device's, read when it was opened; what the guest writes stays in the copy, but for PCI_COMMAND.
//! Every access to a BAR is trapped. Each vector that the guest has unmasked has an eventfd, which the device signals and KVM takes.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VmFd;
use vfio_user_peer::{Client, region_index};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::error::Error;
use crate::hardware::connect_vector;
use crate::irq::Routes;

/// Bytes of config space.
pub(crate) const CONFIG_LEN: usize = 256;
const COMMAND: usize = 0x04;
const BAR0: usize = 0x10;
const BARS_END: usize = 0x28;
const CAPABILITIES: usize = 0x34;
const CAP_MSIX: u8 = 0x11;
const COMMAND_MEMORY: u8 = 1 << 1;
const MSIX_ENABLE: u8 = 1 << 7;
const MSIX_MASK_ALL: u8 = 1 << 6;
/// Bytes of an entry of the MSI-X table.
const ENTRY: u64 = 16;
/// Where this VMM's "firmware" puts the BARs.
const BAR_WINDOW: u64 = 0xC000_0000;

/// An entry of the MSI-X table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Vector {
    /// Address of the message.
    pub(crate) address: u64,
    /// Data of the message.
    pub(crate) data: u32,
    /// Masked by the guest.
    pub(crate) masked: bool,
}

/// The function, in slot 1 of bus 0.
pub(crate) struct Function {
    device: Arc<Client>,
    vm: Arc<VmFd>,
    routes: Arc<Routes>,
    /// Sizes of the regions behind the BARs.
    sizes: [u64; 6],
    msix: Msix,
    pristine: [u8; CONFIG_LEN],
    state: Mutex<State>,
}

/// Where the MSI-X capability and its table are.
#[derive(Clone, Copy)]
struct Msix {
    capability: usize,
    vectors: usize,
    bar: u8,
    table: u64,
}

struct State {
    config: [u8; CONFIG_LEN],
    vectors: Vec<Armed>,
}

/// A vector, and what it is connected to.
#[derive(Default)]
struct Armed {
    entry: Vector,
    event: Option<EventFd>,
    /// KVM takes what the eventfd says.
    irqfd: bool,
}

impl fmt::Debug for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Function").field("vectors", &self.msix.vectors).finish_non_exhaustive()
    }
}

impl Function {
    /// The function of `device`, as it is after a reset.
    pub(crate) fn new(device: Arc<Client>, vm: Arc<VmFd>, routes: Arc<Routes>) -> Result<Self, Error> {
        let mut config = [0; CONFIG_LEN];
        device
            .region_read(region_index::CONFIG, 0, &mut config)
            .map_err(Error::other("reading config space"))?;
        let mut sizes = [0; 6];
        for (index, size) in (0..).zip(&mut sizes) {
            *size = device.region_info(index).map_err(Error::other("asking for a BAR"))?.size;
        }
        let msix = Msix::find(&config).ok_or(Error::Text("the device has no MSI-X"))?;
        let vectors =
            (0..msix.vectors).map(|_| Armed { entry: Vector::reset(), ..Armed::default() }).collect();
        let state = Mutex::new(State { config, vectors });
        Ok(Self { device, vm, routes, sizes, msix, pristine: config, state })
    }

    /// What firmware does: an address for each BAR.
    pub(crate) fn place_bars(&self) {
        let mut at = BAR_WINDOW;
        let mut state = self.lock();
        for (index, size) in self.sizes.iter().enumerate().filter(|(_, size)| **size > 0) {
            at = at.next_multiple_of(*size);
            let low = u32::try_from(at).unwrap_or(0).to_le_bytes();
            self.write_bars(&mut state.config, BAR0 + 4 * index, &low);
            at += size;
        }
    }

    /// A read of config space by the guest.
    pub(crate) fn config_read(&self, offset: usize, into: &mut [u8]) {
        let state = self.lock();
        into.iter_mut()
            .enumerate()
            .for_each(|(n, byte)| *byte = state.config.get(offset + n).copied().unwrap_or(0));
    }

    /// A write of config space by the guest.
    pub(crate) fn config_write(&self, offset: usize, from: &[u8]) -> Result<(), Error> {
        let mut state = self.lock();
        let end = offset + from.len();
        if offset >= BAR0 && end <= BARS_END {
            self.write_bars(&mut state.config, offset, from);
        } else if offset == COMMAND && from.len() >= 2 {
            state.config[COMMAND..COMMAND + 2].copy_from_slice(&from[..2]);
            self.write_command(&state.config)?;
        } else if offset == self.msix.capability && from.len() == 4 {
            state.config[offset + 3] = from[3] & (MSIX_ENABLE | MSIX_MASK_ALL) | state.config[offset + 3] & 7;
        } else if offset == self.msix.capability + 2 && from.len() == 2 {
            state.config[offset + 1] = from[1] & (MSIX_ENABLE | MSIX_MASK_ALL) | state.config[offset + 1] & 7;
        }
        self.arm(&mut state)
    }

    /// A read of guest-physical memory that is not RAM. Whether it was this function's.
    pub(crate) fn memory_read(&self, address: u64, into: &mut [u8]) -> Result<bool, Error> {
        let Some((bar, offset)) = self.decode(address) else { return Ok(false) };
        match self.table_entry(bar, offset) {
            Some((index, at)) => {
                let state = self.lock();
                let word = state.vectors.get(index).map_or(0, |vector| vector.entry.word(at));
                into.iter_mut().zip(word.to_le_bytes()).for_each(|(to, from)| *to = from);
            }
            None => {
                self.device.region_read(bar.into(), offset, into).map_err(Error::other("reading a BAR"))?
            }
        }
        Ok(true)
    }

    /// The same for a write.
    pub(crate) fn memory_write(&self, address: u64, from: &[u8]) -> Result<bool, Error> {
        let Some((bar, offset)) = self.decode(address) else { return Ok(false) };
        let Some((index, at)) = self.table_entry(bar, offset) else {
            self.device.region_write(bar.into(), offset, from).map_err(Error::other("writing a BAR"))?;
            return Ok(true);
        };
        let mut word = [0; 4];
        word.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        let mut state = self.lock();
        if let Some(vector) = state.vectors.get_mut(index) {
            vector.entry.set_word(at, u32::from_le_bytes(word));
        }
        self.arm(&mut state)?;
        Ok(true)
    }

    /// Config space and the BARs' addresses.
    pub(crate) fn config(&self) -> ([u8; CONFIG_LEN], [u64; 6]) {
        let state = self.lock();
        let mut bars = [0; 6];
        for (index, bar) in bars.iter_mut().enumerate().filter(|(index, _)| self.sizes[*index] > 0) {
            *bar = address(&state.config, index);
        }
        (state.config, bars)
    }

    /// Takes the vectors from KVM, and says of each whether it was raised and is not delivered.
    pub(crate) fn take_vectors(&self) -> Result<Vec<(Vector, bool)>, Error> {
        let mut state = self.lock();
        let mut taken = Vec::new();
        for (index, vector) in state.vectors.iter_mut().enumerate() {
            self.drop_irqfd(index, vector)?;
            let pending = vector.event.as_ref().is_some_and(|event| event.read().is_ok());
            if let Some(event) = vector.event.as_ref().filter(|_| pending) {
                // It stays raised here: the guest may go on here after all.
                event.write(1).map_err(Error::other("keeping an interrupt"))?;
            }
            taken.push((vector.entry, pending));
        }
        Ok(taken)
    }

    /// What must agree between two devices, as offsets in config space.
    pub(crate) fn differs(&self, config: &[u8]) -> Option<(u16, u8, u8)> {
        let compared = (0..4).chain(8..12).chain(0x2c..0x30).chain([CAPABILITIES]);
        compared
            .map(|at| (at, config.get(at).copied().unwrap_or(0), self.pristine[at]))
            .find(|(_, theirs, own)| theirs != own)
            .and_then(|(at, theirs, own)| Some((u16::try_from(at).ok()?, theirs, own)))
    }

    /// Loads config space, and tells the device its PCI_COMMAND.
    pub(crate) fn load_config(&self, config: &[u8]) -> Result<(), Error> {
        let config = config.try_into().map_err(|_| Error::Text("config space of another size"))?;
        let mut state = self.lock();
        state.config = config;
        self.write_command(&state.config)
    }

    /// Loads the MSI-X table; the routes of its vectors take effect with [`Routes::commit`].
    pub(crate) fn load_vectors(&self, vectors: &[Vector]) -> Result<(), Error> {
        let mut state = self.lock();
        if vectors.len() != state.vectors.len() {
            return Err(Error::Text("another number of vectors"));
        }
        for (index, (armed, entry)) in state.vectors.iter_mut().zip(vectors).enumerate() {
            armed.entry = *entry;
            self.routes.set(index, entry.address, entry.data);
        }
        Ok(())
    }

    /// Connects the vectors that the guest has unmasked, and raises `pending`. How many are connected.
    pub(crate) fn connect(&self, pending: &[bool]) -> Result<usize, Error> {
        let mut state = self.lock();
        for (index, _) in pending.iter().enumerate().filter(|(_, pending)| **pending) {
            if let Some(vector) = state.vectors.get_mut(index) {
                let event = self.event(index, vector)?;
                event.write(1).map_err(Error::other("raising an interrupt"))?;
            }
        }
        self.arm(&mut state)?;
        Ok(state.vectors.iter().filter(|vector| vector.irqfd).count())
    }

    /// Goes on after [`take_vectors`](Self::take_vectors).
    pub(crate) fn rearm(&self) -> Result<(), Error> {
        self.arm(&mut self.lock())
    }

    /// As it was made.
    pub(crate) fn clear(&self) -> Result<(), Error> {
        let mut state = self.lock();
        for (index, vector) in state.vectors.iter_mut().enumerate() {
            self.drop_irqfd(index, vector)?;
            *vector = Armed { entry: Vector::reset(), ..Armed::default() };
        }
        state.config = self.pristine;
        drop(state);
        self.device
            .irq_disable(vfio_user_peer::irq_index::MSIX)
            .map_err(Error::other("disconnecting interrupts"))
    }

    /// Brings eventfds, routes and irqfds to what config space and table ask for.
    fn arm(&self, state: &mut State) -> Result<(), Error> {
        let control = state.config[self.msix.capability + 3];
        let on = control & MSIX_ENABLE != 0 && control & MSIX_MASK_ALL == 0;
        for (index, vector) in state.vectors.iter_mut().enumerate() {
            if !on || vector.entry.masked {
                self.drop_irqfd(index, vector)?;
                continue;
            }
            if self.routes.set(index, vector.entry.address, vector.entry.data) {
                self.routes.commit(&self.vm)?;
            }
            if !vector.irqfd {
                let event = self.event(index, vector)?;
                self.vm
                    .register_irqfd(event, Routes::gsi(index))
                    .map_err(Error::other("registering an irqfd"))?;
                vector.irqfd = true;
            }
        }
        Ok(())
    }

    /// The eventfd of a vector, connected to the device.
    fn event<'a>(&self, index: usize, vector: &'a mut Armed) -> Result<&'a EventFd, Error> {
        if vector.event.is_none() {
            let event =
                EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::other("making an eventfd"))?;
            let number = u32::try_from(index).map_err(Error::other("numbering a vector"))?;
            connect_vector(&self.device, number, &event)?;
            vector.event = Some(event);
        }
        vector.event.as_ref().ok_or(Error::Text("no eventfd"))
    }

    fn drop_irqfd(&self, index: usize, vector: &mut Armed) -> Result<(), Error> {
        if let Some(event) = vector.event.as_ref().filter(|_| vector.irqfd) {
            self.vm
                .unregister_irqfd(event, Routes::gsi(index))
                .map_err(Error::other("unregistering an irqfd"))?;
            vector.irqfd = false;
        }
        Ok(())
    }

    fn write_command(&self, config: &[u8; CONFIG_LEN]) -> Result<(), Error> {
        let command = &config[COMMAND..COMMAND + 2];
        self.device
            .region_write(region_index::CONFIG, COMMAND as u64, command)
            .map_err(Error::other("writing PCI_COMMAND"))
    }

    /// The low bits of a BAR are what it is, the size is that of its region.
    fn write_bars(&self, config: &mut [u8; CONFIG_LEN], offset: usize, from: &[u8]) {
        for (at, byte) in (offset..).zip(from) {
            let (index, lane) = ((at - BAR0) / 4, (at - BAR0) % 4);
            let upper = index > 0 && self.pristine[BAR0 + 4 * (index - 1)] & 0x6 == 0x4;
            let mask = match (upper, self.sizes[index]) {
                (true, _) => 0xff,
                (false, 0) => 0,
                (false, size) => (!(size - 1)).to_le_bytes()[lane],
            };
            config[at] = byte & mask | self.pristine[at] & !mask;
        }
    }

    /// The BAR that an address is in, and where.
    fn decode(&self, at: u64) -> Option<(u8, u64)> {
        let state = self.lock();
        if state.config[COMMAND] & COMMAND_MEMORY == 0 {
            return None;
        }
        (0..6u8).find_map(|bar| {
            let size = self.sizes[usize::from(bar)];
            let offset = at.checked_sub(address(&state.config, usize::from(bar)))?;
            (offset < size).then_some((bar, offset))
        })
    }

    /// The entry of the MSI-X table at a place, and the byte of it.
    fn table_entry(&self, bar: u8, offset: u64) -> Option<(usize, u64)> {
        let at = offset.checked_sub(self.msix.table).filter(|_| bar == self.msix.bar)?;
        let index = usize::try_from(at / ENTRY).ok().filter(|index| *index < self.msix.vectors)?;
        Some((index, at % ENTRY))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn address(config: &[u8; CONFIG_LEN], bar: usize) -> u64 {
    let word = |at: usize| {
        u64::from(u32::from_le_bytes([config[at], config[at + 1], config[at + 2], config[at + 3]]))
    };
    let (at, low) = (BAR0 + 4 * bar, word(BAR0 + 4 * bar));
    let high = if low & 0x6 == 0x4 && bar < 5 { word(at + 4) << 32 } else { 0 };
    high | low & !0xf
}

impl Msix {
    fn find(config: &[u8; CONFIG_LEN]) -> Option<Self> {
        let mut at = usize::from(config[CAPABILITIES] & 0xfc);
        // A list that never ends is none.
        for _ in 0..48 {
            if at == 0 || at + 12 > CONFIG_LEN {
                return None;
            }
            if config[at] == CAP_MSIX {
                let vectors = usize::from(u16::from_le_bytes([config[at + 2], config[at + 3] & 7])) + 1;
                let table =
                    u32::from_le_bytes([config[at + 4], config[at + 5], config[at + 6], config[at + 7]]);
                let bar = config[at + 4] & 7;
                return Some(Self { capability: at, vectors, bar, table: u64::from(table & !7) });
            }
            at = usize::from(config[at + 1] & 0xfc);
        }
        None
    }
}

impl Vector {
    fn reset() -> Self {
        Self { masked: true, ..Self::default() }
    }

    fn word(&self, at: u64) -> u32 {
        let [a, b, c, d, e, f, g, h] = self.address.to_le_bytes();
        match at {
            0 => u32::from_le_bytes([a, b, c, d]),
            4 => u32::from_le_bytes([e, f, g, h]),
            8 => self.data,
            _ => self.masked.into(),
        }
    }

    fn set_word(&mut self, at: u64, word: u32) {
        match at {
            0 => self.address = self.address & !0xffff_ffff | u64::from(word),
            4 => self.address = self.address & 0xffff_ffff | u64::from(word) << 32,
            8 => self.data = word,
            _ => self.masked = word & 1 == 1,
        }
    }
}
