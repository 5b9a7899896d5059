//! Threads of a session, and what is done where the system has none left.

use std::cell::RefCell;
use std::io::Error;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle, Scope, ScopedJoinHandle};

use vfio_migration_types::{Failure, Phase, Side};

use crate::session::lock::lock;
use crate::thread_setup::ThreadSetup;

thread_local! {
    /// What the threads do first that this thread makes for a session, and those that they make.
    static SETUP: RefCell<Option<ThreadSetup>> = const { RefCell::new(None) };
}

/// While it is kept, the threads that the calling thread makes do first what it was made with.
pub(crate) struct SetUp {
    former: Option<ThreadSetup>,
    /// It belongs to the thread that made it.
    _here: PhantomData<*const ()>,
}

/// Has the threads of a session do `setup` first, for as long as what is returned is kept. Called where a session begins, on its caller's
/// thread.
pub(crate) fn set_up(setup: Option<&ThreadSetup>) -> SetUp {
    SetUp { former: SETUP.replace(setup.cloned()), _here: PhantomData }
}

impl Drop for SetUp {
    fn drop(&mut self) {
        SETUP.set(self.former.take());
    }
}

/// `work` on a new thread of that name: after its set-up, which the threads that it makes inherit.
fn prepared<T, W: FnOnce() -> T>(name: &str, work: W) -> impl FnOnce() -> T + use<T, W> {
    let (setup, name) = (SETUP.with_borrow(Clone::clone), name.to_owned());
    move || {
        let _inherited = set_up(setup.as_ref());
        if let Some(setup) = setup {
            setup.call(&name);
        }
        work()
    }
}

/// Makes a thread, named so that it can be told apart in a process's list.
///
/// # Errors
/// The system has none left (EAGAIN).
pub(crate) fn spawn<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: &str,
    work: impl FnOnce() -> T + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, T>, Error> {
    #[cfg(any(test, feature = "fault-injection"))]
    injected::check()?;
    Builder::new().name(name.into()).spawn_scoped(scope, prepared(name, work))
}

/// The same for a thread that may outlive its maker.
pub(crate) fn spawn_free<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>, Error> {
    #[cfg(any(test, feature = "fault-injection"))]
    injected::check()?;
    Builder::new().name(name.into()).spawn(prepared(name, work))
}

/// The failure for a thread that could not be made.
pub(crate) fn no_thread(side: Side, phase: Phase, name: &str, error: &Error) -> Failure {
    let text = format!("there is no thread left for the {name}: {error}");
    let remedy =
        "raise the limit on threads (ulimit -u, TasksMax= or pids.max), or on memory (ulimit -v or -d)";
    let errno = error.raw_os_error().map(i32::unsigned_abs);
    Failure { errno, ..Failure::new(side, phase, text).with_remedy(remedy) }
}

/// Work on a thread of its own; where there is none left, it is done by whoever asks for its result.
pub(crate) struct Task<'scope, T, W> {
    thread: Option<ScopedJoinHandle<'scope, Option<T>>>,
    work: Arc<Mutex<Option<W>>>,
}

/// Begins `work`.
pub(crate) fn task<'scope, T: Send + 'scope, W: FnOnce() -> T + Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: &str,
    work: W,
) -> Task<'scope, T, W> {
    let work = Arc::new(Mutex::new(Some(work)));
    let of_thread = Arc::clone(&work);
    let thread = spawn(scope, name, move || {
        let work = lock(&of_thread).take();
        work.map(|work| work())
    });
    let thread = thread
        .inspect_err(|error| tracing::warn!(%error, name, "no thread left: work is done one after another"))
        .ok();
    Task { thread, work }
}

impl<T, W: FnOnce() -> T> Task<'_, T, W> {
    /// Its result, once it has one.
    ///
    /// # Panics
    /// As the work does.
    pub(crate) fn finish(self) -> Option<T> {
        let done =
            self.thread.map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        let left = || {
            let work = lock(&self.work).take();
            work.map(|work| work())
        };
        done.flatten().or_else(left)
    }
}

/// Threads that cannot be made, for tests.
#[cfg(any(test, feature = "fault-injection"))]
pub(crate) mod injected {
    use std::cell::Cell;
    use std::io::Error;

    use rustix::io::Errno;

    thread_local! {
        static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
    }

    /// Lets the calling thread make so many threads of sessions, and no more.
    pub(crate) fn leave(threads: Option<u32>) {
        LEFT.set(threads);
    }

    pub(super) fn check() -> Result<(), Error> {
        match LEFT.get() {
            None => Ok(()),
            Some(0) => Err(Errno::AGAIN.into()),
            Some(left) => {
                LEFT.set(Some(left - 1));
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::session::parallel::for_each_device_parallel;

    use super::*;

    #[test]
    fn work_is_done_with_and_without_threads() {
        for left in [None, Some(0), Some(1), Some(2), Some(3)] {
            injected::leave(left);
            let results = for_each_device_parallel([1, 2, 3], |item| item * 10);
            assert_eq!(results, [10, 20, 30], "{left:?} threads left");
        }
        injected::leave(Some(0));
        std::thread::scope(|scope| {
            let error = spawn(scope, "reader", || ()).unwrap_err();
            let failure = no_thread(Side::Source, Phase::Hello, "reader", &error);
            assert_eq!(failure.errno, Some(11));
            assert!(failure.text.contains("no thread left for the reader"), "{failure}");
        });
        injected::leave(None);
    }
}
