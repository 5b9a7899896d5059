//! Two machines and a migration between them; what must hold after it, however it ended.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use vfio_migration::{
    Aborted, Arrived, Completed, Control, Destination, DestinationOptions, Failure, IncomingError,
    InjectedFault, Machine, MigrateError, Progress, Source, SourceOptions, inject,
};
use vfio_migration_compat::{Allow, Reason, Severity};
use vfio_migration_device::Device;
use vfio_migration_memory::{start_all, stop_all};
use vfio_migration_types::{MigrationState, Phase, error_chain};

use super::machine::Toy;
use super::program;
use crate::check::{Outcome, holds, same};
use crate::instance::Instance;
use crate::migdev::set;

/// Everything here runs in emulation, and most tests are about something else.
const DOWNTIME_LIMIT: Duration = Duration::from_secs(20);
/// A guard against a hang alone.
const PATIENCE: Duration = Duration::from_secs(5);

/// A guest at work, and a place to go.
#[derive(Debug)]
pub(crate) struct Pair {
    pub(crate) source: Arc<Toy>,
    pub(crate) destination: Arc<Toy>,
    // Removed after the machines have closed them.
    pub(crate) from: Vec<Instance>,
    pub(crate) to: Vec<Instance>,
    before: HeldResources,
    /// What of the source is broken on purpose.
    fault: Option<InjectedFault>,
}

/// How both sides ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) source: Result<Completed, MigrateError>,
    pub(crate) destination: Result<Arrived, IncomingError>,
}

/// What an aborted migration should have said.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    pub(crate) phase: Phase,
    pub(crate) device: Option<&'static str>,
    pub(crate) arc: Option<(MigrationState, MigrationState)>,
    pub(crate) errno: Option<Errno>,
    /// A part of what happened, and of what to do about it.
    pub(crate) text: &'static str,
    pub(crate) remedy: &'static str,
    /// Whether the source's device was reset on the way back.
    pub(crate) reset: bool,
}

/// What a test's source begins with.
pub(crate) fn options() -> SourceOptions {
    let mut options = SourceOptions::default();
    options.downtime_limit = DOWNTIME_LIMIT;
    // The toy drives its devices by their registers alone, and has no PCI functions to hand over with them.
    let code = "pci-left-behind".to_owned();
    options.policy.allow.push(Allow { code, ..Allow::default() });
    options
}

impl Pair {
    /// One device on each side, of `bytes` bytes of bulk state that changes; `settle` sets what they are to be like.
    pub(crate) fn new(settle: impl Fn(&Instance) -> Outcome) -> Outcome<Self> {
        Self::of(1, settle, Toy::new)
    }

    /// `count` devices on each side; `build` makes the machines.
    pub(crate) fn of(
        count: usize,
        settle: impl Fn(&Instance) -> Outcome,
        build: impl Fn(&[Instance]) -> Outcome<Arc<Toy>>,
    ) -> Outcome<Self> {
        Self::made(count, settle, &build, &build)
    }

    /// `count` devices on each side; each makes its machine in its own way.
    pub(crate) fn of_both(
        count: usize,
        here: impl FnOnce(&[Instance]) -> Outcome<Arc<Toy>>,
        there: impl FnOnce(&[Instance]) -> Outcome<Arc<Toy>>,
    ) -> Outcome<Self> {
        Self::made(count, |_| Ok(()), here, there)
    }

    fn made(
        count: usize,
        settle: impl Fn(&Instance) -> Outcome,
        here: impl FnOnce(&[Instance]) -> Outcome<Arc<Toy>>,
        there: impl FnOnce(&[Instance]) -> Outcome<Arc<Toy>>,
    ) -> Outcome<Self> {
        let instance = || {
            let instance = Instance::new("migdev", "migdev-0")?;
            set(&instance, "state_size", 16 * 4096)?;
            settle(&instance)?;
            Ok(instance)
        };
        let instances = || (0..count).map(|_| instance()).collect::<Outcome<Vec<_>>>();
        let pair = Self::between(instances()?, instances()?, here, there)?;
        pair.source.boot()?;
        Ok(pair)
    }

    /// Machines of these instances. Nothing runs yet.
    pub(crate) fn between(
        from: Vec<Instance>,
        to: Vec<Instance>,
        here: impl FnOnce(&[Instance]) -> Outcome<Arc<Toy>>,
        there: impl FnOnce(&[Instance]) -> Outcome<Arc<Toy>>,
    ) -> Outcome<Self> {
        let before = HeldResources::now()?;
        let (source, destination) = (here(&from)?, there(&to)?);
        Ok(Self { source, destination, from, to, before, fault: None })
    }

    /// The way back.
    pub(crate) fn turned(self) -> Self {
        let Self { source, destination, from, to, before, fault } = self;
        Self { source: destination, destination: source, from: to, to: from, before, fault }
    }

    /// The same pair, with a fault at the source.
    pub(crate) fn with_fault(self, fault: InjectedFault) -> Self {
        Self { fault: Some(fault), ..self }
    }

    /// Migrates from the one to the other.
    pub(crate) fn migrate(&self, options: SourceOptions) -> Outcome<Ended> {
        self.migrate_seen(options, |_, _| {})
    }

    /// The same, observed.
    pub(crate) fn migrate_seen(
        &self,
        options: SourceOptions,
        observe: impl FnMut(&Control, &Progress),
    ) -> Outcome<Ended> {
        let (here, there) = UnixStream::pair()?;
        self.migrate_between(here.into(), there.into(), options, observe)
    }

    /// The same, with a guest that goes on for a while after everything was sent once: its devices certainly write more.
    /// Also the bytes of RAM that had been sent until then.
    pub(crate) fn migrate_at_work(&self, mut options: SourceOptions) -> Outcome<(Ended, u64)> {
        options.pause_before_switchover = true;
        let mut worked = None;
        let ended = self.migrate_seen(options, |control, progress| {
            if progress.waiting && worked.is_none() {
                worked = Some((self.source.guest.goes_on().is_ok(), progress.bytes.ram));
                control.continue_switchover();
            }
        })?;
        match worked {
            Some((true, sent)) => Ok((ended, sent)),
            _ => Err(format!("the guest went on while it was migrated: {worked:?}, {ended:?}").into()),
        }
    }

    /// The same, over a wire that need not be whole.
    pub(crate) fn migrate_between(
        &self,
        here: OwnedFd,
        there: OwnedFd,
        options: SourceOptions,
        mut observe: impl FnMut(&Control, &Progress),
    ) -> Outcome<Ended> {
        std::thread::scope(|scope| {
            // One site, one policy.
            let mut incoming = DestinationOptions::default();
            incoming.policy = options.policy.clone();
            let arriving = scope.spawn(|| {
                let mut destination = Destination::over(there, incoming)?;
                destination.accept(|_| Ok(self.destination.clone() as Arc<dyn Machine>))
            });
            let machine: Arc<dyn Machine> = match &self.fault {
                Some(fault) => inject(self.source.clone(), fault.clone()),
                None => self.source.clone(),
            };
            let source = Source::new(machine, options);
            let control = source.control();
            let source = source.migrate_over(here, |progress| observe(&control, progress));
            let destination = arriving.join().map_err(|_| "the destination panicked")?;
            Ok(Ended { source, destination })
        })
    }

    /// The guest is at the destination, whole, and nothing of it runs here.
    pub(crate) fn moved(&self, ended: Ended) -> Outcome<Completed> {
        let completed = ended.source.map_err(|error| format!("the source: {}", error_chain(&error)))?;
        let arrived =
            ended.destination.map_err(|error| format!("the destination: {}", error_chain(&error)))?;
        holds(arrived.report.guest.runs() && completed.guest.runs(), "the guest runs")?;
        holds(!self.source.guest.runs(), "it does not run here")?;
        drop(arrived);
        for card in &self.destination.cards {
            same("the destination's device", card.state()?, MigrationState::Running)?;
        }
        for card in &self.source.cards {
            same("the source's device", card.state()?, MigrationState::Stop)?;
        }
        self.logs_are_off(&self.source)?;
        self.destination.guest.goes_on()?;
        Ok(completed)
    }

    /// Nothing came of it: both sides say why, the guest goes on at the source with devices that work, and nothing is
    /// left at the destination.
    pub(crate) fn aborted(&self, ended: Ended, wanted: Wanted) -> Outcome<Aborted> {
        let aborted = match ended.source {
            Err(MigrateError::Aborted(aborted)) => *aborted,
            other => return Err(format!("the source was not aborted: {other:?}").into()),
        };
        match ended.destination {
            Err(IncomingError::Aborted(failure)) => same("both sides say", &failure, &aborted.cause)?,
            other => return Err(format!("the destination was not aborted: {other:?}").into()),
        }
        told(&aborted.cause, wanted)?;
        holds(aborted.restored && !aborted.cancelled, &format!("restored: {aborted:?}"))?;
        let reset: Vec<&str> = aborted.reset.iter().map(|id| id.as_str()).collect();
        same("devices that were reset", reset, if wanted.reset { vec!["card0"] } else { vec![] })?;
        self.goes_on_here()?;
        Ok(aborted)
    }

    /// The guest runs here as if nothing had been, and the destination holds nothing.
    pub(crate) fn goes_on_here(&self) -> Outcome {
        holds(self.source.guest.runs(), "the guest runs here")?;
        holds(!self.destination.guest.runs(), "it does not run there")?;
        for card in self.source.cards.iter().chain(&self.destination.cards) {
            same("a device", card.state()?, MigrationState::Running)?;
        }
        self.logs_are_off(&self.source)?;
        same("who holds the machines", Arc::strong_count(&self.source), 1)?;
        same("who holds the machines", Arc::strong_count(&self.destination), 1)?;
        self.source.guest.goes_on()?;
        self.destination
            .cards
            .iter()
            .filter(|card| card.driver() == Some("migdev"))
            .try_for_each(program::is_empty)
    }

    /// A log that still ran would refuse to be started.
    fn logs_are_off(&self, machine: &Toy) -> Outcome {
        let logs = machine.logs();
        start_all(&logs)?;
        Ok(stop_all(&logs)?)
    }

    /// Lets everything go, and looks whether everything went: descriptors, threads, and the devices can be opened.
    pub(crate) fn close(self) -> Outcome {
        self.close_within(PATIENCE)
    }

    /// The same, with less patience.
    pub(crate) fn close_within(self, patience: Duration) -> Outcome {
        let Self { source, destination, from, to, before, .. } = self;
        drop((source, destination));
        before.comes_back(patience)?;
        drop((Toy::new(&from)?, Toy::new(&to)?));
        before.comes_back(patience)
    }
}

/// In which phase an attempt was aborted.
pub(crate) fn phase_of(ended: &Ended) -> Outcome<Phase> {
    match &ended.source {
        Err(MigrateError::Aborted(aborted)) => Ok(aborted.cause.phase),
        other => Err(format!("the source was not aborted: {other:?}").into()),
    }
}

/// Fails unless `failure` says what it should.
pub(crate) fn told(failure: &Failure, wanted: Wanted) -> Outcome {
    let errno = wanted.errno.map(|errno| errno.raw_os_error()).and_then(|errno| u32::try_from(errno).ok());
    let found = (failure.phase, failure.device.as_deref(), failure.arc, failure.errno);
    let all = (wanted.phase, wanted.device, wanted.arc, errno);
    same(&format!("phase, device, arc and errno of '{failure}'"), found, all)?;
    holds(failure.text.contains(wanted.text), &format!("'{}' contains '{}'", failure.text, wanted.text))?;
    holds(
        failure.remedy.contains(wanted.remedy),
        &format!("the remedy '{}' contains '{}'", failure.remedy, wanted.remedy),
    )
}

/// The one reason for which nothing began, at neither side.
pub(crate) fn refused(ended: Ended) -> Outcome<Reason> {
    let reasons = match ended.source {
        Err(MigrateError::Refused(reasons)) => reasons,
        other => return Err(format!("it was not refused: {other:?}").into()),
    };
    holds(matches!(ended.destination, Err(IncomingError::NotBegun(_))), "nothing came in")?;
    let mut against: Vec<_> =
        reasons.into_iter().filter(|reason| reason.severity > Severity::Warning).collect();
    match (against.pop(), against.is_empty()) {
        (Some(reason), true) => Ok(reason),
        (reason, _) => Err(format!("not one reason: {reason:?} {against:?}").into()),
    }
}

/// What the process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct HeldResources {
    descriptors: usize,
    threads: usize,
}

impl HeldResources {
    fn now() -> Outcome<Self> {
        let count = |path| -> Outcome<usize> { Ok(fs::read_dir(path)?.count()) };
        Ok(Self { descriptors: count("/proc/self/fd")?, threads: count("/proc/self/task")? })
    }

    /// A thread that was joined may stay in the process's list for a moment.
    fn comes_back(self, patience: Duration) -> Outcome {
        let began = Instant::now();
        while Self::now()? != self && began.elapsed() < patience {
            std::thread::yield_now();
        }
        same("descriptors and threads", Self::now()?, self)
    }
}
