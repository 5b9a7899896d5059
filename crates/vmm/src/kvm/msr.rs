//! Model-specific registers: which of them are a guest's state, and one of them read or written.

use std::ops::{Range, RangeInclusive};

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use crate::error::VmmError;

/// The TSC.
pub(super) const MSR_IA32_TSC: u32 = 0x10;
/// The TSC at which the local APIC's timer fires.
pub(super) const MSR_IA32_TSC_DEADLINE: u32 = 0x6E0;
/// The Hyper-V enlightenments, which this machine's CPUID does not offer.
const MSR_HYPERV: Range<u32> = 0x4000_0000..0x4000_0200;
/// What the processor's VMX can do (IA32_VMX_BASIC to IA32_VMX_VMFUNC), which no guest is given.
const MSR_VMX: RangeInclusive<u32> = 0x480..=0x491;
/// Where SVM saves a host's state, which no guest is given.
const MSR_VM_HSAVE_PA: u32 = 0xC001_0117;
/// MSRs per call: KVM takes 256.
pub(super) const MSR_BATCH: usize = 128;

/// The MSRs that belong to a vCPU's state on this KVM.
pub(super) fn migratable_msrs(kvm: &Kvm) -> Result<Vec<u32>, VmmError> {
    let list = kvm.get_msr_index_list().map_err(VmmError::kvm("list its MSRs"))?;
    Ok(list.as_slice().iter().copied().filter(|index| is_migratable(*index)).collect())
}

fn is_migratable(index: u32) -> bool {
    !MSR_HYPERV.contains(&index) && !MSR_VMX.contains(&index) && index != MSR_VM_HSAVE_PA
}

/// The value of an MSR, unless KVM does not give it.
pub(super) fn read_msr(fd: &VcpuFd, index: u32) -> Option<u64> {
    let mut table = msr_table(&[kvm_msr_entry { index, ..Default::default() }]).ok()?;
    match fd.get_msrs(&mut table) {
        Ok(1) => table.as_slice().first().map(|entry| entry.data),
        _ => None,
    }
}

/// Whether KVM takes a value for an MSR, which need not mean that it heeds it.
pub(super) fn write_msr(fd: &VcpuFd, index: u32, data: u64) -> bool {
    msr_table(&[kvm_msr_entry { index, data, ..Default::default() }])
        .is_ok_and(|table| matches!(fd.set_msrs(&table), Ok(1)))
}

/// Entries as the calls of KVM take them, at most 256.
pub(super) fn msr_table(entries: &[kvm_msr_entry]) -> Result<Msrs, VmmError> {
    Msrs::from_entries(entries)
        .map_err(|_| VmmError::Refused(format!("{} MSRs are too many for one call", entries.len())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn msrs_of_what_no_guest_is_given_are_not_saved() {
        for given in
            [MSR_IA32_TSC, MSR_IA32_TSC_DEADLINE, 0x47F, 0x492, 0x3FFF_FFFF, 0x4000_0200, 0xC001_0116]
        {
            assert!(is_migratable(given), "{given:#x}");
        }
        for other in (0x480..=0x491).chain([0x4000_0000, 0x4000_01FF, 0xC001_0117]) {
            assert!(!is_migratable(other), "{other:#x}");
        }
    }
}
