//! Errors of the ioctls.

use rustix::io::Errno;
use vfio_migration_types::{GranuleError, UnknownState};

/// Why a call of the uAPI failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UapiError {
    /// The kernel refused a call.
    #[error("{doing} failed")]
    System {
        /// Call that failed, as a noun phrase.
        doing: &'static str,
        /// Errno of the call.
        #[source]
        source: Errno,
    },
    /// The device reports migration support without STOP_COPY, which the uAPI rules out.
    #[error("the device reports migration flags {0:#x}, without STOP_COPY")]
    NoStopCopy(u64),
    /// The device is in a state that this version does not know.
    #[error("the device reports an unknown migration state")]
    UnknownState(#[source] UnknownState),
    /// The device logs in pages of a size that no dirty bitmap has.
    #[error("the device logs DMA in pages of an unusable size")]
    UnusablePageSize(#[source] GranuleError),
    /// More ranges than the structure can count.
    #[error("{0} ranges are more than DMA logging can be asked for")]
    TooManyRanges(usize),
    /// More interrupts in one call than a device can have.
    #[error("{0} interrupts are more than a device has")]
    TooManyInterrupts(usize),
    /// The host has fewer interrupts than it was asked for, and the kernel has enabled none.
    #[error("the host has {possible} of the {wanted} interrupts asked for, and enabled none")]
    FewerInterrupts {
        /// Interrupts of the kind that the call would have had in use, counted from the first.
        wanted: u32,
        /// Interrupts that could be had, at least 1: so many may be asked for instead.
        possible: u32,
    },
    /// An answer of the kernel whose capabilities lead nowhere: a driver's fault.
    #[error("the device describes itself inconsistently: {0}")]
    BadCapability(&'static str),
    /// The kernel speaks another version of the VFIO API.
    #[error("the kernel speaks VFIO API version {0}, not 0")]
    ApiVersion(i32),
    /// More pages than one report can be of.
    #[error("a range of {0:#x} bytes has more pages than one report of dirty pages takes")]
    ReportTooLong(u64),
    /// The range is mapped already, or overlaps one that is.
    #[error("the range {iova:#x}+{len:#x} overlaps one that is mapped")]
    Overlaps {
        /// First address of the range.
        iova: u64,
        /// Length of the range, in bytes.
        len: u64,
    },
    /// The range is not mapped as it was named.
    #[error("the range {iova:#x}+{len:#x} is not mapped")]
    NotMapped {
        /// First address of the range.
        iova: u64,
        /// Length of the range, in bytes.
        len: u64,
    },
    /// The memory is not as long as the range that it is to appear at.
    #[error("{memory:#x} bytes of memory for a range of {range:#x}")]
    WrongLength {
        /// Bytes of the memory.
        memory: u64,
        /// Bytes of the range.
        range: u64,
    },
    /// The range is not made of whole pages of the size asked for.
    #[error("the range {iova:#x}+{len:#x} is not made of whole pages of {page_size:#x} bytes")]
    Misaligned {
        /// First address of the range.
        iova: u64,
        /// Length of the range, in bytes.
        len: u64,
        /// Page size that was asked for, in bytes.
        page_size: u64,
    },
    /// The caller's bitmap has no room for the report.
    #[error("a bitmap of {words} words for a report of {needed}")]
    BitmapTooSmall {
        /// 64-bit words that there are.
        words: usize,
        /// 64-bit words that the report takes.
        needed: u64,
    },
}

impl UapiError {
    /// The kernel's errno, if it was the kernel that refused.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::System { source, .. } => Some(*source),
            _ => None,
        }
    }

    /// Whether the device (or its driver, or the kernel) does not have what it was asked for: ENOTTY.
    ///
    /// One exception: a kernel built without `CONFIG_IOMMUFD_DRIVER` lets DMA logging start and answers each report
    /// with EOPNOTSUPP (`include/linux/iova_bitmap.h`); that counts as well.
    pub fn is_unsupported(&self) -> bool {
        matches!(self.errno(), Some(Errno::NOTTY | Errno::OPNOTSUPP))
    }
}
