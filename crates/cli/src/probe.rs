//! Devices of this host, opened to be asked where `--probe` allows that.

use std::sync::Arc;

use vfio_migration_compat::DeviceManifest;
use vfio_migration_device::host::{HostDevice, Roots};
use vfio_migration_device::{
    Device, DeviceError, DmaAccess, KernelDevice, KernelError, KernelOptions, KernelPath, PciHardware,
};
use vfio_migration_memory::{GuestRam, RamSpec};
use vfio_migration_types::{DeviceId, Gpa, Iova, RamOffset, Range, error_chain};

/// Memory that is mapped for a device that is asked, where a guest has its own: no more than any limit on locked memory
/// allows.
const RAM: RamSpec = RamSpec { gpa: Gpa(1 << 20), len: 64 << 10 };

/// Access to the devices of this host: the trees to look in, and whether devices may be opened.
#[derive(Debug)]
pub(crate) struct HostAccess {
    pub(crate) roots: Roots,
    pub(crate) probe: bool,
}

impl HostAccess {
    /// The manifest of a device: its own if it may be opened and can be, else what sysfs shows.
    pub(crate) fn manifest(&self, device: &HostDevice, id: DeviceId) -> DeviceManifest {
        let shown = device.manifest(&id, &self.roots);
        if !self.probe {
            return shown;
        }
        let unknown = |why: &str| {
            tracing::warn!("{}: what only an open device tells is not known: {why}", device.name);
            shown
        };
        if !device.openable() {
            let obstacle = device.obstacles.first();
            return unknown(obstacle.map_or("no VFIO driver has it", |obstacle| &obstacle.text));
        }
        let asked = ProbedDevice::open(device, id, &self.roots).and_then(|probed| {
            if let Err(error) = &probed.mapped {
                let why = error_chain(error);
                tracing::warn!("{}: who can log its writes is not known: {why}", device.name);
            }
            probed.device.manifest()
        });
        match asked {
            Ok(manifest) => manifest,
            Err(error) => unknown(&error_chain(&error)),
        }
    }
}

/// A device that was opened to be asked.
#[derive(Debug)]
pub(crate) struct ProbedDevice {
    pub(crate) device: KernelDevice,
    /// The outcome of mapping memory for it. Until some is, nobody knows who can log its DMA writes.
    pub(crate) mapped: Result<(), DeviceError>,
}

impl ProbedDevice {
    /// Opens it, which resets some devices. What it holds of a guest stays where its driver keeps that.
    ///
    /// # Errors
    /// Also where somebody has it: the kernel refuses to open it a second time.
    pub(crate) fn open(device: &HostDevice, id: DeviceId, roots: &Roots) -> Result<Self, DeviceError> {
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| {
            DeviceError::new(id.clone(), "opening it to ask it", None, source)
        };
        let path: KernelPath = device.name.parse().map_err(|error: KernelError| failed(error.into()))?;
        let options = KernelOptions {
            sysfs: roots.sys.clone(),
            dev: roots.dev.clone(),
            keep_state: true,
            ..KernelOptions::default()
        };
        let ram = Arc::new(GuestRam::new("asked", &[RAM]).map_err(|error| failed(error.into()))?);
        let all = Range::new(Iova(RAM.gpa.0), RAM.len).map_err(|error| failed(error.into()))?;
        let device = KernelDevice::open(id.clone(), &path, ram.clone(), &options)?;
        let mapped = device.dma_map(all, DmaAccess::BOTH, ram.shared_file(RamOffset(0), RAM.len));
        Ok(Self { device, mapped })
    }
}
