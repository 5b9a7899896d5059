//! Errors of guest memory and dirty logs.

use std::error::Error;

use vfio_migration_types::{Gpa, error_chain};

/// An error of guest RAM, of a mapping, or of a dirty page source.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// A system call failed.
    #[error("{doing} failed")]
    System {
        /// The system call's purpose, as a noun phrase.
        doing: String,
        /// The call's errno.
        #[source]
        source: rustix::io::Errno,
    },
    /// A dirty log failed.
    #[error("the dirty log of {source_name} failed: {doing}")]
    DirtyLog {
        /// Name of the dirty page source.
        source_name: String,
        /// The source's step that failed, as a noun phrase.
        doing: String,
        /// The source's own error.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// A dirty log was started twice.
    #[error("the dirty log of {source_name} already runs")]
    AlreadyLogging {
        /// Name of the dirty page source.
        source_name: String,
    },
    /// A dirty log that does not run was asked what is dirty.
    #[error("the dirty log of {source_name} does not run")]
    NotLogging {
        /// Name of the dirty page source.
        source_name: String,
    },
    /// More than one of several sources failed, or one failed and so did its rollback. Each with its causes.
    #[error("{doing} failed: {}", list(.errors))]
    Several {
        /// The purpose of the access, as a noun phrase.
        doing: String,
        /// The failures, in the order in which they happened.
        errors: Vec<MemoryError>,
    },
    /// The RAM asked for cannot be laid out.
    #[error("guest RAM cannot be laid out: {0}")]
    Layout(String),
    /// What is behind a region of guest RAM cannot be used as it.
    #[error("guest RAM at {gpa}+{len:#x} cannot be used")]
    Region {
        /// Guest physical address of the region.
        gpa: Gpa,
        /// The region's size in bytes.
        len: u64,
        /// What is wrong with it.
        #[source]
        why: RegionError,
    },
    /// The RAM asked for is more than the host has.
    #[error(
        "{wanted} bytes of guest RAM do not fit this host, which has {available} bytes of memory and swap"
    )]
    TooLarge {
        /// Size asked for, in bytes.
        wanted: u64,
        /// Bytes of the host's memory and swap, used or not.
        available: u64,
    },
    /// An access leaves the memory.
    #[error("{len:#x} bytes at {offset:#x} leave the {size:#x} bytes of memory")]
    OutOfBounds {
        /// First byte of the range, from the start of RAM.
        offset: u64,
        /// Length of the range, in bytes.
        len: u64,
        /// Bytes that there are.
        size: u64,
    },
    /// An access is not aligned as it must be.
    #[error("{len:#x} bytes at {offset:#x} are not aligned to {align}")]
    Misaligned {
        /// First byte of the range, from the start of RAM.
        offset: u64,
        /// Length of the range, in bytes.
        len: u64,
        /// The size that both must be a multiple of, in bytes.
        align: u64,
    },
    /// A file is smaller than the part of it that was to be mapped: touching it would raise SIGBUS.
    #[error("the file has {size:#x} bytes, too few to map {len:#x} at {offset:#x}")]
    FileTooSmall {
        /// Offset in the file.
        offset: u64,
        /// Length of the mapping, in bytes.
        len: u64,
        /// Bytes of the file.
        size: u64,
    },
    /// A write to a mapping that was made for reading.
    #[error("the memory is mapped for reading alone")]
    ReadOnly,
}

/// The reason why a region of guest RAM cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegionError {
    /// Its place in this process is not made of whole pages.
    #[error("its host address {address:#x} is not a multiple of its page size of {page} bytes")]
    HostAddress {
        /// The host address given.
        address: u64,
        /// The region's page size in bytes.
        page: u64,
    },
    /// Its place in its file is not made of whole pages.
    #[error("its file offset {offset:#x} is not a multiple of its page size of {page} bytes")]
    FileOffset {
        /// The file offset given.
        offset: u64,
        /// The region's page size in bytes.
        page: u64,
    },
    /// Its host addresses leave the address space.
    #[error("its host addresses leave the address space")]
    AddressSpace,
    /// Two regions are one memory.
    #[error("it is the same memory as the region at {other}")]
    SameMemory {
        /// Guest physical address of the other region.
        other: Gpa,
    },
    /// The file ends too early, or was made shorter after it had been lent.
    #[error("its file has {size:#x} bytes, and it needs {needed:#x}: an access would end in SIGBUS")]
    FileTooSmall {
        /// Bytes of the file.
        size: u64,
        /// Bytes that it must have for the region.
        needed: u64,
    },
    /// The descriptor is no file that memory can be.
    #[error("its descriptor is neither a memory file nor a regular one")]
    NoMemoryFile,
    /// The file of a shared region cannot be written.
    #[error("its descriptor was not opened for reading and writing, and the region is shared")]
    FileReadOnly,
    /// Anonymous memory with a descriptor.
    #[error("it is said to be anonymous, and has a file")]
    AnonymousFile,
    /// A private mapping of a file whose first contents are known to be none.
    #[error("it is said to be fresh, and shows what its file holds")]
    FreshFile,
    /// The file has pages of another size.
    #[error("it is said to have pages of {said} bytes, and its file has pages of {found}")]
    PageSize {
        /// The size given, in bytes.
        said: u64,
        /// The size of the file's pages, in bytes.
        found: u64,
    },
    /// It cannot be read or written here.
    #[error("it is not mapped for reading and writing")]
    Protection,
    /// A bitmap whose bits are not pages that dirty logs count in.
    #[error("its dirty bitmap does not count pages of a power of two, at least 4096 bytes")]
    BitmapPages,
    /// A range of its file was to stand for it, and is a file's contents.
    #[error("it is a private mapping, and what its file holds is not what the guest sees")]
    PrivateFile,
    /// A system call failed.
    #[error("{doing} failed")]
    System {
        /// The system call's purpose, as a noun phrase.
        doing: &'static str,
        /// The call's errno.
        #[source]
        source: rustix::io::Errno,
    },
}

impl MemoryError {
    /// The errno of the system call that failed, where it was one.
    pub fn errno(&self) -> Option<rustix::io::Errno> {
        match self {
            Self::System { source, .. } | Self::Region { why: RegionError::System { source, .. }, .. } => {
                Some(*source)
            }
            _ => None,
        }
    }

    pub(crate) fn system(doing: &str) -> impl FnOnce(rustix::io::Errno) -> Self + '_ {
        move |source| Self::System { doing: doing.to_owned(), source }
    }
}

fn list(errors: &[MemoryError]) -> String {
    errors.iter().map(|error| error_chain(error)).collect::<Vec<_>>().join("; ")
}
