//! Weight of a reason for a verdict, and who can change it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a reason does to the verdict. Greater is worse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Nothing: it is said, and that is all.
    Note,
    /// The verdict is at best `live-with-warning`.
    Warning,
    /// The verdict is at best `snapshot-only`.
    SnapshotOnly,
    /// The verdict is `no`.
    No,
}

/// Who can change a reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum WhoCanFix {
    /// Whoever installs the host's driver of the device, or its firmware.
    HostDriver,
    /// Whoever installs the driver in the guest.
    GuestDriver,
    /// Whoever maintains the device's implementation.
    Device,
    /// Whoever configures the VM.
    Configuration,
    /// Whoever writes the site's policy.
    Policy,
    /// Whoever runs the host.
    Host,
    /// Nobody: it is in the nature of the thing.
    Nobody,
}
