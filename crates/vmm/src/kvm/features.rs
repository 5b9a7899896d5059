//! What a guest was told of its processor, and whether another host can keep that promise.
//!
//! Every promise is a word, and a host's offer is a set of words, so a guest may move wherever its words are a subset of
//! the offer. The CPUID table itself moves with the vCPU: the guest reads the same table afterwards, however much
//! more the new host could do.

use std::collections::BTreeSet;
use std::sync::OnceLock;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use super::msr::{MSR_IA32_TSC, read_msr, write_msr};
use crate::error::VmmError;
use crate::layout;

/// The registers whose bits are features, by leaf and subleaf.
const FEATURE_LEAVES: [(u32, u32, &[Register]); 9] = [
    (1, 0, &[Register::Ecx, Register::Edx]),
    (7, 0, &[Register::Ebx, Register::Ecx, Register::Edx]),
    (7, 1, &[Register::Eax, Register::Ebx, Register::Ecx, Register::Edx]),
    (7, 2, &[Register::Edx]),
    (0xD, 1, &[Register::Eax]),
    (0x8000_0001, 0, &[Register::Ecx, Register::Edx]),
    (0x8000_0007, 0, &[Register::Edx]),
    (0x8000_0008, 0, &[Register::Ebx]),
    // KVM's own leaf: kvmclock and its kin.
    (0x4000_0001, 0, &[Register::Eax]),
];

/// Bits of those registers that follow CR4 or the APIC's base instead of the processor.
const CHANGING_BITS: [(u32, Register, u32); 3] =
    [(1, Register::Ecx, 27), (1, Register::Edx, 9), (7, Register::Ecx, 4)];

/// VMX, in ECX of leaf 1.
const CPUID_VMX: u32 = 1 << 5;
/// SVM, in ECX of leaf 0x80000001.
const CPUID_SVM: u32 = 1 << 2;

/// Width of the classes of TSC frequencies, in kHz: wide against the error with which a kernel measures it.
const TSC_CLASS: u32 = 32_000;

/// The word of a KVM that sets a guest's TSC when told to. Others give the guest the host's.
pub(super) const TSC_WRITABLE: &str = "tsc-writable";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// What a guest gets on this host, as words for a machine's manifest: a bit of CPUID is `cpuid.7.0.ebx.5`, a component
/// of the XSAVE area `xsave.2=576+256` (offset and size), the vendor `vendor=GenuineIntel`.
///
/// A host that cannot scale the TSC also names the class of its frequency, `tsc-mhz=2496`: hosts of one class may
/// still differ too much, which loading the vCPU finds out.
///
/// `tsc-writable` is offered where KVM sets a guest's TSC: a guest to which the time that a move takes was promised
/// not to count is refused by a host without it.
///
/// # Errors
/// KVM does not tell.
pub fn cpu_features(kvm: &Kvm) -> Result<Vec<String>, VmmError> {
    // Whoever asks for a manifest does not wait for a machine to be made and closed each time: on a busy host the kernel takes seconds.
    static KNOWN: OnceLock<Vec<String>> = OnceLock::new();
    if let Some(known) = KNOWN.get() {
        return Ok(known.clone());
    }
    let found = found_features(kvm)?;
    Ok(KNOWN.get_or_init(|| found).clone())
}

fn found_features(kvm: &Kvm) -> Result<Vec<String>, VmmError> {
    let supported =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(VmmError::kvm("tell its CPUID table"))?;
    let mut words = words(&without_nesting(supported.as_slice()));
    let vm = kvm.create_vm().map_err(VmmError::kvm("create a machine"))?;
    let vcpu = vm.create_vcpu(0).map_err(VmmError::kvm("create a vCPU"))?;
    let khz = vcpu.get_tsc_khz().map_err(VmmError::kvm("tell the TSC's frequency"))?;
    if sets_tsc(&vcpu, khz) {
        words.insert(TSC_WRITABLE.to_owned());
    }
    if !kvm.check_extension(Cap::TscControl) {
        words.insert(format!("tsc-mhz={}", (khz + TSC_CLASS / 2) / TSC_CLASS * TSC_CLASS / 1000));
    }
    Ok(words.into_iter().collect())
}

/// Whether a TSC that is written an hour ahead is read back there. A KVM without hardware virtualisation takes the
/// write, and gives the host's TSC all the same.
fn sets_tsc(vcpu: &VcpuFd, khz: u32) -> bool {
    let hour = u64::from(khz) * 1000 * 3600;
    let Some(before) = read_msr(vcpu, MSR_IA32_TSC) else { return false };
    let ahead = before.wrapping_add(hour);
    write_msr(vcpu, MSR_IA32_TSC, ahead)
        && read_msr(vcpu, MSR_IA32_TSC).is_some_and(|now| now.wrapping_sub(ahead) < hour)
}

/// CPU features that a guest could get on this host.
///
/// # Errors
/// There is no KVM here, or it does not tell.
pub fn offered_features() -> Result<Vec<String>, VmmError> {
    cpu_features(&Kvm::new().map_err(VmmError::kvm("open"))?)
}

/// Features of `given` that a host lacks which supports `supported`.
pub(super) fn missing(given: &[kvm_cpuid_entry2], supported: &[kvm_cpuid_entry2]) -> Vec<String> {
    words(given).difference(&words(&without_nesting(supported))).cloned().collect()
}

/// The table of vCPU `index`: all that KVM supports but nested virtualisation, with the vCPU's own APIC id.
pub(super) fn for_vcpu(supported: &[kvm_cpuid_entry2], index: u8) -> Vec<kvm_cpuid_entry2> {
    let mut table = without_nesting(supported);
    for entry in &mut table {
        match entry.function {
            1 => entry.ebx = entry.ebx & 0x00FF_FFFF | u32::from(index) << 24,
            0xB | 0x1F => entry.edx = u32::from(index),
            _ => {}
        }
    }
    table
}

/// A table without VMX and SVM: the state of a guest that uses them is not saved, so none is offered them.
fn without_nesting(supported: &[kvm_cpuid_entry2]) -> Vec<kvm_cpuid_entry2> {
    let mut table = supported.to_vec();
    for entry in &mut table {
        match entry.function {
            1 => entry.ecx &= !CPUID_VMX,
            0x8000_0001 => entry.ecx &= !CPUID_SVM,
            0x8000_000A => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            _ => {}
        }
    }
    table
}

/// Whether addresses are wide enough for the machine's map.
pub(super) fn check_physical_bits(supported: &CpuId) -> Result<(), VmmError> {
    let leaf = supported.as_slice().iter().find(|entry| entry.function == 0x8000_0008);
    let bits = leaf.map_or(36, |entry| entry.eax & 0xFF);
    if bits >= u32::from(layout::PHYSICAL_BITS) {
        return Ok(());
    }
    let needed = layout::PHYSICAL_BITS;
    Err(VmmError::NoKvm {
        reason: format!("guests have {bits} bits of physical address here, the machine needs {needed}"),
        source: None,
    })
}

fn words(table: &[kvm_cpuid_entry2]) -> BTreeSet<String> {
    let find = |function: u32, index: u32| {
        table.iter().find(move |entry| entry.function == function && entry.index == index)
    };
    let mut words = BTreeSet::new();
    if let Some(leaf) = find(0, 0) {
        let name: Vec<u8> = [leaf.ebx, leaf.edx, leaf.ecx].into_iter().flat_map(u32::to_le_bytes).collect();
        words.insert(format!("vendor={}", String::from_utf8_lossy(&name)));
    }
    for (function, index, registers) in FEATURE_LEAVES {
        let Some(leaf) = find(function, index) else { continue };
        for register in registers {
            let value = register.of(leaf);
            let changing = |bit| CHANGING_BITS.contains(&(function, *register, bit));
            let set = (0..32).filter(|bit| value >> bit & 1 == 1 && !changing(*bit));
            words.extend(set.map(|bit| format!("cpuid.{function:x}.{index}.{}.{bit}", register.name())));
        }
    }
    if let Some(leaf) = find(0xD, 0) {
        let xcr0 = u64::from(leaf.edx) << 32 | u64::from(leaf.eax);
        for component in (0..63u32).filter(|component| xcr0 >> component & 1 == 1) {
            // The first two lie in the legacy area; the others say where they lie, which differs between vendors.
            let (offset, size) = match component {
                0 => (0, 160),
                1 => (160, 256),
                _ => find(0xD, component).map_or((0, 0), |leaf| (leaf.ebx, leaf.eax)),
            };
            words.insert(format!("xsave.{component}={offset}+{size}"));
        }
    }
    words
}

impl Register {
    fn of(self, leaf: &kvm_cpuid_entry2) -> u32 {
        match self {
            Self::Eax => leaf.eax,
            Self::Ebx => leaf.ebx,
            Self::Ecx => leaf.ecx,
            Self::Edx => leaf.edx,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Eax => "eax",
            Self::Ebx => "ebx",
            Self::Ecx => "ecx",
            Self::Edx => "edx",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn table() -> Vec<kvm_cpuid_entry2> {
        vec![
            leaf(0, 0, [7, 0x756E_6547, 0x6C65_746E, 0x4965_6E69]),
            leaf(1, 0, [0, 0, 1 << 26 | 1 << 27, 1 << 9]),
            leaf(7, 0, [0, 1 << 5, 1 << 4, 0]),
            leaf(0xD, 0, [0b111, 832, 832, 0]),
            leaf(0xD, 2, [256, 576, 0, 0]),
        ]
    }

    #[test]
    fn features_become_words() {
        let words: Vec<_> = words(&table()).into_iter().collect();
        assert_eq!(
            words,
            [
                "cpuid.1.0.ecx.26",
                "cpuid.7.0.ebx.5",
                "vendor=GenuineIntel",
                "xsave.0=0+160",
                "xsave.1=160+256",
                "xsave.2=576+256"
            ]
        );
    }

    #[test]
    fn a_host_that_offers_less_is_refused_and_one_that_offers_more_is_not() {
        let mut more = table();
        more[2].ebx |= 1 << 16;
        assert!(missing(&table(), &more).is_empty());
        assert_eq!(missing(&more, &table()), ["cpuid.7.0.ebx.16"]);
        let mut moved = table();
        moved[4].ebx = 640;
        assert_eq!(missing(&table(), &moved), ["xsave.2=576+256"]);
        let mut other = table();
        other[0].ebx = 0;
        assert_eq!(missing(&table(), &other), ["vendor=GenuineIntel"]);
    }

    #[test]
    fn nested_virtualisation_is_given_to_no_guest_and_taken_from_none() {
        let host = [
            leaf(1, 0, [0, 0, CPUID_VMX | 1, 0]),
            leaf(0x8000_0001, 0, [0, 0, CPUID_SVM | 1, 0]),
            leaf(0x8000_000A, 0, [1, 2, 3, 4]),
        ];
        let given = for_vcpu(&host, 0);
        assert_eq!((given[0].ecx, given[1].ecx), (1, 1));
        assert_eq!([given[2].eax, given[2].ebx, given[2].ecx, given[2].edx], [0; 4]);
        assert!(missing(&given, &host).is_empty());
        assert_eq!(missing(&host, &host), ["cpuid.1.0.ecx.5", "cpuid.80000001.0.ecx.2"]);
    }

    #[test]
    fn vcpus_differ_by_their_apic_id_alone() {
        let given = for_vcpu(&[leaf(1, 0, [1, 0xAB00_0001, 3, 4]), leaf(0xB, 1, [0, 0, 0, 9])], 5);
        assert_eq!(given[0].ebx, 0x0500_0001);
        assert_eq!(given[1].edx, 5);
    }
}
