//! The protocol without I/O: headers, payloads, negotiation. **Unstable**: it may change in any version of this crate.
//!
//! Every decoder takes a bounded slice and returns an error instead of panicking, whatever the bytes; every encoder
//! appends to a vector. Numbers are in the byte order of the host, as the specification has it: both ends are on one
//! machine. Payload structs carry the names of the specification; their offsets are its.

mod device;
mod header;
mod migration;
mod version;

pub use device::{
    CapHeader, DMA_UNMAP_ALL, DMA_UNMAP_DIRTY_BITMAP, DmaAccess, DmaMapPayload, DmaUnmapPayload, InfoPayload,
    IoFdEntry, IoFdsPayload, IrqSetPayload, RegionAccess, RegionInfoPayload, WriteOne, decode_io_fds,
    decode_multi, decode_multi_reply, decode_sparse_areas, dma_flags, encode_multi, encode_sparse_areas,
    irq_flags, prot_of_flags,
};
pub use device::{
    DEVICE_FLAGS_PCI, DEVICE_FLAGS_RESET, IO_FD_EVENTFD, IO_FD_REGIONFD, REGION_FLAG_CAPS, REGION_FLAG_MMAP,
    REGION_FLAG_READ, REGION_FLAG_WRITE,
};
pub use header::{Command, HEADER_SIZE, Header, Kind};
pub use migration::{
    FEATURE_GET, FEATURE_INDEX, FEATURE_PROBE, FEATURE_SET, Feature, FeatureHead, FeatureOp, LoggingControl,
    LoggingReport, MigDataHead, MigStatePayload, PRECOPY_REINIT, PrecopyPayload, after_feature_head,
    decode_ranges, decode_u64, encode_ranges, or_bitmap, pages,
};
pub use version::{Extension, TwinSocket, VersionCapabilities, VersionPayload};

/// `max_data_xfer_size` where a peer announces none, in bytes.
pub const DEFAULT_MAX_DATA_XFER_SIZE: u32 = 1 << 20;
/// `max_msg_fds` where a peer announces none.
pub const DEFAULT_MAX_MSG_FDS: u32 = 1;
/// `max_dma_maps` where a peer announces none.
pub const DEFAULT_MAX_DMA_MAPS: u32 = 65535;
/// `pgsizes` where a peer announces none: 4 KiB.
pub const DEFAULT_PGSIZES: u64 = 4096;
/// The most descriptors that this crate takes or sends in one message; the kernel's own limit is 253.
pub const MAX_MSG_FDS: u32 = 64;
/// The largest `max_data_xfer_size` that this crate agrees to, in bytes, whatever both sides announce.
pub const MAX_DATA_XFER_SIZE: u32 = 64 << 20;
/// The most interrupts in one SET_IRQS: MSI-X ends at 2048.
pub const MAX_IRQS: usize = 2048;
/// The most mappable areas of one region: each is a mapping of the client's, of which a process has 65,530.
pub const MAX_MMAP_AREAS: usize = 64;
/// The most descriptors that accesses to one region may go to: each is one of KVM's ioeventfds, of which a machine has 1000.
pub const MAX_IO_FDS: usize = 128;
/// The most writes in one REGION_WRITE_MULTI, as QEMU has it.
pub const MAX_MULTI_WRITES: usize = 200;
/// The most ranges in one DMA_LOGGING_START.
pub const MAX_LOGGING_RANGES: usize = 4096;
/// Length of one of them in bytes.
pub const LOGGING_RANGE_SIZE: usize = 16;
/// The most 64-bit words in the bitmap of one report: 64 MiB, for 2 TiB in pages of 4 KiB.
pub const MAX_BITMAP_WORDS: usize = 8 << 20;
/// The most bytes of JSON in a VERSION message.
pub const MAX_VERSION_DATA: usize = 64 << 10;

/// Bytes that do not make the message they should.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// The slice ends too early.
    #[error("{have} bytes where {need} are needed")]
    Truncated {
        /// Least length of the payload, in bytes.
        need: usize,
        /// Length of the payload that came, in bytes.
        have: usize,
    },
    /// A value that is not allowed.
    #[error("{0}")]
    Invalid(String),
}

/// Takes the first `N` bytes off `bytes`.
pub(crate) fn split<const N: usize>(bytes: &[u8]) -> Result<(&[u8; N], &[u8]), CodecError> {
    bytes.split_first_chunk::<N>().ok_or(CodecError::Truncated { need: N, have: bytes.len() })
}

/// Defines a payload struct of integers, packed in the order given, with its codec.
macro_rules! payload {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $type,)*
        }

        impl $name {
            /// Length in bytes.
            pub const SIZE: usize = 0 $(+ std::mem::size_of::<$type>())*;

            /// Reads the struct from the front of `bytes`; what follows is returned.
            ///
            /// # Errors
            /// `bytes` is shorter than the struct.
            pub fn decode_with_rest(bytes: &[u8]) -> Result<(Self, &[u8]), $crate::codec::CodecError> {
                if bytes.len() < Self::SIZE {
                    return Err($crate::codec::CodecError::Truncated { need: Self::SIZE, have: bytes.len() });
                }
                let rest = bytes;
                $(
                    let (raw, rest) = $crate::codec::split::<{ std::mem::size_of::<$type>() }>(rest)?;
                    let $field = <$type>::from_ne_bytes(*raw);
                )*
                Ok((Self { $($field),* }, rest))
            }

            /// Reads the struct from the front of `bytes`; what follows is ignored, for later versions to add to it.
            ///
            /// # Errors
            /// `bytes` is shorter than the struct.
            pub fn decode_prefix(bytes: &[u8]) -> Result<Self, $crate::codec::CodecError> {
                Self::decode_with_rest(bytes).map(|(payload, _)| payload)
            }

            /// Reads the struct from `bytes`, which hold nothing else.
            ///
            /// # Errors
            /// `bytes` is shorter or longer than the struct.
            pub fn decode_exact(bytes: &[u8]) -> Result<Self, $crate::codec::CodecError> {
                match Self::decode_with_rest(bytes)? {
                    (payload, []) => Ok(payload),
                    (_, rest) => Err($crate::codec::CodecError::Invalid(format!(
                        "{} bytes beyond the {} of the request", rest.len(), Self::SIZE
                    ))),
                }
            }

            /// Appends the struct to `out`.
            pub fn encode(&self, out: &mut Vec<u8>) {
                $(out.extend_from_slice(&self.$field.to_ne_bytes());)*
            }

            /// The struct as it is on the wire.
            pub fn to_vec(&self) -> Vec<u8> {
                let mut out = Vec::with_capacity(Self::SIZE);
                self.encode(&mut out);
                out
            }
        }
    };
}
pub(crate) use payload;
