//! One device to and from a file: what it is found in, what it is left in, and when it is touched at all.

use std::path::Path;
use std::sync::{Arc, Mutex};

use crate::toy::{FakeDevice, FakeDeviceKind, FakeFault, Plan, Toy};
use vfio_migration::{
    DeviceControl, DeviceFileError, DeviceReport, FileError, RestoreDeviceOptions, SaveDeviceOptions,
    SaveOptions, Snapshot, SnapshotError, Source, SourceOptions, restore_device, save, save_device,
};
use vfio_migration_device::Device;
use vfio_migration_memory::{GuestRam, RamSpec};
use vfio_migration_types::{Gpa, MigrationState};

struct Bench {
    toy: Arc<FakeDevice>,
    device: Arc<dyn Device>,
    journal: Arc<Mutex<Vec<String>>>,
}

impl Bench {
    fn new() -> Self {
        let ram = Arc::new(GuestRam::new("toy", &[RamSpec { gpa: Gpa(0), len: 1 << 20 }]).unwrap());
        let journal = Arc::default();
        let toy =
            FakeDevice::new(0, FakeDeviceKind { pieces: 40, ..FakeDeviceKind::default() }, &ram, &journal);
        let device: Arc<dyn Device> = toy.clone();
        Self { toy, device, journal }
    }

    fn filled() -> Self {
        let bench = Self::new();
        bench.toy.power_on();
        bench
    }

    fn save_by(&self, path: &Path, control: &DeviceControl) -> Result<DeviceReport, DeviceFileError> {
        save_device(&self.device, path, SaveDeviceOptions::default(), control)
    }

    fn save(&self, path: &Path) -> Result<DeviceReport, DeviceFileError> {
        self.save_by(path, &DeviceControl::default())
    }

    fn restore_by(&self, path: &Path, control: &DeviceControl) -> Result<DeviceReport, DeviceFileError> {
        let snapshot = Snapshot::open(path).unwrap();
        restore_device(snapshot, &self.device, RestoreDeviceOptions::default(), control)
    }

    fn restore(&self, path: &Path) -> Result<DeviceReport, DeviceFileError> {
        self.restore_by(path, &DeviceControl::default())
    }

    fn fails_at(&self, fault: FakeFault) {
        self.toy.fail_at(fault);
    }

    fn untouched(&self) -> bool {
        self.journal.lock().unwrap().is_empty()
    }
}

#[test]
fn a_device_goes_on_and_its_state_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let from = Bench::filled();
    let saved = from.save(&path).unwrap();
    from.toy.prove_running();
    assert_eq!((saved.left_in, saved.file_bytes), (MigrationState::Running, path.metadata().unwrap().len()));
    assert!(saved.precopy > 0 && saved.stopcopy > 0, "{saved:?}");
    let walk: Vec<_> = saved.arcs.iter().map(|arc| arc.to).collect();
    assert_eq!(walk[..3], [MigrationState::PreCopy, MigrationState::PreCopyP2p, MigrationState::StopCopy]);
    assert!(saved.arcs.windows(2).all(|pair| pair[0].to == pair[1].from), "{saved:?}");
    let to = Bench::new();
    let restored = to.restore(&path).unwrap();
    to.toy.prove_running();
    assert_eq!((restored.state_digest, restored.file_digest), (saved.state_digest, saved.file_digest));
    assert_eq!((restored.precopy, restored.stopcopy), (saved.precopy, saved.stopcopy));
    assert!(to.toy.loaded().iter().any(|byte| *byte != 0), "nothing was loaded");
}

#[test]
fn a_session_that_was_left_open_is_ended_and_one_half_loaded_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let from = Bench::filled();
    std::mem::forget(from.device.begin_precopy().unwrap());
    assert_eq!(from.toy.at(), MigrationState::PreCopy);
    assert_eq!(from.save(&dir.path().join("running")).unwrap().left_in, MigrationState::Running);
    from.device.set_state(MigrationState::Stop).unwrap();
    std::mem::forget(from.device.begin_stop_copy().unwrap());
    assert_eq!(from.save(&dir.path().join("stopped")).unwrap().left_in, MigrationState::Stop);
    let half = Bench::new();
    std::mem::forget(half.device.begin_resuming().unwrap());
    let journal = half.journal.lock().unwrap().len();
    let error = half.save(&dir.path().join("half")).unwrap_err();
    let state = MigrationState::Resuming;
    assert!(
        matches!(&error, DeviceFileError::NoWholeState { state: found, .. } if *found == state),
        "{error}"
    );
    assert_eq!(half.journal.lock().unwrap().len(), journal, "it was touched");
    assert!(!dir.path().join("half").exists());
    // Loading begins anew, not behind what was half loaded.
    let restored = half.restore(&dir.path().join("running")).unwrap();
    assert!(restored.arcs[0].reset && !restored.arcs[1].reset, "{restored:?}");
    assert_eq!(restored.left_in, MigrationState::Running);
}

#[test]
fn cancelled_before_its_first_byte() {
    let dir = tempfile::tempdir().unwrap();
    let (path, none) = (dir.path().join("file"), dir.path().join("none"));
    let cancelled = DeviceControl::default();
    cancelled.cancel();
    let from = Bench::filled();
    let error = from.save_by(&none, &cancelled).unwrap_err();
    assert!(matches!(&error, DeviceFileError::Cancelled(fate) if !fate.reset), "{error}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    from.toy.prove_running();
    from.save(&path).unwrap();
    let to = Bench::new();
    let error = to.restore_by(&path, &cancelled).unwrap_err();
    let running = Some(MigrationState::Running);
    assert!(
        matches!(&error, DeviceFileError::Cancelled(fate) if fate.reset && fate.now == running),
        "{error}"
    );
}

#[test]
fn failures_say_what_became_of_the_device() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    for fault in
        [FakeFault::BeginPrecopy, FakeFault::ReadPrecopy, FakeFault::GoStopCopy, FakeFault::ReadStopCopy]
    {
        let from = Bench::filled();
        from.fails_at(fault);
        let error = from.save(&path).unwrap_err();
        let DeviceFileError::Failed { fate, .. } = &error else { panic!("{fault:?}: {error}") };
        assert_eq!((fate.reset, fate.now), (false, Some(MigrationState::Running)), "{fault:?}");
        assert!(!path.exists(), "{fault:?}");
    }
    let from = Bench::filled();
    from.fails_at(FakeFault::BackToRunning);
    let error = from.save(&path).unwrap_err();
    assert!(matches!(&error, DeviceFileError::WholeFile { fate, .. } if fate.reset), "{error}");
    for fault in [FakeFault::BeginResuming, FakeFault::Write, FakeFault::Finish] {
        let to = Bench::new();
        to.fails_at(fault);
        let error = to.restore(&path).unwrap_err();
        let DeviceFileError::Failed { fate, .. } = &error else { panic!("{fault:?}: {error}") };
        assert_eq!((fate.reset, fate.now), (true, Some(MigrationState::Running)), "{fault:?}");
    }
    let to = Bench::new();
    to.fails_at(FakeFault::BackToRunning);
    let error = to.restore(&path).unwrap_err();
    assert!(error.to_string().contains("its state is loaded, and it does not start"), "{error}");
}

#[test]
fn nothing_is_touched_for_a_file_that_cannot_be() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, "precious").unwrap();
    let bench = Bench::filled();
    let error = bench.save(&path).unwrap_err();
    assert!(matches!(error, DeviceFileError::File(SnapshotError::Unfit(FileError::Exists(_)))), "{error}");
    assert!(bench.untouched());
    std::fs::remove_file(&path).unwrap();
    let plan = Plan { pages: 8, hot: 2, devices: vec![FakeDeviceKind::default()], ..Plan::default() };
    let options = SourceOptions::default().for_saving();
    save(Source::new(Toy::booted(&plan), options), &path, SaveOptions::default(), |_| {}).unwrap();
    let error = bench.restore(&path).unwrap_err();
    assert!(matches!(&error, DeviceFileError::OfMachine { .. }), "{error}");
    assert!(bench.untouched());
    // The control: what is touched is noted.
    std::fs::remove_file(&path).unwrap();
    bench.save(&path).unwrap();
    assert!(!bench.untouched());
}
