//! What a test ends in.

use std::error::Error;

/// Result of a test.
pub(crate) type Outcome<T = ()> = Result<T, Box<dyn Error>>;

/// Fails the test unless both are equal.
pub(crate) fn same<T: PartialEq + std::fmt::Debug>(what: &str, found: T, wanted: T) -> Outcome {
    if found == wanted { Ok(()) } else { Err(format!("{what}: found {found:?}, wanted {wanted:?}").into()) }
}

/// Fails the test unless `holds`.
pub(crate) fn holds(holds: bool, what: &str) -> Outcome {
    if holds { Ok(()) } else { Err(format!("not so: {what}").into()) }
}
