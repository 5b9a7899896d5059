//! A VFIO device as a PCI function of the guest.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vfio_migration_device::{
    ConfigRules, ConfigState, DeviceError, IrqIndex, PciError, PciFunction, PciHardware, PciState,
    RegionIndex,
};
use vfio_migration_types::{DeviceId, Gpa};

use super::areas::map_memory;
use super::backend::{BarDoorbell, Eventfd};
use super::bars::{BARS, Bar, register};
use super::compare::compare;
use super::config::{ConfigSpace, MsiLayout, MsixLayout};
use super::devfn::Devfn;
use super::flr::ResetRegisters;
use super::host::PciHost;
use super::interrupts::FunctionInterrupts;
use super::own_registers::OwnRegister;
use super::registers::{CAP_MSI, CAP_MSIX, COMMAND, HEADER_END, INTERRUPT_LINE};
use super::state::State;
use super::vectors::{ENTRY, IrqPath, PciFailure};

/// Bytes of config space that every function has: its header.
const HEADER: usize = HEADER_END as usize;

/// A VFIO device before the guest: its config space emulated, its BARs mapped where they can be and trapped where not,
/// its pin and vectors as interrupts of the guest. The stock [`PciFunction`].
#[derive(Debug)]
pub struct VfioPciFunction {
    pub(super) devfn: Devfn,
    pub(super) hardware: Arc<dyn PciHardware>,
    pub(super) host: Arc<PciHost>,
    pub(super) bars: Vec<Bar>,
    layout: Option<MsixLayout>,
    resets: ResetRegisters,
    own_registers: Vec<OwnRegister>,
    /// Config space as it was when the device was opened.
    pristine: ConfigSpace,
    state: Mutex<State>,
    errors: AtomicU64,
    /// The guest's interrupts are [unsettled](Self::is_unsettled), for whoever asks while the device is waited for.
    unsettled: AtomicBool,
}

impl VfioPciFunction {
    /// Makes the function of a device that was just opened or reset, for place `devfn` of the bus.
    ///
    /// The other devices of the host become able to reach its BARs by DMA, and it theirs.
    ///
    /// # Errors
    /// Its config space or its regions cannot be had, or make no sense.
    pub fn new(devfn: Devfn, hardware: Arc<dyn PciHardware>, host: Arc<PciHost>) -> Result<Self, PciError> {
        let id = hardware.id().clone();
        let failed = |doing: &str, source: Box<dyn std::error::Error + Send + Sync>| PciError::Failed {
            device: id.clone(),
            doing: doing.to_owned(),
            source,
        };
        let region_size = |index: u32| {
            hardware.regions().iter().find(|region| region.index.0 == index).map_or(0, |region| region.size)
        };
        // The kernel's mtty says 255 of 256 bytes: what a device leaves out reads 0, and is never asked of it.
        let (mut bytes, own) = match usize::try_from(region_size(RegionIndex::CONFIG.0)).unwrap_or(usize::MAX)
        {
            0..HEADER => {
                return Err(PciError::Unfit { device: id.clone(), what: "it has no config space".into() });
            }
            size @ HEADER..4096 => (vec![0; 256], size.min(256)),
            _ => (vec![0; 4096], 4096),
        };
        hardware
            .region_read(RegionIndex::CONFIG, 0, bytes.get_mut(..own).unwrap_or_default())
            .map_err(|error| failed("reading config space", Box::new(error)))?;

        let bars = Bar::discover(&bytes, |index| region_size(index.into()));
        let mut config = ConfigSpace::new(bytes);
        config.end_of_device(own);
        bars.iter().for_each(|bar| bar.define(&mut config));
        let layout = config.msix().filter(|layout| {
            let inside = |(bar, offset): (u8, u64), len: u64| {
                bars.iter().any(|known| known.index == bar && !known.io && offset + len <= known.size)
            };
            let vectors = u64::from(layout.vectors);
            let sane = inside(layout.table, vectors * ENTRY) && inside(layout.pba, vectors.div_ceil(64) * 8);
            let offered = hardware.irq_count(IrqIndex::Msix);
            if !sane {
                tracing::warn!(device = %id, ?layout, "MSI-X lies outside of the device's BARs: hidden");
            } else if u32::from(layout.vectors) > offered {
                let vectors = layout.vectors;
                tracing::warn!(device = %id, vectors, offered, "the host serves fewer MSI-X vectors: hidden");
            }
            sane && u32::from(layout.vectors) <= offered
        });
        if layout.is_none() {
            config.hide(CAP_MSIX);
        }
        let msi = MsiLayout::find(&config)
            .and_then(|layout| layout.limited(hardware.irq_count(IrqIndex::Msi), &mut config));
        if msi.is_none() {
            config.hide(CAP_MSI);
        }
        let interrupts = FunctionInterrupts::new(devfn, &hardware, &*host.irq, &config, msi, layout)
            .map_err(|(doing, source)| failed(&doing, source))?;

        let (mut memory, mut doorbells): ([Vec<_>; BARS], [Vec<_>; BARS]) = Default::default();
        for bar in bars.iter().filter(|bar| !bar.io) {
            let index = usize::from(bar.index);
            memory[index] = map_memory(&*hardware, bar, layout.as_ref());
            let offered = hardware
                .doorbells(RegionIndex(bar.index.into()))
                .map_err(|error| failed("asking for doorbells", Box::new(error)))?;
            let known = |doorbell: &vfio_migration_device::Doorbell| {
                doorbell.offset.checked_add(doorbell.size).is_some_and(|end| end <= bar.size)
                    && matches!(doorbell.size, 0 | 1 | 2 | 4 | 8)
            };
            doorbells[index] = offered
                .into_iter()
                .filter(known)
                .map(|doorbell| {
                    let event = Arc::new(Eventfd::from(doorbell.fd));
                    let (size, datamatch) = (doorbell.size, doorbell.datamatch);
                    (doorbell.offset, BarDoorbell { gpa: Gpa(0), size, datamatch, event })
                })
                .collect();
        }

        host.peers
            .join(devfn, Arc::clone(&hardware))
            .map_err(|error| failed("letting it reach the other devices' BARs", Box::new(error)))?;
        let state = State {
            config: config.clone(),
            interrupts,
            memory,
            doorbells,
            placed: std::array::from_fn(|_| None),
        };
        let (resets, own_registers) = (ResetRegisters::find(&config), OwnRegister::find(&config));
        let (state, errors, unsettled) = (Mutex::new(state), AtomicU64::new(0), AtomicBool::new(false));
        Ok(Self {
            devfn,
            hardware,
            host,
            bars,
            layout,
            resets,
            own_registers,
            pristine: config,
            state,
            errors,
            unsettled,
        })
    }

    /// Slot and function on bus 0.
    pub fn devfn(&self) -> Devfn {
        self.devfn
    }

    /// The device behind the function.
    pub fn hardware(&self) -> &Arc<dyn PciHardware> {
        &self.hardware
    }

    /// Vendor (low half) and device id, as the first dword of config space has them.
    pub fn identity(&self) -> u32 {
        self.pristine.u32(0)
    }

    /// Accesses of the guest, and changes that it asked for, that failed since the function was made. The guest read
    /// all ones, or saw nothing happen, as with a device that fell off its bus.
    pub fn errors(&self) -> u64 {
        self.errors.load(Ordering::Relaxed)
    }

    /// Whether the device has refused, or not answered, something that the guest's interrupts need, so that some of those which the
    /// guest has unmasked may not reach it. [`settle_interrupts`](Self::settle_interrupts) tries again. Asks the device nothing.
    pub fn is_unsettled(&self) -> bool {
        self.unsettled.load(Ordering::Acquire)
    }

    /// Brings the interrupts once more to what the guest asks for, if they are [not](Self::is_unsettled) and the guest runs. Says
    /// whether they are now.
    pub fn settle_interrupts(&self) -> bool {
        let Some(_passage) = self.host.gate.pass_if_open() else { return false };
        let mut state = self.lock();
        let State { config, interrupts, .. } = &mut *state;
        if !interrupts.is_unsettled() {
            return true;
        }
        match interrupts.apply_masks(config, self.irq_path()) {
            Ok(()) => {
                tracing::info!(device = %self.hardware.id(), "the guest's interrupts are connected");
                self.unsettled.store(false, Ordering::Release);
                true
            }
            Err((doing, error)) => {
                tracing::debug!(device = %self.hardware.id(), doing, %error, "the guest's interrupts are still not connected");
                false
            }
        }
    }

    /// Raises what is pending on unmasked vectors: for a guest that goes on here after its state was saved.
    pub fn deliver_pending(&self) -> Result<(), PciError> {
        self.lock().interrupts.resume(self.irq_path()).map_err(|failure| self.failed(failure))
    }

    /// Takes everything back, and leaves the other devices' reach: before the device is closed. Goes on after a
    /// failure, and says the first.
    pub fn release(&self) -> Result<(), PciError> {
        let undone = self.undo();
        self.host.peers.leave(self.devfn);
        undone
    }

    pub(super) fn bars(&self) -> &[Bar] {
        &self.bars
    }

    /// Writes a BAR's address, while decode is off.
    pub(super) fn set_bar(&self, bar: Bar, address: u64) {
        let mut state = self.lock();
        let bytes = address.to_le_bytes();
        let (low, high) = bytes.split_at(4);
        state.config.write(register(bar.index), low);
        if bar.wide {
            state.config.write(register(bar.index + 1), high);
        }
    }

    /// Tells the guest, as firmware does, which interrupt its pin raises.
    pub(super) fn set_line(&self) {
        let mut state = self.lock();
        if let Some(line) = state.interrupts.line() {
            let [line, ..] = line.to_le_bytes();
            state.config.write(INTERRUPT_LINE, &[line]);
        }
    }

    pub(super) fn config_read(&self, offset: u16, into: &mut [u8]) {
        // Before the lock, as everywhere: whoever closes the gate waits for passages, and they wait for the lock.
        let Some(_passage) = self.host.gate.pass() else { return into.fill(0xff) };
        let mut state = self.lock();
        let own = state.config.of_device(offset, into.len());
        if let Some(own) = into.get_mut(..own).filter(|own| !own.is_empty()) {
            match self.hardware.region_read(RegionIndex::CONFIG, offset.into(), own) {
                Ok(()) => state.config.refresh(offset, own),
                Err(error) => self.note(&error, "reading config space"),
            }
        }
        if state.interrupts.concerned(offset, into.len()) {
            let State { config, interrupts, .. } = &mut *state;
            match interrupts.msi_pending() {
                Ok(Some((register, bits))) => config.set_u32(register, bits),
                Ok(None) => {}
                Err(failure) => self.note(&self.failed(failure), "reading pending bits"),
            }
        }
        state.config.read(offset, into);
    }

    pub(super) fn config_write(&self, offset: u16, from: &[u8]) {
        let Some(_passage) = self.host.gate.pass() else { return };
        let mut guard = self.lock();
        let state = &mut *guard;
        if let Some((at, own)) = state.config.write(offset, from) {
            match self.hardware.region_write(RegionIndex::CONFIG, at.into(), own) {
                // Nothing of what this function was remains, and nothing else that was written counts.
                Ok(()) if self.resets.asked(offset, from) => {
                    if let Err(error) = self.forget(state) {
                        self.note(&error, "going back to the reset state");
                    }
                    return;
                }
                Ok(()) => self.refresh_own(&mut state.config, at, own.len()),
                Err(error) => self.note(&error, "writing config space"),
            }
        }
        let touched = |register: u16, len: u16| {
            offset < register + len && usize::from(offset) + from.len() > usize::from(register)
        };
        if touched(COMMAND, 2)
            && let Err(error) = self.write_command(state)
        {
            self.note(&error, "writing PCI_COMMAND");
        }
        if (touched(COMMAND, 2) || touched(register(0), 24))
            && let Err(error) = self.place_all(state)
        {
            self.note(&error, "placing BARs");
        }
        if state.interrupts.concerned(offset, from.len()) {
            let State { config, interrupts, .. } = state;
            if let Err(failure) = interrupts.apply_masks(config, self.irq_path()) {
                self.note(&self.failed(failure), "switching interrupts");
            }
            self.unsettled.store(interrupts.is_unsettled(), Ordering::Release);
        }
    }

    /// Takes what the device made of a write to a register that a move puts back: a save asks the device nothing.
    fn refresh_own(&self, config: &mut ConfigSpace, at: u16, len: usize) {
        for register in self.own_registers.iter().filter(|register| register.touched(at, len)) {
            match register.read(&*self.hardware) {
                Ok(value) => config.refresh(register.offset(), &value),
                Err(error) => self.note(&error, "reading config space"),
            }
        }
    }

    pub(super) fn bar_read(&self, bar: u8, offset: u64, into: &mut [u8]) {
        into.fill(0xff);
        let Some(_passage) = self.host.gate.pass() else { return };
        match self.emulated(bar, offset) {
            Some(Emulated::Table(at)) => {
                let state = self.lock();
                for (index, part) in into.chunks_mut(4).enumerate() {
                    let bytes = state.interrupts.msix.table(at + 4 * index as u64).to_le_bytes();
                    part.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
                }
            }
            Some(Emulated::Pending(at)) => {
                let mut state = self.lock();
                for (index, part) in into.chunks_mut(4).enumerate() {
                    match state
                        .interrupts
                        .msix
                        .pending_bits(usize::try_from(at / 4).unwrap_or(usize::MAX).saturating_add(index))
                    {
                        Ok(bits) => part.iter_mut().zip(bits.to_le_bytes()).for_each(|(to, from)| *to = from),
                        Err(failure) => self.note(&self.failed(failure), "reading pending bits"),
                    }
                }
            }
            None => {
                if let Err(error) = self.hardware.region_read(RegionIndex(bar.into()), offset, into) {
                    into.fill(0xff);
                    self.note(&error, "reading a BAR");
                }
            }
        }
    }

    pub(super) fn bar_write(&self, bar: u8, offset: u64, from: &[u8]) {
        let Some(_passage) = self.host.gate.pass() else { return };
        match self.emulated(bar, offset) {
            // PCI 3.0, 6.8.2: the table is written by aligned dwords and qwords; nothing else is defined.
            Some(Emulated::Table(at)) if at.is_multiple_of(4) && from.len().is_multiple_of(4) => {
                let mut state = self.lock();
                let State { config, interrupts, .. } = &mut *state;
                for (index, part) in from.chunks_exact(4).enumerate() {
                    let value = part.try_into().map_or(0, u32::from_le_bytes);
                    let offset = at + 4 * index as u64;
                    if let Err(failure) = interrupts.set_table(offset, value, config, self.irq_path()) {
                        self.note(&self.failed(failure), "changing an interrupt");
                    }
                }
                self.unsettled.store(interrupts.is_unsettled(), Ordering::Release);
            }
            Some(_) => {}
            None => {
                if let Err(error) = self.hardware.region_write(RegionIndex(bar.into()), offset, from) {
                    self.note(&error, "writing a BAR");
                }
            }
        }
    }

    fn emulated(&self, bar: u8, offset: u64) -> Option<Emulated> {
        let layout = self.layout?;
        let vectors = u64::from(layout.vectors);
        let inside = |(in_bar, start): (u8, u64), len: u64| {
            (bar == in_bar).then(|| offset.checked_sub(start)).flatten().filter(|at| *at < len)
        };
        let table = inside(layout.table, vectors * ENTRY).map(Emulated::Table);
        table.or_else(|| inside(layout.pba, vectors.div_ceil(64) * 8).map(Emulated::Pending))
    }

    fn irq_path(&self) -> IrqPath<'_> {
        IrqPath { hardware: &*self.hardware, irq: &*self.host.irq, router: &self.host.router }
    }

    fn write_command(&self, state: &State) -> Result<(), DeviceError> {
        let command = state.config.u16(COMMAND).to_le_bytes();
        self.hardware.region_write(RegionIndex::CONFIG, COMMAND.into(), &command)
    }

    /// Back to what it was after a reset: no interrupts, no BARs before the guest. Goes on after a failure, and says the
    /// first.
    fn forget(&self, state: &mut State) -> Result<(), PciError> {
        let mut result = state.interrupts.reset(self.irq_path()).map_err(|failure| self.failed(failure));
        self.unsettled.store(false, Ordering::Release);
        for placed in 0..BARS {
            if let Some(placed) = state.placed[placed].take() {
                result = result.and(self.take_away(placed));
            }
        }
        if state.config.u16(COMMAND) != 0 {
            state.config = self.pristine.clone();
            let written = self.write_command(state);
            result = result
                .and(written.map_err(|error| self.failed(("writing PCI_COMMAND".to_owned(), error.into()))));
        }
        state.config = self.pristine.clone();
        result
    }

    pub(super) fn failed(&self, (doing, source): PciFailure) -> PciError {
        PciError::Failed { device: self.hardware.id().clone(), doing, source }
    }

    pub(super) fn unfit(&self, what: impl Into<String>) -> PciError {
        PciError::Unfit { device: self.hardware.id().clone(), what: what.into() }
    }

    /// Takes note of what failed for the guest, which has no way to be told. The guest decides how often that is, as with
    /// a device that is lost, so that only each doubling of their number is logged.
    fn note(&self, error: &dyn std::error::Error, doing: &str) {
        let errors = self.errors.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        if errors.is_power_of_two() {
            let cause = error.source().map(ToString::to_string);
            tracing::error!(device = %self.hardware.id(), %error, cause, errors, "{doing} for the guest failed");
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses interrupts that this function cannot have.
    fn check_interrupts(&self, saved: &PciState) -> Result<(), PciError> {
        match self.lock().interrupts.misfit(saved) {
            Some(what) => Err(self.unfit(what)),
            None => Ok(()),
        }
    }
}

impl PciFunction for VfioPciFunction {
    fn id(&self) -> &DeviceId {
        self.hardware.id()
    }

    fn save_config(&self) -> Result<ConfigState, PciError> {
        let state = self.lock();
        let mut bars = [0; BARS];
        for bar in &self.bars {
            bars[usize::from(bar.index)] = bar.address(&state.config);
        }
        Ok(ConfigState { bytes: state.config.bytes().to_vec(), bars })
    }

    fn save_interrupts(&self, config: ConfigState) -> Result<PciState, PciError> {
        let saved = self.lock().interrupts.save(self.irq_path()).map_err(|failure| self.failed(failure))?;
        let (vectors, msi_pending, intx_pending) = saved;
        let ConfigState { bytes: config, bars } = config;
        Ok(PciState { config, bars, vectors, msix: self.layout.is_some(), msi_pending, intx_pending })
    }

    fn restore_config(&self, saved: &PciState, rules: &ConfigRules) -> Result<(), PciError> {
        compare(self.hardware.id(), &self.pristine, &saved.config, rules)?;
        self.check_interrupts(saved)?;
        let mut config = self.pristine.clone();
        config.load(&saved.config);
        for index in 0..BARS {
            let own = self.bars.iter().find(|bar| usize::from(bar.index) == index);
            if saved.bars[index] != own.map_or(0, |bar| bar.address(&config)) {
                return Err(self
                    .unfit(format!("BAR {index} at {:#x} is not one of this function", saved.bars[index])));
            }
        }
        let mut state = self.lock();
        state.interrupts.clear(self.irq_path()).map_err(|failure| self.failed(failure))?;
        state.config = config;
        // Memory decode is on at the device before anything can touch a BAR that is mapped.
        let written = self.write_command(&state);
        written.map_err(|error| self.failed(("writing PCI_COMMAND".to_owned(), error.into())))?;
        for register in &self.own_registers {
            let value = register.restore(&*self.hardware, &saved.config, rules)?;
            state.config.refresh(register.offset(), &value);
        }
        self.place_all(&mut state)
    }

    fn stage_interrupts(&self, saved: &PciState) -> Result<(), PciError> {
        self.check_interrupts(saved)?;
        let mut state = self.lock();
        let State { config, interrupts, .. } = &mut *state;
        interrupts.stage(saved, config, &self.host.router).map_err(|failure| self.failed(failure))
    }

    fn connect_interrupts(&self, saved: &PciState) -> Result<u32, PciError> {
        self.check_interrupts(saved)?;
        let mut state = self.lock();
        let State { config, interrupts, .. } = &mut *state;
        interrupts.restore(saved, config, self.irq_path()).map_err(|failure| self.failed(failure))
    }

    fn undo(&self) -> Result<(), PciError> {
        self.forget(&mut self.lock())
    }
}

/// A part of a BAR that is emulated here: which dword of it.
enum Emulated {
    Table(u64),
    Pending(u64),
}
