//! The Device contract over the kernel's uAPI.

use std::sync::Arc;

use vfio_migration_compat::DeviceManifest;
use vfio_migration_memory::MemoryError;
use vfio_migration_types::{DeviceId, Gpa, Iova, MigrationState, RamOffset, Range};
use vfio_migration_uapi as uapi;

use super::dirty::{LogPort, TrackerLog, Tried};
use super::iommu::{DeviceLog, with_cause};
use super::tracker::{Trial, Trials, choose};
use super::windows::DmaWindows;
use super::{Inner, KernelDevice, TrackerChoice, TrackerKind};
use crate::contract::{Capabilities, Device, DirtyLog, NotMigratable, ResumingSession, SavingSession};
use crate::error::{DeviceError, TransitionError};

/// Bytes of device state that are worth one system call.
const CHUNK: usize = 1 << 20;

impl Device for KernelDevice {
    fn id(&self) -> &DeviceId {
        &self.inner.id
    }

    fn manifest(&self) -> Result<DeviceManifest, DeviceError> {
        let flags = self.inner.flags.clone().map_err(|NotMigratable(why)| {
            DeviceError::new(self.inner.id.clone(), "describing a device that cannot migrate", None, why)
        })?;
        self.describe(flags)
    }

    fn capabilities(&self) -> Result<Capabilities, NotMigratable> {
        let flags = self.inner.flags.clone()?;
        Ok(Capabilities {
            flags,
            precopy_info: flags.pre_copy,
            data_size: matches!(self.stop_copy_size(), Ok(Some(_))),
            dirty_log: self.tracker().kind != TrackerKind::Everything,
            chunk: CHUNK,
        })
    }

    fn state(&self) -> Result<MigrationState, DeviceError> {
        self.inner.machine.state()
    }

    fn set_state(&self, to: MigrationState) -> Result<(), TransitionError> {
        self.inner.machine.set_state(to)
    }

    fn begin_precopy(&self) -> Result<Box<dyn SavingSession>, TransitionError> {
        Ok(Box::new(self.inner.machine.begin_precopy()?))
    }

    fn begin_stop_copy(&self) -> Result<Box<dyn SavingSession>, TransitionError> {
        Ok(Box::new(self.inner.machine.begin_stop_copy()?))
    }

    fn begin_resuming(&self) -> Result<Box<dyn ResumingSession>, TransitionError> {
        Ok(Box::new(self.inner.machine.begin_resuming()?))
    }

    fn stop_copy_size(&self) -> Result<Option<u64>, DeviceError> {
        match uapi::stop_copy_size(std::os::fd::AsFd::as_fd(&*self.inner.device)) {
            Ok(size) => Ok(Some(size)),
            // A kernel before 6.2.
            Err(error) if error.is_unsupported() => Ok(None),
            Err(error) => {
                let doing = "asking for the size of its state";
                Err(DeviceError::new(self.inner.id.clone(), doing, error.errno(), error))
            }
        }
    }

    fn dirty_log(&self) -> Option<&dyn DirtyLog> {
        let (_, log) = self.inner.tracked();
        log.as_ref().map(|log| log as &dyn DirtyLog)
    }

    fn reset(&self) -> Result<(), DeviceError> {
        self.inner.machine.reset()
    }
}

impl Inner {
    /// The tracker, chosen by trial when it is first asked for.
    pub(super) fn tracked(&self) -> &(TrackerChoice, Option<TrackerLog>) {
        self.tracker.get_or_init(|| {
            let device_port = Ok(Box::new(DeviceLog(self.device.clone())) as Box<dyn LogPort>);
            // It can be tried on memory that is not mapped.
            let (device, device_log) =
                try_log(&self.id, &self.windows, device_port, &self.all_ram(), |_| None);
            let skip =
                |better: &Option<TrackerLog>| better.is_some().then(|| "a better one works".to_owned());
            let port = match skip(&device_log) {
                Some(why) => Err(why),
                None => self.iommu.hardware_log().map(|log| Box::new(log) as Box<dyn LogPort>),
            };
            let (iommufd, iommu_log) = try_log(&self.id, &self.windows, port, &[], |_| None);
            let log = device_log.or(iommu_log);
            let port = match skip(&log) {
                Some(why) => Err(why),
                None => self.container_port(),
            };
            let (type1, container_log) = try_log(&self.id, &self.windows, port, &[], |tried| {
                let why = "it reports every mapped page each time, as it does for a device behind an IOMMU";
                tried.all_dirty.then(|| why.to_owned())
            });
            let choice = choose(Trials { device, iommufd, type1 });
            tracing::info!(device = %self.id, kind = ?choice.kind, why = %choice.why, "dirty tracker chosen");
            (choice, log.or(container_log))
        })
    }

    fn container_port(&self) -> Result<Box<dyn LogPort>, String> {
        let emulated = self.sys.as_ref().map(|sys| sys.mdev);
        if emulated == Some(false) {
            return Err(
                "it would report every mapped page each time, since the device is behind an IOMMU".into()
            );
        }
        if emulated.is_none() && self.windows.ram().is_empty() {
            return Err("nothing is mapped to try it on".into());
        }
        Ok(Box::new(self.iommu.container_log()?))
    }

    fn all_ram(&self) -> Vec<(Range<Iova>, RamOffset)> {
        let regions = self.ram.regions().iter();
        regions
            .filter_map(|region| {
                let Gpa(start) = region.gpa;
                Some((Range::new(Iova(start), region.len).ok()?, region.offset))
            })
            .collect()
    }
}

/// Tries a log, on `otherwise` where nothing is mapped.
pub(super) fn try_log(
    id: &DeviceId,
    windows: &Arc<DmaWindows>,
    port: Result<Box<dyn LogPort>, String>,
    otherwise: &[(Range<Iova>, RamOffset)],
    spoilt: impl FnOnce(Tried) -> Option<String>,
) -> (Trial, Option<TrackerLog>) {
    let log = match port {
        Ok(port) => TrackerLog::new(format!("device {id}"), port, windows.clone()),
        Err(why) => return (Trial::Fails(why), None),
    };
    match log.trial(otherwise) {
        Ok(tried) => match spoilt(tried) {
            Some(why) => (Trial::Fails(why), None),
            None => (Trial::Works, Some(log)),
        },
        Err(MemoryError::DirtyLog { doing, source, .. }) => {
            (Trial::Fails(format!("{doing}: {}", with_cause(&*source))), None)
        }
        Err(error) => (Trial::Fails(with_cause(&error)), None),
    }
}

/// Its flags, or why it has none.
pub(super) fn find_flags(
    id: &DeviceId,
    device: &Arc<std::os::fd::OwnedFd>,
    driver: Option<&str>,
) -> Result<vfio_migration_types::MigrationFlags, NotMigratable> {
    uapi::migration_flags(std::os::fd::AsFd::as_fd(&**device)).map_err(|error| {
        if !error.is_unsupported() {
            return NotMigratable(format!("device {id}: {}", with_cause(&error)));
        }
        let driver = driver.unwrap_or("not known");
        NotMigratable(format!(
            "device {id}: its driver ({driver}) has no migration; plain vfio-pci never has, the vendor's variant driver \
             may, if the device's firmware has it enabled"
        ))
    })
}
