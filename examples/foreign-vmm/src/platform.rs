//! What the guest finds at its ports: PCI's configuration mechanism, the host's clock, a port to give up by.

use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use vfio_migration_guest_image::ports::{CLOCK_HIGH, CLOCK_LOW, FAILURE};

use crate::error::Error;
use crate::pci::Function;

const CONFIG_ADDRESS: u16 = 0xCF8;
const CONFIG_DATA: u16 = 0xCFC;
/// Enabled, bus 0, slot 1, function 0.
const SLOT: u32 = 0x8000_0800;

/// What the ports remember, which moves with the guest.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct PortState {
    config_address: u32,
    clock: u64,
}

/// Everything that a vCPU reaches beside RAM.
pub(crate) struct Platform {
    function: Arc<Function>,
    state: Mutex<PortState>,
}

impl Platform {
    /// The ports, and `function` on the bus.
    pub(crate) fn new(function: Arc<Function>, state: PortState) -> Self {
        Self { function, state: Mutex::new(state) }
    }

    /// What the ports remember.
    pub(crate) fn state(&self) -> PortState {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A read of a port.
    pub(crate) fn port_read(&self, port: u16, into: &mut [u8]) -> Result<(), Error> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        into.fill(0xff);
        let mut give = |word: u32| into.iter_mut().zip(word.to_le_bytes()).for_each(|(to, from)| *to = from);
        match port {
            CLOCK_LOW => {
                state.clock = now()?;
                give(low(state.clock));
            }
            CLOCK_HIGH => give(low(state.clock >> 32)),
            CONFIG_DATA..=0xCFF if state.config_address & 0xFFFF_FF00 == SLOT => {
                self.function.config_read(register(state.config_address, port), into);
            }
            _ => {}
        }
        Ok(())
    }

    /// A write to a port.
    pub(crate) fn port_write(&self, port: u16, from: &[u8]) -> Result<(), Error> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match port {
            CONFIG_ADDRESS => state.config_address = word(from),
            CONFIG_DATA..=0xCFF if state.config_address & 0xFFFF_FF00 == SLOT => {
                self.function.config_write(register(state.config_address, port), from)?;
            }
            FAILURE => return Err(Error::Text("the guest program gave up")),
            _ => {}
        }
        Ok(())
    }

    /// A read of what is no RAM.
    pub(crate) fn memory_read(&self, address: u64, into: &mut [u8]) -> Result<(), Error> {
        into.fill(0xff);
        self.function.memory_read(address, into).map(drop)
    }

    /// A write to what is no RAM.
    pub(crate) fn memory_write(&self, address: u64, from: &[u8]) -> Result<(), Error> {
        self.function.memory_write(address, from).map(drop)
    }
}

fn register(address: u32, port: u16) -> usize {
    usize::from(address.to_le_bytes()[0] & 0xfc) + usize::from(port - CONFIG_DATA)
}

fn word(from: &[u8]) -> u32 {
    let mut word = [0; 4];
    word.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    u32::from_le_bytes(word)
}

fn low(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// The host's monotonic clock, in nanoseconds.
fn now() -> Result<u64, Error> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one `timespec` at the pointer.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    if result != 0 {
        return Err(crate::error::system("reading the clock"));
    }
    let (seconds, nanoseconds) = (time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs());
    Ok(seconds * 1_000_000_000 + nanoseconds)
}
