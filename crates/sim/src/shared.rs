//! What the device's threads share, and how its DMA engine is made to stand still.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Errno;
use vfio_migration_guest_driver::registers::VECTORS;
use vfio_migration_memory::Mapping;
use vfio_user_peer::{MigrationState, StopHandle};

use crate::bulk::BulkState;
use crate::dma::DmaTable;
use crate::error::{SimError, invalid};
use crate::fault::Fault;
use crate::options::Options;
use crate::pci::{BAR2_SIZE, SampleConfigSpace};
use crate::regs::Registers;

/// Work that the DMA engine may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Nothing is done.
    Stopped,
    /// All but peer-to-peer descriptors.
    NoP2p,
    /// Everything is done.
    Running,
}

/// The device's insides. Locks are taken in the order of the fields, and none is held across a DMA by message.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) options: Options,
    pub(crate) orders: Mutex<EngineOrders>,
    /// The engine has acknowledged orders, or there are new ones.
    pub(crate) orders_changed: Condvar,
    pub(crate) front: Mutex<Front>,
    pub(crate) bulk: Mutex<BulkState>,
    /// The bulk state may change again, or the device ends.
    pub(crate) bulk_changed: Condvar,
    pub(crate) dma: DmaTable,
    pub(crate) mailbox: Mailbox,
    /// Signalled by whoever rings the doorbell without a message.
    pub(crate) doorbell: Arc<OwnedFd>,
    /// Wakes the engine for anything else.
    kick: OwnedFd,
    pub(crate) ending: AtomicBool,
    /// Arcs that hang by a scripted fault may go on.
    pub(crate) hang_over: AtomicBool,
    /// What ends the server, and with it an arc that hangs; unset for a device that is not served.
    pub(crate) stop: OnceLock<StopHandle>,
    state: AtomicU32,
}

/// Orders to the DMA engine, and how far it has followed.
#[derive(Debug)]
pub(crate) struct EngineOrders {
    mode: Mode,
    /// The last mode that the engine took up.
    following: Mode,
    /// Number of orders given.
    given: u64,
    /// The last order that the engine acknowledged, between two descriptors.
    followed: u64,
}

/// The guest's side of the device: registers, interrupts, configuration space.
#[derive(Debug)]
pub(crate) struct Front {
    pub(crate) registers: Registers,
    pub(crate) config: SampleConfigSpace,
    pub(crate) eventfds: [Option<OwnedFd>; VECTORS],
    /// The device may raise interrupts.
    pub(crate) active: bool,
    lose: Vec<(usize, u64)>,
}

/// The mailbox: memory that peers and the guest write without the device's help.
#[derive(Debug)]
pub(crate) struct Mailbox {
    pub(crate) fd: Arc<OwnedFd>,
    memory: Mapping,
}

impl Shared {
    pub(crate) fn new(options: Options) -> Result<Self, SimError> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let event = || eventfd(0, flags).map_err(|errno| SimError::new(errno, "no eventfd"));
        let lose = options.faults.iter().filter_map(|fault| match fault {
            Fault::LoseRaise { vector, nth } => Some((*vector, *nth)),
            _ => None,
        });
        let front = Front {
            registers: Registers::default(),
            config: SampleConfigSpace::of(&options),
            eventfds: [const { None }; VECTORS],
            active: true,
            lose: lose.collect(),
        };
        let omit_every = options.fault(|fault| match fault {
            Fault::IgnoreDirtyLog(every) => Some(*every),
            _ => None,
        });
        Ok(Self {
            orders: Mutex::new(EngineOrders {
                mode: Mode::Running,
                following: Mode::Running,
                given: 1,
                followed: 0,
            }),
            orders_changed: Condvar::new(),
            front: Mutex::new(front),
            bulk: Mutex::new(BulkState::new(options.state_size)),
            bulk_changed: Condvar::new(),
            dma: DmaTable::new(omit_every),
            mailbox: Mailbox::new()?,
            doorbell: Arc::new(event()?),
            kick: event()?,
            ending: AtomicBool::new(false),
            hang_over: AtomicBool::new(false),
            stop: OnceLock::new(),
            state: AtomicU32::new(MigrationState::Running as u32),
            options,
        })
    }

    /// The migration state, without waiting for an arc that is under way.
    pub(crate) fn state(&self) -> MigrationState {
        MigrationState::try_from(self.state.load(Ordering::Acquire)).unwrap_or(MigrationState::Error)
    }

    pub(crate) fn set_state(&self, state: MigrationState) {
        self.state.store(state as u32, Ordering::Release);
    }

    /// Gives the engine an order and waits until it follows it: the descriptor in hand is then complete. Without a
    /// new `mode` this only waits for that.
    pub(crate) fn order(&self, mode: Option<Mode>) {
        let mut orders = lock(&self.orders);
        orders.mode = mode.unwrap_or(orders.mode);
        orders.given += 1;
        let mine = orders.given;
        self.orders_changed.notify_all();
        self.kick();
        while orders.followed < mine && !self.ending.load(Ordering::Acquire) {
            orders = wait(&self.orders_changed, orders);
        }
    }

    /// For the engine, between two descriptors: acknowledges the orders and waits while it is to stand still. `None`
    /// when the device ends. What the engine has begun it ends in `finish`, called before it is no longer running.
    pub(crate) fn follow(&self, mut finish: impl FnMut()) -> Option<Mode> {
        let mut orders = lock(&self.orders);
        loop {
            if self.ending.load(Ordering::Acquire) {
                return None;
            }
            let was = orders.following;
            orders.following = orders.mode;
            if was == Mode::Running && orders.mode != Mode::Running {
                drop(orders);
                finish();
                orders = lock(&self.orders);
                continue;
            }
            if orders.followed != orders.given {
                // What rang until now is remembered in the registers; what rings later stays in the eventfd.
                self.take_doorbell();
                orders.followed = orders.given;
                self.orders_changed.notify_all();
            }
            if orders.mode != Mode::Stopped {
                return Some(orders.mode);
            }
            orders = wait(&self.orders_changed, orders);
        }
    }

    /// Moves a ring of the doorbell's eventfd into the registers.
    pub(crate) fn take_doorbell(&self) {
        if drain(&self.doorbell) {
            lock(&self.front).registers.doorbell = true;
        }
    }

    pub(crate) fn kick(&self) {
        signal(&self.kick);
    }

    /// For the engine: waits for a doorbell or a kick, at most `time`.
    pub(crate) fn wait_for_work(&self, time: Option<std::time::Duration>) {
        let time = time.and_then(|time| time.try_into().ok());
        let mut fds = [
            PollFd::from_borrowed_fd(self.doorbell.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.kick.as_fd(), PollFlags::IN),
        ];
        // An interrupted or failed wait is as good as a short one.
        let _ = poll(&mut fds, time.as_ref());
        drain(&self.kick);
    }

    /// Tells the device's threads to end.
    pub(crate) fn end(&self) {
        self.ending.store(true, Ordering::Release);
        drop(lock(&self.orders));
        self.orders_changed.notify_all();
        drop(lock(&self.bulk));
        self.bulk_changed.notify_all();
        self.kick();
    }
}

impl Front {
    /// Raises `vector` if it is due and the device may.
    pub(crate) fn raise(&mut self, vector: usize) {
        if !self.active || !self.registers.take_raise(vector) {
            return;
        }
        if self.lose.contains(&(vector, self.registers.raises[vector])) {
            tracing::warn!(vector, raise = self.registers.raises[vector], "scripted: this interrupt is lost");
            return;
        }
        match &self.eventfds[vector] {
            Some(fd) => signal(fd),
            None => self.registers.unsent[vector] = true,
        }
    }

    /// Connects or disconnects a vector; one that was raised meanwhile is sent.
    pub(crate) fn connect(&mut self, vector: usize, fd: Option<OwnedFd>) {
        if let Some(fd) = &fd
            && std::mem::take(&mut self.registers.unsent[vector])
        {
            signal(fd);
        }
        self.eventfds[vector] = fd;
    }
}

impl Mailbox {
    fn new() -> Result<Self, SimError> {
        let failed = |errno| SimError::new(errno, "no memory for the mailbox");
        let fd = memfd_create("sample-mailbox", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(failed)?;
        ftruncate(&fd, BAR2_SIZE).map_err(failed)?;
        // Whoever maps it may rely on its size.
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).map_err(failed)?;
        let memory = Mapping::new(fd.as_fd(), 0, BAR2_SIZE, true)
            .map_err(|error| SimError::new(Errno::NOMEM, format!("the mailbox cannot be mapped: {error}")))?;
        Ok(Self { fd: Arc::new(fd), memory })
    }

    pub(crate) fn read(&self, at: u64, into: &mut [u8]) -> Result<(), SimError> {
        self.memory.read(at, into).map_err(|error| invalid(error.to_string()))
    }

    pub(crate) fn write(&self, at: u64, from: &[u8]) -> Result<(), SimError> {
        self.memory.write(at, from).map_err(|error| invalid(error.to_string()))
    }

    /// A copy of all of it.
    pub(crate) fn copy(&self) -> Result<Vec<u8>, SimError> {
        let mut bytes = vec![0; usize::try_from(BAR2_SIZE).unwrap_or(0)];
        self.read(0, &mut bytes)?;
        Ok(bytes)
    }

    pub(crate) fn clear(&self) -> Result<(), SimError> {
        self.write(0, &vec![0; usize::try_from(BAR2_SIZE).unwrap_or(0)])
    }
}

/// Takes a lock. A thread that panicked with it is no reason for the others to.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condvar.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

/// Signals an eventfd. A full one is signalled already.
pub(crate) fn signal(fd: &OwnedFd) {
    if let Err(errno) = rustix::io::write(fd, &1u64.to_ne_bytes())
        && errno != Errno::AGAIN
    {
        tracing::warn!(%errno, "an eventfd cannot be signalled");
    }
}

/// Empties a non-blocking eventfd. Returns whether it was signalled.
pub(crate) fn drain(fd: &OwnedFd) -> bool {
    rustix::io::read(fd, &mut [0; 8]).is_ok()
}
