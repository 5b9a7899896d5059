//! Saving and resuming sessions on a kernel device: a data descriptor, and a state machine that a guest's reset may
//! move under it.

use std::sync::Arc;

use rustix::io::Errno;
use vfio_migration_types::MigrationState;

use super::error::KernelError;
use super::machine::Machine;
use super::port::Stream;
use crate::{DeviceError, Position, PrecopyProgress, Read, ResumingSession, SavingSession, TransitionError};

/// Opens a saving session at RUNNING → PRE_COPY, or RUNNING_P2P → PRE_COPY_P2P.
pub(super) fn begin_precopy(machine: &Arc<Machine>) -> Result<Saving, TransitionError> {
    let from = machine.state_before(MigrationState::PreCopy)?;
    let position = match from {
        MigrationState::RunningP2p => Position::PreCopyP2p,
        _ => Position::PreCopy,
    };
    Saving::open(machine, from, position)
}

/// Opens a saving session at STOP → STOP_COPY.
pub(super) fn begin_stop_copy(machine: &Arc<Machine>) -> Result<Saving, TransitionError> {
    let from = machine.state_before(MigrationState::StopCopy)?;
    Saving::open(machine, from, Position::StopCopy)
}

/// Opens a resuming session, from whatever state the device is in.
pub(super) fn begin_resuming(machine: &Arc<Machine>) -> Result<Resuming, TransitionError> {
    let mut from = machine.state_before(MigrationState::Resuming)?;
    if from == MigrationState::Resuming {
        // Somebody's session that was not finished: its descriptor cannot be had again, and the way out is a reset.
        machine.reset().map_err(|error| {
            let now = machine.state().ok();
            TransitionError::new(machine.id.clone(), from, MigrationState::Resuming, now, error.errno, error)
        })?;
        from = machine.state_before(MigrationState::Resuming)?;
    }
    let stream = machine.open(from, MigrationState::Resuming)?;
    Ok(Resuming { machine: machine.clone(), stream, open: true })
}

/// An open saving session.
#[derive(Debug)]
pub(super) struct Saving {
    machine: Arc<Machine>,
    stream: Box<dyn Stream>,
    position: Position,
    open: bool,
}

impl Saving {
    fn open(machine: &Arc<Machine>, from: MigrationState, at: Position) -> Result<Self, TransitionError> {
        if from.is_saving() || from == MigrationState::Resuming {
            return Err(machine.refused(from, at.state(), KernelError::SessionOpen));
        }
        let stream = machine.open(from, at.state())?;
        Ok(Self { machine: machine.clone(), stream, position: at, open: true })
    }

    fn leave(&mut self) -> Result<MigrationState, TransitionError> {
        self.open = false;
        let to = self.position.after();
        // Where it really is, which need not be where the session left it: a reset may have come in between.
        let now = self.machine.state_before(to)?;
        if now != self.position.state() {
            tracing::warn!(device = %self.machine.id, %now, "the device was reset under its saving session");
        }
        self.machine.go(now, to)?;
        Ok(to)
    }

    /// The session's state if the device is still in it. Several drivers answer a read of a session that a guest's
    /// reset has ended with something else than ENODEV, so the state is asked.
    fn check(&self, doing: &str) -> Result<(), DeviceError> {
        let now = self.machine.state().map_err(|error| self.machine.failed(doing, error))?;
        if now == self.position.state() {
            return Ok(());
        }
        let lost = KernelError::SessionLost(now);
        Err(DeviceError::new(self.machine.id.clone(), doing, Some(Errno::NODEV), lost))
    }

    /// What `errno` of the stream means: a lost session if the device says so or the descriptor is dead.
    fn failed(&self, doing: &str, errno: Errno) -> DeviceError {
        match self.check(doing) {
            Err(lost) => lost,
            Ok(()) if errno == Errno::NODEV => {
                let lost = KernelError::SessionLost(self.position.state());
                DeviceError::new(self.machine.id.clone(), doing, Some(errno), lost)
            }
            Ok(()) => DeviceError::new(self.machine.id.clone(), doing, Some(errno), errno),
        }
    }
}

impl SavingSession for Saving {
    fn position(&self) -> Position {
        self.position
    }

    fn read(&mut self, buf: &mut [u8]) -> Result<Read, DeviceError> {
        const DOING: &str = "reading its state";
        if buf.is_empty() {
            // read(2) would answer 0, which means the end.
            return Err(DeviceError::new(self.machine.id.clone(), DOING, None, KernelError::EmptyBuffer));
        }
        let stopped = self.position == Position::StopCopy;
        match retry(|| self.stream.read(buf)) {
            Ok(0) if stopped => self.check(DOING).map(|()| Read::End),
            // ENOMSG by the uAPI; 0, which looks like an end, from mtty, hisi_acc and qat.
            Ok(0) | Err(Errno::NOMSG) if !stopped => self.check(DOING).map(|()| Read::NothingNow),
            Ok(n) => Ok(Read::Data(n)),
            // ENOMSG in STOP_COPY too: a driver's error, and the stream is lost.
            Err(errno) => Err(self.failed(DOING, errno)),
        }
    }

    fn progress(&mut self) -> Result<Option<PrecopyProgress>, DeviceError> {
        const DOING: &str = "asking for pre-copy progress";
        if self.position == Position::StopCopy {
            return Ok(None);
        }
        match self.stream.precopy_info() {
            Ok(info) => Ok(Some(PrecopyProgress {
                initial_bytes: info.initial_bytes,
                dirty_bytes: info.dirty_bytes,
                // Without the opt-in the kernel echoes whatever was in the flags.
                reinit: info.reinit && self.machine.reinit,
            })),
            Err(error) => match error.errno() {
                Some(errno) => Err(self.failed(DOING, errno)),
                None => Err(self.machine.failed(DOING, error)),
            },
        }
    }

    fn go(&mut self, to: Position) -> Result<(), TransitionError> {
        let now = self.machine.state_before(to.state())?;
        // A SET would open a second session, whose data is no sequel to what was read.
        if now != self.position.state() {
            return Err(self.machine.refused(now, to.state(), KernelError::SessionLost(now)));
        }
        match self.machine.go(now, to.state()) {
            // Inside the saving group the kernel gives no new descriptor: the old one goes on.
            Ok(None) => {
                self.position = to;
                Ok(())
            }
            Ok(Some(_second)) => {
                let now = self.machine.state().ok();
                if let Some(position) = now.and_then(Position::of) {
                    self.position = position;
                }
                let (id, from) = (self.machine.id.clone(), self.position.state());
                Err(TransitionError::new(id, from, to.state(), now, None, KernelError::SecondStream))
            }
            Err(error) => {
                if let Some(position) = error.now.and_then(Position::of) {
                    self.position = position;
                }
                Err(error)
            }
        }
    }

    fn end(mut self: Box<Self>) -> Result<MigrationState, TransitionError> {
        self.leave()
    }
}

impl Drop for Saving {
    fn drop(&mut self) {
        if self.open
            && let Err(error) = self.leave()
        {
            tracing::warn!(%error, "a saving session was dropped and could not be left");
        }
    }
}

/// An open resuming session.
#[derive(Debug)]
pub(super) struct Resuming {
    machine: Arc<Machine>,
    stream: Box<dyn Stream>,
    open: bool,
}

impl ResumingSession for Resuming {
    fn write(&mut self, bytes: &[u8]) -> Result<(), DeviceError> {
        const DOING: &str = "writing its state";
        let mut left = bytes;
        while !left.is_empty() {
            let errno = match retry(|| self.stream.write(left)) {
                Ok(n) if n > 0 && n <= left.len() => {
                    left = &left[n..];
                    continue;
                }
                Ok(n) => {
                    let why = KernelError::OddWrite { taken: n, offered: left.len() };
                    return Err(DeviceError::new(self.machine.id.clone(), DOING, None, why));
                }
                Err(errno) => errno,
            };
            return Err(match self.machine.state() {
                Ok(now) if now != MigrationState::Resuming => {
                    let lost = KernelError::SessionLost(now);
                    DeviceError::new(self.machine.id.clone(), DOING, Some(errno), lost)
                }
                _ => DeviceError::new(self.machine.id.clone(), DOING, Some(errno), errno),
            });
        }
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Result<(), TransitionError> {
        let now = self.machine.state_before(MigrationState::Stop)?;
        // A device that was reset is empty; it must not pass for one that has taken its state.
        if now != MigrationState::Resuming {
            let lost = KernelError::SessionLost(now);
            return Err(self.machine.refused(now, MigrationState::Stop, lost));
        }
        self.machine.go(now, MigrationState::Stop)?;
        self.open = false;
        Ok(())
    }

    fn abort(mut self: Box<Self>) -> Result<(), DeviceError> {
        self.open = false;
        self.machine.reset()
    }
}

impl Drop for Resuming {
    fn drop(&mut self) {
        if self.open
            && let Err(error) = self.machine.reset()
        {
            tracing::warn!(%error, "a resuming session was dropped and the device could not be reset");
        }
    }
}

/// Repeats what a signal has interrupted.
fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            done => return done,
        }
    }
}
