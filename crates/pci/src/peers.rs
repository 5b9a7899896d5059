//! What devices may reach by DMA: guest RAM, and each other's BARs.

use std::sync::atomic::{AtomicBool, Ordering};
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
        if let Err(error) =
            hardware.dma_map(range, DmaAccess::BOTH, ram.shared_file(region.offset, region.len))
        {
            for range in done {
                if let Err(error) = hardware.dma_unmap(range) {
                    tracing::warn!(device = %hardware.id(), %error, ?range, "guest RAM stays mapped for DMA");
                }
            }
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
    members: Vec<Arc<Member>>,
    shared: Vec<Shared>,
}

/// A function that reaches the others, and is reached by them.
#[derive(Debug)]
struct Member {
    devfn: Devfn,
    hardware: Arc<dyn PciHardware>,
    /// It kept a mapping that was to be taken away, and that was told.
    kept: AtomicBool,
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
        let member = Arc::new(Member { devfn, hardware, kept: AtomicBool::new(false) });
        let mut failed = None;
        for piece in &mut *shared {
            if let Some(owner) = members.iter().find(|member| member.devfn == piece.devfn) {
                match map(&*member.hardware, &*owner.hardware, piece) {
                    Ok(reached) => piece.reached_by.extend(reached.then_some(devfn)),
                    Err(error) => {
                        failed = Some(error);
                        break;
                    }
                }
            }
        }
        if let Some(error) = failed {
            shared.iter_mut().for_each(|piece| piece.forget(&member));
            return Err(error);
        }
        members.push(member);
        Ok(())
    }

    /// Takes a device out: it reaches none, and is reached by none.
    pub(super) fn leave(&self, devfn: Devfn) {
        let mut state = self.lock();
        let State { members, shared } = &mut *state;
        for member in &*members {
            for piece in &mut *shared {
                if piece.devfn == devfn || member.devfn == devfn {
                    piece.forget(member);
                }
            }
        }
        members.retain(|member| member.devfn != devfn);
        shared.retain(|piece| piece.devfn != devfn);
    }

    /// Takes all devices out, without a word to any: they are about to be closed, and each takes its mappings back by that.
    /// Of n devices there are n times n - 1, each a request to a server that may have gone already.
    pub(super) fn dissolve(&self) {
        *self.lock() = State::default();
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
        let Ok(range) = Range::new(Iova(gpa.0), piece.len()) else { return Ok(()) };
        let piece = Shared { devfn, range, bar, offset: piece.start(), reached_by: Vec::new() };
        let (owner, others) = {
            let State { members, shared } = &mut *self.lock();
            let Some(at) = members.iter().position(|member| member.devfn == devfn) else { return Ok(()) };
            // Who joins from now on finds it.
            shared.push(piece.clone());
            // From the next one on: functions that come at once do not all wait for the same device.
            let others: Vec<_> =
                members.iter().cycle().skip(at + 1).take(members.len() - 1).cloned().collect();
            (members[at].clone(), others)
        };
        // Without the lock: each is a request that a device answers.
        let mut reached_by = Vec::new();
        let mut failed = None;
        for other in others {
            match map(&*other.hardware, &*owner.hardware, &piece) {
                Ok(reached) => reached_by.extend(reached.then_some(other.devfn)),
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        if let Some(piece) = self.lock().shared.iter_mut().find(|shared| shared.is_of(devfn, gpa)) {
            piece.reached_by.extend(reached_by);
        }
        let Some(error) = failed else { return Ok(()) };
        self.unshare(devfn, gpa);
        Err(error)
    }

    /// Takes away the piece of a BAR at `gpa`.
    pub(super) fn unshare(&self, devfn: Devfn, gpa: Gpa) {
        let (mut piece, members) = {
            let State { members, shared } = &mut *self.lock();
            let Some(at) = shared.iter().position(|shared| shared.is_of(devfn, gpa)) else { return };
            (shared.swap_remove(at), members.clone())
        };
        members.iter().for_each(|member| piece.forget(member));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    fn is_of(&self, devfn: Devfn, gpa: Gpa) -> bool {
        self.devfn == devfn && self.range.start().0 == gpa.0
    }

    /// A member reaches it no more, if it did.
    fn forget(&mut self, member: &Member) {
        if let Some(at) = self.reached_by.iter().position(|devfn| *devfn == member.devfn) {
            self.reached_by.swap_remove(at);
            // A device that is lost keeps what it has, and has a mapping for each BAR of the others: told once.
            if let Err(error) = member.hardware.dma_unmap(self.range)
                && !member.kept.swap(true, Ordering::Relaxed)
            {
                let device = member.hardware.id();
                tracing::warn!(%device, %error, "the device keeps mappings of other devices' BARs that were to be taken away");
            }
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
