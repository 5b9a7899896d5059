//! The verbs and documents of the control socket.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vfio_migration_compat::Reason;

use super::rehearsal::RehearsalInfo;
use crate::move_options::{FileOptions, MoveOptions, SwitchoverOptions};

/// The verbs of the control socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "Verb")]
pub(crate) enum ControlVerb {
    /// Ask for the state of the VM and its migration, at one moment. Returns a [`StatusReport`].
    Query,
    /// Ask for the guest's report page.
    QueryGuest,
    /// Move the guest. Arguments: [`MigrateArguments`]. Returns when it has begun.
    Migrate,
    /// Find out what a migration would come to. Arguments:
    /// [`RehearseArguments`](super::rehearsal::RehearseArguments). Returns when it has begun.
    Rehearse,
    /// Ask for the machine's manifest. Returns its document.
    QueryManifest,
    /// Save the guest into a file. Arguments: [`SaveArguments`]. Returns when it has begun.
    Save,
    /// Wait for a guest again, after the last one left. Arguments: [`IncomingArguments`].
    MigrateIncoming,
    /// Change limits. Arguments: [`ParameterArguments`].
    MigrateSetParameters,
    /// Cancel the migration under way.
    MigrateCancel,
    /// Let a migration that waits before its switchover go on.
    MigrateContinue,
    /// Pause the guest, if it runs.
    Stop,
    /// Let the guest run.
    Cont,
    /// End the process; a guest that is here ends with it.
    Quit,
}

/// A request: one line, without its `id`, which the server takes off first.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ControlRequest {
    pub(crate) execute: ControlVerb,
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub(crate) arguments: Value,
}

/// Arguments of the verbs that take none.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NoArguments {}

/// Arguments of `migrate`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct MigrateArguments {
    /// Where to: `unix:PATH`, `tcp:HOST:PORT` or `fd:N`.
    pub(crate) uri: String,
    #[serde(flatten)]
    pub(crate) options: MoveOptions,
    #[serde(flatten)]
    pub(crate) switchover: SwitchoverOptions,
}

/// Arguments of `save`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct SaveArguments {
    /// Absolute path of the file.
    pub(crate) path: String,
    #[serde(flatten)]
    pub(crate) options: FileOptions,
}

/// Arguments of `migrate-incoming`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct IncomingArguments {
    /// Where to listen: `unix:PATH`, `tcp:HOST:PORT` or `fd:N`.
    pub(crate) uri: String,
}

/// Arguments of `migrate-set-parameters`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct ParameterArguments {
    /// New limit on the downtime, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) downtime_limit: Option<u64>,
    /// New cap on bytes each second; 0: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) max_bandwidth: Option<u64>,
}

/// How a `vm` stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct StatusInfo {
    /// Identity of the VM. One that waits for a guest and was given none takes the guest's when it comes.
    pub(crate) uuid: String,
    /// `"running"`, `"paused"`, `"inmigrate"` (waiting for a guest), `"postmigrate"` (its guest has left),
    /// `"unresolved"` (nobody knows whose the guest is), `"failed"`.
    pub(crate) status: String,
    /// What runs the guest's code: `"kvm"` or `"software"`.
    pub(crate) guest: String,
    /// Process id of the `vm`.
    pub(crate) pid: u32,
    /// Where it waits for a guest, while it does.
    pub(crate) incoming: Option<String>,
    /// Guest RAM, in bytes.
    pub(crate) memory: u64,
    /// Names of the devices.
    pub(crate) devices: Vec<String>,
    /// Those of them whose vfio-user server is gone. What a guest does with such a device is its own affair; it cannot be
    /// moved any more.
    #[serde(default)]
    pub(crate) lost_devices: Vec<String>,
    /// How often the VM has changed owner.
    pub(crate) epoch: u64,
}

/// States of a migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "MigrationState")]
pub(crate) enum MigrationStatus {
    /// No migration was begun here yet.
    #[default]
    None,
    /// Begun and not ended: `phase` says how far.
    Active,
    /// Waiting for `migrate-continue`.
    PreSwitchover,
    /// The guest has moved.
    Completed,
    /// It was cancelled; the guest is where it was.
    Cancelled,
    /// It failed; the guest is where it was, unless `error` says otherwise.
    Failed,
    /// It is not known whose the guest is.
    Unresolved,
    /// It was only rehearsed; the guest is where it was.
    Rehearsed,
}

/// How a migration stands: the same document on both sides.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct MigrationInfo {
    /// State of the migration.
    pub(crate) status: MigrationStatus,
    /// `"outgoing"` at the source, `"incoming"` at the destination.
    pub(crate) direction: Option<String>,
    /// Phase, `"P1"` to `"P9"`.
    pub(crate) phase: Option<String>,
    /// Milliseconds since it began.
    pub(crate) total_ms: f64,
    /// Milliseconds that the guest was paused, once known.
    pub(crate) downtime_ms: Option<f64>,
    /// Milliseconds spent on digests while it was paused, not in `downtime-ms`.
    pub(crate) verify_ms: f64,
    /// Downtime that the next switchover is predicted to cost, in milliseconds.
    pub(crate) expected_downtime_ms: Option<f64>,
    /// Iterations of pre-copy so far: the first sends all RAM.
    pub(crate) iterations: u32,
    /// Payload bytes moved so far.
    pub(crate) transferred: TransferInfo,
    /// Bytes left, RAM and devices, while it is under way.
    pub(crate) remaining: u64,
    /// Bytes each second on the wire, lately.
    pub(crate) rate: u64,
    /// What each phase took.
    pub(crate) phases: Vec<PhaseInfo>,
    /// RAM at the source's pause equals RAM before the destination ran; absent when not asked for.
    pub(crate) ram_digest_match: Option<bool>,
    /// Device bytes read at the source equal those written at the destination.
    pub(crate) device_digest_match: Option<bool>,
    /// Why it did not complete.
    pub(crate) error: Option<String>,
    /// The two sides do not fit: nothing was begun.
    pub(crate) incompatible: bool,
    /// Why not, or what should be known, by the rules of both sides.
    pub(crate) reasons: Vec<Reason>,
    /// What a rehearsal found.
    pub(crate) rehearsal: Option<RehearsalInfo>,
}

/// What `query` returns, and `status --json` and `migrate --json` print.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct StatusReport {
    /// The VM, at the same moment as its migration.
    pub(crate) vm: StatusInfo,
    /// Its migration, under way or the last one that ended.
    pub(crate) migration: MigrationInfo,
}

/// Bytes moved, payload only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct TransferInfo {
    /// RAM; zero pages not counted.
    pub(crate) ram: u64,
    /// Device state while the guest ran.
    pub(crate) device_precopy: u64,
    /// Device state while it was paused.
    pub(crate) device_stopcopy: u64,
}

/// A phase and its time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct PhaseInfo {
    /// Phase, `"P1"` to `"P9"`.
    pub(crate) name: String,
    /// Time that the phase took, in milliseconds.
    pub(crate) ms: f64,
}
