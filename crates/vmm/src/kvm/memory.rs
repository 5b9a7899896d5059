//! Memory that the guest sees: its RAM, and BARs that a device lets be mapped.

use std::ptr::NonNull;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use vfio_migration_types::{Gpa, PAGE_SIZE, Range};

use super::lock::lock;
use super::slots::{RamSlot, Slot, SlotId};
use super::vm::KvmVm;
use crate::error::VmmError;

impl KvmVm {
    /// Makes `len` bytes at `host` appear to the guest at `gpa`, for a BAR that can be mapped. With `log_dirty` KVM
    /// keeps a log of the guest's writes that nobody reads: RAM alone is in the [dirty log](Self::dirty_log).
    ///
    /// Vcpus may run meanwhile.
    ///
    /// # Safety
    /// `host .. host + len` must be mapped readable and writable, and stay so, until
    /// [`remove_memory_slot`](Self::remove_memory_slot) returned or the machine is gone. The guest reads and writes it
    /// at any time, so nobody may hold a reference into it.
    ///
    /// # Errors
    /// It is not whole pages, overlaps another slot, or KVM has no slot left.
    pub unsafe fn add_memory_slot(
        &self,
        gpa: Gpa,
        host: NonNull<u8>,
        len: u64,
        log_dirty: bool,
    ) -> Result<SlotId, VmmError> {
        let flags = if log_dirty { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        let host = host.addr().get() as u64;
        // SAFETY: the caller keeps the promise that this function asks for.
        unsafe { self.insert_slot(Slot { gpa, host, len, ram: None, flags }) }
    }

    /// Takes a slot away. When this returns, no vCPU can reach its memory, even if it runs.
    ///
    /// # Errors
    /// There is no such slot, or it is RAM.
    pub fn remove_memory_slot(&self, id: SlotId) -> Result<(), VmmError> {
        let mut slots = lock(&self.slots);
        let slot = match slots.used.get(&id.0) {
            Some(slot) if slot.ram.is_none() => *slot,
            _ => return Err(VmmError::Refused(format!("there is no removable memory slot {}", id.0))),
        };
        // SAFETY: a length of zero deletes the slot; no memory is given to the guest.
        unsafe { self.tell_kvm(id.0, &Slot { len: 0, flags: 0, ..slot })? };
        slots.used.remove(&id.0);
        Ok(())
    }

    pub(super) fn add_ram_slots(&self) -> Result<(), VmmError> {
        for region in self.ram.regions() {
            let host = self
                .ram
                .host_address(region.offset, region.len)
                .ok_or_else(|| VmmError::Refused(format!("the RAM at {} is not mapped", region.gpa)))?;
            let host = host.addr().get() as u64;
            let slot = Slot { gpa: region.gpa, host, len: region.len, ram: Some(region.offset), flags: 0 };
            // SAFETY: the mapping belongs to the `GuestRam` that this machine holds until after its descriptor is
            // closed, and `GuestRam` hands out no references into it.
            unsafe { self.insert_slot(slot)? };
        }
        Ok(())
    }

    /// Turns the log of guest writes to RAM on, with a clean slate, or off.
    pub(super) fn set_ram_logging(&self, on: bool) -> Result<(), VmmError> {
        let mut slots = lock(&self.slots);
        if on && slots.logging {
            return Err(VmmError::Refused("guest writes are logged already".to_owned()));
        }
        let flags = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        slots.logging = on;
        let mut failed = None;
        for (id, slot) in slots.used.iter_mut().filter(|(_, slot)| slot.ram.is_some() && slot.flags != flags)
        {
            let changed = Slot { flags, ..*slot };
            // SAFETY: the same memory at the same place as before; only the flags change.
            match unsafe { self.tell_kvm(*id, &changed) } {
                Ok(()) => *slot = changed,
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        let Some(error) = failed else { return Ok(()) };
        // Half a log is no log: the caller may start over.
        slots.logging = !on;
        Err(error)
    }

    /// The slots of RAM, when guest writes are logged.
    pub(super) fn logged_ram_slots(&self) -> Option<Vec<RamSlot>> {
        let slots = lock(&self.slots);
        let ram = |(id, slot): (&u32, &Slot)| Some(RamSlot { id: *id, offset: slot.ram?, len: slot.len });
        slots.logging.then(|| slots.used.iter().filter_map(ram).collect())
    }

    /// # Safety
    /// As for [`add_memory_slot`](Self::add_memory_slot).
    unsafe fn insert_slot(&self, slot: Slot) -> Result<SlotId, VmmError> {
        let aligned = [slot.gpa.0, slot.host, slot.len].iter().all(|number| number.is_multiple_of(PAGE_SIZE));
        let range = Range::new(slot.gpa, slot.len).map_err(|error| VmmError::Refused(error.to_string()))?;
        if !aligned {
            return Err(VmmError::Refused(format!("memory at {} is not whole pages", slot.gpa)));
        }
        let mut slots = lock(&self.slots);
        let overlaps =
            |other: &Slot| Range::new(other.gpa, other.len).is_ok_and(|other| other.overlaps(&range));
        if slots.used.values().any(overlaps) {
            return Err(VmmError::Refused(format!("there is other memory at {}", slot.gpa)));
        }
        let id =
            slots.free_id().ok_or_else(|| VmmError::Refused("KVM has no memory slot left".to_owned()))?;
        // SAFETY: the caller keeps the promise that `add_memory_slot` asks for.
        unsafe { self.tell_kvm(id, &slot)? };
        slots.used.insert(id, slot);
        Ok(SlotId(id))
    }

    /// # Safety
    /// As for [`add_memory_slot`](Self::add_memory_slot), unless the length is zero.
    unsafe fn tell_kvm(&self, id: u32, slot: &Slot) -> Result<(), VmmError> {
        let region = kvm_userspace_memory_region {
            slot: id,
            flags: slot.flags,
            guest_phys_addr: slot.gpa.0,
            memory_size: slot.len,
            userspace_addr: slot.host,
        };
        // SAFETY: the caller keeps the promise that `add_memory_slot` asks for.
        unsafe { self.fd.set_user_memory_region(region) }
            .map_err(VmmError::kvm(format!("set the memory slot at {}", slot.gpa)))
    }
}
