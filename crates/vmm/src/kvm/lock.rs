//! Taking a lock.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks what holds plain data, which a panic elsewhere leaves whole.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
