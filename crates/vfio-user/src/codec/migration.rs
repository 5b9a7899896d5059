//! Payloads of the migration commands: features, migration data, DMA logging, and the extension's.

use std::fmt;

use super::{CodecError, MAX_LOGGING_RANGES, payload, split};
use crate::model::IovaRange;

/// Bits of the flags that hold the feature's number.
pub const FEATURE_INDEX: u32 = 0xffff;
/// `VFIO_DEVICE_FEATURE_GET`.
pub const FEATURE_GET: u32 = 1 << 16;
/// `VFIO_DEVICE_FEATURE_SET`.
pub const FEATURE_SET: u32 = 1 << 17;
/// `VFIO_DEVICE_FEATURE_PROBE`.
pub const FEATURE_PROBE: u32 = 1 << 18;
/// `VFIO_PRECOPY_INFO_REINIT`.
pub const PRECOPY_REINIT: u32 = 1 << 0;

/// A device feature's number (`VFIO_DEVICE_FEATURE_*`).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Feature(pub u16);

impl Feature {
    /// Migration features of the device. GET.
    pub const MIGRATION: Self = Self(1);
    /// Migration state of the device. GET, SET.
    pub const MIG_DEVICE_STATE: Self = Self(2);
    /// Starts logging DMA writes. SET.
    pub const DMA_LOGGING_START: Self = Self(6);
    /// Stops the log of DMA writes. SET.
    pub const DMA_LOGGING_STOP: Self = Self(7);
    /// Fetches the log. GET.
    pub const DMA_LOGGING_REPORT: Self = Self(8);
    /// Estimated size of the STOP_COPY data. GET. Extension.
    pub const MIG_DATA_SIZE: Self = Self(9);
}

impl fmt::Debug for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Feature({})", self.0)
    }
}

/// Operations on a feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureOp {
    /// Reads the feature.
    Get,
    /// Writes the feature.
    Set,
    /// Reads or writes the feature, in a probe.
    GetSet,
}

impl FeatureOp {
    /// The operation as flags of DEVICE_FEATURE.
    pub fn bits(self) -> u32 {
        match self {
            Self::Get => FEATURE_GET,
            Self::Set => FEATURE_SET,
            Self::GetSet => FEATURE_GET | FEATURE_SET,
        }
    }
}

payload! {
    /// The front of DEVICE_FEATURE, and of its reply.
    FeatureHead {
        /// Room for the reply's payload; in the reply what it needs.
        argsz: u32,
        /// Feature and operation.
        flags: u32,
    }
}

payload! {
    /// Feature 2, `struct vfio_device_feature_mig_state`.
    MigStatePayload {
        /// `enum vfio_device_mig_state`.
        device_state: u32,
        /// Unused here: migration data goes by messages.
        data_fd: u32,
    }
}

payload! {
    /// The front of feature 6; the ranges follow.
    LoggingControl {
        /// Bytes per page of the log: a wish; in the reply the device's choice.
        page_size: u64,
        /// Number of ranges; none means everything.
        num_ranges: u32,
        /// Reserved: zero.
        reserved: u32,
    }
}

payload! {
    /// The front of feature 8; in the reply the bitmap follows.
    LoggingReport {
        /// First bus address of the range.
        iova: u64,
        /// Length in bytes.
        length: u64,
        /// Bytes that one bit stands for.
        page_size: u64,
    }
}

payload! {
    /// The front of MIG_DATA_READ and MIG_DATA_WRITE, and of the reply to the former.
    MigDataHead {
        /// Room for the reply; in the reply what it needs.
        argsz: u32,
        /// Bytes of migration data.
        size: u32,
    }
}

payload! {
    /// Extension: pre-copy estimates, `struct vfio_precopy_info`.
    PrecopyPayload {
        /// Length of this struct.
        argsz: u32,
        /// [`PRECOPY_REINIT`].
        flags: u32,
        /// Left of the initial data.
        initial_bytes: u64,
        /// Bytes that changed since they were read.
        dirty_bytes: u64,
    }
}

/// What follows the [`FeatureHead`] of `body`.
///
/// # Errors
/// `body` is shorter than the head.
pub fn after_feature_head(body: &[u8]) -> Result<&[u8], CodecError> {
    FeatureHead::decode_with_rest(body).map(|(_, rest)| rest)
}

/// A 64-bit number from the front of `bytes`.
///
/// # Errors
/// `bytes` is too short.
pub fn decode_u64(bytes: &[u8]) -> Result<u64, CodecError> {
    split::<8>(bytes).map(|(raw, _)| u64::from_ne_bytes(*raw))
}

/// Appends ranges as feature 6 has them.
pub fn encode_ranges(ranges: &[IovaRange], out: &mut Vec<u8>) {
    for range in ranges {
        out.extend_from_slice(&range.iova.to_ne_bytes());
        out.extend_from_slice(&range.len.to_ne_bytes());
    }
}

/// `count` ranges that fill `bytes`. None is empty or leaves the address space.
///
/// # Errors
/// There are too many, too few bytes or too many, or a range that is not allowed.
pub fn decode_ranges(count: u32, mut bytes: &[u8]) -> Result<Vec<IovaRange>, CodecError> {
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    if count > MAX_LOGGING_RANGES {
        return Err(CodecError::Invalid(format!("{count} ranges to log")));
    }
    let mut ranges = Vec::with_capacity(count);
    for _ in 0..count {
        let (iova, rest) = split::<8>(bytes)?;
        let (len, rest) = split::<8>(rest)?;
        bytes = rest;
        let range = IovaRange { iova: u64::from_ne_bytes(*iova), len: u64::from_ne_bytes(*len) };
        if range.len == 0 || range.iova.checked_add(range.len - 1).is_none() {
            return Err(CodecError::Invalid(format!("the range {range:x?}")));
        }
        ranges.push(range);
    }
    if !bytes.is_empty() {
        return Err(CodecError::Invalid(format!("{} bytes behind the ranges", bytes.len())));
    }
    Ok(ranges)
}

/// How many pages cover `len` bytes; `None` if the page size is no power of two.
pub fn pages(len: u64, page_size: u64) -> Option<u64> {
    page_size.is_power_of_two().then(|| len.div_ceil(page_size))
}

/// ORs the packed `bits` of a report for `pages` pages into `bitmap`; what a server set beyond the last page is dropped.
pub fn or_bitmap(bits: &[u8], pages: u64, bitmap: &mut [u64]) {
    let mut left = pages;
    for (word, raw) in bitmap.iter_mut().zip(bits.as_chunks::<8>().0) {
        let mask = if left >= 64 { u64::MAX } else { (1 << left) - 1 };
        *word |= u64::from_ne_bytes(*raw) & mask;
        left = left.saturating_sub(64);
    }
}
