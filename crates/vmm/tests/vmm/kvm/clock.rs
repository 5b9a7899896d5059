//! A guest's clocks on real KVM: what is put back is there, or refused, and a pause is told.

use std::time::Instant;

use vfio_migration::Section;
use vfio_migration_types::{PAGE_SIZE, RamOffset};
use vfio_migration_vmm::guest::map;
use vfio_migration_vmm::kvm::{KvmVm, VCPUS_MAX, cpu_features};

use super::ring::{PATIENCE, Rig, kvm_answers};

const MSR_IA32_TSC: u32 = 0x10;
/// `MSR_KVM_SYSTEM_TIME_NEW`: where the guest wants its kvmclock; bit 0 turns it on.
const MSR_KVM_SYSTEM_TIME: u32 = 0x4B56_4D01;
/// Byte `flags` of `struct pvclock_vcpu_time_info`, and its `PVCLOCK_GUEST_STOPPED`.
const CLOCK_FLAGS: u64 = 29;
const GUEST_STOPPED: u64 = 2;

/// The place of an MSR's value in a vCPU's section, whose end is the list of MSRs, 12 bytes each.
fn msr_at(vcpu: &Section, index: u32) -> usize {
    let place = vcpu.bytes.rchunks_exact(12).position(|entry| entry[..4] == index.to_le_bytes());
    vcpu.bytes.len() - 12 * (place.expect("the MSR is saved") + 1) + 4
}

fn msr(sections: &[Section], index: u32) -> u64 {
    let vcpu = sections.iter().find(|section| section.name == "kvm.vcpu.0").unwrap();
    let at = msr_at(vcpu, index);
    u64::from_le_bytes(vcpu.bytes[at..at + 8].try_into().unwrap())
}

fn set_msr(sections: &mut [Section], index: u32, value: u64) {
    let vcpu = sections.iter_mut().find(|section| section.name == "kvm.vcpu.0").unwrap();
    let at = msr_at(vcpu, index);
    vcpu.bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

#[test]
fn a_tsc_that_would_run_backwards_is_refused() {
    if !kvm_answers() {
        return;
    }
    let rig = Rig::new(64);
    rig.boot(0, 0, false);
    rig.wait("ticks", |report| report.ticks > 10);
    rig.pause();
    let mut sections = rig.vm.save_state().unwrap();
    // As of a host that has been up for longer: an hour at 8 GHz, more than any other.
    let ahead = msr(&sections, MSR_IA32_TSC) + 8_000_000_000 * 3600;
    set_msr(&mut sections, MSR_IA32_TSC, ahead);
    let writable = cpu_features(&KvmVm::open().unwrap()).unwrap().contains(&"tsc-writable".to_owned());
    let to = Rig::new(64);
    match to.vm.load_state(&sections) {
        Ok(()) => {
            assert!(writable, "a host that sets the TSC says so");
            assert!(msr(&to.vm.save_state().unwrap(), MSR_IA32_TSC) >= ahead);
        }
        Err(error) => {
            assert!(!writable, "a host that says so sets the TSC: {error}");
            let error = error.to_string();
            assert!(error.contains("run backwards by") && error.contains("`tsc-writable`"), "{error}");
        }
    }
}

#[test]
fn a_paused_guest_finds_in_its_kvmclock_that_it_was_stopped() {
    if !kvm_answers() {
        return;
    }
    let rig = Rig::new(64);
    rig.boot(0, 0, false);
    rig.wait("ticks", |report| report.ticks > 10);
    rig.pause();
    // The guest program uses no kvmclock: one is put where the first device's ring would be.
    let page = rig.offset(map::DEVICES, PAGE_SIZE);
    let clock = RamOffset(page.0 + CLOCK_FLAGS / 8 * 8);
    let mut sections = rig.vm.save_state().unwrap();
    set_msr(&mut sections, MSR_KVM_SYSTEM_TIME, map::DEVICES | 1);
    rig.vm.load_state(&sections).unwrap();
    let flags = || rig.ram.read_u64(clock).unwrap() >> (CLOCK_FLAGS % 8 * 8) & 0xFF;
    for _ in 0..3 {
        rig.vm.resume().unwrap();
        let deadline = Instant::now() + PATIENCE;
        while flags() & GUEST_STOPPED == 0 {
            assert!(Instant::now() < deadline, "flags {:#x}", flags());
            std::thread::yield_now();
        }
        rig.pause();
        // As the guest does when it has read it.
        rig.ram
            .write_u64(clock, rig.ram.read_u64(clock).unwrap() & !(GUEST_STOPPED << (CLOCK_FLAGS % 8 * 8)))
            .unwrap();
    }
}

#[test]
fn a_second_vcpu_is_refused() {
    let ram = Rig::ram(64);
    assert_eq!(VCPUS_MAX, 1);
    for vcpus in [0, 2, 16, 255] {
        let error = KvmVm::new(ram.clone(), vcpus).unwrap_err().to_string();
        assert_eq!(error, format!("{vcpus} vCPUs: the machine takes 1"));
    }
}
