//! Whether files are still the ones that were read, without reading them.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

/// Age, in whole seconds, from which a file's times tell a change: of two changes within one tick of a file system's clock they tell one, and some
/// clocks tick once a second.
const TICK: Duration = Duration::from_secs(2);

/// What tells some files from others under the same names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FileStamps(Vec<Option<FileStamp>>);

/// The same of one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileStamp {
    device: u64,
    inode: u64,
    size: u64,
    mtime: (i64, i64),
    /// Nobody sets it, and permissions change it too.
    ctime: (i64, i64),
}

impl FileStamps {
    /// Those of `files` as they are now. A file that is missing is one that is missing.
    pub(crate) fn of<'a>(files: impl IntoIterator<Item = &'a Path>) -> Self {
        Self(files.into_iter().map(|file| file.metadata().ok().map(|data| FileStamp::of(&data))).collect())
    }

    /// Whether a change from `now` on will show: none of them was changed just now.
    pub(crate) fn are_settled(&self, now: SystemTime) -> bool {
        let settled = |stamp: &FileStamp| {
            let seconds = u64::try_from(stamp.ctime.0).unwrap_or(0);
            let changed = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds));
            changed.is_some_and(|changed| now.duration_since(changed).is_ok_and(|age| age >= TICK))
        };
        self.0.iter().flatten().all(settled)
    }
}

impl FileStamp {
    fn of(data: &Metadata) -> Self {
        Self {
            device: data.dev(),
            inode: data.ino(),
            size: data.size(),
            mtime: (data.mtime(), data.mtime_nsec()),
            ctime: (data.ctime(), data.ctime_nsec()),
        }
    }
}
