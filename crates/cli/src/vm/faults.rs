//! Faults of `demo --break` in a vm process: its machine is wrapped in one that is faulty.

use std::sync::Arc;

use vfio_migration::{InjectedFault, Machine, inject};
use vfio_migration_types::{Gpa, PAGE_SIZE, RamOffset};
use vfio_migration_vmm::machine::ReferenceMachine;

use crate::args::serve::Break;

/// The machine as it is sent away.
pub(super) fn inject_at_source(
    what: Option<Break>,
    machine: Arc<ReferenceMachine>,
) -> Result<Arc<dyn Machine>, String> {
    let fault = match what {
        Some(Break::DirtyLog) => InjectedFault::HideDirtyPages(numbered_pages(&machine)?),
        Some(Break::P2pOrder) => InjectedFault::StopOneByOne,
        _ => return Ok(machine),
    };
    Ok(inject(machine, fault))
}

/// The machine in which a guest arrives.
pub(super) fn inject_at_destination(
    what: Option<Break>,
    machine: Arc<ReferenceMachine>,
) -> Result<Arc<dyn Machine>, String> {
    let fault = match what {
        Some(Break::Interrupt) => InjectedFault::MaskFirstVector,
        Some(Break::PageOrder) => InjectedFault::StalePages(numbered_pages(&machine)?),
        _ => return Ok(machine),
    };
    Ok(inject(machine, fault))
}

/// RAM in which the guest numbers every page: other pages it might not miss.
fn numbered_pages(machine: &Arc<ReferenceMachine>) -> Result<std::ops::Range<RamOffset>, String> {
    let ram = machine.ram();
    let areas = machine.numbered_areas().map_err(|error| error.to_string())?;
    let first =
        ram.offset_of(Gpa(areas.low_start), PAGE_SIZE).ok_or("the guest's pages are not in its RAM")?;
    Ok(first..RamOffset(ram.size()))
}
