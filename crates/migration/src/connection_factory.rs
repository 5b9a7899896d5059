//! How a source whose connection was handed over gets another one.

use std::fmt;
use std::io::Error;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

/// Makes a further connection to the destination of a session: to ask what became of a COMMIT whose answer was lost. It is called on a
/// thread of its own with the time that it may take, and left to itself where that is over or the session is; it gives a connected
/// stream socket, which is then secured as the session's was.
#[derive(Clone)]
pub struct ConnectionFactory(Arc<Make>);

type Make = dyn Fn(Duration) -> Result<OwnedFd, Error> + Send + Sync;

impl ConnectionFactory {
    /// A factory that calls `make`.
    pub fn new(make: impl Fn(Duration) -> Result<OwnedFd, Error> + Send + Sync + 'static) -> Self {
        Self(Arc::new(make))
    }

    pub(crate) fn make(&self, within: Duration) -> Result<OwnedFd, Error> {
        (self.0)(within)
    }
}

impl fmt::Debug for ConnectionFactory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ConnectionFactory(..)")
    }
}
