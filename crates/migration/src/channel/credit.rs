//! Leave to send a device's bytes: granted by the destination, so that neither side queues without end.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::session::interrupt::{Interrupt, Interrupted};
use crate::session::lock::lock;

/// Time after which a waiter looks again whether it was interrupted.
const SLICE: Duration = Duration::from_millis(20);

/// Bytes that one device may still send.
#[derive(Debug, Default)]
pub(crate) struct Credit {
    left: Mutex<u64>,
    granted: Condvar,
}

impl Credit {
    /// Adds what the destination granted. Its sum is the peer's business: it saturates.
    pub(crate) fn grant(&self, bytes: u64) {
        let mut left = lock(&self.left);
        *left = left.saturating_add(bytes);
        self.granted.notify_all();
    }

    /// Waits until there is any, for at most `patience`, and takes up to `most` bytes of it; `None` when none came.
    pub(crate) fn take(
        &self,
        most: u64,
        patience: Duration,
        interrupt: &Interrupt,
    ) -> Result<Option<u64>, Interrupted> {
        let begun = Instant::now();
        let mut left = lock(&self.left);
        while *left == 0 {
            interrupt.check()?;
            if begun.elapsed() >= patience {
                return Ok(None);
            }
            left = self.granted.wait_timeout(left, SLICE).unwrap_or_else(PoisonError::into_inner).0;
        }
        let taken = most.min(*left);
        *left -= taken;
        Ok(Some(taken))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credit_that_never_comes_is_given_up() {
        let (credit, interrupt) = (Credit::default(), Interrupt::default());
        assert_eq!(credit.take(10, Duration::from_millis(1), &interrupt).unwrap(), None);
        credit.grant(7);
        assert_eq!(credit.take(10, Duration::ZERO, &interrupt).unwrap(), Some(7));
        interrupt.raise();
        assert!(credit.take(10, Duration::MAX, &interrupt).is_err());
    }
}
