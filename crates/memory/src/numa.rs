//! Binding memory to a NUMA node: mbind(2), which rustix does not have.

use std::ffi::{c_long, c_ulong, c_void};

use rustix::io::Errno;

use crate::area::{Area, as_usize};
use crate::error::MemoryError;

/// `MPOL_BIND` of linux/mempolicy.h.
const MPOL_BIND: c_ulong = 2;
/// Nodes that a mask has room for: `MAX_NUMNODES` of the largest kernels.
const NODES: u32 = 1024;
#[cfg(target_arch = "x86_64")]
const SYS_MBIND: c_long = 237;
#[cfg(not(target_arch = "x86_64"))]
const SYS_MBIND: c_long = 235;

/// Has the pages of `area` allocated from `node` alone. Before any is.
///
/// # Errors
/// EINVAL: there is no such node, or it has no memory.
pub(crate) fn bind(area: &Area, node: u32) -> Result<(), MemoryError> {
    unsafe extern "C" {
        fn syscall(number: c_long, ...) -> c_long;
    }
    let failed = |source| MemoryError::System {
        doing: format!(
            "binding guest RAM to NUMA node {node} (/sys/devices/system/node has those of the host)"
        ),
        source,
    };
    if node >= NODES {
        return Err(failed(Errno::INVAL));
    }
    let mut mask = [0; (NODES / c_ulong::BITS) as usize];
    if let Some(word) = mask.get_mut(as_usize(u64::from(node / c_ulong::BITS))) {
        *word = 1 << (node % c_ulong::BITS);
    }
    let base: *mut c_void = area.pointer(0, area.len())?.as_ptr().cast();
    let (len, no_flags): (c_ulong, c_ulong) = (area.len(), 0);
    // The kernel takes one node less than it is told.
    let nodes = c_ulong::from(NODES) + 1;
    // SAFETY: mbind(2) sets a policy for the pages of this mapping, and reads NODES bits of `mask`; it touches no
    // other memory.
    let done = unsafe { syscall(SYS_MBIND, base, len, MPOL_BIND, mask.as_ptr(), nodes, no_flags) };
    if done == 0 {
        return Ok(());
    }
    Err(failed(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL)))
}
