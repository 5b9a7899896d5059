//! Addresses as a `vm` that runs takes them: those of the library, and names of sockets that were passed to it.

use std::fmt;
use std::str::FromStr;

use vfio_migration::Uri;

use crate::exit::{CliError, Exit};
use crate::words::uri;

/// Longest name of a socket, in bytes.
const NAME_MAX: usize = 64;

/// The other end of a session that a `vm` is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Address {
    Uri(Uri),
    /// `fd:NAME`: a socket that was passed to the `vm` under this name.
    Passed(SocketName),
}

/// The name of a socket that was passed: a letter, and letters, digits, `-`, `_` and `.` behind it. It cannot be taken for
/// the number of a descriptor.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SocketName(String);

impl FromStr for SocketName {
    type Err = CliError;

    fn from_str(text: &str) -> Result<Self, CliError> {
        let letter_first = text.starts_with(|first: char| first.is_ascii_alphabetic());
        let plain = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
        if !letter_first || !plain || text.len() > NAME_MAX {
            let shown: String = text.chars().take(NAME_MAX).collect();
            return Err(CliError::new(
                Exit::Usage,
                format!(
                    "'{shown}' is no name of a descriptor: a letter, and at most {} letters, digits, '-', '_' and '.' behind it",
                    NAME_MAX - 1
                ),
            ));
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for SocketName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Address {
    type Err = CliError;

    fn from_str(text: &str) -> Result<Self, CliError> {
        match text.strip_prefix("fd:") {
            Some(name) if name.starts_with(|first: char| first.is_ascii_alphabetic()) => {
                name.parse().map(Self::Passed)
            }
            _ => uri(text).map(Self::Uri),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uri(uri) => uri.fmt(f),
            Self::Passed(name) => write!(f, "fd:{name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_told_from_a_number() {
        assert_eq!("fd:7".parse::<Address>().unwrap(), Address::Uri(Uri::Fd(7)));
        for name in ["a", "mig-1.x_Y", &"x".repeat(NAME_MAX)] {
            let address: Address = format!("fd:{name}").parse().unwrap();
            assert_eq!(address, Address::Passed(name.parse().unwrap()));
            assert_eq!(address.to_string(), format!("fd:{name}"));
        }
        for none in [
            "",
            "fd:",
            "fd:7a",
            "fd:-1",
            "fd:-a",
            "fd:a b",
            "fd:a\0",
            "fd:é",
            "fd:a/b",
            &format!("fd:{}", "x".repeat(65)),
        ] {
            assert_eq!(none.parse::<Address>().unwrap_err().exit, Exit::Usage, "{none}");
        }
        for none in ["", "7", "7a", "-a", ".a", "_a", "a b", "a\n", "ä", "a:b"] {
            assert!(none.parse::<SocketName>().is_err(), "{none}");
        }
    }
}
