//! P5: the storage locks change hands. On the way back whoever comes to it first gives them back.

use std::sync::{Arc, Mutex};

use crate::incoming_machine::IncomingMachine;
use crate::machine::LockError;
use crate::session::lock::lock;

/// The storage locks, while an attempt may have them.
#[derive(Default)]
pub(super) struct StorageLocks(Mutex<Option<Arc<dyn IncomingMachine>>>);

impl StorageLocks {
    /// Takes all of them.
    pub(super) fn take(&self, machine: &Arc<dyn IncomingMachine>) -> Result<(), LockError> {
        let mut held = lock(&self.0);
        machine.take_locks()?;
        *held = Some(Arc::clone(machine));
        Ok(())
    }

    /// Releases them, if they are held. After a failure they are, and this can be tried again.
    pub(super) fn release(&self) -> Result<(), LockError> {
        let mut held = lock(&self.0);
        if let Some(machine) = &*held {
            machine.release_locks()?;
        }
        *held = None;
        Ok(())
    }

    /// The guest has arrived: they are the machine's from now on.
    pub(super) fn keep(&self) {
        *lock(&self.0) = None;
    }
}
