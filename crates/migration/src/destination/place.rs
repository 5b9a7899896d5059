//! What a session is given by the place where its guest arrives, and what it gives back.

use crate::admission::Admission;
use crate::channel::connect::Listener;
use crate::channel::greeting::PendingConnections;
use crate::control::IncomingControl;
use crate::destination::commit::KnownOutcome;
use crate::error::IncomingError;
use crate::expectation::Unexpected;
use crate::offer::Arrived;
use crate::options::DestinationOptions;
use crate::waiting_sources::WaitingSources;

/// The place where the guest arrives, as far as a session needs it.
pub(super) struct Place<'a> {
    pub(super) listener: &'a mut Listener,
    pub(super) pending: &'a mut PendingConnections,
    pub(super) options: &'a DestinationOptions,
    pub(super) control: &'a IncomingControl,
    pub(super) admission: &'a Admission,
    pub(super) waiting: &'a mut WaitingSources,
}

/// What a session came to.
pub(super) struct Ended {
    pub(super) arrived: Result<Arrived, IncomingError>,
    /// What became of the attempt, for a source that asks later.
    pub(super) known: Option<KnownOutcome>,
    /// What the source brought was not expected: it was refused, and nothing was made for it.
    pub(super) unexpected: Option<Unexpected>,
    /// Its source offered nothing: why that was waited for no longer.
    pub(super) offered_nothing: Option<String>,
}

impl From<IncomingError> for Ended {
    fn from(error: IncomingError) -> Self {
        Self { arrived: Err(error), known: None, unexpected: None, offered_nothing: None }
    }
}
