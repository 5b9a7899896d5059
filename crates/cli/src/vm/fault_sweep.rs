//! Every fault that the sample device can be told to have, at the source and at the destination, in every phase that it can
//! strike: what is said of the migration (exit code, JSON, text, status of both sides, events, history, journal) agrees with what is
//! (vCPUs, devices). Both `vm`s run in this process, with the software guest.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use clap::Parser;
use serde_json::{Value, json};
use vfio_migration::{VmOwnership, ownership_at};
use vfio_migration_sim::{Fault, Options, serve};
use vfio_migration_types::VmId;
use vfio_user_peer::StopHandle;

use super::{Started, start};
use crate::args::{Cli, CliVerb};
use crate::control::client::ControlClient;
use crate::control::protocol::{
    ArrivedGuest, ControlVerb, FollowedReport, MigrationInfo, MigrationStatus, StatusReport, VmStatus,
};
use crate::exit::Exit;
use crate::follow::{OnInterrupt, follow, followed_text, text};
use crate::history::History;
use crate::interrupt::UserInterrupt;

const UUID: &str = "0d5c8a92-7c1e-4b0b-9a55-0f2f6f6f0003";
/// Longest wait for anything.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// A device server on a thread.
struct Served {
    stop: StopHandle,
    thread: Option<JoinHandle<()>>,
}

impl Served {
    fn start(socket: &Path, options: Options) -> Self {
        let stop = StopHandle::new().unwrap();
        let (path, stopped) = (socket.to_owned(), stop.clone());
        // A fault may end it, which is the fault's affair.
        let thread = std::thread::spawn(move || drop(serve(path, options, &stopped)));
        wait_for("the device's socket", || socket.exists());
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One side: a `vm` with a device, and a client of its control socket.
pub(super) struct Side {
    started: Started,
    control: PathBuf,
    pub(super) state: PathBuf,
    _device: Served,
}

impl Side {
    fn start(dir: &Path, name: &str, faults: &[&str], more: &[&str]) -> Self {
        let path = |what: &str| dir.join(format!("{name}.{what}"));
        let faults: Vec<Fault> = faults.iter().map(|text| text.parse().unwrap()).collect();
        let options =
            Options { state_size: 256 << 10, state_dirty_rate: 64 << 10, faults, ..Options::default() };
        let socket = path("device");
        let device = Served::start(&socket, options);
        let (control, state) = (path("control"), path("state"));
        let word = format!("vfio-user:{},id=dev0,timeout=1s", socket.display());
        let (control_word, state_word) = (control.display().to_string(), state.display().to_string());
        let words = ["vfio-migrate", "vm", "--software", "--memory", "32M", "--dirty-rate", "1M", "--uuid"];
        let words = [&words[..], &[UUID, "--device", &word, "--control", &control_word], more];
        let words = [&words.concat()[..], &["--state-dir", &state_word]].concat();
        let CliVerb::Vm(options) = Cli::try_parse_from(words).unwrap().verb else { panic!() };
        let (quit, _) = mpsc::channel();
        let started = start(&options, &UserInterrupt::default(), quit).unwrap();
        Self { started, control, state, _device: device }
    }

    pub(super) fn client(&self) -> ControlClient {
        ControlClient::connect(&self.control, PATIENCE, None).unwrap()
    }

    pub(super) fn report(&self) -> StatusReport {
        self.client().query().unwrap()
    }

    /// How often the guest went round, if there is one.
    pub(super) fn loops(&self) -> u64 {
        let report = self.client().call(ControlVerb::QueryGuest, Value::Null);
        report.ok().and_then(|report| report["loops"].as_u64()).unwrap_or(0)
    }

    /// Whether vCPUs run, by the guest's own count.
    fn progresses(&self) -> bool {
        let before = self.loops();
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(2) {
            if self.loops() > before {
                return true;
            }
            if self.report().vm.status != VmStatus::Running && begun.elapsed() > Duration::from_millis(200) {
                return false;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        false
    }

    fn owner(&self) -> VmOwnership {
        let vm: VmId = UUID.parse().unwrap();
        ownership_at(&self.state, vm).unwrap()
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        self.started.vm.end();
    }
}

pub(super) fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What was said of one migration, and what is.
pub(super) struct Told {
    pub(super) source: Side,
    pub(super) destination: Side,
    /// What `migrate` would print and exit with.
    pub(super) printed: FollowedReport,
    /// The `MIGRATION` event of the end.
    event: MigrationInfo,
}

/// Migrates between a device with these faults at the source and one with those at the destination, and does something
/// `meanwhile`.
pub(super) fn migrate(
    dir: &Path,
    here: &[&str],
    there: &[&str],
    options: &Value,
    meanwhile: impl FnOnce(&Side, &Side),
) -> Told {
    let source = Side::start(dir, "source", here, &[]);
    let destination = Side::start(dir, "destination", there, &["--incoming", "tcp:127.0.0.1:0"]);
    wait_for("the guest's work", || source.loops() > 20);
    let to = destination.report().vm.incoming.unwrap();
    let mut listener = source.client();
    let mut client = source.client();
    let mut arguments = json!({"uri": to, "downtime-limit": 8000});
    for (key, value) in options.as_object().unwrap() {
        arguments[key] = value.clone();
    }
    client.call(ControlVerb::Migrate, arguments).unwrap();
    meanwhile(&source, &destination);
    let interrupt = UserInterrupt::default();
    let report =
        follow(&mut client, MigrationStatus::is_under_way, true, &interrupt, OnInterrupt::Cancel).unwrap();
    let printed = report.latest().unwrap();
    let event = std::iter::from_fn(|| listener.next_event(PATIENCE).unwrap())
        .filter_map(|event| event.migration())
        .find(|info| !info.status.is_under_way())
        .unwrap();
    wait_for("the destination's end", || {
        let report = destination.report();
        report.migration.is_none() && report.last.is_some()
    });
    Told { source, destination, printed, event }
}

impl Told {
    /// Everything that was said agrees with everything that is.
    pub(super) fn check(&self, case: &str) {
        let Self { source, destination, printed, event } = self;
        let (here, there) = (source.report(), destination.report());
        let info = &printed.migration;
        let all = format!("{case}: {info:?}\nsource {here:?}\ndestination {there:?}");
        let last = here.last.as_ref().unwrap();
        let arrived = there.last.as_ref().unwrap();

        // One thing is said everywhere.
        assert_eq!(info, last, "what migrate prints is what status has: {all}");
        assert_eq!(
            (info.status, info.guest, &info.failure, &info.error),
            (event.status, event.guest, &event.failure, &event.error),
            "the event: {all}"
        );
        let said = [followed_text(printed), text(&here), info.error.clone().unwrap_or_default()].concat();
        let runs = [source.progresses(), destination.progresses()];
        assert!(!(runs[0] && runs[1]), "it runs twice: {all}");

        // And it is so.
        let exit = info.exit();
        match info.status {
            MigrationStatus::Completed => {
                assert_eq!((exit, info.guest), (Exit::Done, Some(ArrivedGuest::Running)), "{all}");
                assert_eq!((&info.error, &info.failure, runs), (&None, &None, [false, true]), "{all}");
                assert!(info.downtime_ms.is_some(), "{all}");
                assert_eq!(
                    (here.vm.status, there.vm.status),
                    (VmStatus::Postmigrate, VmStatus::Running),
                    "{all}"
                );
                assert_eq!((arrived.status, arrived.guest), (info.status, info.guest), "{all}");
            }
            MigrationStatus::NotStarted => {
                assert_eq!((exit, info.guest), (Exit::NotStarted, Some(ArrivedGuest::NotStarted)), "{all}");
                assert_eq!((info.downtime_ms, runs), (None, [false, false]), "{all}");
                assert_eq!(
                    (here.vm.status, there.vm.status),
                    (VmStatus::Postmigrate, VmStatus::Paused),
                    "{all}"
                );
                assert_eq!((arrived.status, &arrived.failure), (info.status, &info.failure), "{all}");
                assert!(info.failure.is_some() && info.error.is_some(), "{all}");
            }
            MigrationStatus::Failed | MigrationStatus::Cancelled => {
                assert!(matches!(exit, Exit::Failed | Exit::Incompatible), "{all}");
                assert!(info.error.is_some() && info.guest.is_none() && !runs[1], "{all}");
                assert!(info.downtime_ms.is_none() || runs[0], "the pause is over: {all}");
                assert_eq!(runs[0], here.vm.status == VmStatus::Running, "{all}");
                assert_eq!(runs[0], !said.contains("not resumed"), "{said}\n{all}");
                let (reset, lost) = (&here.vm.reset_devices, &here.vm.lost_devices);
                let whole = runs[0] && reset.is_empty() && lost.is_empty() && info.left_undone.is_empty();
                assert!(whole || !said.contains("as it was before"), "{said}\n{all}");
                let (lost_state, without) =
                    (said.contains("lost its state"), said.contains("without device"));
                assert!(!lost_state || !reset.is_empty(), "it is shown nowhere: {said}\n{all}");
                assert!(!without || !reset.is_empty() || !lost.is_empty(), "{said}\n{all}");
                assert_eq!(!reset.is_empty(), text(&here).contains("\nreset: dev0 ("), "{said}\n{all}");
                assert_eq!(there.vm.status, VmStatus::Inmigrate, "it waits on: {all}");
                assert_ne!(arrived.status, MigrationStatus::Completed, "{all}");
            }
            other => panic!("{other:?}: {all}"),
        }
        // What is found afterwards is what was said.
        for (side, wanted) in [(source, last), (destination, arrived)] {
            let history = History::read(&side.state).unwrap();
            let record = history.last_of(UUID).unwrap_or_else(|| panic!("nothing in the history: {all}"));
            let kept = &record.migration;
            assert_eq!(kept, wanted, "the history: {all}");
            assert_eq!(kept.attempt, record.attempt, "{all}");
        }
        // The journals: the guest has one owner, and it is the one that the texts mean.
        let moved = here.vm.status == VmStatus::Postmigrate;
        assert_eq!(
            matches!(source.owner(), VmOwnership::Elsewhere { .. }),
            moved,
            "{:?} {all}",
            source.owner()
        );
        assert_eq!(
            matches!(destination.owner(), VmOwnership::Ours(_)),
            moved,
            "{:?} {all}",
            destination.owner()
        );
        // A failure by its parts is what the sentence says.
        if let Some(failure) = &info.failure {
            let error = info.error.as_ref().unwrap();
            assert!(error.contains(&failure.text), "{all}");
            assert!(error.matches(&failure.text).count() == 1, "said twice: {all}");
            if let Some(device) = &failure.device {
                assert!(error.contains(device.as_str()), "{all}");
            }
        }
        // JSON is what its schema's types read.
        let json = serde_json::to_value(printed).unwrap();
        let again: FollowedReport = serde_json::from_value(json).unwrap();
        assert_eq!(again.migration.status, info.status);
    }
}

fn sweep(cases: &[(&[&str], &[&str], MigrationStatus)], options: &Value) {
    for (here, there, wanted) in cases {
        let dir = tempfile::tempdir().unwrap();
        let told = migrate(dir.path(), here, there, options, |_, _| {});
        let case = format!("{here:?} {there:?}");
        told.check(&case);
        assert_eq!(told.printed.migration.status, *wanted, "{case}: {:?}", told.printed.migration);
    }
}

use MigrationStatus::{Completed, Failed, NotStarted};

const NONE: &[&str] = &[];

#[test]
fn arcs_at_the_source() {
    sweep(
        &[
            (&["fail-arc:RUNNING:PRE_COPY:EIO"], NONE, Failed),
            (&["error-arc:RUNNING:PRE_COPY"], NONE, Failed),
            (&["fail-arc:PRE_COPY:PRE_COPY_P2P:EBUSY"], NONE, Failed),
            (&["error-arc:PRE_COPY:PRE_COPY_P2P"], NONE, Failed),
            (&["fail-arc:PRE_COPY_P2P:STOP_COPY:EIO"], NONE, Failed),
            (&["error-arc:PRE_COPY_P2P:STOP_COPY"], NONE, Failed),
            (&["fail-arc:STOP_COPY:STOP:EIO"], NONE, Completed),
            (&["error-arc:STOP_COPY:STOP"], NONE, Completed),
            (&["hang-arc:PRE_COPY:PRE_COPY_P2P:300"], NONE, Completed),
            // Late for longer than the device has; it answers in the end, and stays.
            (&["hang-arc:RUNNING:PRE_COPY:1500"], NONE, Failed),
            (&["hang-arc:PRE_COPY:PRE_COPY_P2P:1500"], NONE, Failed),
            (&["hang-arc:PRE_COPY_P2P:STOP_COPY:1500"], NONE, Failed),
        ],
        &json!({}),
    );
}

/// The limit passes long before the device is given up: what is told is the device all the same, and the time is the true one.
#[test]
fn a_device_that_outlasts_the_downtime_limit_is_named() {
    for fault in ["hang-arc:PRE_COPY:PRE_COPY_P2P:1500", "hang-arc:PRE_COPY_P2P:STOP_COPY:1500"] {
        let dir = tempfile::tempdir().unwrap();
        let told = migrate(dir.path(), &[fault], NONE, &json!({"downtime-limit": 300}), |_, _| {});
        told.check(fault);
        let info = &told.printed.migration;
        let failure = info.failure.as_ref().unwrap_or_else(|| panic!("{info:?}"));
        assert_eq!((failure.device.as_deref(), failure.errno), (Some("dev0"), Some(110)), "{info:?}");
        let (_, after) = failure.text.split_once("had been paused for ").expect(&failure.text);
        let paused: u64 = after.split_once(' ').unwrap().0.parse().unwrap();
        assert!(paused >= 900, "{info:?}");
        assert!(failure.text.contains("above the downtime limit of 300 ms"), "{info:?}");
    }
}

#[test]
fn arcs_at_the_destination() {
    sweep(
        &[
            (NONE, &["fail-arc:STOP:RESUMING:EIO"], Failed),
            (NONE, &["error-arc:STOP:RESUMING"], Failed),
            (NONE, &["fail-arc:RESUMING:STOP:EINVAL"], Failed),
            (NONE, &["error-arc:RESUMING:STOP"], Failed),
            (NONE, &["fail-arc:STOP:RUNNING_P2P:EBUSY"], NotStarted),
            (NONE, &["fail-arc:RUNNING_P2P:RUNNING:EIO"], NotStarted),
            (NONE, &["error-arc:STOP:RUNNING_P2P"], NotStarted),
            (NONE, &["error-arc:RUNNING_P2P:RUNNING"], NotStarted),
            (NONE, &["hang-arc:RESUMING:STOP:300"], Completed),
            (NONE, &["hang-arc:RUNNING_P2P:RUNNING:300"], Completed),
            (NONE, &["hang-arc:STOP:RESUMING:1500"], Failed),
            (NONE, &["hang-arc:RESUMING:STOP:1500"], Failed),
            (NONE, &["hang-arc:RUNNING_P2P:RUNNING:1500"], NotStarted),
        ],
        &json!({}),
    );
}

#[test]
fn streams_and_reads() {
    sweep(
        &[
            (&["short-read:4096"], NONE, Completed),
            (&["wrong-size-estimate:1"], NONE, Completed),
            (&["wrong-size-estimate:1000"], NONE, Completed),
            // `die-in-read` ends its process, which is this one: see the tests with real processes.
            (&["enodev-mid-stream:4096"], NONE, Failed),
            (&["hold-dma:4"], NONE, Completed),
            (&["lose-raise:0:40"], NONE, Completed),
            (NONE, &["short-read:4096"], Completed),
        ],
        &json!({}),
    );
}

#[test]
fn faults_that_digests_find() {
    sweep(
        &[(&["ignore-dirty-log:1"], NONE, Failed), (&["corrupt-tail"], NONE, Completed)],
        &json!({"verify": true}),
    );
}

#[test]
fn a_cancel_at_either_side_is_one_at_both() {
    for at_source in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let options = json!({"pause-before-switchover": true});
        let told = migrate(dir.path(), NONE, NONE, &options, |source, destination| {
            wait_for("the switchover to wait", || {
                let migration = source.report().migration;
                migration.is_some_and(|info| info.status == MigrationStatus::PreSwitchover)
            });
            let side = if at_source { source } else { destination };
            side.client().call(ControlVerb::MigrateCancel, Value::Null).unwrap();
        });
        let case = if at_source { "cancelled at the source" } else { "cancelled at the destination" };
        let arrived = told.destination.report().last.unwrap();
        let ends = (told.printed.migration.status, arrived.status);
        assert_eq!(ends, (MigrationStatus::Cancelled, MigrationStatus::Cancelled), "{case}");
        // The operator of a receiver ends its wait with it.
        if at_source {
            told.check(case);
        }
    }
}
