//! Addresses of the four spaces a migration deals with, as types that do not mix.
//!
//! A host virtual address has no type here: only `memory` may hold one.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The address `bytes` further on, or `None` when that leaves the 64-bit space.
            pub fn checked_add(self, bytes: u64) -> Option<Self> {
                self.0.checked_add(bytes).map(Self)
            }

            /// Bytes from `base` up to this address, or `None` when this address lies below it.
            pub fn offset_from(self, base: Self) -> Option<u64> {
                self.0.checked_sub(base.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl From<$name> for u64 {
            fn from(address: $name) -> u64 {
                address.0
            }
        }
    };
}

address! {
    /// A guest physical address, in bytes.
    Gpa
}
address! {
    /// An address as a device puts it on its bus, in bytes. Equal to the [`Gpa`] only while no vIOMMU translates.
    Iova
}
address! {
    /// A byte offset into the guest's RAM laid end to end, holes of the physical map left out.
    ///
    /// The unit in which dirty bitmaps and the stream count: it is dense, so a guest with a 32-bit hole wastes no bits.
    RamOffset
}

/// A half-open, non-empty range `start .. start + len` of one address space. Its end fits in 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Range<A> {
    start: A,
    len: u64,
}

/// The reason a range is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RangeError {
    /// The length is zero.
    #[error("a range of no bytes at {0:#x}")]
    Empty(u64),
    /// `start + len` does not fit in 64 bits.
    #[error("the range {0:#x}+{1:#x} leaves the 64-bit address space")]
    Overflow(u64, u64),
}

impl<A: Copy + Into<u64>> Range<A> {
    /// The range of `len` bytes (at least one) from `start`.
    pub fn new(start: A, len: u64) -> Result<Self, RangeError> {
        let first: u64 = start.into();
        if len == 0 {
            return Err(RangeError::Empty(first));
        }
        first.checked_add(len).ok_or(RangeError::Overflow(first, len))?;
        Ok(Self { start, len })
    }

    /// The range's first address, which is in it.
    pub fn start(&self) -> A {
        self.start
    }

    /// Length in bytes, at least one.
    // A range is never empty, so there is no `is_empty` to go with it.
    #[expect(clippy::len_without_is_empty, reason = "a range is never empty")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// First address past the range.
    pub fn end(&self) -> u64 {
        self.start.into() + self.len
    }

    /// Whether `address` lies inside.
    pub fn contains(&self, address: A) -> bool {
        let address: u64 = address.into();
        address >= self.start.into() && address < self.end()
    }

    /// Whether the two ranges share an address.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.start.into() < other.end() && other.start.into() < self.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_refuse_nothing_and_overflow() {
        assert_eq!(Range::new(Gpa(4096), 0), Err(RangeError::Empty(4096)));
        assert_eq!(Range::new(Gpa(u64::MAX), 1), Err(RangeError::Overflow(u64::MAX, 1)));
        let range = Range::new(Gpa(u64::MAX - 1), 1).unwrap();
        assert_eq!(range.end(), u64::MAX);
        assert!(range.contains(Gpa(u64::MAX - 1)) && !range.contains(Gpa(u64::MAX)));
    }

    #[test]
    fn overlap_is_symmetric_and_excludes_neighbours() {
        let a = Range::new(Iova(0), 4096).unwrap();
        let b = Range::new(Iova(4096), 4096).unwrap();
        let c = Range::new(Iova(4095), 2).unwrap();
        assert!(!a.overlaps(&b) && !b.overlaps(&a));
        assert!(a.overlaps(&c) && c.overlaps(&a) && c.overlaps(&b));
    }
}
