//! The message that says why an attempt is given up: sent once, by whichever thread comes to it first, and before the connection
//! is closed.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crate::session::lock::lock;

/// Who sends ABORT.
#[derive(Debug, Default)]
pub(crate) struct AbortOnce {
    taken: AtomicBool,
    /// A thread of its own that sends it, where the worker waits for a device.
    sending: Mutex<Option<JoinHandle<()>>>,
}

impl AbortOnce {
    /// Whether it is the caller's to send: so for one of them.
    pub(crate) fn take(&self) -> bool {
        !self.taken.swap(true, Ordering::AcqRel)
    }

    /// `thread` sends it.
    pub(crate) fn sent_by(&self, thread: JoinHandle<()>) {
        *lock(&self.sending) = Some(thread);
    }

    /// Whether a thread of its own has yet to send it: the connection is not to be closed meanwhile.
    pub(crate) fn is_under_way(&self) -> bool {
        lock(&self.sending).as_ref().is_some_and(|thread| !thread.is_finished())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_sends_it_and_is_waited_for() {
        let abort = AbortOnce::default();
        assert!(abort.take() && !abort.take() && !abort.is_under_way());
        let (done, wait) = std::sync::mpsc::channel::<()>();
        abort.sent_by(std::thread::spawn(move || {
            let _ = wait.recv();
        }));
        assert!(abort.is_under_way());
        drop(done);
        while abort.is_under_way() {
            std::thread::yield_now();
        }
    }
}
