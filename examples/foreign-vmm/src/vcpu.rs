//! The guest's one processor: a thread that runs it, its state, and how it is stopped between two instructions.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_segment,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use vfio_migration_guest_image::ENTRY;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::error::Error;
use crate::platform::Platform;

/// Longest wait for the vCPU to come back.
const PATIENCE: Duration = Duration::from_secs(12);
/// Time between two signals to a vCPU that has not come back yet.
const KICK_EVERY: Duration = Duration::from_millis(1);

/// A vCPU's state, as it travels. The guest program uses no MSR but EFER, which is among the system registers.
#[derive(Serialize, Deserialize)]
pub(crate) struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    lapic: kvm_lapic_state,
    xcrs: Option<kvm_xcrs>,
    xsave: kvm_xsave,
    debug: kvm_debugregs,
    events: kvm_vcpu_events,
}

/// The vCPU and its thread.
pub(crate) struct Vcpu {
    fd: Arc<Mutex<VcpuFd>>,
    control: Arc<Control>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Control {
    order: Mutex<Order>,
    changed: Condvar,
}

#[derive(Default)]
struct Order {
    run: bool,
    quit: bool,
    /// The thread is out of the guest.
    parked: bool,
    failed: Option<String>,
}

impl Vcpu {
    /// A vCPU in the state after a reset, and its thread, which waits.
    pub(crate) fn new(kvm: &Kvm, vm: &VmFd, platform: Arc<Platform>) -> Result<Self, Error> {
        let fd = vm.create_vcpu(0).map_err(Error::other("creating a vCPU"))?;
        let cpuid: CpuId = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(Error::other("asking for the CPUID table"))?;
        fd.set_cpuid2(&cpuid).map_err(Error::other("setting the CPUID table"))?;
        register_signal_handler(SIGRTMIN(), on_kick).map_err(Error::other("installing a signal handler"))?;
        let (fd, control) = (Arc::new(Mutex::new(fd)), Arc::new(Control::default()));
        let (of_thread, ordered) = (Arc::clone(&fd), Arc::clone(&control));
        let thread = std::thread::Builder::new()
            .name("vcpu".into())
            .spawn(move || serve_orders(&of_thread, &ordered, &platform))
            .map_err(Error::other("making the vCPU's thread"))?;
        Ok(Self { fd, control, thread: Some(thread) })
    }

    /// Points it at the guest program.
    pub(crate) fn enter_program(&self) -> Result<(), Error> {
        let fd = self.lock();
        let mut sregs = fd.get_sregs().map_err(Error::other("reading registers"))?;
        let code = kvm_segment {
            base: 0,
            limit: u32::MAX,
            selector: ENTRY.code_selector,
            type_: 0xB,
            present: 1,
            s: 1,
            l: 1,
            g: 1,
            ..Default::default()
        };
        let data = kvm_segment { selector: ENTRY.data_selector, type_: 3, l: 0, db: 1, ..code };
        sregs.cs = code;
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        (sregs.gdt.base, sregs.gdt.limit) = (ENTRY.gdt_base, ENTRY.gdt_limit);
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (ENTRY.cr0, ENTRY.cr3, ENTRY.cr4, ENTRY.efer);
        fd.set_sregs(&sregs).map_err(Error::other("setting registers"))?;
        let regs = kvm_regs { rip: ENTRY.rip, rsp: ENTRY.rsp, rflags: ENTRY.rflags, ..Default::default() };
        fd.set_regs(&regs).map_err(Error::other("setting registers"))
    }

    /// Lets it run.
    pub(crate) fn resume(&self) -> Result<(), Error> {
        let mut order = self.control.lock();
        if let Some(failed) = &order.failed {
            return Err(Error::Failed("running the guest", failed.clone().into()));
        }
        order.run = true;
        self.control.changed.notify_all();
        Ok(())
    }

    /// Stops it between two instructions. Whether it ran.
    pub(crate) fn pause(&self) -> Result<bool, Error> {
        let mut order = self.control.lock();
        let ran = std::mem::replace(&mut order.run, false);
        let deadline = Instant::now() + PATIENCE;
        while !order.parked {
            if Instant::now() > deadline {
                order.run = ran;
                return Err(Error::Text("the vCPU does not come back"));
            }
            // Once more each time: a signal may come just before KVM_RUN.
            if let Some(thread) = &self.thread {
                thread.kill(SIGRTMIN()).map_err(Error::other("signalling the vCPU"))?;
            }
            order = self
                .control
                .changed
                .wait_timeout(order, KICK_EVERY)
                .map_or_else(|e| e.into_inner().0, |w| w.0);
        }
        match &order.failed {
            Some(failed) => Err(Error::Failed("running the guest", failed.clone().into())),
            None => Ok(ran),
        }
    }

    /// Why the guest cannot go on.
    pub(crate) fn failed(&self) -> Option<String> {
        self.control.lock().failed.clone()
    }

    /// Reads its state out, while it is paused.
    pub(crate) fn save(&self) -> Result<VcpuState, Error> {
        let (fd, what) = (self.lock(), Error::other("reading a vCPU's state"));
        Ok(VcpuState {
            mp_state: fd.get_mp_state().map_err(&what)?,
            regs: fd.get_regs().map_err(&what)?,
            sregs: fd.get_sregs().map_err(&what)?,
            lapic: fd.get_lapic().map_err(&what)?,
            xcrs: fd.get_xcrs().ok(),
            xsave: fd.get_xsave().map_err(&what)?,
            debug: fd.get_debug_regs().map_err(&what)?,
            events: fd.get_vcpu_events().map_err(&what)?,
        })
    }

    /// Loads a state, before it has ever run.
    pub(crate) fn load(&self, state: &VcpuState) -> Result<(), Error> {
        let (fd, what) = (self.lock(), Error::other("loading a vCPU's state"));
        fd.set_mp_state(state.mp_state).map_err(&what)?;
        fd.set_regs(&state.regs).map_err(&what)?;
        fd.set_sregs(&state.sregs).map_err(&what)?;
        fd.set_lapic(&state.lapic).map_err(&what)?;
        if let Some(xcrs) = state.xcrs.as_ref().filter(|xcrs| xcrs.nr_xcrs > 0) {
            fd.set_xcrs(xcrs).map_err(&what)?;
        }
        // SAFETY: KVM reads more than this structure only from a process that enabled dynamic XSAVE features.
        unsafe { fd.set_xsave(&state.xsave) }.map_err(&what)?;
        fd.set_debug_regs(&state.debug).map_err(&what)?;
        fd.set_vcpu_events(&state.events).map_err(&what)
    }

    fn lock(&self) -> MutexGuard<'_, VcpuFd> {
        self.fd.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        if self.pause().is_err() {
            // A guest that gave up has ended its loop as well.
            self.control.lock().run = false;
        }
        self.control.lock().quit = true;
        self.control.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Control {
    fn lock(&self) -> MutexGuard<'_, Order> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All that the signal does is end KVM_RUN.
extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// The vCPU's thread.
fn serve_orders(fd: &Mutex<VcpuFd>, control: &Control, platform: &Platform) {
    loop {
        let mut order = control.lock();
        order.parked = true;
        control.changed.notify_all();
        while !order.run && !order.quit {
            order = control.changed.wait(order).unwrap_or_else(PoisonError::into_inner);
        }
        if order.quit {
            return;
        }
        order.parked = false;
        drop(order);
        let mut fd = fd.lock().unwrap_or_else(PoisonError::into_inner);
        let mut result = Ok(());
        while result.is_ok() && control.lock().run {
            result = step(&mut fd, platform);
        }
        // An access that was answered is an instruction half done, which the next entry finishes.
        fd.set_kvm_immediate_exit(1);
        while result.is_ok() && matches!(fd.run(), Ok(VcpuExit::MmioRead(..) | VcpuExit::MmioWrite(..))) {
            result = Err(Error::Text("an access over two pages"));
        }
        fd.set_kvm_immediate_exit(0);
        if let Err(error) = result {
            let mut order = control.lock();
            (order.run, order.failed) = (false, Some(error.to_string()));
        }
    }
}

/// Runs the guest to its next exit.
fn step(fd: &mut VcpuFd, platform: &Platform) -> Result<(), Error> {
    match fd.run() {
        Ok(VcpuExit::IoIn(port, into)) => platform.port_read(port, into),
        Ok(VcpuExit::IoOut(port, from)) => platform.port_write(port, from),
        Ok(VcpuExit::MmioRead(address, into)) => platform.memory_read(address, into),
        Ok(VcpuExit::MmioWrite(address, from)) => platform.memory_write(address, from),
        Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt) => Ok(()),
        Ok(exit) => Err(Error::Failed("running the guest", format!("{exit:?}").into())),
        Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => Ok(()),
        Err(error) => Err(Error::Failed("running the guest", error.into())),
    }
}
