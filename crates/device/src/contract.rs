//! The traits a back end implements.

use std::fmt;
use std::time::Duration;

use vfio_migration_compat::DeviceManifest;
use vfio_migration_memory::DirtySource;
use vfio_migration_types::{DeviceId, MigrationFlags, MigrationState};
use vfio_user_peer::QuestionLimit;

use crate::error::{DeviceError, TransitionError};

/// Abilities of a device in a migration. Absent ones are coped with, and reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// STOP_COPY always; P2P and PRE_COPY where true.
    pub flags: MigrationFlags,
    /// [`SavingSession::progress`] answers: the device estimates what is left in pre-copy.
    pub precopy_info: bool,
    /// [`Device::stop_copy_size`] answers: the device estimates its STOP_COPY data.
    pub data_size: bool,
    /// [`Device::dirty_log`] answers. Counts as present only after a START, REPORT, STOP trial succeeded.
    pub dirty_log: bool,
    /// Largest piece that is worth reading or writing at once, in bytes. Small over a vfio-user socket, which MMIO shares.
    pub chunk: usize,
}

/// The reason why a device cannot be migrated, in a sentence for its operator that leaves the device's name to whoever shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotMigratable(pub String);

/// A device did not say what it can do in a migration.
#[derive(Debug, thiserror::Error)]
pub enum CapabilitiesError {
    /// It can do nothing: it has said so.
    #[error("it cannot migrate: {}", .0.0)]
    NotMigratable(NotMigratable),
    /// It has not answered, which says nothing of it: asked again, it may.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl From<NotMigratable> for CapabilitiesError {
    fn from(why: NotMigratable) -> Self {
        Self::NotMigratable(why)
    }
}

/// A device that may migrate.
///
/// Methods block for as long as the device takes, under a time limit of the back end; they may be called from any
/// thread, at most one at a time for one device except where said otherwise.
pub trait Device: fmt::Debug + Send + Sync {
    /// Name of the device.
    fn id(&self) -> &DeviceId;

    /// The device's manifest, from what it declares of itself. A device that cannot migrate has one too, which says so.
    fn manifest(&self) -> Result<DeviceManifest, DeviceError>;

    /// The device's abilities in a migration, or the reason why it has none, which is the device's own word.
    ///
    /// # Errors
    /// Also that the device has not answered ([`CapabilitiesError::Device`]): no verdict, and it is asked anew each time.
    fn capabilities(&self) -> Result<Capabilities, CapabilitiesError>;

    /// The state it is really in (a GET).
    fn state(&self) -> Result<MigrationState, DeviceError>;

    /// Moves it to `to`, one of RUNNING, RUNNING_P2P or STOP, outside of any session.
    /// A move to the state it is in succeeds.
    fn set_state(&self, to: MigrationState) -> Result<(), TransitionError>;

    /// Opens a saving session at RUNNING → PRE_COPY (or RUNNING_P2P → PRE_COPY_P2P).
    ///
    /// # Errors
    /// The device lacks PRE_COPY, or the transition failed.
    fn begin_precopy(&self) -> Result<Box<dyn SavingSession>, TransitionError>;

    /// Opens a saving session at STOP → STOP_COPY. For a device without PRE_COPY, after it was stopped.
    fn begin_stop_copy(&self) -> Result<Box<dyn SavingSession>, TransitionError>;

    /// Opens a resuming session, from whatever state the device is in.
    fn begin_resuming(&self) -> Result<Box<dyn ResumingSession>, TransitionError>;

    /// Estimated bytes of STOP_COPY data, in any state: a hint, never a length. `None` when the device cannot say.
    fn stop_copy_size(&self) -> Result<Option<u64>, DeviceError>;

    /// The device's log of DMA writes; `None` when it has said that it has none. May be used while a session is open.
    fn dirty_log(&self) -> Option<&dyn DirtyLog>;

    /// Resets it: every session dies, the state becomes RUNNING, with nothing enabled.
    ///
    /// # Errors
    /// The device is of no further use, and is never said to have been aborted cleanly.
    fn reset(&self) -> Result<(), DeviceError>;

    /// Longest time that the back end waits for the device's answer: to a change of its migration state or a reset
    /// (`transition`), or to anything else. `None`: until it comes, as for a kernel driver.
    fn answer_limit(&self, transition: bool) -> Option<Duration> {
        let _ = transition;
        None
    }

    /// Gives all that the calling thread asks of it, by whichever trait, until what is returned is dropped, `limit` together, with the
    /// time for which others' requests to it are waited for. `None` where the back end waits until the answer comes.
    fn limit_question(&self, limit: Duration) -> Option<QuestionLimit> {
        let _ = limit;
        None
    }
}

/// A device's DMA log is a dirty source that also knows its granule.
pub trait DirtyLog: DirtySource {
    /// Bytes per bit that the device logs in, once started.
    fn granule(&self) -> vfio_migration_types::Granule;
}

/// The outcome of a read of device state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// Number of bytes in the buffer, at least one.
    Data(usize),
    /// Nothing for now; more may come. In pre-copy alone (the kernel's ENOMSG, and 0, which several drivers give).
    NothingNow,
    /// The end of the STOP_COPY data.
    End,
}

/// Pre-copy estimates, in bytes (`struct vfio_precopy_info`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrecopyProgress {
    /// Left of the initial data. Only at zero, loaded and acknowledged, is a switchover cheap.
    pub initial_bytes: u64,
    /// Changed since it was read, beyond the initial data.
    pub dirty_bytes: u64,
    /// `VFIO_PRECOPY_INFO_REINIT`: the initial data began anew; what was acknowledged before is void.
    pub reinit: bool,
}

/// The state that a saving session's device is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Position {
    /// PRE_COPY: the device runs.
    PreCopy,
    /// PRE_COPY_P2P: it starts no new peer-to-peer DMA.
    PreCopyP2p,
    /// STOP_COPY: the device is stopped.
    StopCopy,
}

impl Position {
    /// The migration state of a device with a session in this position.
    #[must_use]
    pub const fn state(self) -> MigrationState {
        match self {
            Self::PreCopy => MigrationState::PreCopy,
            Self::PreCopyP2p => MigrationState::PreCopyP2p,
            Self::StopCopy => MigrationState::StopCopy,
        }
    }

    /// The position of a session of a device in this state; `None` where it can have none.
    #[must_use]
    pub const fn of(state: MigrationState) -> Option<Self> {
        match state {
            MigrationState::PreCopy => Some(Self::PreCopy),
            MigrationState::PreCopyP2p => Some(Self::PreCopyP2p),
            MigrationState::StopCopy => Some(Self::StopCopy),
            _ => None,
        }
    }

    /// The state that a session is left for from there.
    #[must_use]
    pub const fn after(self) -> MigrationState {
        match self {
            Self::PreCopy => MigrationState::Running,
            Self::PreCopyP2p => MigrationState::RunningP2p,
            Self::StopCopy => MigrationState::Stop,
        }
    }
}

/// An open saving session. Dropping one leaves it (STOP_COPY → STOP, or PRE_COPY → RUNNING), with what fails logged.
pub trait SavingSession: fmt::Debug + Send {
    /// The session's position, as of its last arc.
    fn position(&self) -> Position;

    /// Reads the next device bytes into `buf`.
    ///
    /// # Errors
    /// The stream is lost; the session can only be ended.
    fn read(&mut self, buf: &mut [u8]) -> Result<Chunk, DeviceError>;

    /// Pre-copy estimates; asking is also what makes some drivers produce the next piece. `None` where the device
    /// cannot say, and in STOP_COPY.
    fn progress(&mut self) -> Result<Option<PrecopyProgress>, DeviceError>;

    /// Moves inside the session: PRE_COPY ↔ PRE_COPY_P2P, either → STOP_COPY. A device without P2P refuses
    /// [`Position::PreCopyP2p`].
    fn go(&mut self, to: Position) -> Result<(), TransitionError>;

    /// Ends the session. From STOP_COPY the device is left in STOP; from pre-copy it is left running
    /// (RUNNING, or RUNNING_P2P).
    fn end(self: Box<Self>) -> Result<MigrationState, TransitionError>;
}

/// An open resuming session. Dropping one without [`finish`](Self::finish) resets the device, and waits for that.
pub trait ResumingSession: fmt::Debug + Send {
    /// Writes all of `bytes`, in order, as they were read from the saving side.
    ///
    /// # Errors
    /// Also the driver's own verdict that the state does not fit: the session can only be aborted.
    fn write(&mut self, bytes: &[u8]) -> Result<(), DeviceError>;

    /// RESUMING → STOP: the driver's last word on the state. The caller has made sure that the stream was complete;
    /// several drivers accept a truncated one.
    ///
    /// # Errors
    /// The device is where the error says, and is not [reset](Device::reset) yet: that is the caller's to do, who knows of the failure
    /// before it waits for another answer.
    fn finish(self: Box<Self>) -> Result<(), TransitionError>;

    /// Gives the session up: resets the device.
    fn abort(self: Box<Self>) -> Result<(), DeviceError>;
}
