//! A PCI device made of nothing: it answers from memory, remembers what was done to it, and fails where it is asked to.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::event::{EventfdFlags, eventfd};
use vfio_migration_memory::Mapping;
use vfio_migration_types::{DeviceId, Iova, Range};
use vfio_migration_uapi::UapiError;

use crate::error::DeviceError;
use crate::hardware::{DmaAccess, Doorbell, IrqIndex, PciHardware, PciRegion, RegionFile, RegionIndex};
use crate::kernel::error::KernelError;

const BAR0_SIZE: u64 = 0x4000;
const BAR2_SIZE: u64 = 0x10_0000;

/// The sample device's config space: MSI-X at 0x40 (2 vectors), a vendor-specific capability at 0x50.
pub fn sample_config() -> Vec<u8> {
    let mut config = vec![0; 256];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x00, &[0x46, 0x56, 0x53, 0x4d]);
    put(0x06, &[0x10, 0]);
    put(0x08, &[1, 0, 0, 0xff]);
    put(0x18, &[0x0c]);
    put(0x2c, &[0x46, 0x56, 1, 0]);
    put(0x34, &[0x40]);
    put(0x40, &[0x11, 0x50, 1, 0, 0, 0x20, 0, 0, 0, 0x30, 0, 0]);
    put(0x50, &[0x09, 0, 8, 0xa1, 0xa2, 0xa3, 0xa4, 0xa5]);
    config
}

/// Config space of a device with everything else: besides MSI-X a pin, MSI with 4 maskable vectors at 0x60, and 8 ports
/// in BAR 4.
pub fn legacy_config() -> Vec<u8> {
    let mut config = sample_config();
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x20, &[1]);
    put(0x3d, &[1]);
    put(0x51, &[0x60]);
    put(0x60, &[0x05, 0, 0x84, 0x01]);
    config
}

/// Memory for a BAR 2, and a page beyond it. Not sealed.
pub fn mailbox() -> OwnedFd {
    let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
    let mailbox = rustix::fs::memfd_create("mailbox", flags).unwrap();
    rustix::fs::ftruncate(&mailbox, BAR2_SIZE + 0x1000).unwrap();
    mailbox
}

/// An eventfd that a test can ask.
#[derive(Debug)]
pub struct FakeEvent(OwnedFd);

impl Default for FakeEvent {
    fn default() -> Self {
        Self(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap())
    }
}

impl FakeEvent {
    fn signal(&self) {
        rustix::io::write(&self.0, &1u64.to_ne_bytes()).unwrap();
    }

    /// Whether it was signalled since last asked.
    pub fn drain(&self) -> bool {
        rustix::io::read(&self.0, &mut [0; 8]).is_ok()
    }
}

impl AsFd for FakeEvent {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A device that remembers what was done to it.
#[derive(Debug)]
pub struct FakeHardware {
    id: DeviceId,
    regions: Vec<PciRegion>,
    mailbox: OwnedFd,
    offset: u64,
    doorbell: FakeEvent,
    /// Number of interrupts of each kind.
    irqs: [u32; 3],
    /// Whether each kind is set up as a set.
    noresize: [bool; 3],
    /// Whether it takes an eventfd that unmasks its pin.
    resamples: bool,
    /// Signalled whenever its pin is unmasked by a call.
    pub unmasked: FakeEvent,
    /// The log of what was done to it, and its settings for what comes.
    pub state: Mutex<FakeHardwareState>,
}

/// The log of a [`FakeHardware`], and its settings for what comes.
#[derive(Debug)]
pub struct FakeHardwareState {
    /// Config space of the function.
    pub config: Vec<u8>,
    /// The registers in BAR 0.
    pub bar0: Vec<u8>,
    ports: Vec<u8>,
    /// The eventfds that are connected, by kind and number of the interrupt.
    pub events: BTreeMap<(u32, u32), OwnedFd>,
    /// The level of its pin, and whether that is masked at the device, as it is by each signal.
    pin: bool,
    masked: bool,
    resample: Option<OwnedFd>,
    /// Calls since [`FakeHardware::log`] was last asked.
    pub log: Vec<String>,
    /// Addresses that it may reach by DMA.
    pub dma: BTreeSet<Range<Iova>>,
    /// The next call that changes something fails.
    pub fail: bool,
    /// Whether its IOMMU takes no BAR of another device.
    pub no_peer_dma: bool,
    /// Interrupts of a kind that the host has; `None` for as many as are asked for.
    pub possible: Option<u32>,
    /// Bytes of config space that it lets be written, by their offsets.
    pub writable: BTreeSet<u64>,
    /// Kinds that it refuses to disable, by their number.
    pub keeps: BTreeSet<u32>,
    /// Kinds that are enabled, by their number.
    enabled: BTreeSet<u32>,
    /// Interrupts that the enabled kind was set up with.
    reach: u32,
    /// Vectors that were raised while their kind was enabled and they were not connected: signalled as they are, as a
    /// function's own pending bits are.
    pub unsent: BTreeSet<u32>,
}

impl FakeHardware {
    /// One with [the sample device's config space](sample_config), and a BAR 2 that cannot shrink.
    pub fn new(name: &str) -> Arc<Self> {
        let mailbox = mailbox();
        rustix::fs::fcntl_add_seals(&mailbox, rustix::fs::SealFlags::SHRINK).unwrap();
        Arc::new(Self::with(name, mailbox, 0, &|_| {}))
    }

    /// One whose BAR 2 lies at `offset` of `mailbox`, and whose regions are as `change` makes them.
    pub fn with(name: &str, mailbox: OwnedFd, offset: u64, change: &dyn Fn(&mut Vec<PciRegion>)) -> Self {
        let region = |index, size, mappable: &[(u64, u64)]| PciRegion {
            index: RegionIndex(index),
            size,
            readable: true,
            writable: true,
            mappable: mappable.iter().map(|(start, len)| Range::new(*start, *len).unwrap()).collect(),
        };
        let mut regions =
            vec![region(0, BAR0_SIZE, &[]), region(2, BAR2_SIZE, &[(0, BAR2_SIZE)]), region(7, 256, &[])];
        change(&mut regions);
        let state = FakeHardwareState {
            config: sample_config(),
            bar0: vec![0; 0x4000],
            ports: vec![0; 8],
            events: BTreeMap::new(),
            pin: false,
            masked: false,
            resample: None,
            log: Vec::new(),
            dma: BTreeSet::new(),
            fail: false,
            no_peer_dma: false,
            possible: None,
            writable: (0x53..0x58).collect(),
            keeps: BTreeSet::new(),
            enabled: BTreeSet::new(),
            reach: 0,
            unsent: BTreeSet::new(),
        };
        Self {
            id: DeviceId::new(name).unwrap(),
            regions,
            mailbox,
            offset,
            doorbell: FakeEvent::default(),
            irqs: [0, 0, 2],
            noresize: [false, true, false],
            resamples: true,
            unmasked: FakeEvent::default(),
            state: Mutex::new(state),
        }
    }

    /// One with [everything else](legacy_config) too. Without `resamples` its pin is to be unmasked by calls.
    pub fn legacy(name: &str, resamples: bool) -> Arc<Self> {
        let mailbox = mailbox();
        rustix::fs::fcntl_add_seals(&mailbox, rustix::fs::SealFlags::SHRINK).unwrap();
        let ports = |regions: &mut Vec<PciRegion>| {
            let ports =
                PciRegion { index: RegionIndex(4), size: 8, mappable: Vec::new(), ..regions[0].clone() };
            regions.insert(2, ports);
        };
        let device = Self { irqs: [1, 4, 2], resamples, ..Self::with(name, mailbox, 0, &ports) };
        device.state.lock().unwrap().config = legacy_config();
        Arc::new(device)
    }

    /// One that has nothing but this config space, and three MSI-X vectors.
    pub fn of_config(name: &str, config: Vec<u8>) -> Self {
        let size = config.len() as u64;
        let only = |regions: &mut Vec<PciRegion>| {
            regions.retain(|region| region.index == RegionIndex::CONFIG);
            regions.iter_mut().for_each(|region| region.size = size);
        };
        let mut device = Self { irqs: [0, 0, 3], ..Self::with(name, mailbox(), 0, &only) };
        device.state.get_mut().unwrap().config = config;
        device
    }

    /// One with `vectors` MSI-X vectors, whose table is at 0x10000 of BAR 0 and whose pending bits are at 0x20000.
    pub fn of_vectors(name: &str, vectors: u16, noresize: bool) -> Self {
        let large = |regions: &mut Vec<PciRegion>| regions[0].size = 0x4_0000;
        let mut device = Self::with(name, mailbox(), 0, &large);
        (device.irqs[2], device.noresize[2]) = (vectors.into(), noresize);
        let state = device.state.get_mut().unwrap();
        state.bar0.resize(0x4_0000, 0);
        let [low, high] = (vectors - 1).to_le_bytes();
        state.config[0x42..0x4c].copy_from_slice(&[low, high, 0, 0, 1, 0, 0, 0, 2, 0]);
        device
    }

    /// Makes it have `irqs` interrupts of each kind.
    pub fn set_irq_counts(&mut self, irqs: [u32; 3]) {
        self.irqs = irqs;
    }

    /// The regions that it declares.
    pub fn regions_mut(&mut self) -> &mut Vec<PciRegion> {
        &mut self.regions
    }

    /// Raises an MSI-X vector, as the device does: it is kept where no eventfd is connected while MSI-X is enabled. Returns
    /// whether one was.
    pub fn raise(&self, vector: u32) -> bool {
        self.raise_as(IrqIndex::Msix, vector)
    }

    /// The same for any kind.
    pub fn raise_as(&self, kind: IrqIndex, vector: u32) -> bool {
        let mut state = self.state.lock().unwrap();
        let event = state.events.get(&(kind.number(), vector));
        let sent = event.is_some_and(|fd| rustix::io::write(fd, &1u64.to_ne_bytes()).is_ok());
        if !sent && kind == IrqIndex::Msix && state.enabled.contains(&kind.number()) {
            state.unsent.insert(vector);
        }
        sent
    }

    /// The device drives its pin.
    pub fn drive(&self, pin: bool) {
        let mut state = self.state.lock().unwrap();
        state.pin = pin;
        state.pin_changed();
    }

    /// The device looks at its resample eventfd: whether its pin was unmasked by it.
    pub fn resampled(&self) -> bool {
        let mut state = self.state.lock().unwrap();
        let Some(fd) = &state.resample else { return false };
        let event = FakeEvent(fd.try_clone().unwrap());
        let unmasked = event.drain();
        if unmasked {
            state.masked = false;
            state.pin_changed();
        }
        unmasked
    }

    /// Calls since last asked.
    pub fn log(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().log)
    }

    /// Whether its doorbell was rung since last asked.
    pub fn rung(&self) -> bool {
        self.doorbell.drain()
    }

    /// A mapping of its BAR 2.
    pub fn mailbox(&self) -> Mapping {
        Mapping::new(self.mailbox.as_fd(), 0, BAR2_SIZE, true).unwrap()
    }

    fn doing(&self, what: String) -> Result<MutexGuard<'_, FakeHardwareState>, DeviceError> {
        let mut state = self.state.lock().unwrap();
        if std::mem::take(&mut state.fail) {
            return Err(DeviceError::new(self.id.clone(), what, None, "made to fail"));
        }
        state.log.push(what);
        Ok(state)
    }
}

impl FakeHardwareState {
    fn pin_changed(&mut self) {
        if let Some(event) = self.events.get(&(0, 0))
            && self.pin
            && !std::mem::replace(&mut self.masked, true)
        {
            rustix::io::write(event, &1u64.to_ne_bytes()).unwrap();
        }
    }
}

impl PciHardware for FakeHardware {
    fn id(&self) -> &DeviceId {
        &self.id
    }

    fn regions(&self) -> &[PciRegion] {
        &self.regions
    }

    fn region_file(&self, index: RegionIndex) -> Option<RegionFile<'_>> {
        (index.0 == 2).then(|| RegionFile { fd: self.mailbox.as_fd(), offset: self.offset })
    }

    fn region_read(&self, index: RegionIndex, offset: u64, into: &mut [u8]) -> Result<(), DeviceError> {
        let size = self.regions.iter().find(|region| region.index == index).map_or(0, |region| region.size);
        assert!(offset + into.len() as u64 <= size, "an access outside of region {}", index.0);
        let state = self.state.lock().unwrap();
        let from = match index.0 {
            7 => &state.config,
            4 => &state.ports,
            _ => &state.bar0,
        };
        into.copy_from_slice(&from[offset as usize..][..into.len()]);
        Ok(())
    }

    fn region_write(&self, index: RegionIndex, offset: u64, from: &[u8]) -> Result<(), DeviceError> {
        let mut state = self.doing(format!("write {} {offset:#x} {from:x?}", index.0))?;
        if index == RegionIndex::CONFIG {
            for (at, byte) in
                (offset..).zip(from).filter(|(at, _)| state.writable.contains(at)).collect::<Vec<_>>()
            {
                state.config[at as usize] = *byte;
            }
        } else if index.0 == 4 {
            state.ports[offset as usize..][..from.len()].copy_from_slice(from);
        } else {
            state.bar0[offset as usize..][..from.len()].copy_from_slice(from);
        }
        Ok(())
    }

    fn doorbells(&self, index: RegionIndex) -> Result<Vec<Doorbell>, DeviceError> {
        let fd = self.doorbell.as_fd().try_clone_to_owned().unwrap();
        let doorbell = Doorbell { offset: 0x1000, size: 4, datamatch: None, fd };
        Ok(if index.0 == 0 { vec![doorbell] } else { vec![] })
    }

    fn irq_count(&self, index: IrqIndex) -> u32 {
        self.irqs[index.number() as usize]
    }

    fn irq_noresize(&self, index: IrqIndex) -> bool {
        self.noresize[index.number() as usize]
    }

    fn enable_irqs(&self, index: IrqIndex) -> Result<(), DeviceError> {
        let mut state = self.doing(format!("irqs {} on", index.number()))?;
        assert!(state.enabled.iter().all(|other| *other == index.number()), "another kind is connected");
        if state.enabled.insert(index.number()) {
            state.reach = 1;
        }
        Ok(())
    }

    fn set_irq_eventfds(
        &self,
        index: IrqIndex,
        start: u32,
        eventfds: &[Option<BorrowedFd<'_>>],
    ) -> Result<(), DeviceError> {
        let mut state = self.doing(format!("irqs {} {start}+{}", index.number(), eventfds.len()))?;
        let kind = index.number();
        // As the kernel's vfio-pci: one kind at a time.
        assert!(state.enabled.iter().all(|other| *other == kind), "another kind is connected");
        let wanted = start + u32::try_from(eventfds.len()).unwrap();
        if let Some(possible) = state.possible.filter(|possible| *possible < wanted) {
            let fewer = UapiError::FewerInterrupts { wanted, possible };
            return Err(DeviceError::new(self.id.clone(), "connecting", None, fewer));
        }
        if self.noresize[kind as usize] && state.enabled.contains(&kind) {
            let last = state.reach;
            assert!(wanted <= last, "a set of {last} does not grow to {wanted} unless it is disabled first");
        }
        if state.enabled.insert(kind) {
            state.reach = wanted;
        }
        for (vector, fd) in (start..).zip(eventfds) {
            match fd {
                Some(fd) => {
                    if index == IrqIndex::Msix && state.unsent.remove(&vector) {
                        rustix::io::write(fd, &1u64.to_ne_bytes()).unwrap();
                    }
                    state.events.insert((kind, vector), fd.try_clone_to_owned().unwrap());
                }
                None => drop(state.events.remove(&(kind, vector))),
            }
        }
        if index == IrqIndex::Intx {
            state.masked = false;
            state.pin_changed();
        }
        Ok(())
    }

    fn disable_irqs(&self, index: IrqIndex) -> Result<(), DeviceError> {
        let mut state = self.doing(format!("irqs {} off", index.number()))?;
        if state.keeps.contains(&index.number()) {
            return Err(DeviceError::new(
                self.id.clone(),
                "disabling",
                Some(rustix::io::Errno::IO),
                "made to fail",
            ));
        }
        state.events.retain(|(kind, _), _| *kind != index.number());
        state.enabled.remove(&index.number());
        state.unsent.clear();
        if index == IrqIndex::Intx {
            state.resample = None;
        }
        Ok(())
    }

    fn trigger_irq(&self, _index: IrqIndex, vector: u32) -> Result<(), DeviceError> {
        self.raise(vector);
        Ok(())
    }

    fn mask_irq(&self, index: IrqIndex, _vector: u32, masked: bool) -> Result<(), DeviceError> {
        if index == IrqIndex::Intx {
            let mut state = self.state.lock().unwrap();
            state.masked = masked;
            state.pin_changed();
            drop(state);
            self.unmasked.signal();
            return Ok(());
        }
        Err(DeviceError::new(self.id.clone(), "masking", Some(rustix::io::Errno::INVAL), "not maskable"))
    }

    fn set_intx_resample(&self, resample: Option<BorrowedFd<'_>>) -> Result<(), DeviceError> {
        if !self.resamples {
            let errno = Some(rustix::io::Errno::NOTTY);
            return Err(DeviceError::new(self.id.clone(), "connecting the resample", errno, "not supported"));
        }
        let mut state = self.state.lock().unwrap();
        assert!(state.events.contains_key(&(0, 0)), "the pin is not connected");
        state.resample = resample.map(|fd| fd.try_clone_to_owned().unwrap());
        Ok(())
    }

    fn dma_map(
        &self,
        iova: Range<Iova>,
        _access: DmaAccess,
        file: Option<(BorrowedFd<'_>, u64)>,
    ) -> Result<(), DeviceError> {
        assert!(file.is_some());
        let mut state = self.doing(format!("map {:#x}+{:#x}", iova.start().0, iova.len()))?;
        assert!(state.dma.iter().all(|other| !other.overlaps(&iova)), "overlap");
        if state.no_peer_dma {
            let why = KernelError::NoPeerDma("made so".into());
            return Err(DeviceError::new(self.id.clone(), "mapping", None, why));
        }
        state.dma.insert(iova);
        Ok(())
    }

    fn dma_unmap(&self, iova: Range<Iova>) -> Result<(), DeviceError> {
        let mut state = self.doing(format!("unmap {:#x}+{:#x}", iova.start().0, iova.len()))?;
        assert!(state.dma.remove(&iova), "was not mapped");
        Ok(())
    }
}
