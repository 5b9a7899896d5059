//! What a device is made of: its regions and how they may be reached, and its reset.

use std::os::fd::BorrowedFd;

use rustix::ioctl::{Opcode, Updater, opcode};
use vfio_bindings::bindings::vfio as uapi;
use vfio_migration_types::Range;

use crate::capability::{self, Chain};
use crate::error::UapiError;
use crate::feature::argsz;

/// `_IO(VFIO_TYPE, VFIO_BASE + 7)`.
pub(crate) const DEVICE_GET_INFO: Opcode = opcode::none(uapi::VFIO_TYPE, 107);
/// `_IO(VFIO_TYPE, VFIO_BASE + 8)`.
pub(crate) const DEVICE_GET_REGION_INFO: Opcode = opcode::none(uapi::VFIO_TYPE, 108);

/// A device's own description: `struct vfio_device_info`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// `VFIO_DEVICE_FLAGS_RESET`: it can be [reset](crate::reset).
    pub resettable: bool,
    /// `VFIO_DEVICE_FLAGS_PCI`: its regions and interrupts are those of a PCI function.
    pub pci: bool,
    /// Regions, absent ones counted: the largest index and one.
    pub regions: u32,
    /// Kinds of interrupts, likewise.
    pub irqs: u32,
}

/// A region of a device: `struct vfio_region_info` and its capabilities.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// Index of the region, `VFIO_PCI_*_REGION_INDEX`.
    pub index: u32,
    /// The region may be read.
    pub readable: bool,
    /// The region may be written.
    pub writable: bool,
    /// `VFIO_REGION_INFO_FLAG_MMAP`: it may be mapped, whole or in the parts that [`sparse`](Self::sparse) names.
    pub mappable: bool,
    /// Bytes; 0 where the region is absent.
    pub size: u64,
    /// Offset of its byte 0 in the device's descriptor, for `pread`, `pwrite` and `mmap`.
    pub offset: u64,
    /// `VFIO_REGION_INFO_CAP_SPARSE_MMAP`: the only parts that may be mapped, from the start of the region. Each is
    /// inside of it.
    pub sparse: Option<Vec<Range<u64>>>,
    /// `VFIO_REGION_INFO_CAP_TYPE`: (type, subtype) of a region beyond a PCI function's nine.
    pub kind: Option<(u32, u32)>,
    /// `VFIO_REGION_INFO_CAP_MSIX_MAPPABLE`: the MSI-X table in it may be mapped with the rest.
    pub msix_mappable: bool,
}

/// Number of regions and interrupt types of `device`, and its flags.
pub fn device_info(device: BorrowedFd<'_>) -> Result<DeviceInfo, UapiError> {
    let mut info = uapi::vfio_device_info {
        argsz: const { argsz(size_of::<uapi::vfio_device_info>()) },
        ..Default::default()
    };
    // SAFETY: the structure that the uAPI gives this ioctl, of plain integers; the kernel writes at most argsz bytes.
    unsafe { rustix::ioctl::ioctl(device, Updater::<DEVICE_GET_INFO, _>::new(&mut info)) }
        .map_err(|source| UapiError::System { doing: "asking what the device is made of", source })?;
    Ok(DeviceInfo {
        resettable: info.flags & uapi::VFIO_DEVICE_FLAGS_RESET != 0,
        pci: info.flags & uapi::VFIO_DEVICE_FLAGS_PCI != 0,
        regions: info.num_regions,
        irqs: info.num_irqs,
    })
}

/// Region `index` of `device`, with what its capabilities say.
///
/// # Errors
/// EINVAL for an index that the device does not have; some drivers say the same of one that is merely absent.
/// [`UapiError::BadCapability`] for a chain that leads nowhere.
pub fn region_info(device: BorrowedFd<'_>, index: u32) -> Result<Region, UapiError> {
    let doing = "asking for a region of the device";
    let bytes = capability::ask(size_of::<uapi::vfio_region_info>(), doing, |buffer| {
        buffer.put_u32(8, index);
        // SAFETY: the buffer begins with the structure that the uAPI gives this ioctl, its argsz says how many bytes it
        // holds, and the kernel writes no more (vfio_pci_core.c, vfio_info_cap_shift and its copy).
        unsafe { buffer.ioctl::<DEVICE_GET_REGION_INFO>(device) }
    })?;
    parse(index, &bytes)
}

/// Reads what the kernel answered. Offsets in it are not believed.
fn parse(index: u32, bytes: &capability::InfoAnswer) -> Result<Region, UapiError> {
    let flags = bytes.u32(4)?;
    let size = bytes.u64(16)?;
    let mut region = Region {
        index,
        readable: flags & uapi::VFIO_REGION_INFO_FLAG_READ != 0,
        writable: flags & uapi::VFIO_REGION_INFO_FLAG_WRITE != 0,
        mappable: flags & uapi::VFIO_REGION_INFO_FLAG_MMAP != 0,
        size,
        offset: bytes.u64(24)?,
        sparse: None,
        kind: None,
        msix_mappable: false,
    };
    if flags & uapi::VFIO_REGION_INFO_FLAG_CAPS == 0 {
        return Ok(region);
    }
    for capability in Chain::new(bytes, 32, bytes.u32(12)?)? {
        let capability = capability?;
        match u32::from(capability.id) {
            uapi::VFIO_REGION_INFO_CAP_SPARSE_MMAP => {
                let count = u64::from(bytes.u32(capability.at + 8)?);
                let mut areas = Vec::new();
                for area in 0..count {
                    // The first area that is not in the capability ends this: a count is no reason to allocate.
                    let at = capability.element(16, area, 16)?;
                    let range = Range::new(bytes.u64(at)?, bytes.u64(at + 8)?)
                        .ok()
                        .filter(|range| range.end() <= size)
                        .ok_or(UapiError::BadCapability("a mappable part lies outside of its region"))?;
                    areas.push(range);
                }
                region.sparse = Some(areas);
            }
            uapi::VFIO_REGION_INFO_CAP_TYPE => {
                region.kind = Some((bytes.u32(capability.at + 8)?, bytes.u32(capability.at + 12)?));
            }
            uapi::VFIO_REGION_INFO_CAP_MSIX_MAPPABLE => region.msix_mappable = true,
            _ => {}
        }
    }
    Ok(region)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capability::InfoAnswer;

    fn answer(words: &[u32], rest: &[u64]) -> InfoAnswer {
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.extend(rest.iter().flat_map(|word| word.to_le_bytes()));
        InfoAnswer::new(bytes)
    }

    #[test]
    fn numbers_and_sizes_are_the_uapis() {
        assert_eq!(DEVICE_GET_INFO, 0x3b6b);
        assert_eq!(DEVICE_GET_REGION_INFO, 0x3b6c);
        assert_eq!(size_of::<uapi::vfio_device_info>(), 24);
        assert_eq!(size_of::<uapi::vfio_region_info>(), 32);
        assert_eq!(std::mem::offset_of!(uapi::vfio_region_info, cap_offset), 12);
        assert_eq!(std::mem::offset_of!(uapi::vfio_region_info, size), 16);
        assert_eq!(std::mem::offset_of!(uapi::vfio_region_info_cap_sparse_mmap, nr_areas), 8);
        assert_eq!(std::mem::offset_of!(uapi::vfio_region_info_cap_sparse_mmap, areas), 16);
        assert_eq!(std::mem::offset_of!(uapi::vfio_region_info_cap_type, type_), 8);
    }

    #[test]
    fn a_region_without_capabilities() {
        // The offset of capabilities is nonsense, and not looked at.
        let region = parse(7, &answer(&[32, 3, 7, 99], &[256, 7 << 40])).unwrap();
        assert!(region.readable && region.writable && !region.mappable);
        assert_eq!((region.size, region.offset, region.sparse), (256, 7 << 40, None));
    }

    #[test]
    fn a_sparse_region() {
        // Header, then MSI-X mappable at 32, then two areas.
        let chain = [u64::from(3_u32) | 1 << 16 | 40 << 32, 1 | 1 << 16, 2, 0, 0x1000, 0x3000, 0x1000];
        let region =
            parse(0, &answer(&[88, 0xf, 0, 32], &[[0x4000, 0].as_slice(), &chain].concat())).unwrap();
        let expected = vec![Range::new(0, 0x1000).unwrap(), Range::new(0x3000, 0x1000).unwrap()];
        assert_eq!((region.sparse, region.msix_mappable), (Some(expected), true));
    }

    #[test]
    fn areas_outside_of_the_region_or_the_answer_are_refused() {
        let with = |count: u64, offset: u64, len: u64| {
            parse(0, &answer(&[64, 0xf, 0, 32], &[0x4000, 0, 1 | 1 << 16, count, offset, len]))
        };
        assert!(with(1, 0x3000, 0x1000).is_ok());
        for (count, offset, len) in [
            (1, 0x3000, 0x1001),
            (1, u64::MAX, 2),
            (1, 0, 0),
            (2, 0, 0x1000),
            (u64::from(u32::MAX), 0, 0x1000),
        ] {
            let refused = with(count, offset, len);
            assert!(
                matches!(refused, Err(UapiError::BadCapability(_))),
                "{count} {offset:#x} {len:#x}: {refused:?}"
            );
        }
    }
}
