//! An answer that a `vm` waits for, as the control socket and `--json` have it.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use vfio_migration::{AwaitedAnswer, Request};

use super::failure::ArcInfo;
use crate::units::milliseconds;

/// A request that was not answered yet: of whom, and for how long.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "AwaitedAnswer")]
pub(crate) struct AwaitedInfo {
    /// Name of the device that is to answer; null where it is the VMM or the state directory.
    pub(crate) device: Option<String>,
    /// The state transition that it was asked for; null when it was asked for something else.
    pub(crate) arc: Option<ArcInfo>,
    /// Milliseconds since it was asked.
    pub(crate) waited_ms: u64,
    /// Milliseconds after which it is waited for no more; null: it is waited for until it comes.
    pub(crate) limit_ms: Option<u64>,
    /// The same in a sentence: `net0 has not answered RUNNING to PRE_COPY for 12 s`.
    pub(crate) text: String,
}

impl From<&AwaitedAnswer> for AwaitedInfo {
    fn from(answer: &AwaitedAnswer) -> Self {
        Self {
            device: answer.device.as_ref().map(ToString::to_string),
            arc: match answer.request {
                Request::Transition { from, to } => {
                    Some(ArcInfo { from: from.to_string(), to: to.to_string() })
                }
                _ => None,
            },
            waited_ms: milliseconds(answer.waited),
            limit_ms: answer.limit.map(milliseconds),
            text: answer.to_string(),
        }
    }
}

impl fmt::Display for AwaitedInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.limit_ms {
            Some(limit) => write!(f, "{}, at most {} s", self.text, limit.div_ceil(1000)),
            None => write!(f, "{}, and is waited for until it does", self.text),
        }
    }
}

/// Several of them in one sentence.
pub(crate) fn sentence(awaited: &[AwaitedInfo]) -> String {
    match awaited {
        [] => "its devices are on their way back".into(),
        _ => awaited.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "),
    }
}
