//! Where dirty pages are learned from.

use std::fmt;

use vfio_migration_types::Bitmap;

use crate::error::MemoryError;

/// Something that knows which guest pages were written since it was last asked.
///
/// The dirty set of a guest is the union of its sources: the hypervisor's log of vCPU writes, each device's log of
/// DMA writes, and the VMM's own writes. A page that two of them name is still one page of the union.
///
/// After [`start`](Self::start) returned, no write is missed until [`stop`](Self::stop): a source that cannot keep
/// this promise for some range must report the whole range each time.
pub trait DirtySource: fmt::Debug + Send + Sync {
    /// What this source is, for messages: `"kvm"`, `"device net0"`, `"vmm"`.
    fn name(&self) -> String;

    /// Begins logging with a clean slate. Starting a source that already logs is an error.
    fn start(&self) -> Result<(), MemoryError>;

    /// ORs into `into` — indexed by RAM offset, at any granule — all that was written since the last report, and
    /// forgets it.
    ///
    /// # Errors
    /// The log is no longer to be trusted: the caller treats everything the source covers as dirty, or gives up.
    fn report(&self, into: &mut Bitmap) -> Result<(), MemoryError>;

    /// Ends logging. Stopping a source that does not log succeeds, so that a rollback may always call it.
    fn stop(&self) -> Result<(), MemoryError>;
}
