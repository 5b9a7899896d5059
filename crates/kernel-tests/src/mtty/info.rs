//! What the device says of itself, and its interrupt.

use std::os::fd::AsFd;

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use vfio_migration_uapi::{
    Access, Feature, device_info, disable_irqs, irq_info, migration_flags, opt_in_precopy_info_v2, probe,
    region_info, set_irq_eventfds, stop_copy_size, trigger_irq,
};

use super::one_port;
use crate::check::{Outcome, holds, same};

const CONFIG: u32 = 7;
const INTX: u32 = 0;

pub(crate) fn describes_itself() -> Outcome {
    let instance = one_port()?;
    let opened = instance.open()?;
    let device = opened.device()?;
    let info = device_info(device)?;
    // It takes a reset all the same: the flag is no reason not to try one.
    holds(info.pci && !info.resettable, "a PCI device that does not say that it can be reset")?;
    holds(info.regions >= 9 && info.irqs >= 3, "it has a PCI function's regions and interrupts")?;
    let config = region_info(device, CONFIG)?;
    // One byte short of what PCI has: nobody may count on 256.
    same("bytes of config space", config.size, 255)?;
    holds(config.readable && config.writable && config.sparse.is_none(), "config space is read and written")?;
    let mut ids = [0; 4];
    rustix::io::pread(device, &mut ids, config.offset)?;
    same("vendor and device", ids, [0x48, 0x43, 0x53, 0x32])?;
    holds(region_info(device, info.regions + 1).is_err(), "a region that is not there is refused")?;

    let flags = migration_flags(device)?;
    holds(flags.p2p && flags.pre_copy, "mtty has STOP_COPY, P2P and PRE_COPY")?;
    same("estimated size", stop_copy_size(device)?, 24 + 36)?;
    for (feature, access, wanted) in [
        (Feature::Migration, Access::Get, true),
        (Feature::Migration, Access::Set, false),
        (Feature::MigDeviceState, Access::Set, true),
        (Feature::DmaLoggingStart, Access::Set, true),
    ] {
        same("a probed feature", probe(device, feature, access)?, wanted)?;
    }
    // A kernel of 6.12 does not know it, and says so without an error.
    holds(!opt_in_precopy_info_v2(device)?, "no pre-copy info v2 on this kernel")
}

pub(crate) fn raises_its_interrupt() -> Outcome {
    let instance = one_port()?;
    let opened = instance.open()?;
    let device = opened.device()?;
    // It knows its own interrupts only once it was asked what it is made of.
    same("too early", irq_info(device, INTX).err().and_then(|error| error.errno()), Some(Errno::INVAL))?;
    device_info(device)?;
    let irqs = irq_info(device, INTX)?;
    same("lines", irqs.count, 1)?;
    holds(irqs.eventfd, "signalled by eventfd")?;
    let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    set_irq_eventfds(device, INTX, 0, &[Some(event.as_fd())])?;
    let mut count = [0; 8];
    same("before", rustix::io::read(&event, &mut count), Err(Errno::AGAIN))?;
    trigger_irq(device, INTX, 0)?;
    same("after", rustix::io::read(&event, &mut count), Ok(8))?;
    same("how often", u64::from_ne_bytes(count), 1)?;
    disable_irqs(device, INTX)?;
    let _ = trigger_irq(device, INTX, 0);
    same("disabled", rustix::io::read(&event, &mut count), Err(Errno::AGAIN))
}
