//! The sockets that `fd:N` may name: those that the process was started with, each for one session. Whatever it opens itself
//! is its own, connections to devices above all, which a mistyped number must not end.

use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock, PoisonError};

use vfio_migration::Uri;
use vfio_migration_types::error_chain;

use crate::exit::CliError;

/// Descriptors of this process, as links to what they stand for.
const OPEN: &str = "/proc/self/fd";
/// The first number after stdin, stdout and stderr, which have uses of their own.
const FIRST: RawFd = 3;

/// What there was at the start, and for each socket whether a session has had it; or why that is not known.
static AT_START: OnceLock<Result<Mutex<BTreeMap<RawFd, bool>>, String>> = OnceLock::new();

/// Records what this process was started with. To be called before it opens anything.
pub(crate) fn record() {
    AT_START.get_or_init(|| {
        let sockets = sockets().map_err(|error| format!("{OPEN} cannot be read: {}", error_chain(&error)))?;
        Ok(Mutex::new(sockets.into_iter().map(|number| (number, false)).collect()))
    });
}

fn sockets() -> std::io::Result<Vec<RawFd>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(OPEN)? {
        let entry = entry?;
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        let target = std::fs::read_link(entry.path()).unwrap_or_else(|_| PathBuf::new());
        if let Some(number) = number.filter(|number| *number >= FIRST)
            && target.to_string_lossy().starts_with("socket:")
        {
            found.push(number);
        }
    }
    Ok(found)
}

/// An address that a session is to have. Dropped before there is one, it leaves the socket for another.
#[derive(Debug)]
#[must_use]
pub(crate) struct Claim {
    number: Option<RawFd>,
}

/// Claims `uri` for a session. Of addresses, only a descriptor can be refused.
pub(crate) fn claim(uri: &Uri) -> Result<Claim, CliError> {
    let Uri::Fd(number) = uri else { return Ok(Claim { number: None }) };
    let refused = |why: &str| Err(CliError::failed(format!("{uri} {why}")));
    let sockets = match AT_START.get() {
        Some(Ok(sockets)) => sockets,
        Some(Err(why)) => return refused(&format!("cannot be told from what this process opened: {why}")),
        None => return refused("cannot be told from what this process opened"),
    };
    match sockets.lock().unwrap_or_else(PoisonError::into_inner).get_mut(number) {
        Some(used) if !*used => *used = true,
        Some(_) => return refused("has been used: it is for one session, or one wait"),
        None => {
            return refused(
                "is no socket that this process was started with: start it with one that is connected, from descriptor 3 on",
            );
        }
    }
    Ok(Claim { number: Some(*number) })
}

impl Claim {
    /// There is a session: the socket is not for another.
    pub(crate) fn spend(mut self) {
        self.number = None;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(number) = self.number
            && let Some(Ok(sockets)) = AT_START.get()
        {
            sockets.lock().unwrap_or_else(PoisonError::into_inner).insert(number, false);
        }
    }
}
