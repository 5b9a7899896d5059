//! The user's wish to end, told by a signal: noticed between steps, so that what was started is also ended.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::Signal;

use crate::exit::{CliError, Exit};
use crate::output::{eprintln_line, print_json};
use crate::signals;

/// What a process ends by that was told to end with its stdin.
const STDIN_ENDED: &str = "the end of its stdin";
/// Longest wait for stdout to take the last document.
const PRINTED_WITHIN: Duration = Duration::from_millis(500);
/// Time after which a signal is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// The user's request to stop, made by a signal.
#[derive(Clone, Debug, Default)]
pub(crate) struct UserInterrupt(Arc<Heard>);

#[derive(Default)]
struct Heard {
    /// The number of the first signal; 0 before it.
    first: AtomicI32,
    at_first: Mutex<AtFirst>,
    /// What goes on without this process when a second signal ends it.
    left: Mutex<Option<&'static str>>,
    /// What is printed is JSON.
    json: bool,
}

/// What the first signal sets off.
#[derive(Default)]
enum AtFirst {
    #[default]
    Nothing,
    Call(Box<dyn FnOnce(&'static str) + Send>),
    /// The one of this name came already.
    Came(&'static str),
}

impl fmt::Debug for Heard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Heard").field("first", &self.first).finish_non_exhaustive()
    }
}

impl UserInterrupt {
    /// Begins to listen for the signals that ask the process to end. The second one ends it at once, and says so; should even
    /// that not get through, the third ends it without a word.
    ///
    /// `json`: what the process prints is JSON, also then.
    pub(crate) fn listen(json: bool) -> Result<Self, CliError> {
        let cannot = |error: std::io::Error| CliError::caused("cannot listen for signals", &error);
        let this = Self(Arc::new(Heard { json, ..Heard::default() }));
        let second = Arc::new(AtomicBool::new(false));
        let heard: Vec<i32> = signals::heard().map(Signal::as_raw).collect();
        for signal in &heard {
            signal_hook::flag::register_conditional_shutdown(*signal, Exit::Failed as i32, second.clone())
                .map_err(cannot)?;
        }
        let mut signals = signal_hook::iterator::Signals::new(heard).map_err(cannot)?;
        let of_thread = this.clone();
        let thread = std::thread::Builder::new().name("signals".into()).spawn(move || {
            let mut signals = signals.forever();
            let Some(first) = signals.next() else { return };
            of_thread.0.came(first);
            if let Some(another) = signals.next() {
                second.store(true, Ordering::Relaxed);
                of_thread.0.end_at_once(another);
            }
        });
        thread.map_err(|error| CliError::caused("cannot make a thread that listens for signals", &error))?;
        Ok(this)
    }

    /// Whether a signal came.
    pub(crate) fn requested(&self) -> bool {
        self.name().is_some()
    }

    /// The name of the first signal that came.
    pub(crate) fn name(&self) -> Option<&'static str> {
        match self.0.first.load(Ordering::Relaxed) {
            0 => None,
            signal => Some(name(signal)),
        }
    }

    /// Says what goes on without this process, should a second signal end it.
    pub(crate) fn leaves(&self, what: &'static str) {
        *self.0.left.lock().unwrap_or_else(PoisonError::into_inner) = Some(what);
    }

    /// Calls `end` with what asks the process to end, from another thread: once when a signal comes, or has come, and when stdin ends if
    /// `with_stdin`.
    pub(crate) fn on_end(
        &self,
        with_stdin: bool,
        end: impl Fn(&'static str) + Send + Sync + 'static,
    ) -> Result<(), CliError> {
        let end = Arc::new(end);
        if with_stdin {
            let end = end.clone();
            let thread = std::thread::Builder::new().name("stdin".into());
            let spawned = thread.spawn(move || {
                // Nothing is expected; its end is what counts, and an error is an end too.
                let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
                end(STDIN_ENDED);
            });
            spawned.map_err(|error| CliError::caused("cannot make a thread", &error))?;
        }
        let mut at_first = self.0.at_first.lock().unwrap_or_else(PoisonError::into_inner);
        match *at_first {
            AtFirst::Came(name) => end(name),
            _ => *at_first = AtFirst::Call(Box::new(move |name| end(name))),
        }
        Ok(())
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
        match self.name() {
            Some(name) => Err(CliError::failed(format!("interrupted by {name}"))),
            None => Ok(()),
        }
    }
}

impl Heard {
    fn came(&self, signal: i32) {
        self.first.store(signal, Ordering::Relaxed);
        let mut at_first = self.at_first.lock().unwrap_or_else(PoisonError::into_inner);
        if let AtFirst::Call(end) = std::mem::replace(&mut *at_first, AtFirst::Came(name(signal))) {
            end(name(signal));
        }
    }

    fn end_at_once(&self, signal: i32) {
        let left = *self.left.lock().unwrap_or_else(PoisonError::into_inner);
        let left = left.map_or(String::new(), |what| format!("; {what}"));
        let text = format!("ended at once by a second signal, {}{left}", name(signal));
        eprintln_line(format_args!("vfio-migrate: {text}"));
        if self.json {
            let report = CliError::failed(text).report();
            let (printed, done) = channel();
            // Stdout may take nothing, and whoever prints there may hold it: that keeps no process.
            let printing = std::thread::Builder::new().spawn(move || {
                let _ = printed.send(print_json(&report).is_ok());
            });
            if printing.is_ok() {
                let _ = done.recv_timeout(PRINTED_WITHIN);
            }
        }
        std::process::exit(Exit::Failed as i32);
    }
}

fn name(signal: i32) -> &'static str {
    signal_hook::low_level::signal_name(signal).unwrap_or(match Signal::from_named_raw(signal) {
        Some(Signal::POWER) => "SIGPWR",
        Some(Signal::XCPU) => "SIGXCPU",
        _ => "a signal",
    })
}
