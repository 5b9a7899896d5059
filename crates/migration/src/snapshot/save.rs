//! Saving: a source runs against a recorder.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vfio_migration_types::{Failure, PauseCause, Phase, Side, error_chain};

use super::estimate::{Estimate, StateLimits};
use super::file::{Writer, failed};
use super::record::{Recorded, Unrecorded, record};
use super::{DeviceState, GuestNotResumed, SaveError, SnapshotError, states};
use crate::channel::link::Link;
use crate::channel::liveness::keep_alive_until;
use crate::channel::transport::Socket;
use crate::error::{Aborted, MigrateError, refused_here};
use crate::options::SourceOptions;
use crate::regular_file::AtomicFile;
use crate::report::{Completed, Progress};
use crate::session::abandon::{Unanswered, answer_unless};
use crate::session::awaited::Request;
use crate::session::fail::InPhase;
use crate::session::threads::{set_up, spawn, spawn_free};
use crate::source::Source;
use crate::unresolved::UnresolvedMigration;

/// Longest pause of the guest while its last state is written: as long as the disk takes.
const STANDSTILL: Duration = Duration::from_secs(3600);
/// Time that the disk has to end what is under way when the operator cancels.
const CANCELLED: Duration = Duration::from_millis(250);

/// Options for saving a machine.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct SaveOptions {
    /// Replace a file that is there.
    pub force: bool,
    /// The guest ends here: the file owns it afterwards, by the journal too. Else it goes on.
    pub stop: bool,
    /// Most bytes of state that each device may give. `None`: 16 times what the device estimates that it has, and at least
    /// 1 GiB; 64 GiB for one that cannot estimate it.
    pub state_limit: Option<u64>,
}

/// A machine that was saved.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Saved {
    /// Bytes of the file.
    pub bytes: u64,
    /// BLAKE3 digest of the file without its last 32 bytes, which are it.
    pub digest: [u8; 32],
    /// The state of each device, in the manifest's order.
    pub devices: Vec<DeviceState>,
    /// The session's report, when the guest was to end here.
    pub completed: Option<Completed>,
    /// Time for which the guest was paused, where it goes on here; zero if it was paused before.
    pub stood: Duration,
    /// What did not answer, where the guest goes on here: it is undone behind this end, as
    /// [`Control::pending_rollback`](crate::Control::pending_rollback) tells.
    pub left_undone: Vec<Failure>,
}

impl SourceOptions {
    /// These options, as [`save`] needs them: pages with checksums, and no limit on the downtime but an hour.
    #[must_use]
    pub fn for_saving(mut self) -> Self {
        self.downtime_limit = STANDSTILL;
        self.commit_reserve = None;
        self.ram_crc = Some(true);
        self.to_file = true;
        self
    }
}

/// Saves the machine of `source`, made with [`SourceOptions::for_saving`], into the file `path`. The guest runs while most
/// is written and is paused for the rest. On return the file is whole and on disk.
///
/// # Errors
/// No file is left, and the guest goes on, or the error says why not; but see [`SaveError::NotResumed`]. What is at the path,
/// and the room on its filesystem, are judged before anything else is done.
pub fn save(
    source: Source,
    path: &Path,
    options: SaveOptions,
    mut observer: impl FnMut(&Progress),
) -> Result<Saved, SaveError> {
    let source = source.into_file(path);
    let _threads = set_up(source.thread_setup());
    let control = source.control();
    control.begun();
    source.begin(None, None, &mut observer).map_err(SaveError::Session)?;
    let (target, machine, answers) =
        (path.to_owned(), Arc::clone(&source.machine), control.answers().clone());
    // A disk or a device may hang, and nothing that waits for it ends when it is told to.
    let create = move || -> Result<(Writer, StateLimits), SaveError> {
        let wait = answers.wait(None, Request::File, None);
        let file = AtomicFile::create(&target, options.force).map_err(SnapshotError::from)?;
        drop(wait);
        let estimate = Estimate::of(&*machine, &answers)
            .map_err(|error| SaveError::Session(refused_here(error.in_phase(Side::Source, Phase::Plan))))?;
        estimate.check_room(&file)?;
        Ok((Writer::new(file, &target)?, StateLimits::new(&estimate, options.state_limit)))
    };
    let (writer, limits) =
        match answer_unless(|| control.look_around(Phase::Plan, &[]).is_some(), None, create) {
            Ok(created) => created?,
            Err(Unanswered::NoThread(error)) => {
                return Err(failed("making a thread for", path)(error.0).into());
            }
            Err(Unanswered::GivenUp | Unanswered::Late) => {
                return Err(SaveError::Session(control.cancelled(Phase::Plan)));
            }
        };
    let (here, there) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(|errno| failed("making a socket for", path)(errno.into()))?;
    let link = Link::accepted(Box::new(Socket::new(there)));
    let (of_thread, commit) = (Arc::clone(&link), options.stop);
    let (answer, recorded) = mpsc::channel();
    let recording = spawn_free("recorder", move || {
        let recorded = record(&of_thread, writer, limits, commit);
        // After a cancel nobody may wait for it any more. What it has written by then is gone again.
        let _ = answer.send(recorded);
    });
    let recording = recording.map_err(|error| failed("making a thread for", path)(error))?;
    let ended = std::thread::scope(|scope| {
        let (done, waits) = mpsc::channel();
        let link = &link;
        // Without it a disk that is slow ends the session, and is named; nothing is lost.
        let alive = spawn(scope, "keep-alive", move || keep_alive_until(link, &waits));
        let _ = alive.inspect_err(|error| tracing::warn!(%error, "no thread keeps the session alive"));
        let ended = source.migrate_over(here, observer);
        // Whatever the recorder waits for, nobody sends it any more.
        link.shutdown();
        drop(done);
        ended
    });
    let patience = match &ended {
        Err(MigrateError::Aborted(aborted)) if aborted.cancelled => CANCELLED,
        _ => Duration::MAX,
    };
    let recorded = match recorded.recv_timeout(patience) {
        Ok(recorded) => recorded,
        // It is the disk that hangs: its thread removes the file once it can.
        Err(RecvTimeoutError::Timeout) => Err(Unrecorded::Ended),
        Err(RecvTimeoutError::Disconnected) => match recording.join() {
            Err(panic) => std::panic::resume_unwind(panic),
            Ok(()) => Err(Unrecorded::Ended),
        },
    };
    match (recorded, ended) {
        (Ok(Recorded { bytes, digest, devices, committed: true }), Ok(mut completed)) => {
            completed.paused = Some(PauseCause::IntoFile);
            Ok(Saved {
                bytes,
                digest,
                devices: states(&devices),
                completed: Some(completed),
                stood: Duration::ZERO,
                left_undone: Vec::new(),
            })
        }
        (Ok(Recorded { bytes, digest, devices, committed: false }), Err(MigrateError::Aborted(aborted))) => {
            let left_undone = aborted.left_undone.clone();
            // What is late, with the guest running, is no concern of the file's.
            let all_but_late = Aborted { left_undone: Vec::new(), ..(*aborted).clone() };
            if all_but_late.is_as_before() {
                let (devices, stood) = (states(&devices), aborted.stood);
                return Ok(Saved { bytes, digest, devices, completed: None, stood, left_undone });
            }
            let mut aborted = aborted;
            if let Some(late) = left_undone.first() {
                let text = format!("the file is whole; {}", late.text);
                aborted.cause = Failure { text, ..late.clone() };
            }
            Err(SaveError::NotResumed(GuestNotResumed(aborted)))
        }
        // What became of the guest matters more, and the cause of its end is the file.
        (Err(Unrecorded::File(error)), Err(MigrateError::Aborted(mut aborted)))
            if !aborted.is_as_before() =>
        {
            if !aborted.cancelled {
                aborted.cause.text = error_chain(&error);
            }
            Err(SaveError::Session(MigrateError::Aborted(aborted)))
        }
        (Err(Unrecorded::File(error)), _) => Err(SaveError::File(error)),
        (_, Err(error)) => Err(SaveError::Session(error)),
        (_, Ok(Completed { vm, attempt, epoch, .. })) => {
            let why = "the session ended otherwise than its recording: a defect of this program".into();
            let unresolved = UnresolvedMigration::of_journal(vm, attempt, epoch, "the file".into(), why);
            Err(SaveError::Session(MigrateError::Unresolved(Box::new(unresolved))))
        }
    }
}
