//! A vCPU's registers: how they are saved, and the order in which they go back.
//!
//! The order of loading matters to KVM:
//!
//! 1. CPUID, before the vCPU ever ran: it decides which of the rest is legal.
//! 2. The TSC's frequency, where it can be chosen.
//! 3. MP state, general registers, system registers — the last hold the APIC's base and mode, without which
//! 4. the local APIC's registers would be refused or misread. It restarts its timer from the remaining count.
//! 5. XCR0, then the XSAVE area, whose components XCR0 allows; debug registers.
//! 6. MSRs, the TSC after all others and its deadline at the very end: the deadline is compared with the TSC, and is
//!    dropped while the APIC's timer is not in deadline mode yet. The TSC is read back, since not every KVM sets it.
//! 7. Pending events — exceptions, NMIs, the interrupt shadow — since the steps above may clear them.

use kvm_bindings::{
    CpuId, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use rustix::io::Errno;
use vfio_migration::Section;
use zerocopy::IntoBytes;

use super::features;
use super::msr::{MSR_BATCH, MSR_IA32_TSC, MSR_IA32_TSC_DEADLINE, msr_table, read_msr};
use crate::error::VmmError;
use crate::section::{SectionReader, SectionWriter};

/// Layout of a vCPU's section.
pub(super) const SECTION_VERSION: u32 = 1;

/// Bytes of the XSAVE area of `KVM_GET_XSAVE`. A guest gets a larger one only if the process asked the kernel for it
/// (`arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM)`), which this VMM does not.
const XSAVE_LEN: usize = 4096;

/// A difference between two TSC frequencies that is measurement error, in parts per million.
const TSC_TOLERANCE_PPM: u64 = 250;

/// A vCPU. Whoever holds its lock while the machine is paused may read and change it.
#[derive(Debug)]
pub(super) struct Vcpu {
    pub(super) fd: VcpuFd,
    index: u8,
    /// As it was set: what KVM gives back has bits in it that change as the guest runs.
    cpuid: Vec<kvm_cpuid_entry2>,
    /// MSRs that this KVM can save.
    msrs: Vec<u32>,
    /// This KVM has XCR0: its processor has XSAVE.
    has_xcrs: bool,
}

impl Vcpu {
    /// A vCPU in the state after reset.
    pub(super) fn new(vm: &VmFd, index: u8, supported: &CpuId, msrs: &[u32]) -> Result<Self, VmmError> {
        let fd = vm.create_vcpu(u64::from(index)).map_err(VmmError::kvm("create a vCPU"))?;
        let has_xcrs = vm.check_extension(Cap::Xcrs);
        let mut vcpu = Self { fd, index, cpuid: Vec::new(), msrs: msrs.to_vec(), has_xcrs };
        vcpu.set_cpuid(features::for_vcpu(supported.as_slice(), index))?;
        Ok(vcpu)
    }

    /// The name of this vCPU's section.
    pub(super) fn section_name(&self) -> String {
        section_name(usize::from(self.index))
    }

    pub(super) fn save(&self) -> Result<Section, VmmError> {
        let what = |what: &str| VmmError::kvm(format!("read the {what} of vCPU {}", self.index));
        let fd = &self.fd;
        let mut writer = SectionWriter::default();
        writer.u32(u32::try_from(self.cpuid.len()).unwrap_or(u32::MAX));
        for entry in &self.cpuid {
            let kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, .. } = *entry;
            [function, index, flags, eax, ebx, ecx, edx].into_iter().for_each(|word| writer.u32(word));
        }
        writer.u32(fd.get_tsc_khz().map_err(what("TSC frequency"))?);
        // The MP state first: KVM settles pending INITs and SIPIs for it, which changes other registers.
        writer.abi(&fd.get_mp_state().map_err(what("MP state"))?);
        writer.abi(&fd.get_regs().map_err(what("registers"))?);
        writer.abi(&fd.get_sregs().map_err(what("system registers"))?);
        writer.abi(&fd.get_lapic().map_err(what("local APIC"))?);
        writer.abi(&if self.has_xcrs { fd.get_xcrs().map_err(what("XCR0"))? } else { kvm_xcrs::default() });
        writer.blob(fd.get_xsave().map_err(what("XSAVE area"))?.region.as_bytes());
        writer.abi(&fd.get_debug_regs().map_err(what("debug registers"))?);
        writer.abi(&fd.get_vcpu_events().map_err(what("pending events"))?);
        let msrs = self.read_msrs()?;
        writer.u32(u32::try_from(msrs.len()).unwrap_or(u32::MAX));
        for (index, value) in msrs {
            writer.u32(index);
            writer.u64(value);
        }
        Ok(writer.finish(self.section_name(), SECTION_VERSION))
    }

    /// Loads a section of [`save`](Self::save), perhaps of another host.
    ///
    /// # Errors
    /// It is damaged, or holds something that this host cannot give; the vCPU must not run then.
    pub(super) fn load(&mut self, section: &Section, kvm: &Kvm) -> Result<(), VmmError> {
        let state = State::parse(section)?;
        let refused = |reason: String| VmmError::section(&section.name, reason);
        let index = self.index;
        let what = |what: &str| VmmError::kvm(format!("load the {what} of vCPU {index}"));

        let supported = kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(VmmError::kvm("tell its CPUID table"))?;
        let missing = features::missing(&state.cpuid, supported.as_slice());
        if !missing.is_empty() {
            let reason =
                format!("the guest was given CPU features that this host lacks: {}", missing.join(", "));
            return Err(refused(reason));
        }
        self.set_cpuid(state.cpuid)?;
        self.match_tsc(state.tsc_khz, kvm).map_err(refused)?;
        let fd = &self.fd;
        fd.set_mp_state(state.mp_state).map_err(what("MP state"))?;
        fd.set_regs(&state.regs).map_err(what("registers"))?;
        fd.set_sregs(&state.sregs).map_err(what("system registers"))?;
        fd.set_lapic(&state.lapic).map_err(what("local APIC"))?;
        // A guest that was given no XSAVE has none of these registers; its CPUID table says so to this host too.
        if state.xcrs.nr_xcrs > 0 {
            fd.set_xcrs(&state.xcrs).map_err(what("XCR0"))?;
        }
        // SAFETY: KVM reads more than the 4096 bytes of the structure only from a process that enabled dynamic XSAVE
        // features, which this one does not.
        unsafe { fd.set_xsave(&state.xsave) }.map_err(what("XSAVE area"))?;
        fd.set_debug_regs(&state.debug).map_err(what("debug registers"))?;
        let tsc = state.msrs.iter().find(|(index, _)| *index == MSR_IA32_TSC).map(|(_, value)| *value);
        self.write_msrs(state.msrs).map_err(refused)?;
        if let Some(saved) = tsc {
            let now = read_msr(&self.fd, MSR_IA32_TSC);
            let now = now.ok_or_else(|| refused("the TSC cannot be read back".to_owned()))?;
            not_backwards(saved, now, state.tsc_khz).map_err(refused)?;
        }
        self.fd.set_vcpu_events(&state.events).map_err(what("pending events"))
    }

    /// Has the guest's kvmclock say that it was stopped, so that its watchdogs take the gap for none of its own. A
    /// guest without kvmclock (EINVAL) and a KVM without the call (ENOTTY) have nobody to tell.
    pub(super) fn tell_of_pause(&self) {
        let Err(error) = self.fd.kvmclock_ctrl() else { return };
        let errno = Errno::from_raw_os_error(error.errno());
        if errno != Errno::INVAL && errno != Errno::NOTTY {
            tracing::warn!(vcpu = self.index, %error, "the guest is not told that it was paused");
        }
    }

    /// Sets what a guest starts with: see [`crate::guest`].
    pub(super) fn set_entry(
        &self,
        regs: &kvm_regs,
        change: impl FnOnce(&mut kvm_sregs),
    ) -> Result<(), VmmError> {
        let mut sregs = self.fd.get_sregs().map_err(VmmError::kvm("read the system registers"))?;
        change(&mut sregs);
        self.fd.set_sregs(&sregs).map_err(VmmError::kvm("set the system registers"))?;
        self.fd.set_regs(regs).map_err(VmmError::kvm("set the registers"))
    }

    fn set_cpuid(&mut self, cpuid: Vec<kvm_cpuid_entry2>) -> Result<(), VmmError> {
        // Setting the same table again is refused by KVM once the vCPU ran, and changes nothing before.
        if self.cpuid == cpuid {
            return Ok(());
        }
        let table = CpuId::from_entries(&cpuid)
            .map_err(|_| VmmError::Refused(format!("{} CPUID entries are too many", cpuid.len())))?;
        self.fd
            .set_cpuid2(&table)
            .map_err(VmmError::kvm(format!("set the CPUID table of vCPU {}", self.index)))?;
        self.cpuid = cpuid;
        Ok(())
    }

    fn match_tsc(&self, wanted: u32, kvm: &Kvm) -> Result<(), String> {
        let here =
            self.fd.get_tsc_khz().map_err(|error| format!("no TSC frequency is known here ({error})"))?;
        if here == wanted {
            return Ok(());
        }
        if kvm.check_extension(Cap::TscControl) {
            return self.fd.set_tsc_khz(wanted).map_err(|error| {
                format!("the guest's TSC runs at {wanted} kHz, which this host cannot give ({error})")
            });
        }
        let difference = u64::from(here.abs_diff(wanted)) * 1_000_000;
        if difference <= u64::from(wanted) * TSC_TOLERANCE_PPM {
            return Ok(());
        }
        Err(format!("the guest's TSC runs at {wanted} kHz, this host's at {here} kHz and cannot be scaled"))
    }

    fn read_msrs(&self) -> Result<Vec<(u32, u64)>, VmmError> {
        let mut values = Vec::with_capacity(self.msrs.len());
        for batch in self.msrs.chunks(MSR_BATCH) {
            let mut rest = batch;
            while !rest.is_empty() {
                let entries: Vec<_> =
                    rest.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
                let mut table = msr_table(&entries)?;
                // KVM stops at the first that it lists but does not give, as one whose feature the guest lacks.
                let read = self
                    .fd
                    .get_msrs(&mut table)
                    .map_err(VmmError::kvm(format!("read the MSRs of vCPU {}", self.index)))?;
                values.extend(table.as_slice().iter().take(read).map(|entry| (entry.index, entry.data)));
                rest = rest.get(read + 1..).unwrap_or_default();
            }
        }
        Ok(values)
    }

    fn write_msrs(&self, mut values: Vec<(u32, u64)>) -> Result<(), String> {
        values.sort_by_key(|(index, _)| match *index {
            MSR_IA32_TSC => (1, 0),
            MSR_IA32_TSC_DEADLINE => (2, 0),
            other => (0, other),
        });
        let mut rest = values.as_slice();
        while !rest.is_empty() {
            let batch = rest.get(..MSR_BATCH).unwrap_or(rest);
            let entries: Vec<_> = batch
                .iter()
                .map(|(index, data)| kvm_msr_entry { index: *index, data: *data, ..Default::default() })
                .collect();
            let table = msr_table(&entries).map_err(|error| error.to_string())?;
            let written =
                self.fd.set_msrs(&table).map_err(|error| format!("MSRs cannot be set ({error})"))?;
            rest = rest.get(written..).unwrap_or_default();
            let Some((index, value)) = rest.first().filter(|_| written < batch.len()) else { continue };
            // One that cannot be written may hold the value already, as those do that describe the processor.
            if read_msr(&self.fd, *index) != Some(*value) {
                return Err(format!("MSR {index:#x} cannot be {value:#x} on this host"));
            }
            rest = rest.get(1..).unwrap_or_default();
        }
        Ok(())
    }
}

/// A KVM that ignores a written TSC gives the host's, which may lie before what the guest has read already.
fn not_backwards(saved: u64, now: u64, khz: u32) -> Result<(), String> {
    if now >= saved {
        return Ok(());
    }
    let ms = (saved - now) / u64::from(khz).max(1);
    Err(format!(
        "the guest's TSC would run backwards by {ms} ms, from {saved} to {now}: this host's KVM does not set it (it \
         does not offer `{}`); move the guest to one that does, or that booted earlier",
        features::TSC_WRITABLE
    ))
}

/// What a vCPU's section holds.
struct State {
    cpuid: Vec<kvm_cpuid_entry2>,
    tsc_khz: u32,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    lapic: kvm_lapic_state,
    xcrs: kvm_xcrs,
    xsave: kvm_xsave,
    debug: kvm_debugregs,
    events: kvm_vcpu_events,
    msrs: Vec<(u32, u64)>,
}

impl State {
    fn parse(section: &Section) -> Result<Self, VmmError> {
        let mut reader = SectionReader::open(section, SECTION_VERSION)?;
        let cpuid = (0..reader.count(28)?).map(|_| read_cpuid(&mut reader)).collect::<Result<_, _>>()?;
        let tsc_khz = reader.u32()?;
        let mp_state = reader.abi("mp_state")?;
        let regs = reader.abi("regs")?;
        let sregs = reader.abi("sregs")?;
        let lapic = reader.abi("lapic")?;
        let xcrs: kvm_xcrs = reader.abi("xcrs")?;
        let region = reader.abi::<[u32; XSAVE_LEN / 4]>("xsave")?;
        let xsave = kvm_xsave { region, ..Default::default() };
        let debug = reader.abi("debugregs")?;
        let events = reader.abi("vcpu_events")?;
        let msrs = (0..reader.count(12)?)
            .map(|_| Ok((reader.u32()?, reader.u64()?)))
            .collect::<Result<_, VmmError>>()?;
        reader.end()?;
        Ok(Self { cpuid, tsc_khz, mp_state, regs, sregs, lapic, xcrs, xsave, debug, events, msrs })
    }
}

/// The name of the section of vCPU `index`.
pub(super) fn section_name(index: usize) -> String {
    format!("kvm.vcpu.{index}")
}

fn read_cpuid(reader: &mut SectionReader<'_>) -> Result<kvm_cpuid_entry2, VmmError> {
    let mut word = || reader.u32();
    let (function, index, flags) = (word()?, word()?, word()?);
    let (eax, ebx, ecx, edx) = (word()?, word()?, word()?, word()?);
    Ok(kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Default::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tsc_may_stand_still_or_go_on_and_is_never_taken_back() {
        not_backwards(5_000, 5_000, 2_000_000).unwrap();
        not_backwards(0, u64::MAX, 0).unwrap();
        let error = not_backwards(9_000_000, 1_000_000, 2_000).unwrap_err();
        assert!(error.contains("backwards by 4000 ms") && error.contains("`tsc-writable`"), "{error}");
        not_backwards(1, 0, 0).unwrap_err();
    }
}
