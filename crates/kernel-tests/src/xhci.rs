//! A function with several MSI vectors on a host without interrupt remapping, which has one for it.

use std::fs;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use vfio_migration_device::{IrqIndex, KernelDevice, KernelOptions, PciHardware};
use vfio_migration_memory::{GuestRam, RamSpec};
use vfio_migration_types::{DeviceId, Gpa, error_chain};

use crate::check::{Outcome, holds, same};
use crate::pci;

/// Without remapping any message of a device can be any interrupt, and type1 wants to be told that this is known.
const ALLOW: &str = "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts";

/// The host's kernel was told not to remap interrupts.
pub(crate) fn without_remapping() -> bool {
    fs::read_to_string("/proc/cmdline")
        .is_ok_and(|line| line.split_whitespace().any(|word| word == "intremap=off"))
}

/// Asked for all of its vectors, the kernel answers how many there are, and enables none; those there are can be had.
pub(crate) fn fewer_vectors() -> Outcome {
    fs::write(ALLOW, "Y")?;
    let place = pci::find("0x1033", "0x0194").ok_or("there is no USB controller")?;
    pci::bind(&place)?;
    let ram = Arc::new(GuestRam::new("ktest", &[RamSpec { gpa: Gpa(0), len: 1 << 20 }])?);
    let path = pci::address(&place)?.parse()?;
    let device = KernelDevice::open(DeviceId::new("usb0")?, &path, ram, &KernelOptions::default())?;
    let vectors = device.irq_count(IrqIndex::Msi);
    same("MSI vectors", vectors, 16)?;
    let make = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
    let events = (0..vectors).map(|_| make()).collect::<Result<Vec<_>, Errno>>()?;
    let fds: Vec<_> = events.iter().map(|event| Some(event.as_fd())).collect();
    for _ in 0..2 {
        let refused = device.set_irq_eventfds(IrqIndex::Msi, 0, &fds);
        let refused = refused.err().ok_or("a host without remapping has 16 vectors for one function")?;
        same(&error_chain(&refused), refused.fewer_interrupts(), Some(1))?;
        holds(refused.errno.is_none(), "it is no errno")?;
        holds(device.trigger_irq(IrqIndex::Msi, 0).is_err(), "nothing is enabled")?;
        device.set_irq_eventfds(IrqIndex::Msi, 0, &fds[..1])?;
        device.trigger_irq(IrqIndex::Msi, 0)?;
        let mut count = [0; 8];
        same("raised", rustix::io::read(&events[0], &mut count), Ok(8))?;
        same("not raised", rustix::io::read(&events[1], &mut count), Err(Errno::AGAIN))?;
        device.disable_irqs(IrqIndex::Msi)?;
    }
    drop(device);
    pci::unbind(&place)
}
