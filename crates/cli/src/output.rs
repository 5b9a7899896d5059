//! Output of the command: answers on stdout, messages and progress on stderr. All of it passes [`terminal`] but the escapes of
//! a progress bar, which are the command's own.

mod terminal;

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::ProgressBar;

pub(crate) use self::terminal::{
    LogWriter, eprint_lines, eprintln_line, escape_json, print, print_json, printable_texts, terminal_columns,
};

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
