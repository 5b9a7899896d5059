//! Regular files that an operator names: opened to be read, and written whole or not at all.
//!
//! What stands at a path is judged before anything is done for it. Only a regular file is read or replaced: never a device node,
//! FIFO, socket or directory. A symbolic link is followed, and what it leads to is judged; the link itself stays.

use std::ffi::OsString;
use std::fs::{File, Metadata};
use std::io::{ErrorKind, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

/// Permissions of a new file: what is saved of a guest is its owner's alone.
const MODE: Mode = Mode::RUSR.union(Mode::WUSR);
/// Most symbolic links that the kernel follows in one path (path_resolution(7)).
const LINKS_MAX: u32 = 40;
/// Most attempts to give a file its name, while others put files there and take them away.
const ATTEMPTS: u32 = 16;

/// A path at which no file can be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// A system call failed.
    #[error("{doing} {path} failed")]
    System {
        /// The call that failed, as a verb.
        doing: &'static str,
        /// The file or directory that it failed on.
        path: PathBuf,
        /// The cause, with its errno.
        #[source]
        source: std::io::Error,
    },
    /// There is a file already, and it is not to be replaced.
    #[error("{0} exists already; --force replaces it")]
    Exists(PathBuf),
    /// Something that is no regular file.
    #[error("{path} is {kind} and no regular file; it is left alone")]
    NotRegular {
        /// The path that was named.
        path: PathBuf,
        /// What is there, with an article.
        kind: &'static str,
    },
    /// Anybody may change what is read there.
    #[error("{path} may be changed by anybody (mode {mode:04o}): chmod o-w it")]
    Changeable {
        /// The file, or the folder that it is in.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Another user may change what is read there.
    #[error(
        "{path} belongs to user {owner}, who may change it: it has to be root's or of user {user}, whom this process runs as (chown)"
    )]
    OfAnother {
        /// The file, or a folder or symbolic link on the way to it.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Whom this process runs as.
        user: u32,
    },
    /// A symbolic link to nothing.
    #[error("{0} is a symbolic link to a file that does not exist; name the file itself")]
    Dangling(PathBuf),
    /// The path has no last component that could be a file's name.
    #[error("{0} is the name of a directory, and of no file")]
    NoName(PathBuf),
    /// The path leads to a file by a descriptor of the process that follows it, which may be another than the one that was asked.
    #[error("{0} names a file by a descriptor of the process that opens it; name the file itself")]
    ByDescriptor(PathBuf),
    /// The process may not write so large a file (`RLIMIT_FSIZE`).
    #[error(
        "the file needs about {needed} bytes, and this process may write files of {limit} at most (RLIMIT_FSIZE: ulimit -f, LimitFSIZE=)"
    )]
    SizeLimit {
        /// Bytes that a file of this process may have.
        limit: u64,
        /// Bytes that the file will have at least, as far as that is known.
        needed: u64,
    },
    /// The filesystem has no room for the file.
    #[error("{directory} has {free} bytes free, and the file needs about {needed}")]
    NoSpace {
        /// The directory that the file would be in.
        directory: PathBuf,
        /// Bytes that this process could still write there.
        free: u64,
        /// Bytes that the file will have at least, as far as that is known.
        needed: u64,
    },
}

fn failed(doing: &'static str, path: &Path) -> impl Fn(std::io::Error) -> FileError {
    move |source| FileError::System { doing, path: path.into(), source }
}

/// What a file that is not regular is, with an article.
fn kind(found: FileType) -> &'static str {
    match found {
        FileType::Directory => "a directory",
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        FileType::CharacterDevice => "a character device",
        FileType::BlockDevice => "a block device",
        FileType::Symlink => "a symbolic link",
        _ => "something else",
    }
}

fn regular(path: &Path, found: &Metadata) -> Result<(), FileError> {
    match FileType::from_raw_mode(found.mode()) {
        FileType::RegularFile => Ok(()),
        other => Err(FileError::NotRegular { path: path.into(), kind: kind(other) }),
    }
}

/// Opens a regular file to read it. Anything else is refused at once, unopened: a FIFO would wait for a writer, and some
/// devices act on being opened.
///
/// # Errors
/// There is no such file, it is not regular, or the system refuses.
pub fn open_regular(path: &Path) -> Result<File, FileError> {
    let doing = "opening";
    regular(path, &std::fs::metadata(path).map_err(failed(doing, path))?)?;
    // Another file may have come since: this open never waits either.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file =
        rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| failed(doing, path)(errno.into()))?;
    let file = File::from(file);
    regular(path, &file.metadata().map_err(failed(doing, path))?)?;
    Ok(file)
}

/// Opens a regular file to read it and to append to it, and makes one where there is none. Anything else is refused at once.
///
/// # Errors
/// Something else is there, or the system refuses.
pub fn open_regular_to_append(path: &Path) -> Result<File, FileError> {
    let doing = "opening";
    match std::fs::metadata(path) {
        Ok(found) => regular(path, &found)?,
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(failed(doing, path)(error)),
    }
    let mut options = File::options();
    options.read(true).append(true).create(true);
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    options.custom_flags(flags.bits().cast_signed());
    let file = options.open(path).map_err(failed(doing, path))?;
    // Another may have come since.
    regular(path, &file.metadata().map_err(failed(doing, path))?)?;
    Ok(file)
}

/// A file that is there under its name, whole and on disk, or not at all. It has no name while it is written, or, on a
/// filesystem that cannot do that, a hidden one beside its own. Dropping it before [`finish`](Self::finish) removes it.
#[derive(Debug)]
pub struct AtomicFile {
    file: File,
    /// The directory, so that it stays the same one.
    directory: File,
    name: OsString,
    /// Where it will be, links followed.
    path: PathBuf,
    replace: bool,
    /// Its name meanwhile, if it has one.
    temporary: Option<OsString>,
    named: bool,
    /// The name under which the file that it replaced is kept.
    replaced: Option<OsString>,
}

impl AtomicFile {
    /// Judges what is at `path`, and begins a file that is to appear there. With `replace` it may take the place of a regular
    /// file.
    ///
    /// # Errors
    /// Something else is there, or the directory cannot be written to. Nothing was changed.
    pub fn create(path: &Path, replace: bool) -> Result<Self, FileError> {
        Self::create_by(path, replace, new_file)
    }

    fn create_by(path: &Path, replace: bool, new_file: NewFile) -> Result<Self, FileError> {
        let (path, there) = judge(path, replace)?;
        let no_name = || FileError::NoName(path.clone());
        let name = path.file_name().ok_or_else(no_name)?.to_owned();
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(parent, flags, Mode::empty())
            .map_err(|errno| failed("opening the directory", parent)(errno.into()))?;
        let directory = File::from(directory);
        if let Some(there) = there {
            let holder = directory.metadata().map_err(failed("looking at", parent))?;
            replaceable(&path, &there, &holder)?;
        }
        let (file, temporary) =
            new_file(&directory).map_err(|errno| failed("creating a file in", parent)(errno.into()))?;
        let file = File::from(file);
        Ok(Self { file, directory, name, path, replace, temporary, named: false, replaced: None })
    }

    /// Compares the room on the filesystem, and the size that a file of this process may have, with the `needed` bytes.
    ///
    /// # Errors
    /// There is less room than that.
    pub fn check_room(&self, needed: u64) -> Result<(), FileError> {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Fsize).current;
        if let Some(limit) = limit.filter(|limit| *limit < needed) {
            return Err(FileError::SizeLimit { limit, needed });
        }
        match self.free() {
            Some(free) if free < needed => {
                let directory = self.path.parent().unwrap_or(Path::new(".")).into();
                Err(FileError::NoSpace { directory, free, needed })
            }
            _ => Ok(()),
        }
    }

    /// Bytes that can still be written, if the filesystem says.
    pub(crate) fn free(&self) -> Option<u64> {
        let found = rustix::fs::fstatvfs(&self.directory).ok()?;
        // What is kept for the superuser is room for the superuser.
        let blocks = if rustix::process::geteuid().is_root() { found.f_bfree } else { found.f_bavail };
        // Some filesystems, FUSE's among them, say nothing.
        (found.f_blocks > 0).then(|| blocks.saturating_mul(found.f_frsize))
    }

    /// Gives the file its name: from here it outlives this process and the host's power. What it replaced is kept until
    /// [`keep`](Self::keep) or the drop.
    ///
    /// # Errors
    /// It cannot be written to disk, or something that it must not replace has come to its name meanwhile.
    pub fn finish(&mut self) -> Result<(), FileError> {
        self.file.sync_all().map_err(failed("syncing", &self.path))?;
        self.appear()?;
        self.named = true;
        self.directory.sync_all().map_err(failed("syncing the directory of", &self.path))
    }

    /// Lets go of the file that was replaced.
    pub fn keep(&mut self) {
        if let Some(old) = self.replaced.take() {
            self.remove(&old);
        }
    }

    /// Takes the file away again, also once it has its name, and puts back what it replaced.
    pub fn discard(&mut self) {
        if let Some(temporary) = self.temporary.take() {
            self.remove(&temporary);
        }
        if !std::mem::take(&mut self.named) {
            return;
        }
        let name = self.name.clone();
        if !self.is_ours(&name) {
            tracing::warn!(path = %self.path.display(), "the file that failed is no longer under its name");
            return;
        }
        match self.replaced.take() {
            Some(old) => {
                if let Err(error) = rustix::fs::renameat(&self.directory, &old, &self.directory, &name) {
                    tracing::warn!(%error, path = %self.path.display(), "the file that was replaced is not put back");
                }
            }
            None => self.remove(&name),
        }
    }

    /// Gives it its name, in the place of a regular file if it may replace one, and never of anything else.
    fn appear(&mut self) -> Result<(), FileError> {
        for _ in 0..ATTEMPTS {
            match self.take_free_name() {
                Err(Errno::EXIST) if self.replace => {}
                Err(Errno::EXIST) => return Err(FileError::Exists(self.path.clone())),
                Err(errno) => return Err(failed("naming", &self.path)(errno.into())),
                Ok(()) => return Ok(()),
            }
            if self.take_name_of_regular()? {
                return Ok(());
            }
        }
        Err(failed("naming", &self.path)(Errno::BUSY.into()))
    }

    /// Takes its name if nobody has it.
    fn take_free_name(&mut self) -> Result<(), Errno> {
        let Some(temporary) = &self.temporary else {
            return link_unnamed(&self.file, &self.directory, &self.name);
        };
        let (directory, name) = (&self.directory, &self.name);
        match rustix::fs::renameat_with(directory, temporary, directory, name, RenameFlags::NOREPLACE) {
            // The filesystem has no such rename. Unlike a plain one, a link never replaces anything.
            Err(Errno::INVAL | Errno::NOSYS) => {
                rustix::fs::linkat(directory, temporary, directory, name, AtFlags::empty())?;
                self.remove(temporary);
            }
            result => result?,
        }
        self.temporary = None;
        Ok(())
    }

    /// Takes its name from a regular file, which it keeps; `false` if nobody has the name any more.
    fn take_name_of_regular(&mut self) -> Result<bool, FileError> {
        let naming = |errno: Errno| failed("naming", &self.path)(errno.into());
        let temporary = match &self.temporary {
            Some(temporary) => temporary.clone(),
            None => with_new_name(|name| link_unnamed(&self.file, &self.directory, name)).map_err(naming)?.1,
        };
        let directory = self.directory.as_fd();
        let exchange =
            || rustix::fs::renameat_with(directory, &temporary, directory, &self.name, RenameFlags::EXCHANGE);
        let exchanged = exchange();
        let result = match exchanged {
            Ok(()) => match self.kind_at(&temporary) {
                Ok(FileType::RegularFile) => Ok(true),
                // What came meanwhile gets its name back.
                other => {
                    exchange().map_err(naming)?;
                    match other {
                        Ok(found) => {
                            Err(FileError::NotRegular { path: self.path.clone(), kind: kind(found) })
                        }
                        Err(errno) => Err(naming(errno)),
                    }
                }
            },
            Err(Errno::NOENT) => Ok(false),
            // The filesystem cannot exchange names: what is there is looked at just before it is replaced.
            Err(Errno::INVAL | Errno::NOSYS) => match self.kind_at(&self.name) {
                Ok(FileType::RegularFile) => {
                    rustix::fs::renameat(directory, &temporary, directory, &self.name).map_err(naming)?;
                    self.temporary = None;
                    return Ok(true);
                }
                Ok(found) => Err(FileError::NotRegular { path: self.path.clone(), kind: kind(found) }),
                Err(Errno::NOENT) => Ok(false),
                Err(errno) => Err(naming(errno)),
            },
            Err(errno) => Err(naming(errno)),
        };
        if matches!(result, Ok(true)) {
            self.temporary = None;
            self.replaced = Some(temporary);
        } else {
            self.temporary = Some(temporary);
        }
        result
    }

    fn kind_at(&self, name: &OsString) -> Result<FileType, Errno> {
        let found = rustix::fs::statat(&self.directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(FileType::from_raw_mode(found.st_mode))
    }

    fn is_ours(&self, name: &OsString) -> bool {
        let found = rustix::fs::statat(&self.directory, name, AtFlags::SYMLINK_NOFOLLOW);
        match (found, rustix::fs::fstat(&self.file)) {
            (Ok(found), Ok(ours)) => (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino),
            _ => false,
        }
    }

    fn remove(&self, name: &OsString) {
        if let Err(error) = rustix::fs::unlinkat(&self.directory, name, AtFlags::empty())
            && error != Errno::NOENT
        {
            let path = self.path.with_file_name(name);
            tracing::warn!(%error, path = %path.display(), "a file that is of no use could not be removed");
        }
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if self.named {
            self.keep();
        } else {
            self.discard();
        }
    }
}

/// The path at which a file would appear, links followed, and what it would replace.
fn judge(path: &Path, replace: bool) -> Result<(PathBuf, Option<Metadata>), FileError> {
    if path.as_os_str().as_bytes().ends_with(b"/") {
        return Err(FileError::NoName(path.into()));
    }
    if by_descriptor(path) {
        return Err(FileError::ByDescriptor(path.into()));
    }
    // Also tells of a name that is too long.
    let found = match path.symlink_metadata() {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok((path.into(), None)),
        found => found.map_err(failed("looking at", path))?,
    };
    let (end, found) = if found.is_symlink() {
        let end = match path.canonicalize() {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(FileError::Dangling(path.into()));
            }
            end => end.map_err(failed("following", path))?,
        };
        let found = end.symlink_metadata().map_err(failed("looking at", &end))?;
        (end, found)
    } else {
        (path.into(), found)
    };
    regular(path, &found)?;
    if replace { Ok((end, Some(found))) } else { Err(FileError::Exists(path.into())) }
}

/// Whether a path, or a symbolic link on its way, names a process's descriptor in procfs, as /dev/stdout does.
fn by_descriptor(path: &Path) -> bool {
    let mut path = path.to_owned();
    for _ in 0..LINKS_MAX {
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => ".".into(),
        };
        let procfs = |found: rustix::fs::StatFs| found.f_type == rustix::fs::PROC_SUPER_MAGIC;
        if parent.ends_with("fd") && rustix::fs::statfs(&parent).is_ok_and(procfs) {
            return true;
        }
        match std::fs::read_link(&path) {
            Ok(to) => path = parent.join(to),
            Err(_) => return false,
        }
    }
    false
}

/// In a directory with the sticky bit only a file's owner, and the directory's, may replace it.
fn replaceable(path: &Path, found: &Metadata, directory: &Metadata) -> Result<(), FileError> {
    let us = rustix::process::geteuid();
    let sticky = Mode::from_raw_mode(directory.mode()).contains(Mode::SVTX);
    if sticky && !us.is_root() && ![found.uid(), directory.uid()].contains(&us.as_raw()) {
        return Err(failed("replacing", path)(Errno::PERM.into()));
    }
    Ok(())
}

/// Makes a file in a directory, and returns the name that it has there, if it has one.
type NewFile = fn(&File) -> Result<(OwnedFd, Option<OsString>), Errno>;

/// A new file without a name, where the filesystem has such.
fn new_file(directory: &File) -> Result<(OwnedFd, Option<OsString>), Errno> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    if let Ok(file) = rustix::fs::openat(directory, ".", flags | OFlags::TMPFILE, MODE)
        // It gets its name through procfs.
        && Path::new(&in_procfs(&file)).exists()
    {
        return Ok((file, None));
    }
    new_named_file(directory)
}

fn new_named_file(directory: &File) -> Result<(OwnedFd, Option<OsString>), Errno> {
    let create = OFlags::WRONLY | OFlags::CLOEXEC | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
    let (file, name) = with_new_name(|name| rustix::fs::openat(directory, name, create, MODE))?;
    Ok((file, Some(name)))
}

/// Does `make` with a name that nobody has, however long the file's own is.
fn with_new_name<T>(make: impl Fn(&OsString) -> Result<T, Errno>) -> Result<(T, OsString), Errno> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    loop {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!(".vfio-migrate.{}.{number}.tmp", std::process::id()).into();
        match make(&name) {
            // Somebody else's, or left by an older process of our number.
            Err(Errno::EXIST) => {}
            made => return Ok((made?, name)),
        }
    }
}

fn link_unnamed(file: &File, directory: &File, name: &OsString) -> Result<(), Errno> {
    rustix::fs::linkat(CWD, in_procfs(file), directory, name, AtFlags::SYMLINK_FOLLOW)
}

fn in_procfs(file: &impl AsRawFd) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::*;

    const WAYS: [NewFile; 2] = [new_file, new_named_file];

    fn written(path: &Path, replace: bool, way: NewFile) -> AtomicFile {
        let mut file = AtomicFile::create_by(path, replace, way).unwrap();
        file.write_all(b"new").unwrap();
        file
    }

    fn names(directory: &Path) -> Vec<OsString> {
        let mut names: Vec<_> =
            std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_there_whole_or_not_at_all() {
        for way in WAYS {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("f".repeat(255));
            drop(written(&path, false, way));
            assert_eq!(names(dir.path()).len(), 0, "an unfinished one is left");
            let mut file = written(&path, false, way);
            assert!(!path.exists());
            file.finish().unwrap();
            drop(file);
            assert_eq!(std::fs::read(&path).unwrap(), b"new");
            assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
            // Replaced, and put back when it fails after all.
            std::fs::write(&path, "old").unwrap();
            let mut file = written(&path, true, way);
            file.finish().unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), b"new");
            file.discard();
            drop(file);
            assert_eq!(std::fs::read(&path).unwrap(), b"old");
            let mut file = written(&path, true, way);
            file.finish().unwrap();
            file.keep();
            drop(file);
            assert_eq!(std::fs::read(&path).unwrap(), b"new");
            assert_eq!(names(dir.path()).len(), 1);
            let mut file = written(&path, true, way);
            file.finish().unwrap();
            drop(file);
            assert_eq!(names(dir.path()).len(), 1);
        }
    }

    /// What comes to the path while the file is written is never replaced, unless that is a regular file that may be.
    #[test]
    fn what_comes_meanwhile_is_left_alone() {
        type Come = fn(&Path);
        let come: [(&str, Come, bool); 6] = [
            ("nothing", |_| (), true),
            ("a regular file", |path| std::fs::write(path, "theirs").unwrap(), true),
            ("a directory", |path| std::fs::create_dir(path).unwrap(), false),
            ("a FIFO", |path| rustix::fs::mknodat(CWD, path, FileType::Fifo, MODE, 0).unwrap(), false),
            ("a symbolic link", |path| symlink("/dev/null", path).unwrap(), false),
            ("a socket", |path| drop(UnixListener::bind(path).unwrap()), false),
        ];
        for way in WAYS {
            for (kind, come, replaceable) in come {
                for there in [false, true] {
                    for replace in [false, true] {
                        if there && !replace {
                            continue;
                        }
                        let dir = tempfile::tempdir().unwrap();
                        let path = dir.path().join("file");
                        if there {
                            std::fs::write(&path, "old").unwrap();
                        }
                        let mut file = written(&path, replace, way);
                        if there {
                            std::fs::remove_file(&path).unwrap();
                        }
                        come(&path);
                        let before = path.symlink_metadata().map(|found| (found.ino(), found.mode())).ok();
                        let result = file.finish();
                        drop(file);
                        let case = format!("{kind}, there {there}, replace {replace}: {result:?}");
                        assert_eq!(names(dir.path()), ["file"], "{case}");
                        if kind == "nothing" || (replaceable && replace) {
                            result.expect(&case);
                            assert_eq!(std::fs::read(&path).unwrap(), b"new", "{case}");
                            continue;
                        }
                        let after = path.symlink_metadata().map(|found| (found.ino(), found.mode())).ok();
                        assert_eq!(before, after, "{case}");
                        match result.expect_err(&case) {
                            FileError::Exists(_) => assert!(!replace, "{case}"),
                            FileError::NotRegular { kind: found, .. } => {
                                assert_eq!((replace, found), (true, kind), "{case}");
                            }
                            _ => panic!("{case}"),
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn room_is_compared() {
        let dir = tempfile::tempdir().unwrap();
        let file = written(&dir.path().join("file"), false, new_file);
        let free = file.free().expect("this filesystem says");
        file.check_room(free / 2).unwrap();
        let error = file.check_room(u64::MAX).unwrap_err().to_string();
        assert!(error.contains(&u64::MAX.to_string()) && error.contains("bytes free"), "{error}");
    }

    #[test]
    fn only_regular_files_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let (file, fifo) = (dir.path().join("file"), dir.path().join("fifo"));
        std::fs::write(&file, "data").unwrap();
        rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, MODE, 0).unwrap();
        open_regular(&file).unwrap();
        for (path, kind) in [
            (fifo.as_path(), "a FIFO"),
            (dir.path(), "a directory"),
            (Path::new("/dev/null"), "a character device"),
        ] {
            match open_regular(path) {
                Err(FileError::NotRegular { kind: found, .. }) => assert_eq!(found, kind),
                other => panic!("{other:?}"),
            }
        }
    }
}
