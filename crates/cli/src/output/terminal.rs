//! The one way to stdout and stderr. What is written may hold foreign text (names in manifests, errors of peers and servers,
//! files), so each control character but the ends of the command's own lines is written as an escape: nobody who is asked
//! or looked at gets to steer the terminal of the operator who reads it.
//!
//! A print that panics when nobody reads is no way to end: stdout that cannot be written is a failure like any other, and
//! stderr that cannot be written has nobody left.

use std::borrow::Cow;
use std::fmt::Display;
use std::io::{ErrorKind, IsTerminal, Write};

use serde::Serialize;
use serde_json::Value;
use tracing_subscriber::fmt::MakeWriter;
use vfio_migration_types::{is_control, printable, printable_lines};

use crate::exit::CliError;

/// Writes lines for people to stdout. A reader that has left (`vfio-migrate … | head`) is no failure: the verb's own exit
/// code remains.
pub(crate) fn print(text: impl AsRef<str>) -> Result<(), CliError> {
    write_stdout(&printable_lines(text.as_ref()))
}

/// Writes one line of JSON to stdout.
pub(crate) fn print_json<T: Serialize>(document: &T) -> Result<(), CliError> {
    let text =
        serde_json::to_string(document).map_err(|error| CliError::caused("cannot write JSON", &error))?;
    write_stdout(&format!("{}\n", escape_json(&text)))
}

/// JSON text that says the same and that a terminal shows as it stands. `serde_json` escapes C0 alone.
pub(crate) fn escape_json(text: &str) -> Cow<'_, str> {
    // Outside of texts JSON has no control characters but white space, so all of these are inside of one.
    let hostile = |character: char| is_control(character) && !matches!(character, '\n' | '\t' | '\r');
    if !text.contains(hostile) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        if hostile(character) {
            shown.push_str(&format!("\\u{:04x}", u32::from(character)));
        } else {
            shown.push(character);
        }
    }
    Cow::Owned(shown)
}

fn write_stdout(text: &str) -> Result<(), CliError> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(CliError::caused("cannot write to stdout", &error))
        }
        _ => Ok(()),
    }
}

/// Columns of the terminal that stdout is.
pub(crate) fn terminal_columns() -> Option<usize> {
    let stdout = std::io::stdout();
    let size = stdout.is_terminal().then(|| rustix::termios::tcgetwinsize(&stdout).ok()).flatten()?;
    Some(usize::from(size.ws_col)).filter(|columns| *columns > 0)
}

/// Writes one line to stderr, if anybody listens.
pub(crate) fn eprintln_line(line: impl Display) {
    eprint_lines(&format!("{}\n", printable(&line.to_string())));
}

/// Writes lines to stderr, if anybody listens.
pub(crate) fn eprint_lines(text: &str) {
    let _ = std::io::stderr().write_all(printable_lines(text).as_bytes());
}

/// Makes the texts of an answer printable, wherever they stand: a `vm` passes on what strangers said to it.
pub(crate) fn printable_texts(value: &mut Value) {
    match value {
        Value::String(text) => {
            if let Cow::Owned(shown) = printable(text) {
                *text = shown;
            }
        }
        Value::Array(items) => items.iter_mut().for_each(printable_texts),
        Value::Object(fields) => fields.values_mut().for_each(printable_texts),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// Where log lines go: stderr, each event on one line.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LogWriter;

impl Write for LogWriter {
    /// Takes a whole event at once, which is how `tracing_subscriber::fmt` writes it.
    fn write(&mut self, event: &[u8]) -> std::io::Result<usize> {
        eprintln_line(String::from_utf8_lossy(event).trim_end_matches('\n'));
        Ok(event.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for LogWriter {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        *self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn json_says_the_same_without_control_characters() {
        let document = json!({"a\u{9b}b": ["\u{1b}[2J\u{202e}\u{7f}\u{2028}", "ü✓"]});
        for text in [serde_json::to_string(&document), serde_json::to_string_pretty(&document)] {
            let text = text.unwrap();
            let shown = escape_json(&text);
            assert_eq!(printable_lines(&shown), shown);
            assert_eq!(serde_json::from_str::<Value>(&shown).unwrap(), document);
        }
    }

    #[test]
    fn texts_of_an_answer_become_printable() {
        let mut answer =
            json!({"migration": {"error": "\u{1b}[2J\nok", "phases": [{"name": "\u{202e}"}], "ms": 1}});
        printable_texts(&mut answer);
        assert_eq!(
            answer,
            json!({"migration": {"error": "\\u{1b}[2J\\nok", "phases": [{"name": "\\u{202e}"}], "ms": 1}})
        );
    }
}
