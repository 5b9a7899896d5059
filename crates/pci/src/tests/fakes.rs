//! An interrupt controller and an address space made of nothing, for tests.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use vfio_migration_device::MsiMessage;
pub(crate) use vfio_migration_device::testing::{FakeHardware, legacy_config, mailbox, sample_config};
use vfio_migration_memory::Mapping;
use vfio_migration_types::{Gpa, Range};

use crate::{BarDoorbell, BarMapper, BarWindows, Eventfd, Irqfds, MsiRouteTable, MsiRouter, PciHost};

/// Start of the memory-mapped config space.
pub(crate) const ECAM: u64 = 0xe000_0000;
/// Start of the window for 64-bit BARs.
pub(crate) const HIGH: u64 = 1 << 38;
/// Bits of a guest physical address.
pub(crate) const PHYSICAL_BITS: u32 = 39;
/// The interrupt numbers for messages.
pub(crate) const MESSAGES: std::ops::Range<u32> = 24..4080;

pub(crate) fn windows() -> BarWindows {
    BarWindows {
        low: Range::new(Gpa(0xc000_0000), 0x2000_0000).unwrap(),
        high: Range::new(Gpa(HIGH), 1 << 38).unwrap(),
        small: 1 << 30,
        ports: Range::new(0x1000, 0xf000).unwrap(),
    }
}

/// An interrupt controller that can be asked what it was given.
#[derive(Debug, Default)]
pub(crate) struct FakeIrq {
    pub(crate) attached: Mutex<BTreeMap<u32, Arc<Eventfd>>>,
    pub(crate) routes: Mutex<BTreeMap<u32, MsiMessage>>,
    pub(crate) commits: Mutex<u32>,
    pub(crate) pins: Mutex<Vec<Pin>>,
    /// Nothing can be attached.
    pub(crate) refuse: AtomicBool,
}

impl FakeIrq {
    /// The messages that reach the guest now. One without a route would be lost: a panic.
    pub(crate) fn take(&self) -> Vec<MsiMessage> {
        let attached = self.attached.lock().unwrap();
        let raised = attached.iter().filter(|(_, event)| event.drain().unwrap());
        raised.map(|(gsi, _)| self.routes.lock().unwrap()[gsi]).collect()
    }
}

/// A level interrupt of [`FakeIrq`].
#[derive(Debug)]
pub(crate) struct Pin {
    gsi: u32,
    event: Arc<Eventfd>,
    resample: Arc<Eventfd>,
    level: bool,
}

impl FakeIrq {
    /// The level of a pin.
    pub(crate) fn level(&self, gsi: u32) -> bool {
        let mut pins = self.pins.lock().unwrap();
        pins.iter_mut().for_each(|pin| pin.level |= pin.event.drain().unwrap());
        pins.iter().any(|pin| pin.gsi == gsi && pin.level)
    }

    /// The guest ends the interrupt of a pin.
    pub(crate) fn end(&self, gsi: u32) {
        assert!(self.level(gsi), "there is none");
        for pin in self.pins.lock().unwrap().iter_mut().filter(|pin| pin.gsi == gsi) {
            pin.level = false;
            pin.resample.signal().unwrap();
        }
    }
}

impl Irqfds for FakeIrq {
    fn number_of_pin(&self, slot: u8, pin: u8) -> u32 {
        16 + (u32::from(slot) + u32::from(pin) - 1) % 8
    }

    fn attach_level(&self, gsi: u32, event: &Arc<Eventfd>, resample: &Arc<Eventfd>) -> io::Result<()> {
        let mut pins = self.pins.lock().unwrap();
        assert!(pins.iter().all(|pin| !Arc::ptr_eq(&pin.event, event)), "attached twice");
        pins.push(Pin { gsi, event: event.clone(), resample: resample.clone(), level: false });
        Ok(())
    }

    fn detach_level(&self, gsi: u32, event: &Arc<Eventfd>, _resample: &Arc<Eventfd>) -> io::Result<()> {
        let mut pins = self.pins.lock().unwrap();
        let at = pins.iter().position(|pin| pin.gsi == gsi && Arc::ptr_eq(&pin.event, event));
        pins.remove(at.expect("not attached"));
        Ok(())
    }

    fn attach(&self, gsi: u32, event: &Arc<Eventfd>) -> io::Result<()> {
        if self.refuse.load(Ordering::Relaxed) {
            return Err(io::Error::other("made to fail"));
        }
        assert!(self.attached.lock().unwrap().insert(gsi, Arc::clone(event)).is_none(), "attached twice");
        Ok(())
    }

    fn detach(&self, gsi: u32, _event: &Arc<Eventfd>) -> io::Result<()> {
        if self.refuse.load(Ordering::Relaxed) {
            return Err(io::Error::other("made to fail"));
        }
        assert!(self.attached.lock().unwrap().remove(&gsi).is_some(), "not attached");
        Ok(())
    }
}

impl MsiRouteTable for FakeIrq {
    fn replace(&self, routes: &BTreeMap<u32, MsiMessage>) -> io::Result<()> {
        *self.routes.lock().unwrap() = routes.clone();
        *self.commits.lock().unwrap() += 1;
        Ok(())
    }
}

/// An address space that remembers what was put where.
#[derive(Debug, Default)]
pub(crate) struct FakeMapper {
    pub(crate) mapped: Mutex<BTreeMap<Gpa, u64>>,
    pub(crate) doorbells: Mutex<BTreeSet<Gpa>>,
    /// Nothing can be mapped or attached.
    pub(crate) refuse: AtomicBool,
}

impl FakeMapper {
    fn check(&self) -> io::Result<()> {
        if self.refuse.load(Ordering::Relaxed) { Err(io::Error::other("made to fail")) } else { Ok(()) }
    }
}

impl BarMapper for FakeMapper {
    fn map(&self, gpa: Gpa, memory: &Arc<Mapping>) -> io::Result<()> {
        self.check()?;
        assert!(self.mapped.lock().unwrap().insert(gpa, memory.len()).is_none());
        Ok(())
    }

    fn unmap(&self, gpa: Gpa, _memory: &Arc<Mapping>) -> io::Result<()> {
        assert!(self.mapped.lock().unwrap().remove(&gpa).is_some());
        Ok(())
    }

    fn attach_doorbell(&self, doorbell: &BarDoorbell) -> io::Result<()> {
        self.check()?;
        assert!(self.doorbells.lock().unwrap().insert(doorbell.gpa));
        Ok(())
    }

    fn detach_doorbell(&self, doorbell: &BarDoorbell) -> io::Result<()> {
        assert!(self.doorbells.lock().unwrap().remove(&doorbell.gpa));
        Ok(())
    }
}

/// A host over both.
pub(crate) fn fake_host() -> (Arc<PciHost>, Arc<FakeIrq>, Arc<FakeMapper>) {
    let (irq, mapper) = (Arc::new(FakeIrq::default()), Arc::new(FakeMapper::default()));
    let router = Arc::new(MsiRouter::new(irq.clone(), MESSAGES));
    (PciHost::new(irq.clone(), mapper.clone(), router, windows()), irq, mapper)
}
