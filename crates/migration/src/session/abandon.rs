//! Work that a cancel does not wait for: a question to a device that may not answer, a name to be resolved, a disk that hangs.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use crate::session::threads::spawn_free;

/// Time after which a waiter looks again whether it is to wait on.
const SLICE: Duration = Duration::from_millis(20);

/// The reason why there is no answer.
#[derive(Debug)]
pub(crate) enum Unanswered {
    /// It was given up.
    GivenUp,
    /// It did not come in time.
    Late,
    /// There is no thread to do the work.
    NoThread(NoThread),
}

/// The system has no thread left.
#[derive(Debug, thiserror::Error)]
#[error("there is no thread left for it")]
pub(crate) struct NoThread(#[source] pub(crate) std::io::Error);

/// Does `work` on a thread of its own, and waits for its answer: for at most `limit` (`None`: without end), and until
/// `given_up` says so. The thread of work that is not waited for any more ends when the work does, and drops its answer.
///
/// # Panics
/// As `work` does.
pub(crate) fn answer_unless<T: Send + 'static>(
    given_up: impl Fn() -> bool,
    limit: Option<Duration>,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Unanswered> {
    let begun = Instant::now();
    let (answer, answered) = mpsc::channel();
    let thread = spawn_free("question", move || {
        // Nobody may be waiting any more.
        drop(answer.send(work()));
    });
    let thread = thread.map_err(|error| Unanswered::NoThread(NoThread(error)))?;
    loop {
        match answered.recv_timeout(SLICE) {
            Ok(answer) => {
                // The thread has nothing left to do: a caller who counts its threads finds none of ours.
                drop(thread.join());
                return Ok(answer);
            }
            Err(RecvTimeoutError::Timeout) if given_up() => return Err(Unanswered::GivenUp),
            Err(RecvTimeoutError::Timeout) if limit.is_some_and(|limit| begun.elapsed() >= limit) => {
                return Err(Unanswered::Late);
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => match thread.join() {
                Err(panic) => std::panic::resume_unwind(panic),
                // It cannot end without an answer otherwise.
                Ok(()) => return Err(Unanswered::Late),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_that_never_comes_is_given_up_or_late() {
        let (_kept, never) = mpsc::channel::<()>();
        let never = std::sync::Arc::new(std::sync::Mutex::new(never));
        let hang = || {
            let never = never.clone();
            move || {
                let _ = never.lock().unwrap().recv();
            }
        };
        assert!(matches!(answer_unless(|| true, None, hang()), Err(Unanswered::GivenUp)));
        let late = answer_unless(|| false, Some(Duration::from_millis(1)), hang());
        assert!(matches!(late, Err(Unanswered::Late)));
    }

    #[test]
    fn an_answer_is_given_and_a_panic_passed_on() {
        assert_eq!(answer_unless(|| false, None, || 7).unwrap(), 7);
        let panicked = std::panic::catch_unwind(|| answer_unless(|| false, None, || panic!("as intended")));
        assert!(panicked.is_err());
    }
}
