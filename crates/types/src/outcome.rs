//! What became of a guest at the destination that owns it.

use serde::{Deserialize, Serialize};

use crate::failure::Failure;

/// What became of a guest that is the destination's. Whoever adds one has to say everywhere what it means: this enum is
/// matched without a default.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestOutcome {
    /// Its vCPUs run.
    Running,
    /// It is paused, as it was sent or was to arrive: [`PauseCause`] says which.
    Paused,
    /// It could not be started, and is held paused; nobody else may run it.
    NotStarted(Box<Failure>),
    /// Whether it runs is not known: who answered knows only whose it is.
    Unknown,
}

impl GuestOutcome {
    /// Whether the guest is as it was to be: it runs, or is paused as it was sent.
    #[must_use]
    pub const fn is_success(&self) -> bool {
        match self {
            Self::Running | Self::Paused => true,
            Self::NotStarted(_) | Self::Unknown => false,
        }
    }

    /// Whether vCPUs are known to run.
    #[must_use]
    pub const fn runs(&self) -> bool {
        matches!(self, Self::Running)
    }

    /// The failure that kept the guest from being started.
    #[must_use]
    pub const fn failure(&self) -> Option<&Failure> {
        match self {
            Self::NotStarted(failure) => Some(failure),
            Self::Running | Self::Paused | Self::Unknown => None,
        }
    }
}

/// Why a guest arrived paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PauseCause {
    /// It was paused already when it was sent.
    BeforeItWasSent,
    /// It ran, and its source asked that it arrive paused.
    SourceAsked,
    /// It ran, and its destination's operator wanted it to arrive paused.
    DestinationAsked,
    /// It was saved, and is in the file.
    IntoFile,
}

impl PauseCause {
    /// Why a guest that `ran` at its source, or did not, is to be paused at the destination; `None`: it is to run.
    #[must_use]
    pub const fn of(ran: bool, source_asks: bool, destination_asks: bool) -> Option<Self> {
        match (ran, source_asks, destination_asks) {
            (false, _, _) => Some(Self::BeforeItWasSent),
            (true, true, _) => Some(Self::SourceAsked),
            (true, false, true) => Some(Self::DestinationAsked),
            (true, false, false) => None,
        }
    }
}
