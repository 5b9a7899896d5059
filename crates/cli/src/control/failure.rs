//! A failure by its parts, as the control socket and `--json` have it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use vfio_migration::{Failure, Side};

/// What failed, where, and what can be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "Failure")]
pub(crate) struct FailureInfo {
    /// Side on which it arose: both have devices of the same name.
    pub(crate) side: FailureSide,
    /// Code of the phase in which it arose: `"P0"` to `"P9"`.
    pub(crate) phase: String,
    /// Its name.
    #[serde(default, rename = "phase-name")]
    pub(crate) phase_name: String,
    /// Name of the device concerned.
    pub(crate) device: Option<String>,
    /// The state transition that failed; null when it was none.
    pub(crate) arc: Option<ArcInfo>,
    /// errno, where one is known.
    pub(crate) errno: Option<u32>,
    /// The failure with its causes, in a sentence.
    pub(crate) text: String,
    /// What can be done, in a sentence; empty when nothing is known to help.
    pub(crate) remedy: String,
}

/// A side of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum FailureSide {
    /// The side that has the guest before the migration.
    Source,
    /// The side that has it after.
    Destination,
}

/// A transition between two migration states of a device, as the kernel names them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub(crate) struct ArcInfo {
    /// The state that it was to leave.
    pub(crate) from: String,
    /// The state that it was to reach.
    pub(crate) to: String,
}

impl From<&Failure> for FailureInfo {
    fn from(failure: &Failure) -> Self {
        let Failure { side, phase, device, arc, errno, text, remedy } = failure;
        Self {
            side: match side {
                Side::Source => FailureSide::Source,
                Side::Destination => FailureSide::Destination,
            },
            phase: phase.code().into(),
            phase_name: phase.name().into(),
            device: device.clone(),
            arc: arc.map(|(from, to)| ArcInfo { from: from.to_string(), to: to.to_string() }),
            errno: *errno,
            text: text.clone(),
            remedy: remedy.clone(),
        }
    }
}
