//! A host's trees, which are not trusted, and reading small files of them: capped, never blocking, regular files alone.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use vfio_migration_types::is_control;

/// Roots of a host's trees. [`Default`] is this host's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roots {
    /// Mount point of sysfs: `/sys`.
    pub sys: PathBuf,
    /// Folder of device nodes: `/dev`.
    pub dev: PathBuf,
    /// Mount point of procfs: `/proc`.
    pub proc: PathBuf,
    /// Folder of kernel configurations: `/boot`.
    pub boot: PathBuf,
    /// Kernel modules, a folder per release: `/lib/modules`.
    pub modules: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Self::under(Path::new("/"))
    }
}

impl Roots {
    /// The trees of a host whose root is `top`.
    pub fn under(top: &Path) -> Self {
        Self {
            sys: top.join("sys"),
            dev: top.join("dev"),
            proc: top.join("proc"),
            boot: top.join("boot"),
            modules: top.join("lib/modules"),
        }
    }
}

/// Most entries that are taken from one folder.
const ENTRIES_MAX: usize = 1 << 16;

/// The reason why a file was not read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadFailure {
    /// The system refused: ENOENT, EACCES, ELOOP and the like.
    #[error("it cannot be read")]
    System(#[source] Errno),
    /// A pipe, a device or a folder where a file is expected.
    #[error("it is no regular file")]
    NoFile,
    /// More than is taken.
    #[error("it is longer than {0} bytes")]
    TooLong(u64),
    /// The content is not what is expected there.
    #[error("it holds no {0}")]
    Nonsense(&'static str),
}

impl ReadFailure {
    /// Whether the file does not exist, as against: exists and cannot be read.
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::System(Errno::NOENT | Errno::NOTDIR))
    }
}

/// The whole of a file of at most `cap` bytes.
pub(super) fn read_bytes(path: &Path, cap: u64) -> Result<Vec<u8>, ReadFailure> {
    let mut bytes = Vec::new();
    open(path)?.take(cap.saturating_add(1)).read_to_end(&mut bytes).map_err(system)?;
    if bytes.len() as u64 > cap { Err(ReadFailure::TooLong(cap)) } else { Ok(bytes) }
}

/// The first bytes of a file, at most `cap`.
pub(super) fn read_head(path: &Path, cap: u64) -> Result<Vec<u8>, ReadFailure> {
    let mut bytes = Vec::new();
    open(path)?.take(cap).read_to_end(&mut bytes).map_err(system)?;
    Ok(bytes)
}

/// The text of a file of at most `cap` bytes, without white space at its ends.
///
/// # Errors
/// Also for bytes that are no UTF-8.
pub fn read_text(path: &Path, cap: u64) -> Result<String, ReadFailure> {
    let text = String::from_utf8(read_bytes(path, cap)?).map_err(|_| ReadFailure::Nonsense("text"))?;
    Ok(text.trim().to_owned())
}

/// An attribute of one line: printable, at most 4096 bytes. `None` when it is missing, unreadable or no such thing.
pub(crate) fn attribute(path: &Path) -> Option<String> {
    let text = read_text(path, 4096).ok()?;
    (!text.is_empty() && !text.contains(is_control)).then_some(text)
}

/// A hexadecimal attribute, `0x8086`.
pub(super) fn hex(path: &Path) -> Option<u32> {
    u32::from_str_radix(attribute(path)?.strip_prefix("0x")?, 16).ok()
}

/// Reads a decimal attribute.
pub(super) fn number(path: &Path) -> Option<u32> {
    attribute(path)?.parse().ok()
}

/// Last name of what a link points to; the link is not followed. `None` when there is no link, or the name is not
/// printable.
pub(super) fn link_name(path: &Path) -> Option<String> {
    printable(std::fs::read_link(path).ok()?.file_name()?.to_str()?)
}

/// Name of the folder that holds what a link points to.
pub(super) fn link_parent(path: &Path) -> Option<String> {
    printable(std::fs::read_link(path).ok()?.parent()?.file_name()?.to_str()?)
}

/// Printable names in a folder, sorted; at most 65536. Empty when there is no such folder.
pub fn list(dir: &Path) -> Result<Vec<String>, ReadFailure> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) => {
            let failure = system(error);
            return if failure.is_missing() { Ok(Vec::new()) } else { Err(failure) };
        }
    };
    let mut names = Vec::new();
    for entry in entries.take(ENTRIES_MAX) {
        if let Some(name) = entry.map_err(system)?.file_name().to_str().and_then(printable) {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Whether the caller may open `path` for reading and writing, without opening it: opening a VFIO group or device is an
/// act. A wrong yes is possible (a device cgroup, a security module); a no is true.
///
/// # Errors
/// ENOENT, EACCES and the like.
pub fn access_both_ways(path: &Path) -> Result<(), Errno> {
    rustix::fs::accessat(CWD, path, Access::READ_OK | Access::WRITE_OK, AtFlags::EACCESS)
}

fn open(path: &Path) -> Result<File, ReadFailure> {
    // Not to wait for the other end of a pipe that lies there, nor to make a terminal ours.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(ReadFailure::System)?;
    let stat = rustix::fs::fstat(&fd).map_err(ReadFailure::System)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(File::from(fd)),
        _ => Err(ReadFailure::NoFile),
    }
}

fn printable(name: &str) -> Option<String> {
    (!name.is_empty() && !name.contains(is_control)).then(|| name.to_owned())
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn system(error: std::io::Error) -> ReadFailure {
    ReadFailure::System(Errno::from_io_error(&error).unwrap_or(Errno::IO))
}
