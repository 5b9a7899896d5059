//! What each verb of the control socket needs: the one table of them.

use super::protocol::ControlVerb;

/// What a caller of the control socket may do. The greater includes the less.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum ControlRight {
    /// Ask, and hear events: nothing of the VM changes by it.
    Read,
    /// Everything.
    Full,
}

/// What is needed to carry a verb out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct VerbNeeds {
    /// What its caller must be allowed.
    pub(crate) right: ControlRight,
    /// Whether it takes arguments.
    pub(crate) arguments: bool,
}

impl ControlVerb {
    /// What the verb needs. Without a default, so that a new verb does not compile until it is told.
    pub(crate) fn needs(self) -> VerbNeeds {
        use ControlRight::{Full, Read};
        let (right, arguments) = match self {
            Self::Query | Self::QueryGuest | Self::QueryManifest => (Read, false),
            Self::MigrateCancel | Self::MigrateContinue | Self::Stop | Self::Cont => (Full, false),
            Self::Migrate
            | Self::Rehearse
            | Self::Save
            | Self::Getfd
            | Self::Closefd
            | Self::MigrateIncoming
            | Self::MigrateSetParameters
            | Self::Quit => (Full, true),
        };
        VerbNeeds { right, arguments }
    }

    /// As requests name it.
    pub(crate) fn name(self) -> String {
        let name = serde_json::to_value(self).ok();
        name.as_ref().and_then(serde_json::Value::as_str).unwrap_or_default().to_owned()
    }
}
