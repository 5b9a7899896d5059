//! Bringing a function's BARs before the guest, and taking them away: mapped where they can be, trapped where not.

use std::io;
use std::sync::Arc;

use vfio_migration_device::PciError;
use vfio_migration_types::{Gpa, Range};

use super::backend::BarDoorbell;
use super::bars::{AddressMap, Bar};
use super::state::{Placed, State};
use super::vectors::PciFailure;
use super::vfio::VfioPciFunction;

impl VfioPciFunction {
    /// Brings the BARs before the guest to where config space says: those that leave first, so that two may swap.
    pub(super) fn place_all(&self, state: &mut State) -> Result<(), PciError> {
        let wanted: Vec<(Bar, Option<Range<u64>>)> =
            self.bars.iter().map(|bar| (*bar, bar.place(&state.config, &self.host.windows))).collect();
        let mut result = Ok(());
        for (bar, range) in &wanted {
            let placed = &mut state.placed[usize::from(bar.index)];
            if placed.as_ref().map(|placed| placed.range) != *range
                && let Some(placed) = placed.take()
            {
                result = result.and(self.take_away(placed));
            }
        }
        for (bar, range) in wanted {
            if let Some(range) = range
                && state.placed[usize::from(bar.index)].is_none()
            {
                let placed = self.place(state, bar, range);
                match placed {
                    Ok(placed) => state.placed[usize::from(bar.index)] = Some(placed),
                    Err(error) => result = result.and(Err(error)),
                }
            }
        }
        result
    }

    fn place(&self, state: &State, bar: Bar, range: Range<u64>) -> Result<Placed, PciError> {
        if !self.map_of(bar.io).insert(&range, self.devfn, bar.index) {
            return Err(self.unfit(format!("BAR {} at {:#x} overlaps another", bar.index, range.start())));
        }
        let mut placed =
            Placed { range, io: bar.io, mapped: Vec::new(), shared: Vec::new(), doorbells: Vec::new() };
        let done = self.fill(state, bar, &mut placed);
        if let Err(failure) = done {
            let _ = self.take_away(placed);
            return Err(self.failed(failure));
        }
        Ok(placed)
    }

    fn fill(&self, state: &State, bar: Bar, placed: &mut Placed) -> Result<(), PciFailure> {
        if bar.io {
            return Ok(());
        }
        let base = placed.range.start();
        let index = usize::from(bar.index);
        for (offset, memory) in &state.memory[index] {
            let gpa = Gpa(base + offset);
            // Without the mapping, or the doorbell below, accesses are trapped: slower, and all there.
            match self.host.mapper.map(gpa, memory) {
                Ok(()) => placed.mapped.push((gpa, Arc::clone(memory))),
                Err(error) => self.warn(bar, *offset, "an area is trapped, not mapped", &error),
            }
            if let Ok(piece) = Range::new(*offset, memory.len()) {
                self.host
                    .peers
                    .share(self.devfn, bar.index, piece, gpa)
                    .map_err(|error| ("mapping a BAR for DMA by its peers".to_owned(), error.into()))?;
                placed.shared.push(gpa);
            }
        }
        for (offset, doorbell) in &state.doorbells[index] {
            let doorbell = BarDoorbell { gpa: Gpa(base + offset), ..doorbell.clone() };
            match self.host.mapper.attach_doorbell(&doorbell) {
                Ok(()) => placed.doorbells.push(doorbell),
                Err(error) => self.warn(bar, *offset, "a doorbell is trapped, not attached", &error),
            }
        }
        Ok(())
    }

    pub(super) fn take_away(&self, placed: Placed) -> Result<(), PciError> {
        let mut result = Ok(());
        for doorbell in &placed.doorbells {
            let detached = self.host.mapper.detach_doorbell(doorbell).map_err(doing("detaching a doorbell"));
            result = result.and(detached);
        }
        placed.shared.iter().for_each(|gpa| self.host.peers.unshare(self.devfn, *gpa));
        for (gpa, memory) in &placed.mapped {
            let unmapped = self.host.mapper.unmap(*gpa, memory).map_err(doing("taking a BAR from the guest"));
            result = result.and(unmapped);
        }
        self.map_of(placed.io).remove(placed.range.start());
        result.map_err(|failure| self.failed(failure))
    }

    fn map_of(&self, io: bool) -> &AddressMap {
        if io { &self.host.ports } else { &self.host.addresses }
    }

    fn warn(&self, bar: Bar, offset: u64, what: &str, error: &dyn std::error::Error) {
        let cause = error.source().map(ToString::to_string);
        let offset = format_args!("{offset:#x}");
        tracing::warn!(device = %self.hardware.id(), bar = bar.index, %offset, %error, cause, "{what}");
    }
}

fn doing(doing: &'static str) -> impl Fn(io::Error) -> PciFailure {
    move |source| (doing.to_owned(), Box::new(source))
}
