//! The migration state machine, sizes, pre-copy progress and reset of a device.

use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::ioctl::{NoArg, Opcode, Updater, opcode};
use vfio_bindings::bindings::vfio as uapi;
use vfio_migration_types::{MigrationFlags, MigrationState};

use crate::error::UapiError;
use crate::feature::{Access, Feature, access, argsz};

/// `_IO(VFIO_TYPE, VFIO_BASE + 11)`.
const DEVICE_RESET: Opcode = opcode::none(uapi::VFIO_TYPE, 111);
/// `_IO(VFIO_TYPE, VFIO_BASE + 21)`, on a data descriptor.
const MIG_GET_PRECOPY_INFO: Opcode = opcode::none(uapi::VFIO_TYPE, 121);

/// Pre-copy estimates, in bytes: `struct vfio_precopy_info`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrecopyInfo {
    /// Left of the initial data.
    pub initial_bytes: u64,
    /// Changed since it was read, beyond the initial data.
    pub dirty_bytes: u64,
    /// `VFIO_PRECOPY_INFO_REINIT`: the initial data began anew. Never set unless
    /// [`opt_in_precopy_info_v2`] succeeded.
    pub reinit: bool,
}

/// Features of the migration of `device`. ENOTTY: it does not migrate.
pub fn migration_flags(device: BorrowedFd<'_>) -> Result<MigrationFlags, UapiError> {
    let mut payload = uapi::vfio_device_feature_migration::default();
    // SAFETY: MIGRATION's payload, without pointers.
    unsafe { access(device, Feature::Migration, Access::Get, &mut payload, "asking for migration support") }?;
    MigrationFlags::from_bits(payload.flags).ok_or(UapiError::NoStopCopy(payload.flags))
}

/// The state that `device` is really in.
pub fn device_state(device: BorrowedFd<'_>) -> Result<MigrationState, UapiError> {
    let mut payload = uapi::vfio_device_feature_mig_state { device_state: 0, data_fd: -1 };
    let doing = "asking for the migration state";
    // SAFETY: MIG_DEVICE_STATE's payload, without pointers.
    unsafe { access(device, Feature::MigDeviceState, Access::Get, &mut payload, doing) }?;
    MigrationState::try_from(payload.device_state).map_err(UapiError::UnknownState)
}

/// Moves `device` to `to`, by as many arcs as it takes, and blocks as long. Gives the data descriptor if an arc
/// opened one: close-on-exec, blocking, for reading in the saving states and for writing in RESUMING.
///
/// `None` inside the saving group, which keeps its descriptor, and for a move to the state the device is in: a
/// descriptor that was lost cannot be had again without leaving the group.
///
/// Never to be called on a device in ERROR, which makes the kernel warn (and a host with `panic_on_warn` panic): ask
/// [`device_state`] first.
///
/// # Errors
/// The device stays where the last arc that succeeded left it, anywhere on the path: ask [`device_state`].
pub fn set_device_state(device: BorrowedFd<'_>, to: MigrationState) -> Result<Option<OwnedFd>, UapiError> {
    let mut payload = uapi::vfio_device_feature_mig_state { device_state: to as u32, data_fd: -1 };
    let doing = "setting the migration state";
    // SAFETY: MIG_DEVICE_STATE's payload, without pointers.
    unsafe { access(device, Feature::MigDeviceState, Access::Set, &mut payload, doing) }?;
    // SAFETY: it was -1 before; on success the kernel puts a number there only after it has installed a new
    // descriptor under it for this process, which nobody else knows of.
    Ok((payload.data_fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(payload.data_fd) }))
}

/// Estimated bytes of the STOP_COPY data of `device`, in any state: a hint for a buffer or a forecast, never a length.
pub fn stop_copy_size(device: BorrowedFd<'_>) -> Result<u64, UapiError> {
    let mut payload = uapi::vfio_device_feature_mig_data_size::default();
    let doing = "asking for the size of the device state";
    // SAFETY: MIG_DATA_SIZE's payload, without pointers.
    unsafe { access(device, Feature::MigDataSize, Access::Get, &mut payload, doing) }?;
    Ok(payload.stop_copy_length)
}

/// Makes the flags of [`precopy_info`] honest for as long as `device` stays open. `false`: the kernel or the device
/// has no such thing (ENOTTY from an older kernel, EINVAL for a device without PRE_COPY).
pub fn opt_in_precopy_info_v2(device: BorrowedFd<'_>) -> Result<bool, UapiError> {
    let doing = "opting in to pre-copy info v2";
    // SAFETY: MIG_PRECOPY_INFOv2 has no payload.
    match unsafe { access(device, Feature::MigPrecopyInfoV2, Access::Set, &mut (), doing) } {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.errno(), Some(Errno::NOTTY | Errno::INVAL)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Pre-copy estimates of the saving session that `data` belongs to. For some drivers asking is what makes them
/// produce the next piece.
///
/// # Errors
/// EINVAL outside PRE_COPY and PRE_COPY_P2P, ENODEV for a session that a reset has ended.
pub fn precopy_info(data: BorrowedFd<'_>) -> Result<PrecopyInfo, UapiError> {
    // The flags go in as zero: without the opt-in, the kernel echoes whatever was in them.
    let mut info = uapi::vfio_precopy_info {
        argsz: const { argsz(size_of::<uapi::vfio_precopy_info>()) },
        ..Default::default()
    };
    // SAFETY: the structure that the uAPI gives this ioctl, of plain integers; the kernel writes at most argsz bytes.
    unsafe { rustix::ioctl::ioctl(data, Updater::<MIG_GET_PRECOPY_INFO, _>::new(&mut info)) }
        .map_err(|source| UapiError::System { doing: "asking for pre-copy progress", source })?;
    Ok(PrecopyInfo {
        initial_bytes: info.initial_bytes,
        dirty_bytes: info.dirty_bytes,
        reinit: info.flags & uapi::VFIO_PRECOPY_INFO_REINIT != 0,
    })
}

/// Resets `device`: the way out of ERROR and of RESUMING. Its state becomes RUNNING, and every data descriptor dies
/// (ENODEV).
pub fn reset(device: BorrowedFd<'_>) -> Result<(), UapiError> {
    // SAFETY: this ioctl takes no argument.
    unsafe { rustix::ioctl::ioctl(device, NoArg::<DEVICE_RESET>::new()) }
        .map_err(|source| UapiError::System { doing: "resetting the device", source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_sizes_are_the_uapis() {
        assert_eq!(DEVICE_RESET, 0x3b6f);
        assert_eq!(MIG_GET_PRECOPY_INFO, 0x3b79);
        assert_eq!(size_of::<uapi::vfio_precopy_info>(), 24);
        assert_eq!(uapi::VFIO_PRECOPY_INFO_REINIT, 1);
        for state in MigrationState::ALL {
            assert!((state as u32) < uapi::vfio_device_mig_state_VFIO_DEVICE_STATE_NR);
        }
        assert_eq!(
            MigrationState::PreCopyP2p as u32,
            uapi::vfio_device_mig_state_VFIO_DEVICE_STATE_PRE_COPY_P2P
        );
    }
}
