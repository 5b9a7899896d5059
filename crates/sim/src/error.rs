//! One error type: the errno that a VFIO device would answer, and why.

use std::borrow::Cow;
use std::fmt;

use rustix::io::Errno;

/// A request that the device refuses, or could not carry out.
///
/// The errno is the contract, since it is all that crosses a vfio-user socket; the text is for logs and tests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SimError {
    errno: Errno,
    what: Cow<'static, str>,
    death: bool,
}

impl SimError {
    /// A refusal with `errno` because of `what`.
    pub fn new(errno: Errno, what: impl Into<Cow<'static, str>>) -> Self {
        Self { errno, what: what.into(), death: false }
    }

    /// The device "dies" here by a scripted fault: a server answers nothing more.
    pub(crate) fn death(what: &'static str) -> Self {
        Self { errno: Errno::IO, what: what.into(), death: true }
    }

    /// The errno that a VFIO device would answer.
    pub fn errno(&self) -> Errno {
        self.errno
    }

    /// Whether a fault asked for the device's server to vanish here, without an answer.
    pub fn is_death(&self) -> bool {
        self.death
    }
}

impl fmt::Display for SimError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match name(self.errno) {
            Some(name) => write!(f, "{} ({name})", self.what),
            // In the system's words, by which `error_chain` knows a limit that was reached.
            None => write!(f, "{}: {}", self.what, self.errno),
        }
    }
}

impl std::error::Error for SimError {}

/// EINVAL because of `what`.
pub(crate) fn invalid(what: impl Into<Cow<'static, str>>) -> SimError {
    SimError::new(Errno::INVAL, what)
}

/// The errnos that a fault script may name.
const NAMES: [(&str, Errno); 16] = [
    ("EPERM", Errno::PERM),
    ("ENOENT", Errno::NOENT),
    ("EINTR", Errno::INTR),
    ("EIO", Errno::IO),
    ("EAGAIN", Errno::AGAIN),
    ("ENOMEM", Errno::NOMEM),
    ("EFAULT", Errno::FAULT),
    ("EBUSY", Errno::BUSY),
    ("ENODEV", Errno::NODEV),
    ("EINVAL", Errno::INVAL),
    ("ENOSPC", Errno::NOSPC),
    ("ENOTTY", Errno::NOTTY),
    ("ENOMSG", Errno::NOMSG),
    ("EOPNOTSUPP", Errno::OPNOTSUPP),
    ("ETIMEDOUT", Errno::TIMEDOUT),
    ("ENOTCONN", Errno::NOTCONN),
];

/// The errno called `name`, in capitals as in `errno.h`.
pub(crate) fn errno_by_name(name: &str) -> Option<Errno> {
    NAMES.iter().find(|(known, _)| *known == name).map(|(_, errno)| *errno)
}

fn name(errno: Errno) -> Option<&'static str> {
    NAMES.iter().find(|(_, known)| *known == errno).map(|(name, _)| *name)
}

/// Prints an errno by its name, or by its number when it is not one of those that scripts use.
pub(crate) struct Name(pub(crate) Errno);

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match name(self.0) {
            Some(name) => f.write_str(name),
            None => write!(f, "errno {}", self.0.raw_os_error()),
        }
    }
}
