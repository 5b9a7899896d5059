//! A machine that is one device: no vCPUs, no interrupts, and a page of RAM that nobody writes.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use vfio_migration_compat::{MachineManifest, RamRegion};
use vfio_migration_device::{
    Capabilities, Device, DeviceError, DeviceObserver, IrqRouter, Position, TransitionError, WatchedDevice,
};
use vfio_migration_memory::{DirtySource, GuestRam, MemoryError, RamSpec};
use vfio_migration_types::{DeviceId, Gpa, MigrationState, PAGE_SIZE, VmId};

use super::control::DeviceControl;
use crate::machine::{LockError, Machine, MachineError, MigratableDevice, Paused, Section};

/// The kind of such a machine, in its manifest: which distinguishes a file from a whole VM's.
pub(crate) const KIND: &str = "vfio-migrate/device";

/// The machine. Its device reaches no memory: nothing is mapped for it.
#[derive(Debug)]
pub(super) struct LoneDevice {
    id: VmId,
    device: Arc<dyn Device>,
    ram: Arc<GuestRam>,
}

impl LoneDevice {
    pub(super) fn new(
        id: VmId,
        device: Arc<dyn Device>,
        observer: LoneObserver,
    ) -> Result<Self, MemoryError> {
        let ram = GuestRam::new("device", &[RamSpec { gpa: Gpa(0), len: PAGE_SIZE }])?;
        let device = Arc::new(WatchedDevice::new(device, Arc::new(observer)));
        Ok(Self { id, device, ram: Arc::new(ram) })
    }
}

impl Machine for LoneDevice {
    fn id(&self) -> VmId {
        self.id
    }

    fn manifest(&self) -> Result<MachineManifest, MachineError> {
        let device = self.device.manifest();
        let device = device.map_err(|error| MachineError::new("describing the device", error))?;
        Ok(MachineManifest {
            machine: KIND.into(),
            accelerator: "none".into(),
            vcpus: 0,
            ram: vec![RamRegion { gpa: Gpa(0), len: PAGE_SIZE }],
            cpu: Vec::new(),
            sections: BTreeMap::new(),
            devices: vec![device],
            ..MachineManifest::default()
        })
    }

    fn ram(&self) -> Arc<GuestRam> {
        self.ram.clone()
    }

    fn dirty_sources(&self) -> Vec<Arc<dyn DirtySource>> {
        Vec::new()
    }

    fn devices(&self) -> Vec<MigratableDevice> {
        vec![MigratableDevice { device: self.device.clone(), pci: None }]
    }

    fn irq_router(&self) -> Arc<dyn IrqRouter> {
        Arc::new(NoRoutes)
    }

    /// There are no vCPUs; to its device, the machine runs.
    fn pause(&self) -> Result<bool, MachineError> {
        Ok(true)
    }

    fn resume(&self, _run: bool) -> Result<(), MachineError> {
        Ok(())
    }

    fn save(&self, _paused: &Paused) -> Result<Vec<Section>, MachineError> {
        Ok(Vec::new())
    }

    fn load(&self, sections: Vec<Section>) -> Result<(), MachineError> {
        match sections.first() {
            None => Ok(()),
            Some(section) => Err(MachineError::new(
                format!("loading the section '{}'", section.name.escape_debug()),
                "a device alone has no machine state",
            )),
        }
    }

    fn release_locks(&self) -> Result<(), LockError> {
        Ok(())
    }

    fn take_locks(&self) -> Result<(), LockError> {
        Ok(())
    }
}

/// No interrupt goes anywhere.
#[derive(Debug)]
struct NoRoutes;

impl IrqRouter for NoRoutes {
    fn commit(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(())
    }
}

/// Notes in a [`DeviceControl`] what is done with the device, and hides what a lone device is not to use.
#[derive(Debug)]
pub(super) struct LoneObserver {
    pub(super) control: DeviceControl,
    /// Whether it is treated as without PRE_COPY.
    pub(super) stop_copy_only: bool,
    /// The device is stopped, and is never let run.
    pub(super) stays_stopped: bool,
}

impl DeviceObserver for LoneObserver {
    /// Not what runs, if it is not to run, nor its DMA log: it reaches no memory.
    fn shown(&self, mut found: Capabilities) -> Capabilities {
        found.flags.pre_copy &= !self.stop_copy_only && !self.stays_stopped;
        found.precopy_info &= found.flags.pre_copy;
        found.dirty_log = false;
        found
    }

    fn lets_move(&self) -> bool {
        !self.stays_stopped
    }

    /// A session that somebody left half done in it ends in a reset first.
    fn resets_before_resuming(&self) -> bool {
        !matches!(self.control.at(), MigrationState::Running | MigrationState::Stop)
    }

    fn went(&self, _device: &DeviceId, to: MigrationState, reset: bool, took: Duration) {
        self.control.went(to, reset, took);
    }

    fn failed(&self, error: &TransitionError) {
        self.control.found(error.now.unwrap_or(MigrationState::Error));
    }

    fn read(&self, _device: &DeviceId, position: Position, bytes: &mut [u8]) {
        self.control.add_moved(bytes.len());
        if position != Position::StopCopy {
            self.control.add_precopy(bytes.len());
        }
    }

    fn writing<'a>(&self, device: &DeviceId, bytes: &'a [u8]) -> Result<Cow<'a, [u8]>, DeviceError> {
        if self.control.is_cancelled() {
            return Err(DeviceError::new(device.clone(), "loading its state", None, "it was cancelled"));
        }
        Ok(Cow::Borrowed(bytes))
    }

    fn written(&self, _device: &DeviceId, bytes: usize) {
        self.control.add_moved(bytes);
    }
}
