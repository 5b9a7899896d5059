//! A virtual machine of this VMM: RAM, a processor, and one device on its bus.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VmFd};
use serde::{Deserialize, Serialize};
use vfio_migration_guest_image::map::REPORT;
use vfio_migration_guest_image::{BootInfo, REPORT_LEN, Report, contents};
use vfio_user_peer::Client;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::error::Error;
use crate::hardware;
use crate::irq::Routes;
use crate::memory::{self, Memory, PARTS};
use crate::pci::Function;
use crate::platform::{Platform, PortState};
use crate::vcpu::{Vcpu, VcpuState};

/// RAM and the device, open and mapped: all that a guest needs to begin to arrive.
#[derive(Clone)]
pub(crate) struct Parts {
    /// Guest RAM.
    pub(crate) memory: Memory,
    /// The device.
    pub(crate) device: Arc<Client>,
}

/// What moves beside RAM and the device.
#[derive(Serialize, Deserialize)]
pub(crate) struct VmState {
    vcpu: VcpuState,
    ports: PortState,
}

/// A whole machine. Fields end in the order that they stand in: the vCPU before what it runs in.
pub(crate) struct Vm {
    /// The processor.
    pub(crate) vcpu: Vcpu,
    /// The device on the bus.
    pub(crate) function: Arc<Function>,
    /// The table of message routes.
    pub(crate) routes: Arc<Routes>,
    platform: Arc<Platform>,
    /// KVM's machine.
    pub(crate) fd: Arc<VmFd>,
    logging: Mutex<bool>,
    /// What it is made of.
    pub(crate) parts: Parts,
}

impl Parts {
    /// Maps RAM, and opens and maps the device at `socket`.
    pub(crate) fn open(socket: &Path, huge: bool) -> Result<Self, Error> {
        let memory = memory::map(huge)?;
        let device = hardware::connect(socket, &memory)?;
        Ok(Self { memory, device })
    }
}

impl Vm {
    /// A machine of `parts`, in the state after a reset, or in `state`.
    pub(crate) fn new(parts: Parts, state: Option<&VmState>) -> Result<Self, Error> {
        let kvm = Kvm::new().map_err(Error::other("opening /dev/kvm"))?;
        let fd = Arc::new(kvm.create_vm().map_err(Error::other("creating a machine"))?);
        // Only VMX uses these pages.
        let _ = fd.set_identity_map_address(0xFFFB_C000);
        let _ = fd.set_tss_address(0xFFFB_D000);
        fd.create_irq_chip().map_err(Error::other("creating the interrupt controllers"))?;
        let routes = Arc::new(Routes::default());
        let function = Arc::new(Function::new(parts.device.clone(), fd.clone(), routes.clone())?);
        let ports = state.map(|state| state.ports).unwrap_or_default();
        let platform = Arc::new(Platform::new(function.clone(), ports));
        let vcpu = Vcpu::new(&kvm, &fd, platform.clone())?;
        let vm = Self { vcpu, function, routes, platform, fd, logging: Mutex::new(false), parts };
        vm.set_slots(0)?;
        if let Some(state) = state {
            vm.vcpu.load(&state.vcpu)?;
        }
        Ok(vm)
    }

    /// Puts the guest program in front of the vCPU: it numbers `bytes_per_second` of pages, and drives the device.
    pub(crate) fn boot(&self, bytes_per_second: u64) -> Result<(), Error> {
        let wrong = Error::other("booting the guest program");
        self.function.place_bars();
        let info = BootInfo::new(&PARTS, bytes_per_second, 1, false).map_err(&wrong)?;
        for (gpa, bytes) in contents(&PARTS, &info).map_err(&wrong)? {
            self.parts.memory.write_slice(&bytes, GuestAddress(gpa)).map_err(Error::other("writing RAM"))?;
        }
        self.vcpu.enter_program()
    }

    /// What the guest says of itself.
    pub(crate) fn report(&self) -> Result<Report, Error> {
        let mut bytes = [0; REPORT_LEN];
        self.parts
            .memory
            .read_slice(&mut bytes, GuestAddress(REPORT))
            .map_err(Error::other("reading the report"))?;
        Ok(Report::parse(&bytes))
    }

    /// The state beside RAM and device, of a machine that is paused.
    pub(crate) fn save(&self) -> Result<VmState, Error> {
        Ok(VmState { vcpu: self.vcpu.save()?, ports: self.platform.state() })
    }

    /// Turns KVM's log of the vCPU's writes on, with a clean slate, or off.
    pub(crate) fn log_writes(&self, on: bool) -> Result<(), Error> {
        let mut logging = self.logging.lock().unwrap_or_else(PoisonError::into_inner);
        if on && *logging {
            return Err(Error::Text("writes are logged already"));
        }
        *logging = on;
        self.set_slots(if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 })
    }

    /// The words of the log of each region, in its order, forgotten as they are read.
    pub(crate) fn written(&self) -> Result<Vec<Vec<u64>>, Error> {
        let regions = (0..).zip(self.parts.memory.iter());
        regions
            .map(|(slot, region)| {
                let len = usize::try_from(region.len()).map_err(Error::other("reading the dirty log"))?;
                self.fd.get_dirty_log(slot, len).map_err(Error::other("reading the dirty log"))
            })
            .collect()
    }

    fn set_slots(&self, flags: u32) -> Result<(), Error> {
        for (slot, (part, region)) in (0..).zip(PARTS.iter().zip(self.parts.memory.iter())) {
            let host = region.get_host_address(vm_memory::MemoryRegionAddress(0));
            let slot = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: part.gpa,
                memory_size: part.len,
                userspace_addr: host.map_err(Error::other("finding RAM"))?.addr() as u64,
            };
            // SAFETY: the memory stays mapped for as long as `parts`, which this machine drops after KVM's.
            unsafe { self.fd.set_user_memory_region(slot) }
                .map_err(Error::other("giving RAM to the guest"))?;
        }
        Ok(())
    }
}
