//! The loop of a vCPU thread.

use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use kvm_ioctls::VcpuExit;
use rustix::io::Errno;
use vfio_migration_types::Gpa;

use super::gate::{Gate, Order};
use super::kick;
use super::lock::lock;
use super::vcpu::Vcpu;
use crate::bus::IoBus;
use crate::error::{StopReason, VmmError};

/// Makes the thread of vCPU `index`. It runs the guest whenever the gate is open and ends when told to quit.
pub(super) fn spawn(
    index: usize,
    vcpu: Arc<Mutex<Vcpu>>,
    gate: Arc<Gate>,
    bus: Arc<dyn IoBus>,
    all: Arc<Mutex<Vec<JoinHandle<()>>>>,
) -> Result<JoinHandle<()>, VmmError> {
    std::thread::Builder::new()
        .name(format!("vcpu{index}"))
        .spawn(move || {
            while gate.wait_for_order() == Order::Run {
                let mut vcpu = lock(&vcpu);
                // Here, as this thread alone may hold the vCPU while the gate is open.
                vcpu.tell_of_pause();
                let stopped = run(index, &mut vcpu, &gate, &*bus);
                complete_instruction(&mut vcpu, &*bus);
                drop(vcpu);
                if let Some(reason) = stopped {
                    gate.stop(reason);
                    // The others, too, must leave the guest. Whoever holds the lock is about to kick them.
                    if let Ok(threads) = all.try_lock() {
                        kick::all(&threads);
                    }
                }
                gate.park();
            }
            gate.park();
        })
        .map_err(|source| VmmError::Io { doing: "making a vCPU thread".to_owned(), source })
}

/// Runs until another order comes, or the guest cannot go on.
fn run(index: usize, vcpu: &mut Vcpu, gate: &Gate, bus: &dyn IoBus) -> Option<StopReason> {
    let byte = &raw mut vcpu.fd.get_kvm_run().immediate_exit;
    // SAFETY: the byte lies in the vCPU's shared page, which lives as long as `vcpu`, longer than this value.
    let _target = unsafe { kick::KickTarget::new(byte) };
    loop {
        // First the byte, then the order: a kick between the two finds the order changed already.
        vcpu.fd.set_kvm_immediate_exit(0);
        while gate.order() == Order::Run {
            match vcpu.fd.run() {
                Ok(exit) => {
                    if let Some(stop) = serve(exit, bus) {
                        return Some(stop.describe(index, vcpu));
                    }
                }
                Err(error) => match Errno::from_raw_os_error(error.errno()) {
                    Errno::INTR => break,
                    // A vCPU that waited for SIPI, and a spurious wake-up.
                    Errno::AGAIN => {}
                    errno => {
                        return Some(StopReason::Unknown { vcpu: index, exit: format!("errno {errno}") });
                    }
                },
            }
        }
        if gate.order() != Order::Run {
            return None;
        }
    }
}

/// After an access that the bus answered, the instruction itself is unfinished: registers do not hold what was read, and
/// the instruction pointer has not moved. KVM finishes it on the next entry, which `immediate_exit` ends there.
fn complete_instruction(vcpu: &mut Vcpu, bus: &dyn IoBus) {
    vcpu.fd.set_kvm_immediate_exit(1);
    // An access that is split over two pages takes one more exit; nothing takes more than a few.
    for _ in 0..16 {
        match vcpu.fd.run() {
            Ok(exit) => {
                if serve(exit, bus).is_some() {
                    break;
                }
            }
            Err(_) => break,
        }
    }
    vcpu.fd.set_kvm_immediate_exit(0);
}

/// An exit that the machine does not survive.
enum Fatal {
    Shutdown,
    InternalError,
    EntryFailed { reason: u64 },
    Unknown,
}

impl Fatal {
    fn describe(self, index: usize, vcpu: &mut Vcpu) -> StopReason {
        let rip = vcpu.fd.get_regs().ok().map(|regs| regs.rip);
        match self {
            Self::Shutdown => StopReason::Shutdown { vcpu: index, rip },
            Self::InternalError => {
                // SAFETY: the exit reason says that this member of the union is the valid one, and any bits are a u32.
                let suberror = unsafe { vcpu.fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
                StopReason::InternalError { vcpu: index, suberror, rip }
            }
            Self::EntryFailed { reason } => StopReason::Unknown {
                vcpu: index,
                exit: format!("a failed entry, reason {reason:#x} of the hardware"),
            },
            // Its number is KVM_EXIT_* of linux/kvm.h.
            Self::Unknown => {
                let exit = format!("exit reason {}", vcpu.fd.get_kvm_run().exit_reason);
                StopReason::Unknown { vcpu: index, exit }
            }
        }
    }
}

fn serve(exit: VcpuExit<'_>, bus: &dyn IoBus) -> Option<Fatal> {
    match exit {
        VcpuExit::IoIn(port, data) => bus.pio_read(port, data),
        VcpuExit::IoOut(port, data) => bus.pio_write(port, data),
        VcpuExit::MmioRead(address, data) => bus.mmio_read(Gpa(address), data),
        VcpuExit::MmioWrite(address, data) => bus.mmio_write(Gpa(address), data),
        VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt => {}
        VcpuExit::Shutdown | VcpuExit::SystemEvent(..) => return Some(Fatal::Shutdown),
        VcpuExit::InternalError => return Some(Fatal::InternalError),
        VcpuExit::FailEntry(reason, _) => return Some(Fatal::EntryFailed { reason }),
        _ => return Some(Fatal::Unknown),
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::EmptyBus;

    #[test]
    fn an_exit_that_the_machine_does_not_know_ends_it() {
        let failed = serve(VcpuExit::FailEntry(0x8000_0021, 3), &EmptyBus);
        assert!(matches!(failed, Some(Fatal::EntryFailed { reason: 0x8000_0021 })));
        assert!(matches!(serve(VcpuExit::Nmi, &EmptyBus), Some(Fatal::Unknown)));
        assert!(serve(VcpuExit::Hlt, &EmptyBus).is_none());
    }
}
