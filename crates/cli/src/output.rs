//! Output of the command: answers on stdout, messages and progress on stderr. A print that panics when nobody reads is
//! no way to end: stdout that cannot be written is a failure like any other, and stderr that cannot be written has
//! nobody left.

use std::fmt::Display;
use std::io::{ErrorKind, IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use serde::Serialize;

use crate::exit::CliError;

/// Writes `text` to stdout. A reader that has left (`vfio-migrate … | head`) is no failure: the verb's own exit code
/// remains.
pub(crate) fn print(text: impl AsRef<[u8]>) -> Result<(), CliError> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_ref()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(CliError::caused("cannot write to stdout", &error))
        }
        _ => Ok(()),
    }
}

/// Writes one line of JSON to stdout.
pub(crate) fn print_json<T: Serialize>(document: &T) -> Result<(), CliError> {
    let text =
        serde_json::to_string(document).map_err(|error| CliError::caused("cannot write JSON", &error))?;
    print(format!("{text}\n"))
}

/// Writes one line to stderr, if anybody listens.
pub(crate) fn eprintln_line(line: impl Display) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Time between two plain lines.
pub(crate) const LINE_EVERY: Duration = Duration::from_secs(2);

/// The display of a wait: a spinner on a terminal, otherwise a line once it takes more than two seconds.
#[derive(Debug)]
pub(crate) struct WaitingDisplay {
    spinner: Option<ProgressBar>,
    line: std::cell::Cell<Option<(Instant, &'static str)>>,
}

impl WaitingDisplay {
    /// A display of the wait for `what`, or one that prints nothing unless `wanted`.
    pub(crate) fn new(wanted: bool, what: &'static str) -> Self {
        let terminal = wanted && std::io::stderr().is_terminal();
        let spinner = terminal.then(|| ProgressBar::new_spinner().with_message(what));
        let line = (wanted && !terminal).then(|| (Instant::now() + LINE_EVERY, what));
        Self { spinner, line: line.into() }
    }

    /// Turns the spinner, or prints the line when it is due.
    pub(crate) fn tick(&self) {
        if let Some(spinner) = &self.spinner {
            spinner.tick();
        } else if let Some((due, what)) = self.line.get()
            && Instant::now() >= due
        {
            eprintln_line(what);
            self.line.set(None);
        }
    }
}

impl Drop for WaitingDisplay {
    fn drop(&mut self) {
        if let Some(spinner) = &self.spinner {
            spinner.finish_and_clear();
        }
    }
}
