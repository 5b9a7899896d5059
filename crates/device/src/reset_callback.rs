//! The reset of a device that the VMM runs itself: the VMM's own, since it must arm interrupts and PCI_COMMAND anew.

use std::any::Any;
use std::error::Error;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use vfio_migration_uapi::UapiError;
use vfio_user_peer::ClientError;

type Cause = Box<dyn Error + Send + Sync>;
type Call = dyn Fn() -> Result<(), Cause> + Send + Sync;
/// What became of a call: its own answer, or what it panicked with.
type Outcome = Result<Result<(), Cause>, Box<dyn Any + Send>>;

/// A VMM's function that resets one of its devices (VFIO_DEVICE_RESET, and whatever its guest needs after that), and the
/// limit on it. Each call is made on a thread of its own, one at a time.
#[derive(Clone)]
pub struct ResetCallback {
    call: Arc<Call>,
    limit: Duration,
    /// A call that did not return in time.
    late: Arc<Mutex<Option<Receiver<Outcome>>>>,
}

impl ResetCallback {
    /// A reset by `call`, which has 30 s. After it the device is RUNNING, or the reset has failed, whatever it returned.
    pub fn new(call: impl Fn() -> Result<(), Cause> + Send + Sync + 'static) -> Self {
        Self { call: Arc::new(call), limit: Duration::from_secs(30), late: Arc::default() }
    }

    /// The same with another limit.
    #[must_use]
    pub fn within(self, limit: Duration) -> Self {
        Self { limit, ..self }
    }

    /// Resets it. A call that has not returned is waited for before the next is made.
    pub(crate) fn reset(&self) -> Result<(), ResetError> {
        let until = Instant::now() + self.limit;
        let left = || until.saturating_duration_since(Instant::now());
        let mut late = self.late.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(former) = late.take()
            && matches!(former.recv_timeout(left()), Err(RecvTimeoutError::Timeout))
        {
            *late = Some(former);
            return Err(ResetError::Late(self.limit));
        }
        let (sender, outcome) = sync_channel(1);
        let call = Arc::clone(&self.call);
        let thread = std::thread::Builder::new().name("vfio-reset".into());
        thread
            .spawn(move || {
                // Nobody listens any more where the device was closed meanwhile.
                let _ = sender.send(catch_unwind(AssertUnwindSafe(|| call())));
            })
            .map_err(ResetError::NoThread)?;
        match outcome.recv_timeout(left()) {
            Ok(Ok(answer)) => answer.map_err(ResetError::Failed),
            Ok(Err(panic)) => Err(ResetError::Panicked(text_of(&*panic))),
            Err(RecvTimeoutError::Disconnected) => Err(ResetError::Panicked("no message".into())),
            Err(RecvTimeoutError::Timeout) => {
                *late = Some(outcome);
                Err(ResetError::Late(self.limit))
            }
        }
    }
}

impl fmt::Debug for ResetCallback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResetCallback").field("limit", &self.limit).finish_non_exhaustive()
    }
}

/// The failure of a VMM's reset of its device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResetError {
    /// The VMM says that it failed.
    #[error("the VMM's reset of its device failed")]
    Failed(#[source] Cause),
    /// The VMM's function panicked.
    #[error("the VMM's reset of its device panicked ({0})")]
    Panicked(String),
    /// The VMM's function did not return in time, and may yet.
    #[error("the VMM's reset of its device has not returned within {0:?}")]
    Late(Duration),
    /// No thread could be had.
    #[error("there is no thread for the VMM's reset of its device")]
    NoThread(#[source] std::io::Error),
}

impl ResetError {
    /// The errno of what failed, where it has one.
    pub(crate) fn errno(&self) -> Option<Errno> {
        let mut at: Option<&(dyn Error + 'static)> = self.source();
        while let Some(error) = at {
            let found = if let Some(errno) = error.downcast_ref::<Errno>() {
                Some(*errno)
            } else if let Some(error) = error.downcast_ref::<UapiError>() {
                error.errno()
            } else if let Some(error) = error.downcast_ref::<ClientError>() {
                error.errno()
            } else {
                error.downcast_ref().and_then(Errno::from_io_error)
            };
            if found.is_some() {
                return found;
            }
            at = error.source();
        }
        None
    }
}

fn text_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_failure_keeps_its_errno_and_a_panic_its_message() {
        ResetCallback::new(|| Ok(())).reset().unwrap();
        let failed = ResetCallback::new(|| Err(Errno::IO.into())).reset().unwrap_err();
        assert_eq!(failed.errno(), Some(Errno::IO), "{failed:?}");
        let failed = ResetCallback::new(|| Err(std::io::Error::from_raw_os_error(16).into()));
        assert_eq!(failed.reset().unwrap_err().errno(), Some(Errno::BUSY));
        let panics = ResetCallback::new(|| panic!("no vector {}", 3));
        for _ in 0..2 {
            let found = panics.reset().unwrap_err();
            assert_eq!(found.to_string(), "the VMM's reset of its device panicked (no vector 3)");
        }
    }

    #[test]
    fn a_late_one_is_waited_for_and_not_made_twice_at_once() {
        let (go, wait) = channel::<()>();
        let (began, begun) = channel();
        let wait = Mutex::new(wait);
        let reset = ResetCallback::new(move || {
            began.send(()).unwrap();
            wait.lock().unwrap().recv().unwrap();
            Ok(())
        });
        let hasty = reset.clone().within(Duration::from_millis(20));
        for _ in 0..2 {
            let late = hasty.reset().unwrap_err();
            assert!(matches!(late, ResetError::Late(_)) && late.to_string().contains("20ms"), "{late}");
        }
        begun.recv().unwrap();
        assert!(begun.try_recv().is_err(), "a second call was made while the first was under way");
        // The first, and one more.
        go.send(()).unwrap();
        go.send(()).unwrap();
        reset.reset().unwrap();
        begun.recv().unwrap();
    }
}
