//! The answer to a request that is not carried out.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The class of what this caller may not do.
pub(crate) const PERMISSION_DENIED: &str = "PermissionDenied";

/// Why a request is not carried out, in QMP's form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub(crate) struct Refused {
    /// `"GenericError"`, `"CommandNotFound"`, `"MigrationActive"`, `"NoMigration"`, `"TlsRequired"`, `"TooLate"`,
    /// `"PermissionDenied"`: this caller may not.
    pub(crate) class: String,
    /// Why the request is refused, in a sentence.
    pub(crate) desc: String,
}

impl Refused {
    pub(crate) fn new(class: &str, desc: impl Into<String>) -> Self {
        Self { class: class.into(), desc: desc.into() }
    }

    /// A refusal of no class of its own.
    pub(crate) fn generic(desc: impl Into<String>) -> Self {
        Self::new("GenericError", desc)
    }
}
