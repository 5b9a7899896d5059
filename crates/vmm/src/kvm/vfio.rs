//! KVM's own device for VFIO (`KVM_DEV_TYPE_VFIO`, `Documentation/virt/kvm/devices/vfio.rst`): it learns which VFIO files
//! the machine has.
//!
//! Drivers that need to know their guest find it so, and with a device whose DMA snoops no cache KVM lets the guest
//! choose how its memory is cached. A machine works without it.

use std::os::fd::{AsRawFd, BorrowedFd};

use kvm_bindings::{
    KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_VFIO,
};

use rustix::io::Errno;

use super::lock::lock;
use super::vm::KvmVm;
use crate::error::{VmmError, errno_within};

impl KvmVm {
    /// Tells KVM of a VFIO file, a group's or a device's own, before the guest uses the device. Returns whether that was news
    /// to it: a group that several devices have is told once, and a KVM without the device for it does not want to know.
    ///
    /// # Errors
    /// It is no VFIO file.
    pub fn add_vfio_file(&self, file: BorrowedFd<'_>) -> Result<bool, VmmError> {
        let mut device = lock(&self.vfio);
        if device.is_none() {
            let mut ask = kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_VFIO, fd: 0, flags: 0 };
            match self.fd.create_device(&mut ask) {
                Ok(made) => *device = Some(made),
                Err(error) => {
                    tracing::debug!(%error, "KVM has no device for VFIO");
                    return Ok(false);
                }
            }
        }
        drop(device);
        match self.vfio_file(KVM_DEV_VFIO_FILE_ADD, file, "add a VFIO file") {
            Err(error) if errno_within(&error) == Some(Errno::EXIST) => Ok(false),
            added => added.map(|()| true),
        }
    }

    /// Undoes [`add_vfio_file`](Self::add_vfio_file).
    ///
    /// # Errors
    /// KVM does not know the file.
    pub fn remove_vfio_file(&self, file: BorrowedFd<'_>) -> Result<(), VmmError> {
        self.vfio_file(KVM_DEV_VFIO_FILE_DEL, file, "remove a VFIO file")
    }

    fn vfio_file(&self, attr: u32, file: BorrowedFd<'_>, doing: &str) -> Result<(), VmmError> {
        let device = lock(&self.vfio);
        let Some(device) = device.as_ref() else { return Ok(()) };
        let number = file.as_raw_fd();
        let addr = (&raw const number).addr() as u64;
        let attr = kvm_device_attr { group: KVM_DEV_VFIO_FILE, attr: attr.into(), addr, flags: 0 };
        // The kernel reads one i32 at `addr`, which lives until the call returns.
        device.set_device_attr(&attr).map_err(VmmError::kvm(doing))
    }
}
