//! What the other side must say, and by when.

use std::time::Duration;

use crate::api::Time;

/// How many `peer_timeout`s the peer may be busy with work of its own (reserving, opening, loading). A peer that is
/// *dead* is noticed long before by the session's pings; this bounds one that lives and does not answer.
const WORK: u32 = 12;

/// The bound on a peer's work, for a peer that may be silent for `peer_timeout` where it has none.
pub fn work_timeout(peer_timeout: Duration) -> Duration {
    peer_timeout.saturating_mul(WORK)
}

/// An answer that is waited for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ExpectedAnswer {
    /// Its name, for the failure's text.
    pub(crate) what: &'static str,
    since: Time,
    pub(crate) until: Time,
}

impl ExpectedAnswer {
    pub(crate) fn within(timeout: Duration, what: &'static str, now: Time) -> Self {
        Self { what, since: now, until: now.saturating_add(timeout) }
    }

    /// How long it has been waited for.
    pub(crate) fn waited(&self, now: Time) -> Duration {
        now.saturating_sub(self.since)
    }
}
