//! The device's own file, `/dev/vfio/devices/vfioN`: it is bound to an iommufd and attached to an address space of it.

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::ioctl::{Opcode, Updater, opcode};
use vfio_bindings::bindings::vfio as uapi;

use crate::error::UapiError;
use crate::feature::argsz;

/// `_IO(VFIO_TYPE, VFIO_BASE + 18)`.
const BIND_IOMMUFD: Opcode = opcode::none(uapi::VFIO_TYPE, 118);
/// `_IO(VFIO_TYPE, VFIO_BASE + 19)`.
const ATTACH_IOMMUFD_PT: Opcode = opcode::none(uapi::VFIO_TYPE, 119);
/// `_IO(VFIO_TYPE, VFIO_BASE + 20)`.
const DETACH_IOMMUFD_PT: Opcode = opcode::none(uapi::VFIO_TYPE, 120);

/// Binds `device` to `iommufd` for as long as it is open: before that it answers nothing else. Gives its id there.
///
/// # Errors
/// EBUSY when somebody has the device, by its file or by its group; EINVAL when it is bound.
pub fn bind_iommufd(device: BorrowedFd<'_>, iommufd: BorrowedFd<'_>) -> Result<u32, UapiError> {
    let mut bind = Bind {
        argsz: const { argsz(size_of::<Bind>()) },
        flags: 0,
        iommufd: iommufd.as_raw_fd(),
        device_id: 0,
    };
    // SAFETY: the fields that `struct vfio_device_bind_iommufd` had from the start, of plain integers: the kernel reads
    // and writes at most argsz bytes.
    unsafe { rustix::ioctl::ioctl(device, Updater::<BIND_IOMMUFD, _>::new(&mut bind)) }
        .map_err(|source| UapiError::System { doing: "binding the device to an iommufd", source })?;
    Ok(bind.device_id)
}

/// Attaches `device` to an address space (IOAS) or page table (HWPT) of its iommufd. Gives the page table that it came
/// to, which the kernel makes for an IOAS.
pub fn attach(device: BorrowedFd<'_>, page_table: u32) -> Result<u32, UapiError> {
    let mut attach = Attach { argsz: const { argsz(size_of::<Attach>()) }, flags: 0, page_table };
    // SAFETY: the fields that `struct vfio_device_attach_iommufd_pt` had from the start, of plain integers: the kernel
    // reads and writes at most argsz bytes.
    unsafe { rustix::ioctl::ioctl(device, Updater::<ATTACH_IOMMUFD_PT, _>::new(&mut attach)) }
        .map_err(|source| UapiError::System { doing: "attaching the device to an address space", source })?;
    Ok(attach.page_table)
}

/// Detaches it: it can reach nothing by DMA.
pub fn detach(device: BorrowedFd<'_>) -> Result<(), UapiError> {
    let mut detach = [const { argsz(8) }, 0];
    // SAFETY: the fields that `struct vfio_device_detach_iommufd_pt` had from the start.
    unsafe { rustix::ioctl::ioctl(device, Updater::<DETACH_IOMMUFD_PT, _>::new(&mut detach)) }
        .map_err(|source| UapiError::System { doing: "detaching the device from its address space", source })
}

/// `struct vfio_device_bind_iommufd` up to the token, which kernels before 6.16 do not know.
#[repr(C)]
struct Bind {
    argsz: u32,
    flags: u32,
    iommufd: i32,
    device_id: u32,
}

/// `struct vfio_device_attach_iommufd_pt` up to the PASID, which kernels before 6.15 do not know.
#[repr(C)]
struct Attach {
    argsz: u32,
    flags: u32,
    page_table: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_layouts_are_the_uapis() {
        assert_eq!((BIND_IOMMUFD, ATTACH_IOMMUFD_PT, DETACH_IOMMUFD_PT), (0x3b76, 0x3b77, 0x3b78));
        assert_eq!(size_of::<Bind>(), std::mem::offset_of!(uapi::vfio_device_bind_iommufd, token_uuid_ptr));
        assert_eq!(size_of::<Attach>(), std::mem::offset_of!(uapi::vfio_device_attach_iommufd_pt, pasid));
        assert_eq!(std::mem::offset_of!(uapi::vfio_device_detach_iommufd_pt, pasid), 8);
    }
}
