//! Interrupts and doorbells: routes, irqfds, messages, ioeventfds.

use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVMIO, KvmIrqRouting, kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch,
    kvm_ioeventfd_flag_nr_deassign, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_irqchip, kvm_irq_routing_msi, kvm_irq_routing_msi__bindgen_ty_1, kvm_msi,
};
use vfio_migration_types::Gpa;
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::vm::KvmVm;
use crate::error::VmmError;
use crate::layout::{GSIS, IOAPIC_PINS};

ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);

/// One message-signalled interrupt: what KVM raises when the irqfd of `gsi` is signalled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GsiRoute {
    /// Interrupt number, from [`IOAPIC_PINS`] to below [`GSIS`].
    pub gsi: u32,
    /// Guest-physical address of the message.
    pub address: u64,
    /// Data of the message.
    pub data: u32,
}

impl KvmVm {
    /// Makes `routes` the whole table of message-signalled interrupts. The pins of the interrupt controllers keep theirs.
    ///
    /// When this returns, an irqfd that is signalled goes by the new table.
    ///
    /// # Errors
    /// A route has the number of a pin, or KVM refuses the table.
    pub fn set_gsi_routes(&self, routes: &[GsiRoute]) -> Result<(), VmmError> {
        if let Some(route) = routes.iter().find(|route| !(IOAPIC_PINS..GSIS).contains(&route.gsi)) {
            return Err(VmmError::Refused(format!("interrupt {} cannot be a message", route.gsi)));
        }
        let entries: Vec<_> = pin_routes().chain(routes.iter().map(message_route)).collect();
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| VmmError::Refused(format!("{} interrupt routes are too many", entries.len())))?;
        self.fd.set_gsi_routing(&table).map_err(VmmError::kvm("set the interrupt routes"))
    }

    /// Has KVM raise `gsi` whenever `event`, an eventfd, is signalled; at once if it is already. KVM keeps a reference
    /// of its own.
    ///
    /// # Errors
    /// It is no eventfd, or already registered.
    pub fn register_irqfd(&self, event: BorrowedFd<'_>, gsi: u32) -> Result<(), VmmError> {
        let event = as_eventfd(event);
        self.fd.register_irqfd(&event, gsi).map_err(VmmError::kvm(format!("register the irqfd of {gsi}")))
    }

    /// Has KVM raise the level of pin `gsi` whenever `event` is signalled, and when the guest ends the interrupt lower it
    /// and signal `resample` (`KVM_IRQFD_FLAG_RESAMPLE`). Undone by [`unregister_irqfd`](Self::unregister_irqfd).
    ///
    /// # Errors
    /// One of them is no eventfd, `event` is registered already, or this KVM has no resampling.
    pub fn register_level_irqfd(
        &self,
        event: BorrowedFd<'_>,
        resample: BorrowedFd<'_>,
        gsi: u32,
    ) -> Result<(), VmmError> {
        let (event, resample) = (as_eventfd(event), as_eventfd(resample));
        self.fd
            .register_irqfd_with_resample(&event, &resample, gsi)
            .map_err(VmmError::kvm(format!("register the level irqfd of {gsi}")))
    }

    /// Undoes [`register_irqfd`](Self::register_irqfd). When this returns, a signal either has reached the guest's
    /// interrupt controller or stays readable in `event`.
    ///
    /// # Errors
    /// It is not registered.
    pub fn unregister_irqfd(&self, event: BorrowedFd<'_>, gsi: u32) -> Result<(), VmmError> {
        let event = as_eventfd(event);
        self.fd.unregister_irqfd(&event, gsi).map_err(VmmError::kvm(format!("unregister the irqfd of {gsi}")))
    }

    /// Delivers one message now. Returns whether a local APIC took it, `false` when the guest blocked it.
    ///
    /// # Errors
    /// KVM refuses the message.
    pub fn signal_msi(&self, address: u64, data: u32) -> Result<bool, VmmError> {
        let [low, high] = halves(address);
        let message = kvm_msi { address_lo: low, address_hi: high, data, ..Default::default() };
        let delivered = self.fd.signal_msi(message).map_err(VmmError::kvm("deliver a message"))?;
        Ok(delivered > 0)
    }

    /// Has KVM signal `event` instead of exiting when the guest stores `len` bytes (0 for any width) at `gpa`; with
    /// `datamatch` only when it stores that value.
    ///
    /// # Errors
    /// `len` is not 0, 1, 2, 4 or 8, there is one already, or KVM refuses.
    pub fn register_ioeventfd(
        &self,
        event: BorrowedFd<'_>,
        gpa: Gpa,
        len: u32,
        datamatch: Option<u64>,
    ) -> Result<(), VmmError> {
        self.ioeventfd(event, gpa, len, datamatch, 0)
            .map_err(VmmError::kvm(format!("register the ioeventfd at {gpa}")))
    }

    /// Undoes [`register_ioeventfd`](Self::register_ioeventfd), with the same arguments. When this returns, stores exit
    /// to the bus again; a signal that was given stays readable in `event`.
    ///
    /// # Errors
    /// There is none like this.
    pub fn unregister_ioeventfd(
        &self,
        event: BorrowedFd<'_>,
        gpa: Gpa,
        len: u32,
        datamatch: Option<u64>,
    ) -> Result<(), VmmError> {
        self.ioeventfd(event, gpa, len, datamatch, 1 << kvm_ioeventfd_flag_nr_deassign)
            .map_err(VmmError::kvm(format!("unregister the ioeventfd at {gpa}")))
    }

    // kvm-ioctls ties the width to the type of the datum to match, so it cannot register four bytes of any value.
    fn ioeventfd(
        &self,
        event: BorrowedFd<'_>,
        gpa: Gpa,
        len: u32,
        datamatch: Option<u64>,
        flags: u32,
    ) -> Result<(), errno::Error> {
        let matching = if datamatch.is_some() { 1 << kvm_ioeventfd_flag_nr_datamatch } else { 0 };
        let request = kvm_ioeventfd {
            datamatch: datamatch.unwrap_or(0),
            addr: gpa.0,
            len,
            fd: event.as_raw_fd(),
            flags: flags | matching,
            ..Default::default()
        };
        // SAFETY: the descriptor is a VM's, and the kernel reads one `kvm_ioeventfd` at the pointer.
        let result = unsafe { ioctl_with_ref(&self.fd, KVM_IOEVENTFD(), &request) };
        if result == 0 { Ok(()) } else { Err(errno::Error::last()) }
    }
}

/// kvm-ioctls wants its own type, which would close the descriptor when dropped.
fn as_eventfd(event: BorrowedFd<'_>) -> ManuallyDrop<EventFd> {
    // SAFETY: the descriptor is open while it is borrowed, which outlives the use of the result in one call, and
    // `ManuallyDrop` keeps it from being closed.
    ManuallyDrop::new(unsafe { EventFd::from_raw_fd(event.as_raw_fd()) })
}

/// The routes that KVM starts with: `KVM_SET_GSI_ROUTING` replaces them too.
fn pin_routes() -> impl Iterator<Item = kvm_irq_routing_entry> {
    let pic = (0..16).map(|gsi| match gsi {
        0..8 => (gsi, KVM_IRQCHIP_PIC_MASTER, gsi),
        _ => (gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8),
    });
    let ioapic = (0..IOAPIC_PINS).map(|gsi| (gsi, KVM_IRQCHIP_IOAPIC, gsi));
    pic.chain(ioapic).map(|(gsi, irqchip, pin)| kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 { irqchip: kvm_irq_routing_irqchip { irqchip, pin } },
        ..Default::default()
    })
}

fn message_route(route: &GsiRoute) -> kvm_irq_routing_entry {
    let [address_lo, address_hi] = halves(route.address);
    let msi = kvm_irq_routing_msi {
        address_lo,
        address_hi,
        data: route.data,
        __bindgen_anon_1: kvm_irq_routing_msi__bindgen_ty_1 { pad: 0 },
    };
    kvm_irq_routing_entry {
        gsi: route.gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
        ..Default::default()
    }
}

/// The low and the high word.
fn halves(address: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = address.to_le_bytes();
    [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])]
}
