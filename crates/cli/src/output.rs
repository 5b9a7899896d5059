//! Output of the command: answers on stdout, messages and progress on stderr. A print that panics when nobody reads is
//! no way to end: stdout that cannot be written is a failure like any other, and stderr that cannot be written has
//! nobody left.

use std::fmt::Display;
use std::io::{ErrorKind, IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::control::protocol::MigrationInfo;
use crate::exit::CliError;
use crate::units::format_size;

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
const LINE_EVERY: Duration = Duration::from_secs(2);

/// The display of a migration as it goes, on stderr.
#[derive(Debug)]
pub(crate) struct ProgressDisplay {
    bar: Option<ProgressBar>,
    lines: Option<Instant>,
}

impl ProgressDisplay {
    /// A display, or one that prints nothing unless `wanted`.
    pub(crate) fn new(wanted: bool) -> Self {
        if !wanted {
            return Self { bar: None, lines: None };
        }
        if !std::io::stderr().is_terminal() {
            return Self { bar: None, lines: Some(Instant::now() + LINE_EVERY) };
        }
        let bar = ProgressBar::new(0);
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {percent:>3}%  {msg}") {
            bar.set_style(style);
        }
        Self { bar: Some(bar), lines: None }
    }

    /// Prints the migration as it is now.
    pub(crate) fn update(&mut self, info: &MigrationInfo) {
        let done = info.transferred.ram + info.transferred.device_precopy + info.transferred.device_stopcopy;
        if let Some(bar) = &self.bar {
            bar.set_length(done + info.remaining);
            bar.set_position(done);
            bar.set_message(line(info, done));
        } else if let Some(due) = self.lines.filter(|due| Instant::now() >= *due) {
            eprintln_line(line(info, done));
            self.lines = Some(due + LINE_EVERY);
        }
    }

    /// Prints the progress of one device: what was `done`, and what is left as far as is known.
    pub(crate) fn update_bytes(&mut self, done: &str, moved: u64, left: u64) {
        let line = || match (moved, left) {
            (0, 0) => format!("nothing {done} yet"),
            _ => format!("{} {done}, {} left", format_size(moved), format_size(left)),
        };
        if let Some(bar) = &self.bar {
            bar.set_length(moved + left);
            bar.set_position(moved);
            bar.set_message(line());
        } else if let Some(due) = self.lines.filter(|due| Instant::now() >= *due) {
            eprintln_line(line());
            self.lines = Some(due + LINE_EVERY);
        }
    }
}

impl Drop for ProgressDisplay {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

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

fn line(info: &MigrationInfo, done: u64) -> String {
    let phase = info.phase.as_deref().unwrap_or("-");
    let expected = info.expected_downtime_ms.map_or(String::new(), |ms| format!(", downtime now {ms:.0} ms"));
    format!(
        "{phase} iteration {}: {} moved, {} left, {}/s{expected}",
        info.iterations,
        format_size(done),
        format_size(info.remaining),
        format_size(info.rate)
    )
}
