//! Negative controls: one thing broken on purpose, below the engine's own checks. They prove that the checks see it.

use std::collections::BTreeMap;

use vfio_migration_memory::GuestRam;
use vfio_migration_types::{Bitmap, Granule, PAGE_SIZE, Phase, RamOffset, Range};

use crate::channel::link::Link;
use crate::options::{Sabotage, SabotageKind};
use crate::session::fail::InPhase;
use crate::session::work_error::WorkError;

/// Most old copies kept: 64 MiB.
const MOST_COPIES: usize = 16_384;
/// Most pages sent stale: enough to be found, few enough for the guest to live.
const MOST_VICTIMS: u64 = 64;

/// Does what a [`Sabotage`] says; nothing at all without one.
#[derive(Debug, Default)]
pub(super) struct Saboteur {
    plan: Option<Sabotage>,
    copies: BTreeMap<u64, Vec<u8>>,
}

impl Saboteur {
    pub(super) fn new(plan: Option<Sabotage>) -> Self {
        Self { plan, copies: BTreeMap::new() }
    }

    pub(super) fn hides_device_log(&self) -> bool {
        self.does(SabotageKind::DropDeviceLog)
    }

    pub(super) fn breaks_p2p_order(&self) -> bool {
        self.does(SabotageKind::P2pOrder)
    }

    pub(super) fn alters_device_tail(&self) -> bool {
        self.does(SabotageKind::DeviceTail)
    }

    /// Drops the bits of what a report found. Every report loses them: a page hidden once and seen the next time would
    /// arrive whole.
    pub(super) fn hide_dirty(&self, dirty: &mut Bitmap) {
        if !self.does(SabotageKind::DropDirtyBit) {
            return;
        }
        let victims: Vec<u64> = self.victims(dirty).collect();
        for page in victims {
            dirty.clear(page);
        }
    }

    /// Keeps what pages hold now, about to be sent for the first time: copies that will be old one day.
    pub(super) fn remember(&mut self, ram: &GuestRam, pages: &Bitmap) {
        if !self.does(SabotageKind::StaleAfterLast) || !self.copies.is_empty() {
            return;
        }
        let victims: Vec<u64> = self.victims(pages).take(MOST_COPIES).collect();
        for page in victims {
            let mut copy = vec![0; 4096];
            if ram.read(RamOffset(page * PAGE_SIZE), &mut copy).is_ok() {
                self.copies.insert(page, copy);
            }
        }
    }

    /// Sends first copies of pages that have been written since, and all of which have been sent for the last time. Returns
    /// the pages sent.
    pub(super) fn send_stale(&self, ram: &GuestRam, link: &Link) -> Result<u64, WorkError> {
        if !self.does(SabotageKind::StaleAfterLast) {
            return Ok(0);
        }
        let mut written = Bitmap::new(ram.size(), Granule::PAGE);
        for extent in ram.data_extents().map_err(|error| error.in_phase(Phase::Final))? {
            written.set_range(extent.start().0 / PAGE_SIZE, extent.len() / PAGE_SIZE);
        }
        let (zero, mut now) = (vec![0; 4096], vec![0; 4096]);
        let mut sent = 0;
        for page in self.victims(&written) {
            let old = match self.copies.get(&page) {
                Some(old) => old,
                // Not there at first: a page nobody had written yet.
                None if self.copies.len() < MOST_COPIES => &zero,
                None => continue,
            };
            let Ok(range) = Range::new(RamOffset(page * PAGE_SIZE), PAGE_SIZE) else { continue };
            ram.read_pages_into(range, &mut now).map_err(|error| error.in_phase(Phase::Final))?;
            if now != *old && sent < MOST_VICTIMS {
                link.send_page_copy(page, old).map_err(|error| WorkError::sending(error, Phase::Final))?;
                sent += 1;
            }
        }
        Ok(sent)
    }

    fn does(&self, kind: SabotageKind) -> bool {
        self.plan.as_ref().is_some_and(|plan| plan.kind == kind)
    }

    /// Dirty pages within the plan's stretch.
    fn victims<'a>(&'a self, pages: &'a Bitmap) -> impl Iterator<Item = u64> + 'a {
        let stretch = self.plan.as_ref().and_then(|plan| plan.pages.clone());
        pages.runs().flat_map(|run| run.first..run.first + run.count).filter(move |page| {
            stretch.as_ref().is_none_or(|stretch| stretch.contains(&RamOffset(page * PAGE_SIZE)))
        })
    }
}
