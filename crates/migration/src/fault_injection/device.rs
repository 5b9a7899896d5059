//! A device with a faulty dirty log, with the wrong order of stopping, or that watches pages arrive.

use std::fmt;
use std::io::Read as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vfio_migration_compat::DeviceManifest;
use vfio_migration_device::{
    Capabilities, CapabilitiesError, Chunk, Device, DeviceError, DirtyLog, Position, PrecopyProgress,
    QuestionLimit, ResumingSession, SavingSession, TransitionError,
};
use vfio_migration_memory::{Coverage, DirtySource, MemoryError};
use vfio_migration_types::{Bitmap, DeviceId, Granule, MigrationState, RamOffset};

use crate::fault_injection::dirty::HiddenPages;
use crate::fault_injection::stale::StalePages;
use crate::session::lock::lock;

/// Bytes read at once of a device that is read to its end.
const CHUNK: usize = 64 << 10;

/// Held while a device is stopped and read to its end: the next one still runs.
#[derive(Debug, Default)]
pub(super) struct OneByOne(Mutex<()>);

/// A device that is another one, but for what is broken.
pub(super) struct FaultyDevice {
    device: Arc<dyn Device>,
    log: Option<HidingLog>,
    one_by_one: Option<Arc<OneByOne>>,
    stale: Option<Arc<StalePages>>,
}

impl FaultyDevice {
    pub(super) fn new(
        device: Arc<dyn Device>,
        hidden: Option<HiddenPages>,
        one_by_one: Option<Arc<OneByOne>>,
        stale: Option<Arc<StalePages>>,
    ) -> Self {
        let log = hidden.filter(|_| device.dirty_log().is_some());
        let log = log.map(|hidden| HidingLog { device: Arc::clone(&device), hidden });
        Self { device, log, one_by_one, stale }
    }

    fn saving(&self, session: Box<dyn SavingSession>) -> Box<dyn SavingSession> {
        match &self.one_by_one {
            Some(one_by_one) => {
                Box::new(OneByOneSession { session, one_by_one: one_by_one.clone(), drained: None })
            }
            None => session,
        }
    }
}

impl fmt::Debug for FaultyDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultyDevice").field("device", &self.device).finish_non_exhaustive()
    }
}

impl Device for FaultyDevice {
    fn id(&self) -> &DeviceId {
        self.device.id()
    }

    fn manifest(&self) -> Result<DeviceManifest, DeviceError> {
        self.device.manifest()
    }

    fn capabilities(&self) -> Result<Capabilities, CapabilitiesError> {
        self.device.capabilities()
    }

    fn state(&self) -> Result<MigrationState, DeviceError> {
        self.device.state()
    }

    fn set_state(&self, to: MigrationState) -> Result<(), TransitionError> {
        // On the way to a stop, RUNNING_P2P is left out too.
        if self.one_by_one.is_some() && to == MigrationState::RunningP2p {
            return Ok(());
        }
        self.device.set_state(to)
    }

    fn begin_precopy(&self) -> Result<Box<dyn SavingSession>, TransitionError> {
        self.device.begin_precopy().map(|session| self.saving(session))
    }

    fn begin_stop_copy(&self) -> Result<Box<dyn SavingSession>, TransitionError> {
        self.device.begin_stop_copy()
    }

    fn begin_resuming(&self) -> Result<Box<dyn ResumingSession>, TransitionError> {
        let session = self.device.begin_resuming()?;
        Ok(match &self.stale {
            Some(stale) => Box::new(WatchingSession { session, stale: stale.clone() }),
            None => session,
        })
    }

    fn stop_copy_size(&self) -> Result<Option<u64>, DeviceError> {
        self.device.stop_copy_size()
    }

    fn dirty_log(&self) -> Option<&dyn DirtyLog> {
        match &self.log {
            Some(log) => Some(log),
            None => self.device.dirty_log(),
        }
    }

    fn reset(&self) -> Result<(), DeviceError> {
        self.device.reset()
    }

    fn answer_limit(&self, transition: bool) -> Option<Duration> {
        self.device.answer_limit(transition)
    }

    fn limit_question(&self, limit: Duration) -> Option<QuestionLimit> {
        self.device.limit_question(limit)
    }
}

/// A device's dirty log that hides pages.
struct HidingLog {
    device: Arc<dyn Device>,
    hidden: HiddenPages,
}

impl HidingLog {
    fn log(&self) -> Result<&dyn DirtyLog, MemoryError> {
        let name = || self.device.id().to_string();
        self.device.dirty_log().ok_or_else(|| MemoryError::NotLogging { source_name: name() })
    }
}

impl fmt::Debug for HidingLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HidingLog").field("device", &self.device).finish_non_exhaustive()
    }
}

impl DirtySource for HidingLog {
    fn name(&self) -> String {
        self.log().map_or_else(|_| self.device.id().to_string(), |log| log.name())
    }

    fn coverage(&self) -> Coverage {
        match self.log() {
            Ok(log) => log.coverage(),
            Err(error) => Coverage::Nothing(error.to_string()),
        }
    }

    fn start(&self) -> Result<(), MemoryError> {
        self.log()?.start()
    }

    fn report(&self, into: &mut Bitmap) -> Result<(), MemoryError> {
        let log = self.log()?;
        self.hidden.report(into, |found| log.report(found))
    }

    fn covers(&self, offset: RamOffset) -> bool {
        self.log().is_ok_and(|log| log.covers(offset))
    }

    fn stop(&self) -> Result<(), MemoryError> {
        self.log()?.stop()
    }
}

impl DirtyLog for HidingLog {
    fn granule(&self) -> Granule {
        self.log().map_or(Granule::PAGE, |log| log.granule())
    }
}

/// A saving session that knows no P2P barrier: it is stopped and read to its end while others still run.
#[derive(Debug)]
struct OneByOneSession {
    session: Box<dyn SavingSession>,
    one_by_one: Arc<OneByOne>,
    /// The state that was read when it was stopped.
    drained: Option<std::io::Cursor<Vec<u8>>>,
}

impl SavingSession for OneByOneSession {
    fn position(&self) -> Position {
        self.session.position()
    }

    fn read(&mut self, buf: &mut [u8]) -> Result<Chunk, DeviceError> {
        let Some(drained) = &mut self.drained else { return self.session.read(buf) };
        // Reading from memory does not fail.
        Ok(match drained.read(buf).unwrap_or(0) {
            0 => Chunk::End,
            read => Chunk::Data(read),
        })
    }

    fn progress(&mut self) -> Result<Option<PrecopyProgress>, DeviceError> {
        self.session.progress()
    }

    fn go(&mut self, to: Position) -> Result<(), TransitionError> {
        match to {
            Position::PreCopyP2p => Ok(()),
            Position::PreCopy => self.session.go(to),
            Position::StopCopy => {
                let _alone = lock(&self.one_by_one.0);
                self.session.go(to)?;
                let (mut all, mut chunk) = (Vec::new(), vec![0; CHUNK]);
                // A state that cannot be read now cannot be read later either, where that is reported.
                while let Ok(Chunk::Data(read)) = self.session.read(&mut chunk) {
                    all.extend_from_slice(chunk.get(..read).unwrap_or_default());
                }
                self.drained = Some(std::io::Cursor::new(all));
                Ok(())
            }
        }
    }

    fn end(self: Box<Self>) -> Result<MigrationState, TransitionError> {
        self.session.end()
    }
}

/// A resuming session that has pages remembered whenever some of its state arrives.
#[derive(Debug)]
struct WatchingSession {
    session: Box<dyn ResumingSession>,
    stale: Arc<StalePages>,
}

impl ResumingSession for WatchingSession {
    fn write(&mut self, bytes: &[u8]) -> Result<(), DeviceError> {
        self.stale.remember();
        self.session.write(bytes)
    }

    fn finish(self: Box<Self>) -> Result<(), TransitionError> {
        self.session.finish()
    }

    fn abort(self: Box<Self>) -> Result<(), DeviceError> {
        self.session.abort()
    }
}
