//! The limit on what is compared for one matrix: a host describes itself, and what it says must not keep whoever asks about the
//! pool busy for as long as it likes.

use crate::findings::Comparing;

/// Most work for one matrix, in items looked at: some seconds. Two of the largest hosts are within it where a parameter or the
/// model tells their devices apart.
pub(super) const MAX_WORK: u64 = 1 << 28;

/// The reason for which a pool has no matrix.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MatrixError {
    /// What would have to be compared is too much.
    #[error(
        "the pool's manifests differ in too much to be compared each with each: ask about fewer hosts at a time, or look for one \
         that describes thousands of devices"
    )]
    TooMuch,
}

/// Ends what takes more work than `most`.
pub(super) fn check(comparing: &Comparing, most: u64) -> Result<(), MatrixError> {
    if comparing.work() > most { Err(MatrixError::TooMuch) } else { Ok(()) }
}
