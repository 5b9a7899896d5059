//! Answers that the other side owes, each with its deadline.

use std::time::Duration;

use crate::api::Time;

/// The multiple of `peer_timeout` that the peer may be busy with work of its own (reserving, opening, loading). A peer
/// that is *dead* is noticed long before by the session's pings; this bounds one that lives and does not answer.
const WORK: u32 = 12;

/// The bound on a peer's work, for a peer that may be silent for `peer_timeout` where it has none.
pub fn work_timeout(peer_timeout: Duration) -> Duration {
    peer_timeout.saturating_mul(WORK)
}

/// An answer that is waited for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ExpectedAnswer {
    /// The answer's name, for the failure's text.
    pub(crate) what: &'static str,
    since: Time,
    pub(crate) until: Time,
}

impl ExpectedAnswer {
    pub(crate) fn within(timeout: Duration, what: &'static str, now: Time) -> Self {
        Self { what, since: now, until: now.saturating_add(timeout) }
    }

    /// Longest time that it may take.
    pub(crate) fn limit(&self) -> Duration {
        self.until.saturating_sub(self.since)
    }

    /// Time since the wait began.
    pub(crate) fn waited(&self, now: Time) -> Duration {
        now.saturating_sub(self.since)
    }
}
