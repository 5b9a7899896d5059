//! What devices may reach by DMA: guest RAM, and each other's BARs.

use std::sync::{Arc, Mutex, PoisonError};

use vfio_migration_device::{DeviceError, DmaAccess, PciHardware, RegionIndex};
use vfio_migration_memory::GuestRam;
use vfio_migration_types::{Gpa, Iova, Range};

use super::devfn::Devfn;

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

/// The functions of a machine as targets of each other's DMA: a BAR that is placed and can be mapped is mapped into
/// every other device at its guest address, for as long as it is there. Where the IOMMU of a device takes no BAR of
/// another, the two go on without peer-to-peer DMA.
#[derive(Debug, Default)]
pub(super) struct Peers {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    members: Vec<(Devfn, Arc<dyn PciHardware>)>,
    shared: Vec<Shared>,
}

/// A piece of a BAR that the other members may reach.
#[derive(Clone, Debug)]
struct Shared {
    devfn: Devfn,
    range: Range<Iova>,
    bar: u8,
    offset: u64,
    /// The functions that do.
    reached_by: Vec<Devfn>,
}

impl Peers {
    /// Adds a device, which from now on reaches the BARs of the others.
    pub(super) fn join(&self, devfn: Devfn, hardware: Arc<dyn PciHardware>) -> Result<(), DeviceError> {
        let mut state = self.lock();
        let State { members, shared } = &mut *state;
        let mut failed = None;
        for piece in &mut *shared {
            if let Some((_, owner)) = members.iter().find(|(member, _)| *member == piece.devfn) {
                match map(&*hardware, &**owner, piece) {
                    Ok(reached) => piece.reached_by.extend(reached.then_some(devfn)),
                    Err(error) => {
                        failed = Some(error);
                        break;
                    }
                }
            }
        }
        if let Some(error) = failed {
            shared.iter_mut().for_each(|piece| piece.forget(devfn, &*hardware));
            return Err(error);
        }
        members.push((devfn, hardware));
        Ok(())
    }

    /// Takes a device out: it reaches none, and is reached by none.
    pub(super) fn leave(&self, devfn: Devfn) {
        let mut state = self.lock();
        let State { members, shared } = &mut *state;
        for (member, hardware) in &*members {
            for piece in &mut *shared {
                if piece.devfn == devfn || *member == devfn {
                    piece.forget(*member, &**hardware);
                }
            }
        }
        members.retain(|(member, _)| *member != devfn);
        shared.retain(|piece| piece.devfn != devfn);
    }

    /// Lets the others reach a piece of a BAR: `len` bytes at `offset` of it, at `gpa`.
    ///
    /// # Errors
    /// None of them reaches it then.
    pub(super) fn share(
        &self,
        devfn: Devfn,
        bar: u8,
        piece: Range<u64>,
        gpa: Gpa,
    ) -> Result<(), DeviceError> {
        let mut state = self.lock();
        let Ok(range) = Range::new(Iova(gpa.0), piece.len()) else { return Ok(()) };
        let mut piece = Shared { devfn, range, bar, offset: piece.start(), reached_by: Vec::new() };
        let Some((_, owner)) = state.members.iter().find(|(member, _)| *member == devfn) else {
            return Ok(());
        };
        let others = || state.members.iter().filter(|(member, _)| *member != devfn);
        for (other, hardware) in others() {
            match map(&**hardware, &**owner, &piece) {
                Ok(reached) => piece.reached_by.extend(reached.then_some(*other)),
                Err(error) => {
                    others().for_each(|(other, hardware)| piece.forget(*other, &**hardware));
                    return Err(error);
                }
            }
        }
        state.shared.push(piece);
        Ok(())
    }

    /// Takes away the piece of a BAR at `gpa`.
    pub(super) fn unshare(&self, devfn: Devfn, gpa: Gpa) {
        let mut state = self.lock();
        let is_it = |piece: &Shared| piece.devfn == devfn && piece.range.start().0 == gpa.0;
        if let Some(at) = state.shared.iter().position(is_it) {
            let mut piece = state.shared.swap_remove(at);
            state.members.iter().for_each(|(member, hardware)| piece.forget(*member, &**hardware));
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    /// The member at `devfn` reaches it no more, if it did.
    fn forget(&mut self, devfn: Devfn, hardware: &dyn PciHardware) {
        if let Some(at) = self.reached_by.iter().position(|member| *member == devfn) {
            self.reached_by.swap_remove(at);
            unmap(hardware, self.range);
        }
    }
}

/// Returns whether it is mapped: `false` where the device cannot reach another's BAR at all.
fn map(into: &dyn PciHardware, owner: &dyn PciHardware, piece: &Shared) -> Result<bool, DeviceError> {
    let file =
        owner.region_file(RegionIndex(piece.bar.into())).map(|file| (file.fd, file.offset + piece.offset));
    match into.dma_map(piece.range, DmaAccess::BOTH, file) {
        Ok(()) => Ok(true),
        Err(error) if error.is_no_peer_dma() => {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            let (device, peer, bar) = (into.id(), owner.id(), piece.bar);
            tracing::warn!(%device, %peer, bar, cause, "no peer-to-peer DMA from one device to the other");
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

fn unmap(from: &dyn PciHardware, range: Range<Iova>) {
    if let Err(error) = from.dma_unmap(range) {
        tracing::warn!(device = %from.id(), %error, range = ?range, "a DMA mapping was not taken away");
    }
}
