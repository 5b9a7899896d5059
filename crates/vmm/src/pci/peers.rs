//! What devices may reach by DMA: guest RAM, and each other's BARs.

use std::sync::{Arc, Mutex, PoisonError};

use vfio_migration_device::{DeviceError, DmaAccess, PciHardware, RegionIndex};
use vfio_migration_memory::GuestRam;
use vfio_migration_types::{Gpa, Iova, Range};

/// Lets the device reach all of guest RAM at its guest physical addresses: one mapping per region.
///
/// # Errors
/// What was mapped before the failure is unmapped again.
pub fn map_guest_ram(hardware: &dyn PciHardware, ram: &GuestRam) -> Result<(), DeviceError> {
    let mut done: Vec<Range<Iova>> = Vec::new();
    for region in ram.regions() {
        let Ok(range) = Range::new(Iova(region.gpa.0), region.len) else { continue };
        if let Err(error) = hardware.dma_map(range, DmaAccess::BOTH, Some((ram.fd(), region.offset.0))) {
            done.into_iter().for_each(|range| unmap(hardware, range));
            return Err(error);
        }
        done.push(range);
    }
    Ok(())
}

/// Takes guest RAM away from the device. Goes on after a failure, and says the first.
pub fn unmap_guest_ram(hardware: &dyn PciHardware, ram: &GuestRam) -> Result<(), DeviceError> {
    let ranges = ram.regions().iter().filter_map(|region| Range::new(Iova(region.gpa.0), region.len).ok());
    ranges.map(|range| hardware.dma_unmap(range)).fold(Ok(()), Result::and)
}

/// The functions of a machine as targets of each other's DMA: a BAR that is placed and can be mapped is mapped into
/// every other device at its guest address, for as long as it is there.
#[derive(Debug, Default)]
pub(super) struct Peers {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    members: Vec<(u8, Arc<dyn PciHardware>)>,
    shared: Vec<Shared>,
}

/// A piece of a BAR that the other members may reach.
#[derive(Clone, Debug)]
struct Shared {
    slot: u8,
    range: Range<Iova>,
    bar: u8,
    offset: u64,
}

impl Peers {
    /// Adds a device, which from now on reaches the BARs of the others.
    pub(super) fn join(&self, slot: u8, hardware: Arc<dyn PciHardware>) -> Result<(), DeviceError> {
        let mut state = self.lock();
        let State { members, shared } = &mut *state;
        for (index, piece) in shared.iter().enumerate() {
            if let Some((_, owner)) = members.iter().find(|(member, _)| *member == piece.slot)
                && let Err(error) = map(&*hardware, &**owner, piece)
            {
                shared.iter().take(index).for_each(|piece| unmap(&*hardware, piece.range));
                return Err(error);
            }
        }
        members.push((slot, hardware));
        Ok(())
    }

    /// Takes a device out: it reaches none, and is reached by none.
    pub(super) fn leave(&self, slot: u8) {
        let mut state = self.lock();
        let State { members, shared } = &mut *state;
        let (gone, kept) = std::mem::take(members).into_iter().partition(|(member, _)| *member == slot);
        *members = kept;
        let gone: Vec<(u8, Arc<dyn PciHardware>)> = gone;
        for piece in &*shared {
            let reach = if piece.slot == slot { &*members } else { &gone };
            reach.iter().for_each(|(_, hardware)| unmap(&**hardware, piece.range));
        }
        shared.retain(|piece| piece.slot != slot);
    }

    /// Lets the others reach a piece of a BAR: `len` bytes at `offset` of it, at `gpa`.
    ///
    /// # Errors
    /// None of them reaches it then.
    pub(super) fn share(&self, slot: u8, bar: u8, piece: Range<u64>, gpa: Gpa) -> Result<(), DeviceError> {
        let mut state = self.lock();
        let Ok(range) = Range::new(Iova(gpa.0), piece.len()) else { return Ok(()) };
        let piece = Shared { slot, range, bar, offset: piece.start() };
        let Some((_, owner)) = state.members.iter().find(|(member, _)| *member == slot) else {
            return Ok(());
        };
        let others = || state.members.iter().filter(|(member, _)| *member != slot);
        for (index, (_, hardware)) in others().enumerate() {
            if let Err(error) = map(&**hardware, &**owner, &piece) {
                others().take(index).for_each(|(_, hardware)| unmap(&**hardware, range));
                return Err(error);
            }
        }
        state.shared.push(piece);
        Ok(())
    }

    /// Takes away the piece of a BAR at `gpa`.
    pub(super) fn unshare(&self, slot: u8, gpa: Gpa) {
        let mut state = self.lock();
        let is_it = |piece: &Shared| piece.slot == slot && piece.range.start().0 == gpa.0;
        if let Some(at) = state.shared.iter().position(is_it) {
            let piece = state.shared.swap_remove(at);
            for (_, hardware) in state.members.iter().filter(|(member, _)| *member != slot) {
                unmap(&**hardware, piece.range);
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn map(into: &dyn PciHardware, owner: &dyn PciHardware, piece: &Shared) -> Result<(), DeviceError> {
    let file =
        owner.region_file(RegionIndex(piece.bar.into())).map(|file| (file.fd, file.offset + piece.offset));
    into.dma_map(piece.range, DmaAccess::BOTH, file)
}

fn unmap(from: &dyn PciHardware, range: Range<Iova>) {
    if let Err(error) = from.dma_unmap(range) {
        tracing::warn!(device = %from.id(), %error, range = ?range, "a DMA mapping was not taken away");
    }
}
