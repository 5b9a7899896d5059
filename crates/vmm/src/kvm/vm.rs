//! The machine's handle: made with its RAM, started, paused, resumed and ended.

use std::fmt;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_regs, kvm_sregs};
use kvm_ioctls::{Cap, DeviceFd, Kvm, VmFd};
use vfio_migration_memory::GuestRam;

use super::gate::Gate;
use super::lock::lock;
use super::slots::Slots;
use super::vcpu::Vcpu;
use super::{features, kick, msr, run};
use crate::bus::IoBus;
use crate::error::{StopReason, VmmError};
use crate::layout;

/// Most vCPUs of a machine: more were never tested.
pub const VCPUS_MAX: u8 = 1;

/// A virtual machine.
///
/// All methods may be called from any thread. None may be called from an [`IoBus`] of the same machine except
/// those of interrupts, ioeventfds and memory slots, which never wait for a vCPU.
pub struct KvmVm {
    pub(super) fd: VmFd,
    pub(super) kvm: Kvm,
    pub(super) ram: Arc<GuestRam>,
    gate: Arc<Gate>,
    pub(super) vcpus: Vec<Arc<Mutex<Vcpu>>>,
    threads: Arc<Mutex<Vec<JoinHandle<()>>>>,
    pub(super) slots: Mutex<Slots>,
    /// Set when the dirty log was handed out.
    pub(super) dirty: OnceLock<()>,
    /// Made when a device of the kernel's VFIO comes.
    pub(super) vfio: Mutex<Option<DeviceFd>>,
}

impl KvmVm {
    /// Opens `/dev/kvm`.
    ///
    /// # Errors
    /// [`VmmError::NoKvm`] when it is absent, not permitted, or lacks what the machine needs.
    pub fn open() -> Result<Kvm, VmmError> {
        let kvm = Kvm::new().map_err(|source| VmmError::NoKvm {
            reason: "/dev/kvm cannot be opened".to_owned(),
            source: Some(source),
        })?;
        let api = kvm.get_api_version();
        if api != 12 {
            let reason = format!("/dev/kvm speaks version {api} of its interface, not 12");
            return Err(VmmError::NoKvm { reason, source: None });
        }
        for (capability, name) in [
            (Cap::Irqchip, "an interrupt controller"),
            (Cap::Pit2, "a timer"),
            (Cap::Irqfd, "irqfds"),
            (Cap::Ioeventfd, "ioeventfds"),
            (Cap::IoeventfdNoLength, "ioeventfds of any width"),
            (Cap::SignalMsi, "message-signalled interrupts"),
            (Cap::IrqRouting, "interrupt routes"),
            (Cap::ImmediateExit, "immediate exit"),
            (Cap::UserMemory, "memory slots"),
            (Cap::ExtCpuid, "CPUID tables"),
            (Cap::Xsave, "XSAVE"),
            (Cap::VcpuEvents, "vCPU events"),
            (Cap::AdjustClock, "an adjustable clock"),
        ] {
            if !kvm.check_extension(capability) {
                let reason = format!("/dev/kvm has no {name}");
                return Err(VmmError::NoKvm { reason, source: None });
            }
        }
        Ok(kvm)
    }

    /// A machine of `vcpus` vCPUs (1 to [`VCPUS_MAX`]) with `ram`, nothing of it running.
    ///
    /// The first vCPU is the one that boots; the others wait for its INIT and SIPI.
    ///
    /// # Errors
    /// `/dev/kvm` does not answer, or refuses.
    pub fn new(ram: Arc<GuestRam>, vcpus: u8) -> Result<Arc<Self>, VmmError> {
        if !(1..=VCPUS_MAX).contains(&vcpus) {
            return Err(VmmError::Refused(format!("{vcpus} vCPUs: the machine takes {VCPUS_MAX}")));
        }
        let kvm = Self::open()?;
        let fd = kvm.create_vm().map_err(VmmError::kvm("create a machine"))?;
        // Only VMX uses these pages; elsewhere the calls do nothing, and a KVM without them may refuse.
        let _ = fd.set_identity_map_address(layout::KVM_IDENTITY_MAP);
        if let Ok(address) = usize::try_from(layout::KVM_TSS) {
            let _ = fd.set_tss_address(address);
        }
        fd.create_irq_chip().map_err(VmmError::kvm("create the interrupt controllers"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        fd.create_pit2(pit).map_err(VmmError::kvm("create the timer"))?;

        let cpuid =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(VmmError::kvm("tell its CPUID table"))?;
        features::check_physical_bits(&cpuid)?;
        let msrs = msr::migratable_msrs(&kvm)?;
        let gate = Arc::new(Gate::new(usize::from(vcpus))?);
        let vcpus = (0..vcpus)
            .map(|index| Ok(Arc::new(Mutex::new(Vcpu::new(&fd, index, &cpuid, &msrs)?))))
            .collect::<Result<Vec<_>, VmmError>>()?;
        let slots = Mutex::new(Slots::new(kvm.get_nr_memslots()));
        let vm = Self {
            fd,
            kvm,
            ram,
            gate,
            vcpus,
            threads: Arc::default(),
            slots,
            dirty: OnceLock::new(),
            vfio: Mutex::default(),
        };
        vm.add_ram_slots()?;
        vm.set_gsi_routes(&[])?;
        Ok(Arc::new(vm))
    }

    /// RAM of the guest.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Number of vCPUs.
    pub fn vcpus(&self) -> usize {
        self.vcpus.len()
    }

    /// Points the first vCPU at a program: its registers, and what `change` makes of the system registers after reset.
    ///
    /// # Errors
    /// The machine is not paused, or KVM refuses the registers.
    pub fn set_entry(&self, regs: &kvm_regs, change: impl FnOnce(&mut kvm_sregs)) -> Result<(), VmmError> {
        if !self.is_paused() {
            return Err(VmmError::Refused("a machine that runs has its entry behind it".to_owned()));
        }
        match self.vcpus.first() {
            Some(vcpu) => lock(vcpu).set_entry(regs, change),
            None => Ok(()),
        }
    }

    /// Makes the vCPU threads, paused. All accesses outside RAM will go to `bus`, which the threads hold until
    /// [`shutdown`](Self::shutdown): where the bus in turn holds the machine, only that call ends both.
    ///
    /// # Errors
    /// The machine was started before, or a thread cannot be made.
    pub fn start(&self, bus: &Arc<dyn IoBus>) -> Result<(), VmmError> {
        let mut threads = lock(&self.threads);
        if !threads.is_empty() {
            return Err(VmmError::Refused("the machine was started before".to_owned()));
        }
        kick::install_handler()?;
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            let thread = run::spawn(
                index,
                Arc::clone(vcpu),
                Arc::clone(&self.gate),
                Arc::clone(bus),
                Arc::clone(&self.threads),
            )?;
            threads.push(thread);
        }
        Ok(())
    }

    /// Lets the vCPUs run, and has the guest's kvmclock say that it was stopped. Resuming a machine that runs does nothing.
    ///
    /// # Errors
    /// The machine was not started, or has stopped by itself.
    pub fn resume(&self) -> Result<(), VmmError> {
        if lock(&self.threads).is_empty() {
            return Err(VmmError::Refused("the machine was not started".to_owned()));
        }
        self.gate.resume()
    }

    /// Stops the vCPUs between two instructions. When this returns none of them runs, each instruction that was
    /// emulated by the [`IoBus`] is complete, and RAM changes only by devices. Pausing a machine that does not run
    /// does nothing.
    ///
    /// # Errors
    /// A vCPU did not come back within `deadline`, as when its [`IoBus`] hangs. The machine goes on then, if it ran.
    pub fn pause(&self, deadline: Duration) -> Result<(), VmmError> {
        let threads = lock(&self.threads);
        if threads.is_empty() {
            return Ok(());
        }
        self.gate.pause(deadline, || kick::all(&threads))
    }

    /// Whether no vCPU runs and none will until [`resume`](Self::resume).
    pub fn is_paused(&self) -> bool {
        self.gate.is_paused()
    }

    /// The reason for which the machine stopped by itself, if it did.
    pub fn stop_reason(&self) -> Option<StopReason> {
        self.gate.stop_reason()
    }

    /// Waits until the machine stops by itself, at most for `patience`.
    pub fn wait_for_stop(&self, patience: Duration) -> Option<StopReason> {
        self.gate.wait_for_stop(patience)
    }

    /// Becomes readable when the machine stops by itself, and stays so: for an event loop.
    pub fn stop_event(&self) -> std::os::fd::BorrowedFd<'_> {
        self.gate.stop_event()
    }

    /// Ends the vCPU threads for good. State can still be saved.
    pub fn shutdown(&self) {
        let threads = std::mem::take(&mut *lock(&self.threads));
        self.gate.quit(|| kick::all(&threads));
        for thread in threads {
            if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
                tracing::error!("a vCPU thread panicked");
            }
        }
    }
}

impl Drop for KvmVm {
    fn drop(&mut self) {
        self.shutdown();
    }
}

impl fmt::Debug for KvmVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmVm")
            .field("vcpus", &self.vcpus.len())
            .field("ram", &self.ram.size())
            .field("gate", &self.gate)
            .finish_non_exhaustive()
    }
}
