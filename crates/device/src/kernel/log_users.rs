//! The devices that share one address space's dirty log.

use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use vfio_migration_uapi::UapiError;

/// The users of a log which several devices share: it runs as long as any of them wants it. Each report takes what all have
/// written; as all go into one bitmap, nothing is lost by that. A trial's report would be, and so is made while nobody logs.
#[derive(Debug, Default)]
pub(super) struct LogUsers {
    trial: RwLock<()>,
    users: Mutex<u32>,
}

impl LogUsers {
    /// Keeps trials out while a device begins to log.
    pub(super) fn enter(&self) -> RwLockReadGuard<'_, ()> {
        self.trial.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps everybody out for a trial; `None` while a device logs.
    pub(super) fn alone(&self) -> Option<RwLockWriteGuard<'_, ()>> {
        let alone = self.trial.write().unwrap_or_else(PoisonError::into_inner);
        (*self.users() == 0).then_some(alone)
    }

    /// One user more, for the first of whom the log is started: an iommufd's forgets what it has when it is started again.
    pub(super) fn join(&self, start: impl FnOnce() -> Result<(), UapiError>) -> Result<(), UapiError> {
        let mut users = self.users();
        if *users == 0 {
            start()?;
        }
        *users += 1;
        Ok(())
    }

    /// One user less, after the last of whom the log is stopped.
    pub(super) fn leave(&self, stop: impl FnOnce() -> Result<(), UapiError>) -> Result<(), UapiError> {
        let mut users = self.users();
        *users = users.saturating_sub(1);
        if *users == 0 { stop() } else { Ok(()) }
    }

    fn users(&self) -> MutexGuard<'_, u32> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
