//! A device whose answers are [awaited](crate::session::awaited): a pass-through that takes note of each request until it is
//! answered.

use std::error::Error;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vfio_migration_compat::DeviceManifest;
use vfio_migration_device::{
    Capabilities, CapabilitiesError, Chunk, Device, DeviceError, DirtyLog, PciError, Position,
    PrecopyProgress, QuestionLimit, ResumingSession, SavingSession, TransitionError, is_late,
};
use vfio_migration_memory::{Coverage, DirtySource, MemoryError};
use vfio_migration_types::{Bitmap, DeviceId, Granule, MigrationState, RamOffset};

use crate::machine::MigratableDevice;
use crate::session::awaited::{AwaitedAnswers, Request, Wait};
use crate::session::lock::lock;

/// A device, and where its requests are taken note of.
#[derive(Clone, Debug)]
pub(crate) struct TrackedDevice {
    requests: Requests,
    log: TrackedLog,
}

/// The same as `moved`, with its requests taken note of in `answers`.
pub(crate) fn tracked(moved: MigratableDevice, answers: &AwaitedAnswers) -> MigratableDevice {
    let MigratableDevice { device, pci } = moved;
    let at = Arc::new(Mutex::new(MigrationState::Running));
    let requests = Requests { device, answers: answers.clone(), at };
    let log = TrackedLog(requests.clone());
    MigratableDevice { device: Arc::new(TrackedDevice { requests, log }), pci }
}

/// Asks each device that can migrate a question, before the VMM asks them for its manifest: one that does not answer is named then.
pub(crate) fn all_answer(devices: &[MigratableDevice]) -> Result<(), DeviceError> {
    devices.iter().try_for_each(|moved| match moved.device.capabilities() {
        Ok(_) => moved.device.state().map(drop),
        Err(CapabilitiesError::NotMigratable(_)) => Ok(()),
        Err(CapabilitiesError::Device(error)) => Err(error),
    })
}

/// Asks something of the PCI function of `moved`, which the VMM asks of its device: its answer is waited for, and may be late.
pub(crate) fn ask_pci<T>(
    answers: &AwaitedAnswers,
    moved: &MigratableDevice,
    ask: impl FnOnce() -> Result<T, PciError>,
) -> Result<T, PciError> {
    let device = &moved.device;
    let wait = BoundedWait::new(answers, &**device, Request::PciState, false);
    let answer = ask();
    // A function may answer without its device, so that nothing follows from another answer.
    if answer.as_ref().is_err_and(|error| is_late(error)) {
        answers.is_late(&wait.wait, device.answer_limit(true));
    }
    answer
}

/// A wait for a device's answer, which ends by the limit that is told.
#[derive(Debug)]
pub(crate) struct BoundedWait {
    wait: Wait,
    _limit: Option<QuestionLimit>,
}

impl BoundedWait {
    fn new(answers: &AwaitedAnswers, device: &dyn Device, request: Request, transition: bool) -> Self {
        let limit = device.answer_limit(transition);
        let wait = answers.wait(Some(device.id()), request, limit);
        Self { wait, _limit: limit.and_then(|limit| device.limit_question(limit)) }
    }
}

#[derive(Clone, Debug)]
struct Requests {
    device: Arc<dyn Device>,
    answers: AwaitedAnswers,
    /// Where the last transition led, for the name of the next. A device begins a session in RUNNING.
    at: Arc<Mutex<MigrationState>>,
}

impl Requests {
    fn wait(&self, request: Request) -> BoundedWait {
        let transition = matches!(request, Request::Transition { .. } | Request::Reset);
        BoundedWait::new(&self.answers, &*self.device, request, transition)
    }

    /// Asks the device, which answers in its own words, or is late.
    fn ask<T, E: Error + 'static>(
        &self,
        request: Request,
        ask: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        let wait = self.wait(request);
        let answer = ask();
        match &answer {
            Err(error) if is_late(error) => self.answers.is_late(&wait.wait, self.device.answer_limit(true)),
            _ => self.answers.answered(self.device.id()),
        }
        answer
    }

    /// Takes the device to `to`.
    fn go<T>(
        &self,
        to: MigrationState,
        transition: impl FnOnce() -> Result<T, TransitionError>,
    ) -> Result<T, TransitionError> {
        let from = *lock(&self.at);
        let gone = self.ask(Request::Transition { from, to }, transition);
        match &gone {
            Ok(_) => *lock(&self.at) = to,
            Err(error) => {
                if let Some(now) = error.now {
                    *lock(&self.at) = now;
                }
            }
        }
        gone
    }

    fn reset(&self, reset: impl FnOnce() -> Result<(), DeviceError>) -> Result<(), DeviceError> {
        self.ask(Request::Reset, reset)?;
        *lock(&self.at) = MigrationState::Running;
        Ok(())
    }

    fn session<S>(&self, session: S) -> Tracked<S> {
        Tracked { session, requests: self.clone() }
    }
}

impl Device for TrackedDevice {
    fn id(&self) -> &DeviceId {
        self.requests.device.id()
    }

    fn manifest(&self) -> Result<DeviceManifest, DeviceError> {
        self.requests.ask(Request::Capabilities, || self.requests.device.manifest())
    }

    fn capabilities(&self) -> Result<Capabilities, CapabilitiesError> {
        let wait = self.requests.wait(Request::Capabilities);
        let capabilities = self.requests.device.capabilities();
        // What is known already was not asked.
        if capabilities.as_ref().is_err_and(|error| is_late(error)) {
            self.requests.answers.is_late(&wait.wait, self.requests.device.answer_limit(true));
        }
        capabilities
    }

    fn state(&self) -> Result<MigrationState, DeviceError> {
        let state = self.requests.ask(Request::State, || self.requests.device.state())?;
        *lock(&self.requests.at) = state;
        Ok(state)
    }

    fn set_state(&self, to: MigrationState) -> Result<(), TransitionError> {
        self.requests.go(to, || self.requests.device.set_state(to))
    }

    fn begin_precopy(&self) -> Result<Box<dyn SavingSession>, TransitionError> {
        let session = self.requests.go(MigrationState::PreCopy, || self.requests.device.begin_precopy())?;
        Ok(Box::new(self.requests.session(session)))
    }

    fn begin_stop_copy(&self) -> Result<Box<dyn SavingSession>, TransitionError> {
        let session =
            self.requests.go(MigrationState::StopCopy, || self.requests.device.begin_stop_copy())?;
        Ok(Box::new(self.requests.session(session)))
    }

    fn begin_resuming(&self) -> Result<Box<dyn ResumingSession>, TransitionError> {
        let session = self.requests.go(MigrationState::Resuming, || self.requests.device.begin_resuming())?;
        Ok(Box::new(self.requests.session(session)))
    }

    fn stop_copy_size(&self) -> Result<Option<u64>, DeviceError> {
        let wait = self.requests.wait(Request::Progress);
        let size = self.requests.device.stop_copy_size();
        // One that does not tell was not asked.
        if size.as_ref().is_err_and(|error| is_late(error)) {
            self.requests.answers.is_late(&wait.wait, self.requests.device.answer_limit(true));
        }
        size
    }

    fn dirty_log(&self) -> Option<&dyn DirtyLog> {
        self.requests.device.dirty_log().is_some().then_some(&self.log as &dyn DirtyLog)
    }

    fn reset(&self) -> Result<(), DeviceError> {
        self.requests.reset(|| self.requests.device.reset())
    }

    fn answer_limit(&self, transition: bool) -> Option<Duration> {
        self.requests.device.answer_limit(transition)
    }

    fn limit_question(&self, limit: Duration) -> Option<QuestionLimit> {
        self.requests.device.limit_question(limit)
    }
}

/// The log of a device that has one.
#[derive(Clone, Debug)]
struct TrackedLog(Requests);

impl TrackedLog {
    fn ask(&self, request: impl FnOnce(&dyn DirtyLog) -> Result<(), MemoryError>) -> Result<(), MemoryError> {
        let wait = self.0.wait(Request::DirtyLog);
        let answer = match self.0.device.dirty_log() {
            Some(log) => request(log),
            None => Err(MemoryError::NotLogging { source_name: self.name() }),
        };
        // A log may answer without its device, so that nothing follows from another answer.
        if answer.as_ref().is_err_and(|error| is_late(error)) {
            self.0.answers.is_late(&wait.wait, self.0.device.answer_limit(true));
        }
        answer
    }
}

impl DirtySource for TrackedLog {
    fn name(&self) -> String {
        let log = self.0.device.dirty_log();
        log.map_or_else(|| format!("device {}", self.0.device.id()), DirtySource::name)
    }

    fn coverage(&self) -> Coverage {
        match self.0.device.dirty_log() {
            Some(log) => log.coverage(),
            None => Coverage::Nothing("the device has no log".into()),
        }
    }

    fn start(&self) -> Result<(), MemoryError> {
        self.ask(|log| log.start())
    }

    fn report(&self, into: &mut Bitmap) -> Result<(), MemoryError> {
        self.ask(|log| log.report(into))
    }

    fn covers(&self, offset: RamOffset) -> bool {
        self.0.device.dirty_log().is_none_or(|log| log.covers(offset))
    }

    fn stop(&self) -> Result<(), MemoryError> {
        self.ask(|log| log.stop())
    }
}

impl DirtyLog for TrackedLog {
    fn granule(&self) -> Granule {
        self.0.device.dirty_log().map_or(Granule::PAGE, DirtyLog::granule)
    }
}

#[derive(Debug)]
struct Tracked<S> {
    session: S,
    requests: Requests,
}

impl SavingSession for Tracked<Box<dyn SavingSession>> {
    fn position(&self) -> Position {
        self.session.position()
    }

    fn read(&mut self, buf: &mut [u8]) -> Result<Chunk, DeviceError> {
        let Self { session, requests } = self;
        requests.ask(Request::Read, || session.read(buf))
    }

    fn progress(&mut self) -> Result<Option<PrecopyProgress>, DeviceError> {
        let wait = self.requests.wait(Request::Progress);
        let progress = self.session.progress();
        // One that has no estimates was not asked.
        if progress.as_ref().is_err_and(|error| is_late(error)) {
            self.requests.answers.is_late(&wait.wait, self.requests.device.answer_limit(true));
        }
        progress
    }

    fn go(&mut self, to: Position) -> Result<(), TransitionError> {
        let Self { session, requests } = self;
        requests.go(to.state(), || session.go(to))
    }

    fn end(self: Box<Self>) -> Result<MigrationState, TransitionError> {
        let Self { session, requests } = *self;
        requests.go(session.position().after(), || session.end())
    }
}

impl ResumingSession for Tracked<Box<dyn ResumingSession>> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), DeviceError> {
        let Self { session, requests } = self;
        requests.ask(Request::Write, || session.write(bytes))
    }

    fn finish(self: Box<Self>) -> Result<(), TransitionError> {
        let Self { session, requests } = *self;
        requests.go(MigrationState::Stop, || session.finish())
    }

    fn abort(self: Box<Self>) -> Result<(), DeviceError> {
        let Self { session, requests } = *self;
        requests.reset(|| session.abort())
    }
}
