//! A VFIO device as a PCI function of the guest.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vfio_migration_device::{
    ConfigRules, DeviceError, IrqIndex, IrqRouter, PciError, PciFunction, PciHardware, PciState, RegionFile,
    RegionIndex,
};
use vfio_migration_memory::Mapping;
use vfio_migration_types::{DeviceId, Gpa, Range};

use super::areas::{PAGE, whole_pages};
use super::bars::{BARS, Bar, register};
use super::compare::compare;
use super::config::{ConfigSpace, MsixLayout};
use super::msix::{ENTRY, Failure, Msix, Wires};
use super::registers::{COMMAND, MSIX_CONTROL, MSIX_ENABLE, MSIX_MASK_ALL};
use super::{BarDoorbell, Event, PciHost};

/// A VFIO device before the guest: its config space emulated, its BARs mapped where they can be and trapped where not,
/// its MSI-X vectors as interrupts of the guest. The stock [`PciFunction`].
#[derive(Debug)]
pub struct VfioPciFunction {
    slot: u8,
    hardware: Arc<dyn PciHardware>,
    host: Arc<PciHost>,
    bars: Vec<Bar>,
    layout: Option<MsixLayout>,
    /// Config space as it was when the device was opened.
    pristine: ConfigSpace,
    state: Mutex<State>,
    errors: AtomicU64,
}

#[derive(Debug)]
struct State {
    config: ConfigSpace,
    msix: Msix,
    /// What can be mapped of each BAR, mapped into this process once.
    memory: [Vec<Piece>; BARS],
    doorbells: [Vec<(u64, BarDoorbell)>; BARS],
    placed: [Option<Placed>; BARS],
}

/// A mapped piece of a BAR, by its offset.
type Piece = (u64, Arc<Mapping>);

/// What was done to put a BAR before the guest, to be undone.
#[derive(Debug)]
struct Placed {
    range: Range<Gpa>,
    mapped: Vec<(Gpa, Arc<Mapping>)>,
    shared: Vec<Gpa>,
    doorbells: Vec<BarDoorbell>,
}

impl VfioPciFunction {
    /// Makes the function of a device that was just opened or reset, for slot `slot` (1 to 31) of the bus.
    ///
    /// The other devices of the host become able to reach its BARs by DMA, and it theirs.
    ///
    /// # Errors
    /// Its config space or its regions cannot be had, or make no sense.
    pub fn new(slot: u8, hardware: Arc<dyn PciHardware>, host: Arc<PciHost>) -> Result<Self, PciError> {
        let id = hardware.id().clone();
        let failed = |doing: &str, source: Box<dyn std::error::Error + Send + Sync>| PciError::Failed {
            device: id.clone(),
            doing: doing.to_owned(),
            source,
        };
        let region_size = |index: u32| {
            hardware.regions().iter().find(|region| region.index.0 == index).map_or(0, |region| region.size)
        };
        let mut bytes = match region_size(RegionIndex::CONFIG.0) {
            0..256 => {
                return Err(PciError::Unfit { device: id.clone(), what: "it has no config space".into() });
            }
            256..4096 => vec![0; 256],
            _ => vec![0; 4096],
        };
        hardware
            .region_read(RegionIndex::CONFIG, 0, &mut bytes)
            .map_err(|error| failed("reading config space", Box::new(error)))?;

        let bars = Bar::discover(&bytes, |index| region_size(index.into()));
        let mut config = ConfigSpace::new(bytes);
        bars.iter().for_each(|bar| bar.define(&mut config));
        let layout = config.msix().filter(|layout| {
            let inside = |(bar, offset): (u8, u64), len: u64| {
                bars.iter().any(|known| known.index == bar && offset + len <= known.size)
            };
            let vectors = u64::from(layout.vectors);
            let sane = inside(layout.table, vectors * ENTRY) && inside(layout.pba, vectors.div_ceil(64) * 8);
            if !sane {
                tracing::warn!(device = %id, ?layout, "MSI-X lies outside of the device's BARs: left out");
            }
            sane && u32::from(layout.vectors) <= hardware.irq_count(IrqIndex::Msix)
        });
        let vectors = layout.map_or(0, |layout| layout.vectors);
        let first = host.router.allocate(vectors.into()).ok_or_else(|| {
            failed("setting interrupts aside", "the machine has no more interrupt numbers".into())
        })?;
        let msix = Msix::new(vectors, first).map_err(|error| failed("making eventfds", Box::new(error)))?;

        let (mut memory, mut doorbells): ([Vec<_>; BARS], [Vec<_>; BARS]) = Default::default();
        for bar in &bars {
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
                    let event = Arc::new(Event::from(doorbell.fd));
                    let (size, datamatch) = (doorbell.size, doorbell.datamatch);
                    (doorbell.offset, BarDoorbell { gpa: Gpa(0), size, datamatch, event })
                })
                .collect();
        }

        host.peers
            .join(slot, Arc::clone(&hardware))
            .map_err(|error| failed("letting it reach the other devices' BARs", Box::new(error)))?;
        let state =
            State { config: config.clone(), msix, memory, doorbells, placed: std::array::from_fn(|_| None) };
        let errors = AtomicU64::new(0);
        Ok(Self { slot, hardware, host, bars, layout, pristine: config, state: Mutex::new(state), errors })
    }

    /// Slot on bus 0.
    pub fn slot(&self) -> u8 {
        self.slot
    }

    /// The device's hardware.
    pub fn hardware(&self) -> &Arc<dyn PciHardware> {
        &self.hardware
    }

    /// Accesses of the guest, and changes that it asked for, that failed since the function was made. The guest read
    /// all ones, or saw nothing happen, as with a device that fell off its bus.
    pub fn errors(&self) -> u64 {
        self.errors.load(Ordering::Relaxed)
    }

    /// Raises what is pending on unmasked vectors: for a guest that goes on here after its state was saved.
    pub fn deliver_pending(&self) -> Result<(), PciError> {
        self.lock().msix.go_on(&*self.host.irq).map_err(|failure| self.failed(failure))
    }

    /// Takes everything back, and leaves the other devices' reach: before the device is closed. Goes on after a
    /// failure, and says the first.
    pub fn release(&self) -> Result<(), PciError> {
        let undone = self.undo();
        self.host.peers.leave(self.slot);
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

    pub(super) fn config_read(&self, offset: u16, into: &mut [u8]) {
        // Before the lock, as everywhere: whoever closes the gate waits for passages, and they wait for the lock.
        let Some(_passage) = self.host.gate.pass() else { return into.fill(0xff) };
        let mut state = self.lock();
        if state.config.reaches_device(offset, into.len()) {
            match self.hardware.region_read(RegionIndex::CONFIG, offset.into(), into) {
                Ok(()) => state.config.refresh(offset, into),
                Err(error) => self.note(&error, "reading config space"),
            }
        }
        state.config.read(offset, into);
    }

    pub(super) fn config_write(&self, offset: u16, from: &[u8]) {
        let Some(_passage) = self.host.gate.pass() else { return };
        let mut guard = self.lock();
        let state = &mut *guard;
        if let Some((offset, own)) = state.config.write(offset, from)
            && let Err(error) = self.hardware.region_write(RegionIndex::CONFIG, offset.into(), own)
        {
            self.note(&error, "writing config space");
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
        if let Some(layout) = self.layout
            && touched(layout.capability + MSIX_CONTROL, 2)
        {
            let (enabled, all_masked) = msix_control(&state.config, &layout);
            if let Err(failure) = state.msix.set_control(enabled, all_masked, self.wires()) {
                self.note(&self.failed(failure), "switching MSI-X");
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
                    let bytes = state.msix.table(at + 4 * index as u64).to_le_bytes();
                    part.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
                }
            }
            Some(Emulated::Pending(at)) => {
                let mut state = self.lock();
                for (index, part) in into.chunks_mut(4).enumerate() {
                    match state
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
                for (index, part) in from.chunks_exact(4).enumerate() {
                    let value = part.try_into().map_or(0, u32::from_le_bytes);
                    if let Err(failure) = state.msix.set_table(at + 4 * index as u64, value, self.wires()) {
                        self.note(&self.failed(failure), "changing an interrupt");
                    }
                }
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

    fn wires(&self) -> Wires<'_> {
        Wires { hardware: &*self.hardware, irq: &*self.host.irq, router: &*self.host.router }
    }

    fn write_command(&self, state: &State) -> Result<(), DeviceError> {
        let command = state.config.u16(COMMAND).to_le_bytes();
        self.hardware.region_write(RegionIndex::CONFIG, COMMAND.into(), &command)
    }

    /// Brings the BARs before the guest to where config space says: those that leave first, so that two may swap.
    fn place_all(&self, state: &mut State) -> Result<(), PciError> {
        let wanted: Vec<(Bar, Option<Range<Gpa>>)> =
            self.bars.iter().map(|bar| (*bar, bar.place(&state.config, &self.host.windows))).collect();
        let mut result = Ok(());
        for (bar, range) in &wanted {
            let placed = &mut state.placed[usize::from(bar.index)];
            if placed.as_ref().map(|placed| placed.range) != *range
                && let Some(placed) = placed.take()
            {
                result = result.and(self.take_away(placed));
            }
        }
        for (bar, range) in wanted {
            if let Some(range) = range
                && state.placed[usize::from(bar.index)].is_none()
            {
                let placed = self.place(state, bar, range);
                match placed {
                    Ok(placed) => state.placed[usize::from(bar.index)] = Some(placed),
                    Err(error) => result = result.and(Err(error)),
                }
            }
        }
        result
    }

    fn place(&self, state: &State, bar: Bar, range: Range<Gpa>) -> Result<Placed, PciError> {
        if !self.host.addresses.insert(&range, self.slot, bar.index) {
            let what = format!("BAR {} at {} overlaps another", bar.index, range.start());
            return Err(PciError::Unfit { device: self.hardware.id().clone(), what });
        }
        let mut placed = Placed { range, mapped: Vec::new(), shared: Vec::new(), doorbells: Vec::new() };
        let done = self.fill(state, bar, &mut placed);
        if let Err(failure) = done {
            let _ = self.take_away(placed);
            return Err(self.failed(failure));
        }
        Ok(placed)
    }

    fn fill(&self, state: &State, bar: Bar, placed: &mut Placed) -> Result<(), Failure> {
        let base = placed.range.start();
        let index = usize::from(bar.index);
        for (offset, memory) in &state.memory[index] {
            let gpa = Gpa(base.0 + offset);
            // Without the mapping, or the doorbell below, accesses are trapped: slower, and all there.
            match self.host.mapper.map(gpa, memory) {
                Ok(()) => placed.mapped.push((gpa, Arc::clone(memory))),
                Err(error) => self.warn(bar, *offset, "an area is trapped, not mapped", &error),
            }
            if let Ok(piece) = Range::new(*offset, memory.len()) {
                self.host
                    .peers
                    .share(self.slot, bar.index, piece, gpa)
                    .map_err(|error| ("mapping a BAR for DMA by its peers".to_owned(), error.into()))?;
                placed.shared.push(gpa);
            }
        }
        for (offset, doorbell) in &state.doorbells[index] {
            let doorbell = BarDoorbell { gpa: Gpa(base.0 + offset), ..doorbell.clone() };
            match self.host.mapper.attach_doorbell(&doorbell) {
                Ok(()) => placed.doorbells.push(doorbell),
                Err(error) => self.warn(bar, *offset, "a doorbell is trapped, not attached", &error),
            }
        }
        Ok(())
    }

    fn take_away(&self, placed: Placed) -> Result<(), PciError> {
        let mut result = Ok(());
        for doorbell in &placed.doorbells {
            let detached = self.host.mapper.detach_doorbell(doorbell).map_err(doing("detaching a doorbell"));
            result = result.and(detached);
        }
        placed.shared.iter().for_each(|gpa| self.host.peers.unshare(self.slot, *gpa));
        for (gpa, memory) in &placed.mapped {
            let unmapped = self.host.mapper.unmap(*gpa, memory).map_err(doing("taking a BAR from the guest"));
            result = result.and(unmapped);
        }
        self.host.addresses.remove(placed.range.start());
        result.map_err(|failure| self.failed(failure))
    }

    fn failed(&self, (doing, source): Failure) -> PciError {
        PciError::Failed { device: self.hardware.id().clone(), doing, source }
    }

    fn unfit(&self, what: impl Into<String>) -> PciError {
        PciError::Unfit { device: self.hardware.id().clone(), what: what.into() }
    }

    fn warn(&self, bar: Bar, offset: u64, what: &str, error: &dyn std::error::Error) {
        let cause = error.source().map(ToString::to_string);
        let offset = format_args!("{offset:#x}");
        tracing::warn!(device = %self.hardware.id(), bar = bar.index, %offset, %error, cause, "{what}");
    }

    /// Something that the guest asked for failed, and it cannot be told.
    fn note(&self, error: &dyn std::error::Error, doing: &str) {
        self.errors.fetch_add(1, Ordering::Relaxed);
        let cause = error.source().map(ToString::to_string);
        tracing::error!(device = %self.hardware.id(), %error, cause, "{doing} for the guest failed");
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses vectors that this function cannot have.
    fn check_vectors(&self, state: &PciState) -> Result<(), PciError> {
        let own = self.layout.map_or(0, |layout| usize::from(layout.vectors));
        if state.intx_pending {
            return Err(self.unfit("an INTx interrupt is pending, and the function has no pin"));
        }
        if !state.msix && !state.vectors.is_empty() {
            return Err(self.unfit("it uses MSI, and the function offers MSI-X alone"));
        }
        if state.vectors.len() != own {
            return Err(
                self.unfit(format!("it has {} vectors, and the function has {own}", state.vectors.len()))
            );
        }
        Ok(())
    }
}

impl PciFunction for VfioPciFunction {
    fn id(&self) -> &DeviceId {
        self.hardware.id()
    }

    fn save(&self) -> Result<PciState, PciError> {
        let mut state = self.lock();
        let vectors = state.msix.save(self.wires()).map_err(|failure| self.failed(failure))?;
        let mut bars = [0; BARS];
        for bar in &self.bars {
            bars[usize::from(bar.index)] = bar.address(&state.config);
        }
        let msix = self.layout.is_some();
        Ok(PciState { config: state.config.bytes().to_vec(), bars, vectors, msix, intx_pending: false })
    }

    fn restore_config(&self, saved: &PciState, rules: &ConfigRules) -> Result<(), PciError> {
        compare(self.hardware.id(), &self.pristine, &saved.config, rules)?;
        self.check_vectors(saved)?;
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
        state.config = config;
        // Memory decode is on at the device before anything can touch a BAR that is mapped.
        let written = self.write_command(&state);
        written.map_err(|error| self.failed(("writing PCI_COMMAND".to_owned(), error.into())))?;
        self.place_all(&mut state)
    }

    fn stage_interrupts(&self, saved: &PciState, router: &dyn IrqRouter) -> Result<(), PciError> {
        self.check_vectors(saved)?;
        let mut state = self.lock();
        let State { config, msix, .. } = &mut *state;
        let (enabled, all_masked) =
            self.layout.map_or((false, false), |layout| msix_control(config, &layout));
        msix.stage(enabled, all_masked, &saved.vectors, router).map_err(|failure| self.failed(failure))
    }

    fn connect_interrupts(&self, saved: &PciState) -> Result<u32, PciError> {
        self.check_vectors(saved)?;
        self.lock().msix.restore(self.wires()).map_err(|failure| self.failed(failure))
    }

    fn undo(&self) -> Result<(), PciError> {
        let mut state = self.lock();
        let mut result = state.msix.reset(self.wires()).map_err(|failure| self.failed(failure));
        for placed in 0..BARS {
            if let Some(placed) = state.placed[placed].take() {
                result = result.and(self.take_away(placed));
            }
        }
        if state.config.u16(COMMAND) != 0 {
            state.config = self.pristine.clone();
            let written = self.write_command(&state);
            result = result
                .and(written.map_err(|error| self.failed(("writing PCI_COMMAND".to_owned(), error.into()))));
        }
        state.config = self.pristine.clone();
        result
    }
}

/// A part of a BAR that is emulated here: which dword of it.
enum Emulated {
    Table(u64),
    Pending(u64),
}

/// The MSI-X control register's enable and mask-all bits.
fn msix_control(config: &ConfigSpace, layout: &MsixLayout) -> (bool, bool) {
    let control = config.u16(layout.capability + MSIX_CONTROL);
    (control & MSIX_ENABLE != 0, control & MSIX_MASK_ALL != 0)
}

/// Maps what the guest may have of a BAR. The pages of the MSI-X structures stay trapped, and so does what cannot be
/// mapped, or not safely.
fn map_memory(hardware: &dyn PciHardware, bar: &Bar, layout: Option<&MsixLayout>) -> Vec<Piece> {
    let index = RegionIndex(bar.index.into());
    let region = hardware.regions().iter().find(|region| region.index == index);
    let (Some(region), Some(file)) = (region, hardware.region_file(index)) else { return Vec::new() };
    // A mapping cannot keep the guest from reading, nor from writing: the trap can.
    if !region.readable || !region.writable {
        return Vec::new();
    }
    let trapped: Vec<Range<u64>> = layout
        .into_iter()
        .flat_map(|layout| {
            let vectors = u64::from(layout.vectors);
            [(layout.table, vectors * ENTRY), (layout.pba, vectors.div_ceil(64) * 8)]
        })
        .filter(|((in_bar, _), _)| *in_bar == bar.index)
        .filter_map(|((_, start), len)| Range::new(start, len).ok())
        .collect();
    let mut out = Vec::new();
    for area in whole_pages(&region.mappable, &trapped) {
        match map_area(&file, bar, &area) {
            Ok(mapping) => out.push((area.start(), Arc::new(mapping))),
            Err(error) => {
                let area = format_args!("{:#x}+{:#x}", area.start(), area.len());
                tracing::warn!(device = %hardware.id(), bar = bar.index, %area, %error, "trapped, not mapped");
            }
        }
    }
    out
}

fn map_area(
    file: &RegionFile<'_>,
    bar: &Bar,
    area: &Range<u64>,
) -> Result<Mapping, Box<dyn std::error::Error + Send + Sync>> {
    if area.end() > bar.size {
        return Err("it ends outside of the BAR".into());
    }
    let offset = file.offset.checked_add(area.start()).ok_or("its file offset overflows")?;
    if !offset.is_multiple_of(PAGE) {
        return Err(format!("its file offset {offset:#x} is no whole page").into());
    }
    let mapping = Mapping::new(file.fd, offset, area.len(), true)?;
    // Once it is shorter, an access of the guest's would end this process.
    if mapping.can_shrink() {
        return Err("its file is not sealed against shrinking".into());
    }
    Ok(mapping)
}

fn doing(doing: &'static str) -> impl Fn(io::Error) -> Failure {
    move |source| (doing.to_owned(), Box::new(source))
}
