//! RAM of a VMM that keeps it in vm-memory's `GuestMemoryMmap`, lent as it is, and that VMM's log of its own writes.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use ::vm_memory::bitmap::{AtomicBitmap, Bitmap as VmMemoryBitmap};
use ::vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MmapRegion};
use vfio_migration_types::{Bitmap, Gpa, Granule, PAGE_SIZE, RamOffset, Range};

use crate::dirty::{Coverage, DirtySource};
use crate::error::{MemoryError, RegionError};
use crate::lent::{LentRegion, file_page_size};
use crate::ram::GuestRam;
use crate::region::{RamKind, RamPageSize};

// asm-generic/mman-common.h, linux/mman.h
const PROT_READ_WRITE: i32 = 3;
const MAP_SHARED: i32 = 1;
const MAP_ANONYMOUS: i32 = 0x20;
const MAP_HUGETLB: i32 = 0x4_0000;
/// The base-2 logarithm of the page size in the flags of mmap(2); 0: the host's default.
const MAP_HUGE_SHIFT: i32 = 26;

/// Lends every region of `memory`, in its order, which is that of guest addresses; the mappings stay as long as anybody reaches
/// them. Pages are never given back to the host, and none counts as fresh.
///
/// # Errors
/// As [`GuestRam::lent`]; [`RegionError::Protection`] for a region that is not mapped for reading and writing.
impl<B: VmMemoryBitmap + Send + Sync + 'static> TryFrom<&GuestMemoryMmap<B>> for GuestRam {
    type Error = MemoryError;

    fn try_from(memory: &GuestMemoryMmap<B>) -> Result<Self, MemoryError> {
        let mappings: Vec<Arc<MmapRegion<B>>> = memory.iter().map(|region| region.get_mmap()).collect();
        let regions = memory.iter().map(|region| {
            let (gpa, len) = (Gpa(region.start_addr().raw_value()), region.len());
            describe(gpa, region).map_err(|why| MemoryError::Region { gpa, len, why })
        });
        let regions = regions.collect::<Result<Vec<_>, _>>()?;
        // SAFETY: vm-memory maps each region as its flags and file say, or took that on from whoever built it by `build_raw`; it
        // is mapped for reading and writing (`describe` checks that), and unmapped with its `MmapRegion`, which the lender holds.
        // vm-memory makes no references to guest memory, and warns its users of making any. Pages may be pinned: none is given
        // back.
        unsafe { Self::lent(regions, Arc::new(mappings)) }
    }
}

fn describe<B: VmMemoryBitmap>(
    gpa: Gpa,
    region: &::vm_memory::GuestRegionMmap<B>,
) -> Result<LentRegion, RegionError> {
    let mapping: &MmapRegion<B> = region;
    let flags = mapping.flags();
    if mapping.prot() & PROT_READ_WRITE != PROT_READ_WRITE {
        return Err(RegionError::Protection);
    }
    let kind = match (flags & MAP_SHARED != 0, flags & MAP_ANONYMOUS != 0) {
        (true, _) => RamKind::SharedFile,
        (false, true) => RamKind::PrivateAnonymous,
        (false, false) => RamKind::PrivateFile,
    };
    // The kernel does not look at the file of an anonymous mapping.
    let file = mapping.file_offset().filter(|_| flags & MAP_ANONYMOUS == 0);
    let page_size = match file {
        Some(file) => file_page_size(file.file().as_fd())?,
        None if flags & MAP_HUGETLB != 0 && flags >> MAP_HUGE_SHIFT & 0x3f == 30 => 1 << 30,
        None if flags & MAP_HUGETLB != 0 => 2 << 20,
        None => PAGE_SIZE,
    };
    let page_size = [RamPageSize::Size4K, RamPageSize::Size2M, RamPageSize::Size1G]
        .into_iter()
        .find(|size| size.bytes() == page_size)
        .ok_or(RegionError::PageSize { said: PAGE_SIZE, found: page_size })?;
    let file = file.map(|file| Ok((OwnedFd::from(file.file().try_clone()?), file.start())));
    let file = file.transpose().map_err(|error: std::io::Error| RegionError::System {
        doing: "duplicating its descriptor",
        source: rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::IO),
    })?;
    Ok(LentRegion {
        gpa,
        len: region.len(),
        host: NonNull::new(mapping.as_ptr()).ok_or(RegionError::AddressSpace)?,
        kind,
        page_size,
        file,
        fresh: false,
        punch_holes: false,
    })
}

/// The VMM's own writes to a `GuestMemoryMmap` that has bitmaps, as a source of dirty pages of the RAM that is made of it.
///
/// It takes the bits as it reports them: nobody else may reset them while it runs. Writes that vm-memory does not see, those of
/// vCPUs, of devices and of whoever has a raw pointer, are not in them.
pub struct AtomicBitmapLog {
    name: String,
    regions: Vec<LoggedRegion>,
    running: AtomicBool,
    /// Start and stop one at a time.
    control: Mutex<()>,
}

struct LoggedRegion {
    mapping: Arc<MmapRegion<AtomicBitmap>>,
    /// RAM offset of its first byte.
    start: u64,
    /// Memory behind one bit.
    granule: Granule,
}

impl AtomicBitmapLog {
    /// The log called `name` of `memory`, not started.
    ///
    /// # Errors
    /// [`RegionError::BitmapPages`]: a bitmap does not count pages of a power of two.
    pub fn new(name: impl Into<String>, memory: &GuestMemoryMmap<AtomicBitmap>) -> Result<Self, MemoryError> {
        let mut start = 0;
        let regions = memory.iter().map(|region| {
            let (gpa, len) = (Gpa(region.start_addr().raw_value()), region.len());
            let mapping = region.get_mmap();
            let granule = granule(mapping.bitmap(), len).ok_or(MemoryError::Region {
                gpa,
                len,
                why: RegionError::BitmapPages,
            })?;
            let logged = LoggedRegion { mapping, start, granule };
            start += len;
            Ok(logged)
        });
        let regions = regions.collect::<Result<_, MemoryError>>()?;
        Ok(Self { name: name.into(), regions, running: AtomicBool::new(false), control: Mutex::new(()) })
    }
}

/// The memory behind one bit, which a bitmap does not tell: of powers of two only one divides the region into so many pages,
/// unless it is one page, where all do.
fn granule(bitmap: &AtomicBitmap, len: u64) -> Option<Granule> {
    if bitmap.byte_size() as u64 != len {
        return None;
    }
    let sizes = (PAGE_SIZE.trailing_zeros()..u64::BITS - 1).map(|shift| 1u64 << shift);
    let mut fitting = sizes.filter(|size| len.div_ceil(*size) == bitmap.len() as u64);
    fitting.next().and_then(|size| Granule::new(size).ok())
}

impl DirtySource for AtomicBitmapLog {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn coverage(&self) -> Coverage {
        let regions = self.regions.iter();
        let seen = regions
            .filter_map(|region| Range::new(RamOffset(region.start), region.mapping.size() as u64).ok());
        Coverage::Regions { seen: seen.collect(), why: "its memory has no more regions than these".into() }
    }

    fn start(&self) -> Result<(), MemoryError> {
        let _one = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        if self.running.load(Ordering::Acquire) {
            return Err(MemoryError::AlreadyLogging { source_name: self.name() });
        }
        for region in &self.regions {
            // Taken, not overwritten: what was written before a mark that is forgotten here is seen by the first pass over RAM.
            region.mapping.bitmap().get_and_reset();
        }
        self.running.store(true, Ordering::Release);
        Ok(())
    }

    fn report(&self, into: &mut Bitmap) -> Result<(), MemoryError> {
        if !self.running.load(Ordering::Acquire) {
            return Err(MemoryError::NotLogging { source_name: self.name() });
        }
        for LoggedRegion { mapping, start, granule } in &self.regions {
            into.or_scaled(*start, &mapping.bitmap().get_and_reset(), *granule);
        }
        Ok(())
    }

    fn stop(&self) -> Result<(), MemoryError> {
        let _one = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        self.running.store(false, Ordering::Release);
        Ok(())
    }
}

impl fmt::Debug for AtomicBitmapLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AtomicBitmapLog")
            .field("name", &self.name)
            .field("regions", &self.regions.len())
            .field("running", &self.running)
            .finish_non_exhaustive()
    }
}
