//! Whose request is under way: one at a time, and whoever waits for its turn may give up.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use super::error::ConnError;

/// How often the lock on what is read is tried again, which is held for the length of a message.
const TRY_AGAIN: Duration = Duration::from_micros(200);

/// The right to have a request under way.
#[derive(Debug, Default)]
pub(super) struct Turns {
    taken: Mutex<bool>,
    free: Condvar,
}

/// The right, until it is dropped.
#[derive(Debug)]
pub(super) struct Turn<'a>(&'a Turns);

impl Turns {
    /// Waits for the turn, until then at most.
    pub(super) fn take(&self, until: Option<Instant>) -> Result<Turn<'_>, ConnError> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        while *taken {
            taken = match until.map(|until| until.saturating_duration_since(Instant::now())) {
                None => self.free.wait(taken).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => return Err(ConnError::Behind),
                Some(left) => self.free.wait_timeout(taken, left).unwrap_or_else(PoisonError::into_inner).0,
            };
        }
        *taken = true;
        Ok(Turn(self))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.taken.lock().unwrap_or_else(PoisonError::into_inner) = false;
        self.0.free.notify_one();
    }
}

/// Takes a lock, until then at most.
pub(super) fn lock_until<T>(
    mutex: &Mutex<T>,
    until: Option<Instant>,
) -> Result<MutexGuard<'_, T>, ConnError> {
    let Some(until) = until else { return Ok(mutex.lock().unwrap_or_else(PoisonError::into_inner)) };
    loop {
        match mutex.try_lock() {
            Ok(guard) => return Ok(guard),
            Err(TryLockError::Poisoned(poisoned)) => return Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) if Instant::now() >= until => return Err(ConnError::Behind),
            Err(TryLockError::WouldBlock) => std::thread::sleep(TRY_AGAIN),
        }
    }
}
