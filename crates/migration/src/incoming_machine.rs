//! The destination's machine before its state is there.
//!
//! A VMM that has a whole machine to load state into hands over that: an `Arc<dyn Machine>` is an [`IncomingMachine`]. One
//! that constructs its machine out of what it receives has RAM and opened devices to begin with, and the rest at the end.

use std::fmt;
use std::sync::Arc;

use vfio_migration_compat::MachineManifest;
use vfio_migration_device::{Device, PciFunction, PciState};
use vfio_migration_memory::GuestRam;
use vfio_migration_types::{DeviceId, VmId};

use crate::machine::{LockError, Machine, MachineError, MigratableDevice, Section};

/// A machine that a guest is coming into, in three steps: its devices and its RAM, which receive while the guest still runs at the
/// source, and what is made of the rest when that is there.
///
/// Methods block; a session calls them from its own threads, one at a time.
pub trait IncomingMachine: Send + Sync {
    /// As [`Machine::id`].
    fn id(&self) -> VmId;

    /// As [`Machine::manifest`]: what the finished machine is going to be.
    ///
    /// # Errors
    /// The attempt fails, with the guest running at the source.
    fn manifest(&self) -> Result<MachineManifest, MachineError>;

    /// The guest's RAM, all of it. The finished machine has the same.
    fn ram(&self) -> Arc<GuestRam>;

    /// The devices, open and ready to be taken to RESUMING.
    fn incoming_devices(&self) -> Vec<IncomingDevice>;

    /// Makes the machine: all state is here, RAM is complete, the guest is paused at the source. Its interrupt controller must be
    /// ready for interrupts when this returns, and its [`devices`](Machine::devices) must give the function of each device that
    /// has one: the library then puts config space, BARs and interrupts back in the order that holds for any machine. Called at most
    /// once in a session.
    ///
    /// # Errors
    /// The guest goes on at the source. Also a section that is unknown, of an unknown version, missing, or left over: nothing is
    /// skipped in silence.
    fn finish(&self, state: MachineState) -> Result<Arc<dyn Machine>, MachineError>;

    /// As [`Machine::release_locks`], of what [`take_locks`](Self::take_locks) took here.
    ///
    /// # Errors
    /// They count as held, and this is tried again.
    fn release_locks(&self) -> Result<(), LockError>;

    /// As [`Machine::take_locks`]. Called before [`finish`](Self::finish); the locks are the finished machine's once the guest has
    /// arrived.
    ///
    /// # Errors
    /// The guest goes on at the source.
    fn take_locks(&self) -> Result<(), LockError>;
}

/// A device of an [`IncomingMachine`].
#[derive(Clone, Debug)]
pub struct IncomingDevice {
    /// The device, which takes in its own state.
    pub device: Arc<dyn Device>,
    /// The VMM's side of it.
    pub pci: IncomingFunction,
}

/// The PCI function of a device that is coming in.
#[derive(Clone, Debug)]
pub enum IncomingFunction {
    /// It is there already.
    Made(Arc<dyn PciFunction>),
    /// The finished machine has it: a guest that has none is refused then.
    Later,
    /// There is none. A device with BARs or interrupts is refused.
    None,
}

/// All that a machine is made of, beside RAM and what its devices hold themselves.
#[derive(Clone)]
pub struct MachineState {
    /// The sections that the source's [`Machine::save`] gave, in no order.
    pub sections: Vec<Section>,
    /// Config space, BARs and interrupts of each function, by the device's name here, in the order of the source's devices. A machine
    /// may be laid out by it; the library puts it back itself.
    pub functions: Vec<(DeviceId, PciState)>,
}

impl fmt::Debug for MachineState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let functions: Vec<_> = self.functions.iter().map(|(device, _)| device).collect();
        f.debug_struct("MachineState")
            .field("sections", &self.sections)
            .field("functions", &functions)
            .finish()
    }
}

impl From<MigratableDevice> for IncomingDevice {
    fn from(MigratableDevice { device, pci }: MigratableDevice) -> Self {
        Self { device, pci: pci.map_or(IncomingFunction::None, IncomingFunction::Made) }
    }
}

/// A machine that is there before its state: it is loaded.
impl IncomingMachine for Arc<dyn Machine> {
    fn id(&self) -> VmId {
        (**self).id()
    }

    fn manifest(&self) -> Result<MachineManifest, MachineError> {
        (**self).manifest()
    }

    fn ram(&self) -> Arc<GuestRam> {
        (**self).ram()
    }

    fn incoming_devices(&self) -> Vec<IncomingDevice> {
        (**self).devices().into_iter().map(IncomingDevice::from).collect()
    }

    fn finish(&self, state: MachineState) -> Result<Arc<dyn Machine>, MachineError> {
        self.load(state.sections)?;
        Ok(Arc::clone(self))
    }

    fn release_locks(&self) -> Result<(), LockError> {
        (**self).release_locks()
    }

    fn take_locks(&self) -> Result<(), LockError> {
        (**self).take_locks()
    }
}
