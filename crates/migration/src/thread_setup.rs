//! What a VMM has every thread of a session do first.

use std::fmt;
use std::sync::Arc;

/// Called first on each thread that a session makes, with the thread's name: for a seccomp filter, a cpuset, a scheduling class, a
/// count of threads. It must not block, and a panic of it is one of the thread.
#[derive(Clone)]
pub struct ThreadSetup(Arc<dyn Fn(&str) + Send + Sync>);

impl ThreadSetup {
    /// A set-up that calls `call`.
    pub fn new(call: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Self(Arc::new(call))
    }

    pub(crate) fn call(&self, name: &str) {
        (self.0)(name);
    }
}

impl fmt::Debug for ThreadSetup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ThreadSetup(..)")
    }
}
