//! The device's own log of its DMA writes.

use std::os::fd::BorrowedFd;

use vfio_bindings::bindings::vfio as uapi;
use vfio_migration_types::{Granule, Iova, Range};

use crate::error::UapiError;
use crate::feature::{Access, Feature, access};
use crate::report;

/// Starts logging the DMA writes of `device` to `ranges`, in pages of `granule` if it can. Gives the page size that
/// it took instead.
///
/// Independent of the migration state; survives a reset, not the close of the device. Memory that is mapped later is
/// not covered.
///
/// # Errors
/// Among others E2BIG for more ranges than the kernel takes (256 with 4 KiB pages), EINVAL for none, for ranges that
/// overlap or are not aligned to `granule` and, with most drivers, for a log that runs already; EOPNOTSUPP for more
/// than the device can log.
pub fn start_dma_logging(
    device: BorrowedFd<'_>,
    granule: Granule,
    ranges: &[Range<Iova>],
) -> Result<Granule, UapiError> {
    let ranges: Vec<uapi::vfio_device_feature_dma_logging_range> = ranges
        .iter()
        .map(|range| uapi::vfio_device_feature_dma_logging_range {
            iova: range.start().0,
            length: range.len(),
        })
        .collect();
    let mut payload = uapi::vfio_device_feature_dma_logging_control {
        page_size: granule.bytes(),
        num_ranges: u32::try_from(ranges.len()).map_err(|_| UapiError::TooManyRanges(ranges.len()))?,
        __reserved: 0,
        ranges: ranges.as_ptr().expose_provenance() as u64,
    };
    // SAFETY: DMA_LOGGING_START's payload; `ranges` points to `num_ranges` structures that live beyond the call and
    // that the kernel only reads.
    unsafe {
        access(device, Feature::DmaLoggingStart, Access::Set, &mut payload, "starting the device's DMA log")
    }?;
    Granule::new(payload.page_size).map_err(UapiError::UnusablePageSize)
}

/// Ends logging. With the drivers known, ending what was not begun succeeds.
pub fn stop_dma_logging(device: BorrowedFd<'_>) -> Result<(), UapiError> {
    let doing = "stopping the device's DMA log";
    // SAFETY: DMA_LOGGING_STOP has no payload.
    unsafe { access(device, Feature::DmaLoggingStop, Access::Set, &mut (), doing) }
}

/// ORs into `bitmap` which pages of `range` the device wrote since the last report, and makes the device forget them.
/// Bit `n % 64` of word `n / 64` stands for page `n` counted from the start of the range, whatever the formula in the
/// header says (`drivers/vfio/iova_bitmap.c`).
///
/// Ask for ranges as they were started: some devices know no others.
///
/// # Errors
/// Any error of the kernel means that the log is lost: all that it covers counts as dirty.
pub fn report_dma_logging(
    device: BorrowedFd<'_>,
    range: Range<Iova>,
    granule: Granule,
    bitmap: &mut [u64],
) -> Result<(), UapiError> {
    let (iova, length, page_size) = (range.start().0, range.len(), granule.bytes());
    report::read(range, granule, bitmap, |bitmap| {
        let mut payload = uapi::vfio_device_feature_dma_logging_report { iova, length, page_size, bitmap };
        let doing = "reading the device's DMA log";
        // SAFETY: DMA_LOGGING_REPORT's payload; the kernel sets bits in the memory pages that the bitmap takes, which
        // are there to be written (`report`), and keeps no pointer to them.
        unsafe { access(device, Feature::DmaLoggingReport, Access::Get, &mut payload, doing) }
    })
}
