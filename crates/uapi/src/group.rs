//! Groups: the older way to a device, `/dev/vfio/NUMBER`.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, NoArg, Opcode, Updater, opcode};
use vfio_bindings::bindings::vfio as uapi;

use crate::error::UapiError;
use crate::feature::argsz;
use crate::type1::Type1;

/// `_IO(VFIO_TYPE, VFIO_BASE + 3)`.
const GROUP_GET_STATUS: Opcode = opcode::none(uapi::VFIO_TYPE, 103);
/// `_IO(VFIO_TYPE, VFIO_BASE + 4)`.
const GROUP_SET_CONTAINER: Opcode = opcode::none(uapi::VFIO_TYPE, 104);
/// `_IO(VFIO_TYPE, VFIO_BASE + 5)`.
const GROUP_UNSET_CONTAINER: Opcode = opcode::none(uapi::VFIO_TYPE, 105);
/// `_IO(VFIO_TYPE, VFIO_BASE + 6)`.
const GROUP_GET_DEVICE_FD: Opcode = opcode::none(uapi::VFIO_TYPE, 106);

/// Status of a group: `struct vfio_group_status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupStatus {
    /// Every device of it is bound to VFIO, or to no driver: it may be used.
    pub viable: bool,
    /// The group is in a container.
    pub has_container: bool,
}

/// Whether the devices of `group` can be used.
pub fn group_status(group: BorrowedFd<'_>) -> Result<GroupStatus, UapiError> {
    let mut status = uapi::vfio_group_status {
        argsz: const { argsz(size_of::<uapi::vfio_group_status>()) },
        ..Default::default()
    };
    // SAFETY: the structure that the uAPI gives this ioctl, of plain integers; the kernel writes at most argsz bytes.
    unsafe { rustix::ioctl::ioctl(group, Updater::<GROUP_GET_STATUS, _>::new(&mut status)) }
        .map_err(|source| UapiError::System { doing: "asking how the VFIO group stands", source })?;
    Ok(GroupStatus {
        viable: status.flags & uapi::VFIO_GROUP_FLAGS_VIABLE != 0,
        has_container: status.flags & uapi::VFIO_GROUP_FLAGS_CONTAINER_SET != 0,
    })
}

/// Puts `group` into a container.
///
/// # Errors
/// EINVAL when it is in one, EPERM when it is not viable.
pub fn set_container(group: BorrowedFd<'_>, container: &Type1) -> Result<(), UapiError> {
    let mut number = container.fd().as_raw_fd();
    // SAFETY: the kernel reads one integer.
    unsafe { rustix::ioctl::ioctl(group, Updater::<GROUP_SET_CONTAINER, _>::new(&mut number)) }
        .map_err(|source| UapiError::System { doing: "putting the VFIO group into a container", source })
}

/// Takes `group` out of its container. EBUSY while a device of it is open.
pub fn unset_container(group: BorrowedFd<'_>) -> Result<(), UapiError> {
    // SAFETY: this ioctl takes no argument.
    unsafe { rustix::ioctl::ioctl(group, NoArg::<GROUP_UNSET_CONTAINER>::new()) }
        .map_err(|source| UapiError::System { doing: "taking the VFIO group out of its container", source })
}

/// Opens the device `name` of `group`: `0000:01:00.0` of a PCI function, the UUID of an mdev. The group is in a
/// container that has its IOMMU set.
///
/// # Errors
/// ENODEV when no such device is in the group; EBUSY when somebody has it.
pub fn group_device(group: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, UapiError> {
    // SAFETY: the argument is a string that ends in a zero byte, which the kernel only reads.
    unsafe { rustix::ioctl::ioctl(group, GetDevice(name)) }
        .map_err(|source| UapiError::System { doing: "opening the device of the VFIO group", source })
}

/// `VFIO_GROUP_GET_DEVICE_FD`: takes a string, returns a descriptor.
struct GetDevice<'a>(&'a CStr);

// SAFETY: the opcode and the pointer are this ioctl's; it returns a new descriptor that nobody else knows of.
unsafe impl Ioctl for GetDevice<'_> {
    type Output = OwnedFd;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        GROUP_GET_DEVICE_FD
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        self.0.as_ptr().cast_mut().cast()
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut std::ffi::c_void) -> Result<Self::Output, Errno> {
        // SAFETY: on success the kernel returns the number of a descriptor that it made for this call.
        Ok(unsafe { OwnedFd::from_raw_fd(out) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_sizes_are_the_uapis() {
        assert_eq!((GROUP_GET_STATUS, GROUP_SET_CONTAINER), (0x3b67, 0x3b68));
        assert_eq!((GROUP_UNSET_CONTAINER, GROUP_GET_DEVICE_FD), (0x3b69, 0x3b6a));
        assert_eq!(size_of::<uapi::vfio_group_status>(), 8);
    }
}
