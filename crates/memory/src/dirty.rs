//! Sources of dirty pages: KVM's log, a device's log, the VMM's own writes.

use std::fmt;

use vfio_migration_types::{Bitmap, RamOffset, Range};

use crate::error::MemoryError;

/// Something that knows which guest pages were written since it was last asked.
///
/// The dirty set of a guest is the union of its sources: the hypervisor's log of vCPU writes, each device's log of
/// DMA writes, and the VMM's own writes. A page that two of them name is still one page of the union.
///
/// After [`start`](Self::start) returned, no write is missed until [`stop`](Self::stop): a source that cannot keep
/// this promise for some range must report the whole range each time, or tell of it by [`coverage`](Self::coverage).
pub trait DirtySource: fmt::Debug + Send + Sync {
    /// The source's name, for messages: `"kvm"`, `"device net0"`, `"vmm"`.
    fn name(&self) -> String;

    /// The RAM in which it sees each write that is its to report. Asked before it is started and after the guest has stopped, and
    /// answered at once, by what is known here.
    ///
    /// There is no answer that goes without saying: a write that nobody sees is a page that nobody sends.
    fn coverage(&self) -> Coverage;

    /// Begins logging with a clean slate. Starting a source that already logs is an error.
    fn start(&self) -> Result<(), MemoryError>;

    /// ORs into `into` — indexed by RAM offset, at any granule — all that was written since the last report, and
    /// forgets it.
    ///
    /// # Errors
    /// The log is no longer to be trusted: the caller treats everything the source covers as dirty, or gives up.
    fn report(&self, into: &mut Bitmap) -> Result<(), MemoryError>;

    /// Whether writes to the page at `offset` are this source's to report: a source of writes that reach a part of RAM
    /// alone, such as a device's DMA, says so of that part. For messages.
    fn covers(&self, offset: RamOffset) -> bool {
        let _ = offset;
        true
    }

    /// Ends logging. Stopping a source that does not log succeeds, so that a rollback may always call it.
    fn stop(&self) -> Result<(), MemoryError>;
}

/// The RAM in which a [`DirtySource`] sees each write that is its to report: those of its own writers, not of others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Coverage {
    /// It misses none, wherever in RAM.
    All,
    /// It misses none in these ranges, in any order, and all that its writers write elsewhere.
    Regions {
        /// The ranges.
        seen: Vec<Range<RamOffset>>,
        /// The reason for no more, in words that leave the source's name to whoever shows it.
        why: String,
    },
    /// It sees none, for this reason. Such a source is neither started nor asked.
    Nothing(String),
}

impl Coverage {
    /// The parts of RAM, of `size` bytes, that are left out, ascending.
    pub fn gaps(&self, size: u64) -> Vec<Range<RamOffset>> {
        let seen: &[Range<RamOffset>] = match self {
            Self::All => return Vec::new(),
            Self::Regions { seen, .. } => seen,
            Self::Nothing(_) => &[],
        };
        let mut seen: Vec<_> = seen.iter().map(|range| (range.start().0, range.end())).collect();
        seen.sort_unstable();
        let (mut gaps, mut at) = (Vec::new(), 0);
        for (start, end) in seen.into_iter().chain([(size, size)]) {
            let until = start.min(size);
            if until > at {
                gaps.extend(Range::new(RamOffset(at), until - at));
            }
            at = at.max(end);
        }
        gaps
    }

    /// The reason for the gaps; empty where there can be none.
    pub fn why(&self) -> &str {
        match self {
            Self::All => "",
            Self::Regions { why, .. } | Self::Nothing(why) => why,
        }
    }
}

/// Starts every source, or none: when one fails, those started before it are stopped again.
///
/// # Errors
/// The failure; [`MemoryError::Several`] when a rollback failed as well, and a log may still run.
pub fn start_all(sources: &[&dyn DirtySource]) -> Result<(), MemoryError> {
    for (started, source) in sources.iter().enumerate() {
        if let Err(failure) = source.start() {
            let rollback = stop_each(&sources[..started]);
            return combine("starting the dirty logs", std::iter::once(failure).chain(rollback).collect());
        }
    }
    Ok(())
}

/// ORs into `into` what any source reports: a page that two of them name is one page.
///
/// # Errors
/// Each source is asked even when an earlier one failed, since what a source has reported it has forgotten; so `into`
/// holds all that the others know. What the failed ones cover is to be treated as dirty, or the migration given up.
pub fn report_all(sources: &[&dyn DirtySource], into: &mut Bitmap) -> Result<(), MemoryError> {
    let failures = sources.iter().filter_map(|source| source.report(into).err()).collect();
    combine("asking what is dirty", failures)
}

/// Stops every source, those too that come after one that fails to.
pub fn stop_all(sources: &[&dyn DirtySource]) -> Result<(), MemoryError> {
    combine("stopping the dirty logs", stop_each(sources))
}

fn stop_each(sources: &[&dyn DirtySource]) -> Vec<MemoryError> {
    sources.iter().rev().filter_map(|source| source.stop().err()).collect()
}

fn combine(doing: &str, mut errors: Vec<MemoryError>) -> Result<(), MemoryError> {
    if errors.len() > 1 {
        return Err(MemoryError::Several { doing: doing.to_owned(), errors });
    }
    errors.pop().map_or(Ok(()), Err)
}
