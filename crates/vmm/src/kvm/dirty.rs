//! The log of pages that vCPUs wrote.
//!
//! KVM's plain log (`KVM_GET_DIRTY_LOG` without `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`): reading it forgets what was read
//! and protects those pages again, in one step. It names pages that the guest wrote and those whose page-table bits the
//! processor changed; it does not see writes of devices or of the VMM, which are other sources.

use std::sync::Arc;

use vfio_migration_memory::{Coverage, DirtySource, MemoryError};
use vfio_migration_types::{Bitmap, Granule};

use super::vm::KvmVm;
use crate::error::VmmError;

/// The dirty source `"kvm"`: see [`KvmVm::dirty_log`].
#[derive(Debug)]
pub struct KvmDirtyLog {
    vm: Arc<KvmVm>,
}

impl KvmVm {
    /// The log of the vCPUs' writes. There is one log per machine, so this hands it out once.
    ///
    /// # Errors
    /// It was handed out before.
    pub fn dirty_log(self: &Arc<Self>) -> Result<KvmDirtyLog, VmmError> {
        self.dirty
            .set(())
            .map_err(|()| VmmError::Refused("the machine's dirty log is already in use".to_owned()))?;
        Ok(KvmDirtyLog { vm: Arc::clone(self) })
    }
}

impl KvmDirtyLog {
    fn error(&self, doing: &str, error: VmmError) -> MemoryError {
        MemoryError::DirtyLog { source_name: self.name(), doing: doing.to_owned(), source: Box::new(error) }
    }

    fn read(&self, into: &mut Bitmap) -> Result<(), VmmError> {
        let slots = self
            .vm
            .logged_ram_slots()
            .ok_or_else(|| VmmError::Refused("guest writes are not logged".to_owned()))?;
        for slot in slots {
            let len = usize::try_from(slot.len).map_err(|error| VmmError::Refused(error.to_string()))?;
            let words = self
                .vm
                .fd
                .get_dirty_log(slot.id, len)
                .map_err(VmmError::kvm(format!("read the dirty log of the RAM at offset {}", slot.offset)))?;
            into.or_scaled(slot.offset.0, &words, Granule::PAGE);
        }
        Ok(())
    }
}

impl DirtySource for KvmDirtyLog {
    fn name(&self) -> String {
        "kvm".to_owned()
    }

    /// All of RAM is in slots that are logged, or none.
    fn coverage(&self) -> Coverage {
        Coverage::All
    }

    fn start(&self) -> Result<(), MemoryError> {
        self.vm.set_ram_logging(true).map_err(|error| self.error("starting it", error))
    }

    fn report(&self, into: &mut Bitmap) -> Result<(), MemoryError> {
        self.read(into).map_err(|error| self.error("reading it", error))
    }

    fn stop(&self) -> Result<(), MemoryError> {
        self.vm.set_ram_logging(false).map_err(|error| self.error("stopping it", error))
    }
}
