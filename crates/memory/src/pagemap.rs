//! Which pages of this process's private anonymous memory were ever written, by `/proc/thread-self/pagemap`
//! (Documentation/admin-guide/mm/pagemap.rst of Linux). The kernel hides frame numbers from most processes, and not
//! these two bits.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// Bytes of one entry of the file.
const ENTRY: usize = size_of::<u64>();
/// Entries that are read at once: 32 MiB of memory.
const ENTRIES: usize = 8192;
/// "Page swapped" and "page present". What has neither was never written, or was given back: it reads as zero.
const USED: u64 = 1 << 62 | 1 << 63;

/// Byte ranges, from `address` on, of the `len` bytes there that have pages behind them, ascending and apart. `None`: it
/// cannot be told here.
pub(crate) fn used(address: u64, len: u64) -> Option<Vec<(u64, u64)>> {
    let page = rustix::param::page_size() as u64;
    if page != vfio_migration_types::PAGE_SIZE {
        return None;
    }
    // Anew each time: a process that forked would ask about its parent's memory.
    let file = File::open("/proc/thread-self/pagemap").ok()?;
    let mut used: Vec<(u64, u64)> = Vec::new();
    let mut buffer = vec![0; ENTRY * ENTRIES.min(usize::try_from(len / page).ok()?)];
    let (mut at, first) = (0, address / page);
    while at < len / page {
        let count = (len / page - at).min(ENTRIES as u64);
        let entries = buffer.get_mut(..usize::try_from(count).ok()? * ENTRY)?;
        file.read_exact_at(entries, (first + at) * ENTRY as u64).ok()?;
        for (number, entry) in (at..).zip(entries.as_chunks::<ENTRY>().0) {
            if u64::from_ne_bytes(*entry) & USED == 0 {
                continue;
            }
            match used.last_mut().filter(|(_, end)| *end == number * page) {
                Some((_, end)) => *end += page,
                None => used.push((number * page, (number + 1) * page)),
            }
        }
        at += count;
    }
    Some(used)
}
