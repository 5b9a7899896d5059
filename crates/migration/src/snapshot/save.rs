//! Saving: a source runs against a recorder.

use std::path::Path;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::file::{Writer, failed};
use super::record::{Recorded, Unrecorded, record};
use super::{DeviceState, GuestNotResumed, SaveError, states};
use crate::channel::link::Link;
use crate::channel::liveness::keep_alive_until;
use crate::error::MigrateError;
use crate::options::SourceOptions;
use crate::report::{Completed, Progress};
use crate::source::Source;

/// Longest pause of the guest while its last state is written: as long as the disk takes.
const STANDSTILL: Duration = Duration::from_secs(3600);

/// Options for saving a machine.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct SaveOptions {
    /// Replace a file that is there.
    pub force: bool,
    /// The guest ends here: the file owns it afterwards, by the journal too. Else it goes on.
    pub stop: bool,
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
}

impl SourceOptions {
    /// These options, as [`save`] needs them: pages with checksums, and no limit on the downtime but an hour.
    #[must_use]
    pub fn for_saving(mut self) -> Self {
        self.downtime_limit = STANDSTILL;
        self.commit_reserve = None;
        self.ram_crc = true;
        self.to_file = true;
        self
    }
}

/// Saves the machine of `source`, made with [`SourceOptions::for_saving`], into the file `path`. The guest runs while most
/// is written and is paused for the rest. On return the file is whole and on disk.
///
/// # Errors
/// No file is left, and the guest goes on, or the error says why not; but see [`SaveError::NotResumed`].
pub fn save(
    source: Source,
    path: &Path,
    options: SaveOptions,
    observer: impl FnMut(&Progress),
) -> Result<Saved, SaveError> {
    let writer = Writer::create(path, options.force)?;
    let (here, there) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(|errno| failed("making a socket for", path)(errno.into()))?;
    let link = Link::accepted(there);
    let (recorded, ended) = std::thread::scope(|scope| {
        let (done, waits) = std::sync::mpsc::channel();
        let link = &link;
        let recording = scope.spawn(move || {
            let recorded = record(link, writer, options.stop);
            drop(done);
            recorded
        });
        scope.spawn(move || keep_alive_until(link, &waits));
        let ended = source.into_file(path).migrate_over(here, observer);
        // Whatever the recorder waits for, nobody sends it any more.
        link.shutdown();
        (recording.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), ended)
    });
    match (recorded, ended) {
        (Ok(Recorded { bytes, digest, devices, committed: true }), Ok(completed)) => {
            Ok(Saved { bytes, digest, devices: states(&devices), completed: Some(completed) })
        }
        (Ok(Recorded { bytes, digest, devices, committed: false }), Err(MigrateError::Aborted(aborted))) => {
            if aborted.restored && aborted.reset.is_empty() {
                Ok(Saved { bytes, digest, devices: states(&devices), completed: None })
            } else {
                Err(SaveError::NotResumed(GuestNotResumed(aborted)))
            }
        }
        (Err(Unrecorded::File(error)), _) => Err(SaveError::File(error)),
        (_, Err(error)) => Err(SaveError::Session(error)),
        (_, Ok(_)) => Err(SaveError::Session(MigrateError::Unresolved {
            why: "the session ended otherwise than its recording: a defect of this program".into(),
        })),
    }
}
