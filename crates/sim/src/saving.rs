//! A saving session: what is left to send, and in which order.

use vfio_migration_types::{Bitmap, Granule, PAGE_SIZE};

use crate::bulk::{BulkState, PAGE};
use crate::pci::BAR2_SIZE;
use crate::regs::ENCODED;
use crate::stream::{self, HEADER, RECORD, RecordKind, StreamHeader, TRAILER};

/// Pages per record.
const RUN: u64 = (stream::MAX_PAYLOAD / PAGE) as u64;

/// Pre-copy estimates, in bytes, as `struct vfio_precopy_info` has them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SamplePrecopy {
    /// Left of the initial data.
    pub initial_bytes: u64,
    /// Changed since it was read.
    pub dirty_bytes: u64,
    /// The initial data began anew since the last time this was asked.
    pub reinit: bool,
}

/// An open saving session, in pre-copy until [`stop`](Self::stop).
#[derive(Debug)]
pub(crate) struct SampleSaving {
    header: Option<StreamHeader>,
    /// Bytes made and not yet read, from `staged[at..]`.
    staged: Vec<u8>,
    at: usize,
    /// Whether what is staged belongs to the initial data.
    staged_initial: bool,
    /// Next page of the initial pass over the whole bulk state.
    cursor: u64,
    pages: u64,
    reinit: bool,
    /// Bytes staged so far.
    made: u64,
    rest: Option<Rest>,
    /// Alter the last page of the stream, by a scripted fault.
    corrupt: bool,
}

/// The part that is sent at the end, with the device stopped.
#[derive(Debug)]
struct Rest {
    mailbox: Vec<u8>,
    next_mailbox: usize,
    registers: Option<[u8; ENCODED]>,
    trailer: bool,
}

impl SampleSaving {
    /// Opens a session: from now on `bulk` tracks what changes.
    pub(crate) fn open(bulk: &mut BulkState, header: StreamHeader, corrupt: bool) -> Self {
        bulk.tracking = Some(Bitmap::new(bulk.pages() * PAGE_SIZE, Granule::PAGE));
        bulk.reinit = false;
        Self {
            header: Some(header),
            staged: Vec::new(),
            at: 0,
            staged_initial: true,
            cursor: 0,
            pages: bulk.pages(),
            reinit: false,
            made: 0,
            rest: None,
            corrupt,
        }
    }

    /// Ends the tracking of changed pages.
    pub(crate) fn close(bulk: &mut BulkState) {
        bulk.tracking = None;
        bulk.reinit = false;
    }

    /// Whether the device is stopped.
    pub(crate) fn stopped(&self) -> bool {
        self.rest.is_some()
    }

    /// Enters STOP_COPY with what the device has besides its bulk state.
    pub(crate) fn stop(&mut self, bulk: &mut BulkState, mailbox: Vec<u8>, registers: [u8; ENCODED]) {
        self.take_reinit(bulk);
        if self.corrupt
            && self.cursor == self.pages
            && let Some((tracking, last)) = bulk.tracking.as_mut().zip(self.pages.checked_sub(1))
        {
            tracking.set(last);
        }
        self.rest = Some(Rest { mailbox, next_mailbox: 0, registers: Some(registers), trailer: true });
    }

    /// Fills the front of `into`; 0 when there is nothing (left).
    pub(crate) fn read(&mut self, bulk: &mut BulkState, into: &mut [u8]) -> usize {
        let mut filled = 0;
        while filled < into.len() {
            if self.at == self.staged.len() {
                self.staged.clear();
                self.at = 0;
                if !self.make(bulk) {
                    break;
                }
                self.made += self.staged.len() as u64;
            }
            let left = &self.staged[self.at..];
            let count = left.len().min(into.len() - filled);
            into[filled..filled + count].copy_from_slice(&left[..count]);
            filled += count;
            self.at += count;
        }
        filled
    }

    pub(crate) fn progress(&mut self, bulk: &mut BulkState) -> SamplePrecopy {
        self.take_reinit(bulk);
        let header = if self.header.is_some() { HEADER as u64 } else { 0 };
        let left = self.pages - self.cursor;
        let staged = (self.staged.len() - self.at) as u64;
        let (initial, dirty) = if self.staged_initial { (staged, 0) } else { (0, staged) };
        SamplePrecopy {
            initial_bytes: header + initial + left * PAGE_SIZE + left.div_ceil(RUN) * RECORD as u64,
            dirty_bytes: dirty + dirty_pages(bulk) * (PAGE + RECORD) as u64,
            reinit: std::mem::take(&mut self.reinit),
        }
    }

    /// Bytes that are left, if the device stopped now with so many pages in its mailbox.
    pub(crate) fn left(&self, bulk: &BulkState, mailbox_pages: u64) -> u64 {
        let initial = if bulk.reinit { self.pages } else { self.pages - self.cursor };
        let header = if self.header.is_some() { HEADER as u64 } else { 0 };
        let staged = (self.staged.len() - self.at) as u64;
        let rest = match &self.rest {
            Some(rest) if !rest.trailer => 0,
            _ => tail_bytes(mailbox_pages),
        };
        header
            + staged
            + initial * PAGE_SIZE
            + initial.div_ceil(RUN) * RECORD as u64
            + dirty_pages(bulk) * (PAGE + RECORD) as u64
            + rest
    }

    fn take_reinit(&mut self, bulk: &mut BulkState) {
        if std::mem::take(&mut bulk.reinit) && self.rest.is_none() {
            self.reinit = true;
            self.cursor = 0;
            if let Some(tracking) = &mut bulk.tracking {
                tracking.clear_all();
            }
        }
    }

    /// Stages the next piece of the stream. Returns whether there was one.
    fn make(&mut self, bulk: &mut BulkState) -> bool {
        self.take_reinit(bulk);
        self.staged_initial = true;
        if let Some(header) = self.header.take() {
            stream::put_header(&mut self.staged, header);
            return true;
        }
        if self.cursor < self.pages {
            let count = RUN.min(self.pages - self.cursor);
            self.make_pages(bulk, self.cursor, count);
            self.cursor += count;
            return true;
        }
        self.staged_initial = false;
        let dirty = bulk.tracking.as_ref().and_then(|tracking| tracking.runs().next());
        if let Some(run) = dirty {
            self.make_pages(bulk, run.first, run.count.min(RUN));
            return true;
        }
        let Some(rest) = &mut self.rest else { return false };
        for (n, page) in rest.mailbox.chunks(PAGE).enumerate().skip(rest.next_mailbox) {
            rest.next_mailbox = n + 1;
            if page.iter().any(|byte| *byte != 0) {
                let mut page = page.to_vec();
                if std::mem::take(&mut self.corrupt) {
                    page[PAGE / 2] ^= 1;
                }
                stream::put_record(&mut self.staged, RecordKind::Mailbox, (n * PAGE) as u64, &page);
                return true;
            }
        }
        if let Some(registers) = rest.registers.take() {
            stream::put_record(&mut self.staged, RecordKind::Registers, 0, &registers);
            return true;
        }
        if std::mem::take(&mut rest.trailer) {
            stream::put_trailer(&mut self.staged, self.made, bulk.generations());
            return true;
        }
        false
    }

    fn make_pages(&mut self, bulk: &mut BulkState, first: u64, count: u64) {
        if let Some(tracking) = &mut bulk.tracking {
            tracking.clear_range(first, count);
        }
        let pages = bulk.run(first, count);
        if self.corrupt && self.rest.is_some() && first + count == self.pages {
            self.corrupt = false;
            let mut altered = pages.to_vec();
            let at = altered.len() - PAGE / 2;
            altered[at] ^= 1;
            stream::put_record(&mut self.staged, RecordKind::Pages, first, &altered);
        } else {
            stream::put_record(&mut self.staged, RecordKind::Pages, first, pages);
        }
    }
}

/// Bytes of a whole stream of a device with so much state.
pub(crate) fn whole(state_size: u64, mailbox_pages: u64) -> u64 {
    let pages = state_size / PAGE_SIZE;
    HEADER as u64 + state_size + pages.div_ceil(RUN) * RECORD as u64 + tail_bytes(mailbox_pages)
}

/// Bytes of what follows the bulk state.
fn tail_bytes(mailbox_pages: u64) -> u64 {
    let pages = mailbox_pages.min(BAR2_SIZE / PAGE_SIZE);
    pages * (PAGE + RECORD) as u64 + (2 * RECORD + ENCODED + TRAILER) as u64
}

fn dirty_pages(bulk: &BulkState) -> u64 {
    bulk.tracking.as_ref().map_or(0, Bitmap::count)
}
