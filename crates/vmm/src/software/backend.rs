//! How PCI functions reach the software guest: what KVM does with irqfds, routes, memory slots and ioeventfds, done
//! by hand.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vfio_migration_device::MsiMessage;
use vfio_migration_memory::Mapping;
use vfio_migration_types::Gpa;

use crate::layout::pci_pin;

use vfio_migration_pci::{BarDoorbell, BarMapper, Eventfd, Irqfds, MsiRouteTable};

/// The way between PCI functions and the software guest: [`Irqfds`], [`MsiRouteTable`] and [`BarMapper`] in one.
#[derive(Debug)]
pub struct SoftwareBackend {
    state: Mutex<State>,
    /// Ends a wait for interrupts.
    kick: Eventfd,
}

#[derive(Debug, Default)]
struct State {
    attached: BTreeMap<u32, Arc<Eventfd>>,
    routes: BTreeMap<u32, MsiMessage>,
    mapped: BTreeMap<Gpa, Arc<Mapping>>,
    doorbells: Vec<BarDoorbell>,
}

impl SoftwareBackend {
    /// A guest that nothing is attached to.
    pub fn new() -> io::Result<Self> {
        Ok(Self { state: Mutex::default(), kick: Eventfd::new()? })
    }

    /// The messages of all interrupts that were raised since last asked. One without a route goes nowhere, as it
    /// would on KVM.
    pub(super) fn take_interrupts(&self) -> Vec<MsiMessage> {
        let state = self.lock();
        let raised = state.attached.iter().filter(|(gsi, event)| {
            event.drain().unwrap_or_else(|error| {
                tracing::error!(gsi, %error, "an interrupt's eventfd cannot be read");
                false
            })
        });
        raised.filter_map(|(gsi, _)| state.routes.get(gsi).copied()).collect()
    }

    /// Waits for an interrupt, a [`kick`](Self::kick), or the end of `patience`.
    pub(super) fn wait(&self, patience: Duration) {
        let events: Vec<Arc<Eventfd>> = self.lock().attached.values().cloned().collect();
        let mut fds: Vec<PollFd<'_>> = Vec::with_capacity(events.len() + 1);
        fds.push(PollFd::from_borrowed_fd(self.kick.as_fd(), PollFlags::IN));
        fds.extend(events.iter().map(|event| PollFd::from_borrowed_fd(event.as_fd(), PollFlags::IN)));
        let timeout = Timespec::try_from(patience).ok();
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => tracing::error!(%error, "waiting for interrupts failed"),
        }
        let _ = self.kick.drain();
    }

    /// Ends a wait, or the next one.
    pub(super) fn kick(&self) {
        if let Err(error) = self.kick.signal() {
            tracing::error!(%error, "the software guest cannot be kicked");
        }
    }

    /// The mapped memory in which `len` bytes at `gpa` lie, and where in it.
    pub(super) fn memory(&self, gpa: Gpa, len: u64) -> Option<(Arc<Mapping>, u64)> {
        let state = self.lock();
        let (start, memory) = state.mapped.range(..=gpa).next_back()?;
        let offset = gpa.offset_from(*start)?;
        let end = offset.checked_add(len)?;
        (end <= memory.len()).then(|| (Arc::clone(memory), offset))
    }

    /// Rings the doorbell that a write of `from` at `gpa` rings, if there is one.
    pub(super) fn ring(&self, gpa: Gpa, from: &[u8]) -> bool {
        let mut bytes = [0; 8];
        bytes.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        let value = u64::from_le_bytes(bytes);
        let hit = |doorbell: &&BarDoorbell| {
            doorbell.gpa == gpa
                && (doorbell.size == 0 || doorbell.size == from.len() as u64)
                && doorbell.datamatch.is_none_or(|wanted| wanted == value)
        };
        let event = self.lock().doorbells.iter().find(hit).map(|doorbell| Arc::clone(&doorbell.event));
        event.is_some_and(|event| event.signal().is_ok())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Irqfds for SoftwareBackend {
    fn number_of_pin(&self, slot: u8, pin: u8) -> u32 {
        pci_pin(slot, pin)
    }

    fn attach(&self, gsi: u32, event: &Arc<Eventfd>) -> io::Result<()> {
        if self.lock().attached.insert(gsi, Arc::clone(event)).is_some() {
            return Err(io::Error::other(format!("interrupt {gsi} has an eventfd already")));
        }
        self.kick();
        Ok(())
    }

    // The guest handles what it takes before it can be paused, so what it has not taken is in the eventfd.
    fn detach(&self, gsi: u32, _event: &Arc<Eventfd>) -> io::Result<()> {
        match self.lock().attached.remove(&gsi) {
            Some(_) => Ok(()),
            None => Err(io::Error::other(format!("interrupt {gsi} has no eventfd"))),
        }
    }

    // The program takes message-signalled interrupts alone, as a guest does that leaves all pins masked: what is raised
    // on one waits in its eventfd.
    fn attach_level(&self, _gsi: u32, _event: &Arc<Eventfd>, _resample: &Arc<Eventfd>) -> io::Result<()> {
        Ok(())
    }

    fn detach_level(&self, _gsi: u32, _event: &Arc<Eventfd>, _resample: &Arc<Eventfd>) -> io::Result<()> {
        Ok(())
    }
}

impl MsiRouteTable for SoftwareBackend {
    fn replace(&self, routes: &BTreeMap<u32, MsiMessage>) -> io::Result<()> {
        self.lock().routes.clone_from(routes);
        Ok(())
    }
}

impl BarMapper for SoftwareBackend {
    fn map(&self, gpa: Gpa, memory: &Arc<Mapping>) -> io::Result<()> {
        self.lock().mapped.insert(gpa, Arc::clone(memory));
        Ok(())
    }

    fn unmap(&self, gpa: Gpa, _memory: &Arc<Mapping>) -> io::Result<()> {
        match self.lock().mapped.remove(&gpa) {
            Some(_) => Ok(()),
            None => Err(io::Error::other(format!("nothing is mapped at {gpa}"))),
        }
    }

    fn attach_doorbell(&self, doorbell: &BarDoorbell) -> io::Result<()> {
        self.lock().doorbells.push(doorbell.clone());
        Ok(())
    }

    fn detach_doorbell(&self, doorbell: &BarDoorbell) -> io::Result<()> {
        let mut state = self.lock();
        state
            .doorbells
            .retain(|other| !(other.gpa == doorbell.gpa && Arc::ptr_eq(&other.event, &doorbell.event)));
        Ok(())
    }
}
