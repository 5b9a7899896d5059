//! The Device contract over the kernel's uAPI.

use std::os::fd::AsFd;
use std::path::Path;

use vfio_migration_compat::{DeviceManifest, DirtyTracking, Driver};
use vfio_migration_types::{DeviceId, Gpa, Iova, MigrationFlags, MigrationState, RamOffset, Range};
use vfio_migration_uapi as uapi;

use super::device::{KernelDevice, OpenDevice};
use super::dirty::{LogPort, TrackerLog};
use super::iommu::DeviceLog;
use super::sysfs::SysDevice;
use super::tracker::{TrackerChoice, TrackerKind, Trials, try_log};
use crate::contract::{
    Capabilities, CapabilitiesError, Device, DirtyLog, NotMigratable, ResumingSession, SavingSession,
};
use crate::describe::describe_hardware;
use crate::error::{DeviceError, TransitionError};
use crate::host::files::attribute;

/// Bytes of device state that are worth one system call.
const CHUNK: usize = 1 << 20;

impl Device for KernelDevice {
    fn id(&self) -> &DeviceId {
        &self.inner.id
    }

    fn manifest(&self) -> Result<DeviceManifest, DeviceError> {
        let (flags, no_migration) = match &self.inner.flags {
            Ok(flags) => (Some(*flags), None),
            Err(NotMigratable(why)) => (None, Some(why.clone())),
        };
        self.describe(flags, no_migration)
    }

    fn capabilities(&self) -> Result<Capabilities, CapabilitiesError> {
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
        match uapi::stop_copy_size((*self.inner.device).as_fd()) {
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
        log.map(|log| log as &dyn DirtyLog)
    }

    fn reset(&self) -> Result<(), DeviceError> {
        self.inner.machine.reset()
    }
}

impl OpenDevice {
    /// The tracker, chosen by trial when it is first asked for, and its log.
    pub(super) fn tracked(&self) -> (TrackerChoice, Option<&TrackerLog>) {
        self.tracker.get_or_try(&self.id, || {
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
            (Trials { device, iommufd, type1 }, log.or(container_log))
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

impl KernelDevice {
    /// The keeper of the log of its DMA writes, and what follows from that. Chosen by trial when it is first asked for,
    /// best after the guest's RAM was mapped; where none logs for a lack that may pass, as EBUSY or ENOMEM, it is tried anew each time.
    pub fn tracker(&self) -> TrackerChoice {
        self.inner.tracked().0
    }

    /// The manifest from sysfs and the PCI function. No kernel driver declares a model, so none is made up: equality is
    /// strict, the driver included, where sysfs has it.
    fn describe(
        &self,
        flags: Option<MigrationFlags>,
        no_migration: Option<String>,
    ) -> Result<DeviceManifest, DeviceError> {
        let sys = self.inner.sys.as_ref();
        let driver = sys.and_then(|sys| {
            let version = sys.driver_version.clone();
            Some(Driver { version, ..Driver::new(sys.driver.clone()?) })
        });
        let manifest = DeviceManifest {
            backend: "kernel".into(),
            driver,
            kernel: attribute(Path::new("/proc/sys/kernel/osrelease")),
            mdev_type: sys.and_then(|sys| sys.mdev_type.clone()),
            // Of a device that cannot migrate nothing else is asked that only migration has.
            dirty: if flags.is_some() { self.dirty() } else { None },
            state_size: if flags.is_some() { self.stop_copy_size()? } else { None },
            flags,
            no_migration,
            firmware: sys.and_then(|sys| sys.firmware.clone()),
            facts: sys.map(SysDevice::facts).unwrap_or_default(),
            ..DeviceManifest::new(self.inner.id.clone())
        };
        describe_hardware(self, manifest)
    }

    /// The tracker that was chosen. Before any memory is mapped a choice would be made on nothing, and stay.
    fn dirty(&self) -> Option<DirtyTracking> {
        let inner = &self.inner;
        let known = inner.tracker.get().is_some() || !inner.windows.ram().is_empty();
        known.then(|| tracking(self.tracker().kind))
    }
}

/// The finding on each tracker. A better one than the chosen was tried before it, and failed; a worse one was not
/// tried.
fn tracking(kind: TrackerKind) -> DirtyTracking {
    let none = DirtyTracking { device_log: Some(false), iommu: Some(false), ..DirtyTracking::default() };
    match kind {
        TrackerKind::DeviceLog => DirtyTracking { device_log: Some(true), ..DirtyTracking::default() },
        TrackerKind::Iommufd => DirtyTracking { iommu: Some(true), ..none },
        TrackerKind::Type1 => DirtyTracking { container: Some(true), ..none },
        TrackerKind::Everything => DirtyTracking { container: Some(false), all_dirty: Some(true), ..none },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tracker_says_nothing_of_those_that_were_not_tried() {
        let log = tracking(TrackerKind::DeviceLog);
        assert_eq!((log.device_log, log.iommu, log.container, log.all_dirty), (Some(true), None, None, None));
        let all = tracking(TrackerKind::Everything);
        assert_eq!((all.device_log, all.iommu, all.container), (Some(false), Some(false), Some(false)));
        assert_eq!(all.all_dirty, Some(true));
    }
}
