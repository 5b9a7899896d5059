//! `VFIO_DEVICE_FEATURE`: one ioctl with many payloads.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, opcode};
use vfio_bindings::bindings::vfio as uapi;

use crate::error::UapiError;

/// `_IO(VFIO_TYPE, VFIO_BASE + 17)`.
pub(crate) const DEVICE_FEATURE: Opcode = opcode::none(uapi::VFIO_TYPE, 117);

/// A feature of `VFIO_DEVICE_FEATURE` that migration uses, with the kernel's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[repr(u32)]
pub enum Feature {
    /// Migration flags (GET).
    Migration = uapi::VFIO_DEVICE_FEATURE_MIGRATION,
    /// State of the migration state machine (GET, SET).
    MigDeviceState = uapi::VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE,
    /// Begin of DMA logging (SET).
    DmaLoggingStart = uapi::VFIO_DEVICE_FEATURE_DMA_LOGGING_START,
    /// End of DMA logging (SET).
    DmaLoggingStop = uapi::VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP,
    /// Content of the DMA log (GET).
    DmaLoggingReport = uapi::VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT,
    /// Estimated size of the STOP_COPY data (GET).
    MigDataSize = uapi::VFIO_DEVICE_FEATURE_MIG_DATA_SIZE,
    /// Honest flags in the pre-copy info (SET).
    MigPrecopyInfoV2 = uapi::VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2,
}

/// Operation on a feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// `VFIO_DEVICE_FEATURE_GET`.
    Get,
    /// `VFIO_DEVICE_FEATURE_SET`.
    Set,
}

impl Access {
    fn bit(self) -> u32 {
        match self {
            Self::Get => uapi::VFIO_DEVICE_FEATURE_GET,
            Self::Set => uapi::VFIO_DEVICE_FEATURE_SET,
        }
    }
}

/// Whether `device` says it has `feature` for `access`. Changes nothing.
///
/// ENOTTY and EINVAL are a no: the kernel gives the one for what is missing and the other for an access that the
/// feature does not have, and for [`Feature::MigPrecopyInfoV2`] on a device without PRE_COPY.
///
/// A yes is no promise: for DMA logging it says that the driver has the calls, not that they work for given ranges.
pub fn probe(device: BorrowedFd<'_>, feature: Feature, access: Access) -> Result<bool, UapiError> {
    let flags = feature as u32 | access.bit() | uapi::VFIO_DEVICE_FEATURE_PROBE;
    // SAFETY: a PROBE has no payload and the kernel touches none.
    match unsafe { call(device, flags, &mut ()) } {
        Ok(()) => Ok(true),
        Err(Errno::NOTTY | Errno::INVAL) => Ok(false),
        Err(source) => Err(UapiError::System { doing: "probing a device feature", source }),
    }
}

/// Gets or sets `feature` with `payload`, which the kernel reads and then writes.
///
/// # Safety
/// `P` is the payload that the uAPI gives `feature`, and what its pointers point to is good for what the kernel does
/// with it.
pub(crate) unsafe fn access<P>(
    device: BorrowedFd<'_>,
    feature: Feature,
    access: Access,
    payload: &mut P,
    doing: &'static str,
) -> Result<(), UapiError>
where
    P: Payload,
{
    // SAFETY: by this function's contract.
    unsafe { call(device, feature as u32 | access.bit(), payload) }
        .map_err(|source| UapiError::System { doing, source })
}

/// Payload after the header: plain integers, for which any bytes from the kernel are a value.
pub(crate) trait Payload: Copy {}
impl Payload for () {}
impl Payload for uapi::vfio_device_feature_migration {}
impl Payload for uapi::vfio_device_feature_mig_state {}
impl Payload for uapi::vfio_device_feature_mig_data_size {}
impl Payload for uapi::vfio_device_feature_dma_logging_control {}
impl Payload for uapi::vfio_device_feature_dma_logging_report {}

/// `struct vfio_device_feature` with its payload in place of the flexible array.
#[repr(C)]
struct Framed<P> {
    argsz: u32,
    flags: u32,
    payload: P,
}

/// # Safety
/// As for [`access`].
unsafe fn call<P: Payload>(device: BorrowedFd<'_>, flags: u32, payload: &mut P) -> Result<(), Errno> {
    const { assert!(std::mem::offset_of!(Framed<P>, payload) == 8, "the payload follows the header at once") };
    let argsz = const { argsz(size_of::<Framed<P>>()) };
    let mut framed = Framed { argsz, flags, payload: *payload };
    // SAFETY: the kernel reads and writes at most argsz bytes of `framed` (vfio_main.c, vfio_ioctl_device_feature),
    // all of which are ours and hold plain integers; pointers among them are good by this function's contract.
    unsafe { rustix::ioctl::ioctl(device, Updater::<DEVICE_FEATURE, _>::new(&mut framed)) }?;
    *payload = framed.payload;
    Ok(())
}

#[expect(clippy::cast_possible_truncation, reason = "sizes of a few structures, checked here")]
pub(crate) const fn argsz(size: usize) -> u32 {
    assert!(size <= 256);
    size as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_sizes_are_the_uapis() {
        assert_eq!(DEVICE_FEATURE, 0x3b75);
        let ids = [
            (Feature::Migration, 1),
            (Feature::MigDeviceState, 2),
            (Feature::DmaLoggingStart, 6),
            (Feature::DmaLoggingStop, 7),
            (Feature::DmaLoggingReport, 8),
            (Feature::MigDataSize, 9),
            (Feature::MigPrecopyInfoV2, 12),
        ];
        assert!(ids.iter().all(|(feature, id)| *feature as u32 == *id));
        assert_eq!(
            (Access::Get.bit(), Access::Set.bit(), uapi::VFIO_DEVICE_FEATURE_PROBE),
            (1 << 16, 1 << 17, 1 << 18)
        );
        assert_eq!(size_of::<uapi::vfio_device_feature>(), 8);
        assert_eq!(size_of::<Framed<()>>(), 8);
        assert_eq!(size_of::<Framed<uapi::vfio_device_feature_migration>>(), 8 + 8);
        assert_eq!(size_of::<Framed<uapi::vfio_device_feature_mig_state>>(), 8 + 8);
        assert_eq!(size_of::<Framed<uapi::vfio_device_feature_mig_data_size>>(), 8 + 8);
        assert_eq!(size_of::<Framed<uapi::vfio_device_feature_dma_logging_control>>(), 8 + 24);
        assert_eq!(size_of::<Framed<uapi::vfio_device_feature_dma_logging_report>>(), 8 + 32);
        assert_eq!(size_of::<uapi::vfio_device_feature_dma_logging_range>(), 16);
        assert_eq!(std::mem::offset_of!(uapi::vfio_device_feature_dma_logging_control, ranges), 16);
        assert_eq!(std::mem::offset_of!(uapi::vfio_device_feature_dma_logging_report, bitmap), 24);
    }
}
