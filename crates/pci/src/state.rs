//! What changes of a function while it runs: config space, interrupts, and where its BARs are.

use std::sync::Arc;

use vfio_migration_memory::Mapping;
use vfio_migration_types::{Gpa, Range};

use super::areas::MappedPiece;
use super::backend::BarDoorbell;
use super::bars::BARS;
use super::config::ConfigSpace;
use super::interrupts::FunctionInterrupts;

/// The parts of a function that the guest can change.
#[derive(Debug)]
pub(super) struct State {
    pub(super) config: ConfigSpace,
    pub(super) interrupts: FunctionInterrupts,
    /// The mappable pieces of each BAR, mapped into this process once.
    pub(super) memory: [Vec<MappedPiece>; BARS],
    pub(super) doorbells: [Vec<(u64, BarDoorbell)>; BARS],
    pub(super) placed: [Option<Placed>; BARS],
}

/// A BAR that is before the guest, with all that is to be undone.
#[derive(Debug)]
pub(super) struct Placed {
    pub(super) range: Range<u64>,
    pub(super) io: bool,
    pub(super) mapped: Vec<(Gpa, Arc<Mapping>)>,
    pub(super) shared: Vec<Gpa>,
    pub(super) doorbells: Vec<BarDoorbell>,
}
