//! The layout around the frames: how a file begins and how it ends.

/// The first bytes of every snapshot, before the layout's number.
pub(super) const MAGIC: [u8; 7] = *b"VFIOSNP";
/// The layout that this program writes and reads.
pub(super) const VERSION: u8 = 1;
/// The first bytes of the trailer.
pub(super) const END: [u8; 8] = *b"VFIOSEND";
/// Bytes before the first frame.
pub(super) const HEAD_LEN: u64 = 8;
/// Bytes of a BLAKE3 digest.
pub(super) const DIGEST_LEN: u64 = 32;
/// The trailer: its magic, the length of the whole file, and the digest of everything before the digest.
pub(super) const TRAILER_LEN: u64 = 8 + 8 + DIGEST_LEN;
