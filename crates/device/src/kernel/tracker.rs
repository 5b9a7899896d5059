//! The choice of a kernel device's dirty tracker, and what follows from it.

use std::sync::Arc;

use vfio_migration_memory::MemoryError;
use vfio_migration_types::{DeviceId, Iova, RamOffset, Range, error_chain};

use super::dirty::{LogPort, TrackerLog, Tried};
use super::windows::DmaWindows;

/// The keeper of the log of a device's DMA writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TrackerKind {
    /// The device itself (`VFIO_DEVICE_FEATURE_DMA_LOGGING_*`).
    DeviceLog,
    /// The IOMMU in front of it, through iommufd (`IOMMU_HWPT_GET_DIRTY_BITMAP`).
    Iommufd,
    /// The type1 container (`VFIO_IOMMU_DIRTY_PAGES`): of use for mediated devices alone.
    Type1,
    /// Nobody: all that the device may write counts as dirty.
    Everything,
}

/// The tracker that was chosen, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrackerChoice {
    /// The keeper of the log.
    pub kind: TrackerKind,
    /// The reason for this and none that is better, and what follows from it, in sentences.
    pub why: String,
}

/// The outcome of a trial of one tracker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Trial {
    /// The tracker logs.
    Works,
    /// The tracker does not log, for this reason.
    Fails(String),
}

/// The outcomes of the trials. Later ones are not made once one has worked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Trials {
    pub(super) device: Trial,
    pub(super) iommufd: Trial,
    pub(super) type1: Trial,
}

/// The best that works.
pub(super) fn choose(trials: Trials) -> TrackerChoice {
    let (device, iommufd, type1) = match trials {
        Trials { device: Trial::Works, .. } => {
            let why = "the device logs its DMA writes: only what it wrote is sent again".to_owned();
            return TrackerChoice { kind: TrackerKind::DeviceLog, why };
        }
        Trials { device: Trial::Fails(device), iommufd: Trial::Works, .. } => {
            let why = format!(
                "the IOMMU logs the device's DMA writes: only what it wrote is sent again (no device log: {device})"
            );
            return TrackerChoice { kind: TrackerKind::Iommufd, why };
        }
        Trials { device: Trial::Fails(device), iommufd: Trial::Fails(iommufd), type1: Trial::Works } => {
            let why = format!(
                "the container logs what the mediated device writes or pins: what it has pinned is sent again each \
                 time (no device log: {device}; no IOMMU log: {iommufd})"
            );
            return TrackerChoice { kind: TrackerKind::Type1, why };
        }
        Trials {
            device: Trial::Fails(device),
            iommufd: Trial::Fails(iommufd),
            type1: Trial::Fails(type1),
        } => (device, iommufd, type1),
    };
    let why = format!(
        "nothing logs the device's DMA writes (device: {device}; IOMMU: {iommufd}; container: {type1}), so all memory \
         that it may write counts as dirty: one full copy while the guest is paused, refused unless \
         --allow-all-dirty is given"
    );
    TrackerChoice { kind: TrackerKind::Everything, why }
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
            (Trial::Fails(format!("{doing}: {}", error_chain(&*source))), None)
        }
        Err(error) => (Trial::Fails(error_chain(&error)), None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn no(why: &str) -> Trial {
        Trial::Fails(why.into())
    }

    #[test]
    fn the_best_that_works_is_taken() {
        let kind = |device, iommufd, type1| choose(Trials { device, iommufd, type1 }).kind;
        assert_eq!(kind(Trial::Works, Trial::Works, Trial::Works), TrackerKind::DeviceLog);
        assert_eq!(kind(no("a"), Trial::Works, Trial::Works), TrackerKind::Iommufd);
        assert_eq!(kind(no("a"), no("b"), Trial::Works), TrackerKind::Type1);
        assert_eq!(kind(no("a"), no("b"), no("c")), TrackerKind::Everything);
    }

    #[test]
    fn every_reason_and_the_consequence_are_said() {
        let why =
            choose(Trials { device: no("reason-a"), iommufd: no("reason-b"), type1: no("reason-c") }).why;
        for said in ["reason-a", "reason-b", "reason-c", "while the guest is paused", "--allow-all-dirty"] {
            assert!(why.contains(said), "{said}: {why}");
        }
        let why = choose(Trials { device: no("reason-a"), iommufd: Trial::Works, type1: no("c") }).why;
        assert!(why.contains("reason-a"), "{why}");
    }
}
