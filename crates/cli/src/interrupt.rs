//! Ctrl-C: noticed between steps, so that what was started is also ended.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use crate::exit::CliError;

/// Time after which a signal is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// The user's request to stop, made by a signal.
#[derive(Clone, Debug, Default)]
pub(crate) struct UserInterrupt(Arc<AtomicBool>);

impl UserInterrupt {
    /// Begins to listen for SIGINT and SIGTERM. The second one ends the process at once.
    pub(crate) fn listen() -> Result<Self, CliError> {
        let this = Self::default();
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            signal_hook::flag::register_conditional_shutdown(signal, 1, this.0.clone())
                .and_then(|_| signal_hook::flag::register(signal, this.0.clone()))
                .map_err(|error| CliError::caused("cannot listen for signals", &error))?;
        }
        Ok(this)
    }

    /// Whether a signal came.
    pub(crate) fn requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Does work that nothing else can interrupt, such as reading a file, on a thread of its own.
    ///
    /// # Errors
    /// A signal came first; the work is left to itself, and the process is to end.
    pub(crate) fn watch<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, CliError> {
        let (done, result) = channel();
        let thread = std::thread::Builder::new().name("interruptible".into());
        let spawned = thread.spawn(move || {
            // Nobody waits for it after a signal.
            let _ = done.send(work());
        });
        let working = spawned.map_err(|error| CliError::caused("cannot make a thread", &error))?;
        loop {
            match result.recv_timeout(LOOK_EVERY) {
                Ok(result) => return Ok(result),
                Err(RecvTimeoutError::Timeout) => self.check()?,
                Err(RecvTimeoutError::Disconnected) => match working.join() {
                    Err(panic) => std::panic::resume_unwind(panic),
                    Ok(()) => return Err(CliError::failed("the work ended without a result")),
                },
            }
        }
    }

    /// Fails when a signal came.
    pub(crate) fn check(&self) -> Result<(), CliError> {
        if self.requested() { Err(CliError::failed("interrupted")) } else { Ok(()) }
    }
}

/// Calls `end` once, from a thread of its own, when SIGINT or SIGTERM comes, or when stdin ends if `with_stdin`.
pub(crate) fn on_end(with_stdin: bool, end: impl Fn() + Send + Sync + 'static) -> Result<(), CliError> {
    let end = Arc::new(end);
    let mut signals =
        signal_hook::iterator::Signals::new([signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM])
            .map_err(|error| CliError::caused("cannot listen for signals", &error))?;
    let on_signal = end.clone();
    let thread = |name: &str| std::thread::Builder::new().name(name.into());
    let cannot = |error: std::io::Error| CliError::caused("cannot make a thread", &error);
    thread("signals")
        .spawn(move || {
            if signals.forever().next().is_some() {
                on_signal();
            }
        })
        .map_err(cannot)?;
    if with_stdin {
        thread("stdin")
            .spawn(move || {
                // Nothing is expected; its end is what counts, and an error is an end too.
                let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
                end();
            })
            .map_err(cannot)?;
    }
    Ok(())
}
