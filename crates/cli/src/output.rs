//! What the command says. A print that panics when nobody reads is no way to end: stdout that cannot be written is a
//! failure like any other, and stderr that cannot be written has nobody left to tell.

use std::fmt::Display;
use std::io::{ErrorKind, Write};

use serde::Serialize;

use crate::exit::Failure;

/// Writes `text` to stdout. A reader that has left (`vfio-migrate … | head`) is no failure: the verb's own exit code
/// stands.
pub(crate) fn print(text: impl AsRef<[u8]>) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_ref()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::caused("cannot write to stdout", &error))
        }
        _ => Ok(()),
    }
}

/// Writes one line of JSON to stdout.
pub(crate) fn print_json<T: Serialize>(document: &T) -> Result<(), Failure> {
    let text =
        serde_json::to_string(document).map_err(|error| Failure::caused("cannot write JSON", &error))?;
    print(format!("{text}\n"))
}

/// Says one line on stderr, if anybody listens.
pub(crate) fn say(line: impl Display) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
