//! Two `vm`s with a device each, and a migration between them.

use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use clap::Parser;
use serde_json::{Value, json};
use vfio_migration::{VmOwnership, ownership_at};
use vfio_migration_sim::{Fault, Options, SampleBackend, SampleDevice, serve};
use vfio_migration_types::VmId;
use vfio_user_peer::{Server, StopHandle};

use super::super::{Started, ending, start};
use crate::args::{Cli, CliVerb};
use crate::control::client::ControlClient;
use crate::control::protocol::{
    ControlVerb, FollowedReport, MigrationInfo, MigrationStatus, StatusReport, VmStatus,
};
use crate::exit::CliError;
use crate::follow::{OnInterrupt, follow};
use crate::interrupt::UserInterrupt;
use crate::verbs::tls::make::throw_away;

pub(super) const UUID: &str = "0d5c8a92-7c1e-4b0b-9a55-0f2f6f6f0003";
/// What a device has for a transition where none is to be late.
pub(super) const PATIENT: &str = "20s";
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
        let dies = options.faults.iter().any(|fault| matches!(fault, Fault::DieInRead(_)));
        // A fault may end it, which is the fault's affair.
        let thread = std::thread::spawn(move || match dies {
            true => die_alone(&path, options, &stopped),
            false => drop(serve(path, options, &stopped)),
        });
        wait_for("the device's socket", || socket.exists());
        Self { stop, thread: Some(thread) }
    }
}

/// Serves a device whose death, which would be its process's, is its thread's: its connection ends without an answer.
fn die_alone(path: &Path, options: Options, stop: &StopHandle) {
    let server = Server::bind(path).unwrap();
    let device = Arc::new(SampleDevice::new(options).unwrap());
    let backend = SampleBackend::with_death(device, || std::panic::resume_unwind(Box::new("its death")));
    drop(server.serve(&backend, stop));
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
    pub(super) started: Started,
    control: PathBuf,
    pub(super) state: PathBuf,
    _device: Served,
}

impl Side {
    pub(super) fn start(dir: &Path, name: &str, faults: &[&str], timeout: &str, more: &[&str]) -> Self {
        Self::try_start(dir, name, faults, timeout, more).unwrap()
    }

    pub(super) fn try_start(
        dir: &Path,
        name: &str,
        faults: &[&str],
        timeout: &str,
        more: &[&str],
    ) -> Result<Self, CliError> {
        let path = |what: &str| dir.join(format!("{name}.{what}"));
        let faults: Vec<Fault> = faults.iter().map(|text| text.parse().unwrap()).collect();
        let options =
            Options { state_size: 256 << 10, state_dirty_rate: 64 << 10, faults, ..Options::default() };
        let socket = path("device");
        let device = Served::start(&socket, options);
        let (control, state) = (path("control"), path("state"));
        let word = format!("vfio-user:{},id=dev0,timeout={timeout}", socket.display());
        let (control_word, state_word) = (control.display().to_string(), state.display().to_string());
        let words = ["vfio-migrate", "vm", "--software", "--memory", "32M", "--dirty-rate", "1M", "--uuid"];
        let words = [&words[..], &[UUID, "--device", &word, "--control", &control_word], more];
        let certificates = dir.join("certificates");
        if !certificates.exists() {
            throw_away(&certificates, &["host"]).unwrap();
        }
        let creds = certificates.join("host").display().to_string();
        let words = [&words.concat()[..], &["--state-dir", &state_word, "--tls-creds", &creds]].concat();
        let CliVerb::Vm(options) = Cli::try_parse_from(words).unwrap().verb else { panic!() };
        let (quit, _) = mpsc::channel();
        let started = start(&options, &UserInterrupt::default(), quit)?;
        Ok(Self { started, control, state, _device: device })
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

    /// Whether vCPUs run, by the guest's own count. One that asks a device that does not answer goes round seldom.
    pub(super) fn progresses(&self) -> bool {
        let before = self.loops();
        let begun = Instant::now();
        // Each access of its device waits ten seconds for one that never answers.
        while begun.elapsed() < Duration::from_secs(120) {
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

    pub(super) fn owner(&self) -> VmOwnership {
        let vm: VmId = UUID.parse().unwrap();
        ownership_at(&self.state, vm).unwrap()
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        ending::end(&self.started.vm, "the end of the test");
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
    pub(super) event: MigrationInfo,
}

/// Migrates between a device with these faults at the source and one with those at the destination, and does something
/// `meanwhile`. Both sides have ended it when this returns, the destination if it had heard of it.
pub(super) fn migrate(
    dir: &Path,
    here: &[&str],
    there: &[&str],
    options: &Value,
    meanwhile: impl FnOnce(&Side, &Side),
) -> Told {
    let (source, destination) = pair(dir, here, there, PATIENT);
    migrate_between(source, destination, options, meanwhile)
}

/// A guest that works, and a receiver, with these faults of their devices, which have so long for a transition.
pub(super) fn pair(dir: &Path, here: &[&str], there: &[&str], timeout: &str) -> (Side, Side) {
    let source = Side::start(dir, "source", here, timeout, &[]);
    let destination = Side::start(dir, "destination", there, timeout, &["--incoming", "tcp:127.0.0.1:0"]);
    wait_for("the guest's work", || source.loops() > 20);
    (source, destination)
}

/// Migrates between these two, and does something `meanwhile`.
pub(super) fn migrate_between(
    source: Side,
    destination: Side,
    options: &Value,
    meanwhile: impl FnOnce(&Side, &Side),
) -> Told {
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
    let planned = printed.migration.phase.as_deref() == Some("P0");
    wait_for("the destination's end", || {
        let report = destination.report();
        report.migration.is_none() && (planned || report.last.is_some())
    });
    Told { source, destination, printed, event }
}
