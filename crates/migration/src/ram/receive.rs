//! The way of RAM out of the stream: pages straight to where they belong, and what is checked of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vfio_migration_memory::{GuestRam, MemoryError};
use vfio_migration_types::{PAGE_SIZE, RamOffset, Range};
use vfio_migration_wire::{Crc, WireError};

use crate::channel::error::ChannelError;
use crate::channel::reader::Reader;

/// Bytes that are read back at once to be checksummed.
const PIECE: usize = 16 << 10;

/// Puts pages into RAM.
#[derive(Debug)]
pub(crate) struct PageReceiver {
    pub(crate) ram: Arc<GuestRam>,
    /// Pages placed, data and zero, each time they came.
    pages: AtomicU64,
    /// Bytes of data placed.
    bytes: AtomicU64,
}

/// The reason why pages were not placed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PagesError {
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("guest memory")]
    Memory(#[from] MemoryError),
    #[error("pages {first} to {last} lie outside of RAM")]
    Outside { first: u64, last: u64 },
    #[error("the peer's stream is damaged")]
    Damaged(#[source] WireError),
}

impl PageReceiver {
    pub(crate) fn new(ram: Arc<GuestRam>) -> Self {
        Self { ram, pages: AtomicU64::new(0), bytes: AtomicU64::new(0) }
    }

    /// Pages placed so far.
    pub(crate) fn pages(&self) -> u64 {
        self.pages.load(Ordering::Relaxed)
    }

    /// Bytes of data placed so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Takes `count` pages, which come next in the stream, from page `first`, and compares their checksum if they have one.
    pub(crate) fn data(
        &self,
        reader: &mut Reader,
        first: u64,
        count: u32,
        crc: Option<u32>,
    ) -> Result<(), PagesError> {
        let range = self.range(first, count.into())?;
        reader.body(&mut self.ram.pieces(&[range])?)?;
        if let Some(announced) = crc {
            self.check(range, announced)?;
        }
        self.pages.fetch_add(count.into(), Ordering::Relaxed);
        self.bytes.fetch_add(range.len(), Ordering::Relaxed);
        Ok(())
    }

    /// Makes `count` pages from page `first` zero.
    pub(crate) fn zeros(&self, first: u64, count: u64) -> Result<(), PagesError> {
        let range = self.range(first, count)?;
        self.ram.zero(range)?;
        self.pages.fetch_add(count, Ordering::Relaxed);
        Ok(())
    }

    /// Read back from where the guest will find it.
    fn check(&self, range: Range<RamOffset>, announced: u32) -> Result<(), PagesError> {
        let mut found = Crc::new();
        let mut piece = [0; PIECE];
        for at in (range.start().0..range.end()).step_by(PIECE) {
            let len = usize::try_from(range.end() - at).map_or(PIECE, |left| left.min(PIECE));
            let Some(piece) = piece.get_mut(..len) else { break };
            self.ram.read(RamOffset(at), piece)?;
            found.update(piece);
        }
        found.check_body(announced).map_err(PagesError::Damaged)
    }

    fn range(&self, first: u64, count: u64) -> Result<Range<RamOffset>, PagesError> {
        let outside = PagesError::Outside { first, last: first.saturating_add(count.saturating_sub(1)) };
        let end = first.checked_add(count).and_then(|end| end.checked_mul(PAGE_SIZE));
        match end.filter(|end| *end <= self.ram.size()) {
            Some(end) => {
                let start = first * PAGE_SIZE;
                Range::new(RamOffset(start), end - start).map_err(|_| outside)
            }
            None => Err(outside),
        }
    }
}
