//! The choice of a kernel device's dirty tracker, and what follows from it.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use vfio_migration_memory::MemoryError;
use vfio_migration_types::{DeviceId, Iova, RamOffset, Range, error_chain};
use vfio_migration_uapi::UapiError;

use super::dirty::{LogPort, TrackerLog, Tried};
use super::windows::DmaWindows;
use crate::error::is_passing;

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
    /// The same, for a lack that may pass: whoever tries it again later may find that it does.
    FailsNow(String),
}

impl Trial {
    /// Whether it logs now, or why not.
    fn now(self) -> Result<(), String> {
        match self {
            Self::Works => Ok(()),
            Self::Fails(why) | Self::FailsNow(why) => Err(why),
        }
    }
}

/// The outcomes of the trials. Later ones are not made once one has worked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Trials {
    pub(super) device: Trial,
    pub(super) iommufd: Trial,
    pub(super) type1: Trial,
}

impl Trials {
    fn may_pass(&self) -> bool {
        [&self.device, &self.iommufd, &self.type1].iter().any(|trial| matches!(trial, Trial::FailsNow(_)))
    }
}

/// The tracker of one device: one that works, or the finding that none does, stays; that none does for a lack that may pass is found anew.
#[derive(Debug, Default)]
pub(super) struct ChosenTracker {
    chosen: OnceLock<(TrackerChoice, Option<TrackerLog>)>,
    /// Held by whoever tries: a log is tried once at a time.
    trying: Mutex<()>,
}

impl ChosenTracker {
    /// The choice, if it was made for good.
    pub(super) fn get(&self) -> Option<&(TrackerChoice, Option<TrackerLog>)> {
        self.chosen.get()
    }

    /// The choice, as `trial` finds where none was made for good, and the log of one that was.
    pub(super) fn get_or_try(
        &self,
        id: &DeviceId,
        trial: impl FnOnce() -> (Trials, Option<TrackerLog>),
    ) -> (TrackerChoice, Option<&TrackerLog>) {
        let _trying = self.trying.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((choice, log)) = self.chosen.get() {
            return (choice.clone(), log.as_ref());
        }
        let (trials, log) = trial();
        let may_pass = log.is_none() && trials.may_pass();
        let choice = choose(trials);
        tracing::info!(device = %id, kind = ?choice.kind, why = %choice.why, may_pass, "dirty tracker chosen");
        if may_pass {
            return (choice, None);
        }
        let (choice, log) = self.chosen.get_or_init(|| (choice, log));
        (choice.clone(), log.as_ref())
    }
}

/// The best that works.
pub(super) fn choose(trials: Trials) -> TrackerChoice {
    let Trials { device, iommufd, type1 } = trials;
    let (device, iommufd, type1) = match (device.now(), iommufd.now(), type1.now()) {
        (Ok(()), ..) => {
            let why = "the device logs its DMA writes: only what it wrote is sent again".to_owned();
            return TrackerChoice { kind: TrackerKind::DeviceLog, why };
        }
        (Err(device), Ok(()), _) => {
            let why = format!(
                "the IOMMU logs the device's DMA writes: only what it wrote is sent again (no device log: {device})"
            );
            return TrackerChoice { kind: TrackerKind::Iommufd, why };
        }
        (Err(device), Err(iommufd), Ok(())) => {
            let why = format!(
                "the container logs what the mediated device writes or pins: what it has pinned is sent again each \
                 time (no device log: {device}; no IOMMU log: {iommufd})"
            );
            return TrackerChoice { kind: TrackerKind::Type1, why };
        }
        (Err(device), Err(iommufd), Err(type1)) => (device, iommufd, type1),
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
            let why = format!("{doing}: {}", error_chain(&*source));
            let errno = source.downcast_ref::<UapiError>().and_then(UapiError::errno);
            (if errno.is_some_and(is_passing) { Trial::FailsNow(why) } else { Trial::Fails(why) }, None)
        }
        Err(error) => (Trial::Fails(error_chain(&error)), None),
    }
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;
    use vfio_migration_types::{Granule, PAGE_SIZE};

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

    /// A log whose start gives this.
    #[derive(Debug)]
    struct Fake(Option<Errno>);

    impl LogPort for Fake {
        fn start(&self, _ranges: &[Range<Iova>]) -> Result<Granule, UapiError> {
            match self.0 {
                Some(source) => Err(UapiError::System { doing: "a test", source }),
                None => Ok(Granule::PAGE),
            }
        }

        fn report(&self, _: Range<Iova>, _: Granule, _: &mut [u64]) -> Result<(), UapiError> {
            Ok(())
        }

        fn stop(&self) -> Result<(), UapiError> {
            Ok(())
        }

        fn most_ranges(&self) -> usize {
            1
        }

        fn goes_with_mapping(&self) -> bool {
            false
        }
    }

    #[test]
    fn only_a_lack_that_may_pass_is_found_anew() {
        let id = DeviceId::new("net0").unwrap();
        let over = [(Range::new(Iova(0), PAGE_SIZE).unwrap(), RamOffset(0))];
        let found = |errnos: &[Option<Errno>]| {
            let (chosen, mut trials) = (ChosenTracker::default(), 0);
            let kinds: Vec<_> = errnos
                .iter()
                .map(|errno| {
                    let found = chosen.get_or_try(&id, || {
                        trials += 1;
                        let port = Ok(Box::new(Fake(*errno)) as Box<dyn LogPort>);
                        let (device, log) = try_log(&id, &Arc::default(), port, &over, |_| None);
                        (Trials { device, iommufd: no("b"), type1: no("c") }, log)
                    });
                    (found.0.kind, found.1.is_some())
                })
                .collect();
            (kinds, trials)
        };
        let (none, works) = ((TrackerKind::Everything, false), (TrackerKind::DeviceLog, true));
        for errno in [Errno::BUSY, Errno::INTR, Errno::NOMEM] {
            let refused = Some(errno);
            assert_eq!(found(&[refused, refused, None, refused]), (vec![none, none, works, works], 3));
        }
        assert_eq!(found(&[Some(Errno::OPNOTSUPP), None]), (vec![none, none], 1));
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
