//! The verbs and documents of the control socket.

use std::fmt;
use std::num::NonZeroU64;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vfio_migration::PauseCause;
use vfio_migration_compat::Reason;

use super::awaited::AwaitedInfo;
use super::expected::{ExpectedInfo, RefusalsInfo};
use super::failure::FailureInfo;
use super::rehearsal::RehearsalInfo;
use super::security::SecurityInfo;
use crate::bandwidth::Bandwidth;
use crate::exit::Exit;
use crate::incoming_options::IncomingOptions;
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
    /// Keep the descriptor that is passed with the request. Arguments: [`FdArguments`].
    Getfd,
    /// Close a descriptor that is kept. Arguments: [`FdArguments`].
    Closefd,
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
    /// End the process. Arguments: [`QuitArguments`], without which it is refused while a guest is here.
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
    /// Where to: `unix:PATH`, `tcp:HOST:PORT`, `fd:N`, a connected socket that the `vm` was started with, or `fd:NAME`, one that
    /// was passed to it by `getfd`.
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
    /// Where to listen: `unix:PATH`, `tcp:HOST:PORT`, `fd:N`, a socket, connected or listening, that the `vm` was started with, or
    /// `fd:NAME`, a connected one that was passed to it by `getfd`.
    pub(crate) uri: String,
    #[serde(flatten)]
    pub(crate) options: IncomingOptions,
}

/// Arguments of `getfd` and `closefd`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct FdArguments {
    /// Name of the descriptor: a letter, and at most 63 letters, digits, `-`, `_` and `.` behind it.
    pub(crate) fdname: String,
}

/// Arguments of `migrate-set-parameters`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct ParameterArguments {
    /// New limit on the downtime, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) downtime_limit: Option<NonZeroU64>,
    /// New cap on bytes each second; `"none"` lifts it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) max_bandwidth: Option<Bandwidth>,
}

/// Arguments of `quit`.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct QuitArguments {
    /// End a guest that is here with the process; without it such a `vm` does not quit.
    #[serde(default)]
    pub(crate) force: bool,
}

/// How a `vm` stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct StatusInfo {
    /// Identity of the VM. One that waits for a guest and was given none takes the guest's when it comes.
    pub(crate) uuid: String,
    /// What there is of a guest here.
    pub(crate) status: VmStatus,
    /// What runs the guest's code: `"kvm"` or `"software"`.
    pub(crate) guest: String,
    /// Process id of the `vm`.
    pub(crate) pid: u32,
    /// Where it waits for a guest, while it does.
    pub(crate) incoming: Option<String>,
    /// Whether it waits there in plain text, over TCP: anybody may have sent what comes.
    #[serde(default)]
    pub(crate) incoming_plaintext: bool,
    /// Why it could take no guest just now, while it waits for one: its machine is being built anew, or cannot be built, which is
    /// tried again and again; with the device that keeps it waiting.
    #[serde(default)]
    pub(crate) not_ready: Option<String>,
    /// Why its guest stopped by itself, if it did: `status` is `"failed"` then.
    #[serde(default)]
    pub(crate) failure: Option<String>,
    /// Where its guest has moved to, once it has left.
    #[serde(default)]
    pub(crate) moved_to: Option<String>,
    /// Guest RAM, in bytes; null before a guest has come to a `vm` that takes as much as that has.
    pub(crate) memory: Option<u64>,
    /// Names of the devices.
    pub(crate) devices: Vec<String>,
    /// Those of them to whose vfio-user server the connection is lost. What a guest does with such a device is its own affair; it cannot be
    /// moved any more.
    #[serde(default)]
    pub(crate) lost_devices: Vec<String>,
    /// Those of them that a migration, rehearsal or save which was undone had to reset under the guest, or tried to: the state that the guest had in
    /// them is lost. For as long as the guest is here.
    #[serde(default)]
    pub(crate) reset_devices: Vec<String>,
    /// Those of them that have not taken all the interrupts which the guest has unmasked, since they refused or were late. Each is asked
    /// again until it has.
    #[serde(default)]
    pub(crate) unconnected_interrupts: Vec<String>,
    /// While a session is still being undone behind its end: the answers that this waits for. No other session can begin before it is
    /// undone; a guest that the session had paused goes on then. Null while nothing is left to be undone.
    #[serde(default)]
    pub(crate) pending_rollback: Option<Vec<AwaitedInfo>>,
    /// While it waits for a guest and was told what to expect (`--expect`, `--uuid`, `--tls-pin`): what that is now.
    #[serde(default)]
    pub(crate) expected: Option<ExpectedInfo>,
    /// Connections that were refused, of one that waits for a guest, or has waited and was not asked to move it since.
    #[serde(default)]
    pub(crate) refused: Option<RefusalsInfo>,
    /// How often the VM has changed owner.
    pub(crate) epoch: u64,
}

/// What there is of a guest in a `vm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum VmStatus {
    /// The guest is here and runs.
    Running,
    /// The guest is here and is paused.
    Paused,
    /// No guest is here yet: one is awaited, or arrives.
    Inmigrate,
    /// The guest has left: another `vm`, or a file, owns it.
    Postmigrate,
    /// No guest is here, and none is awaited.
    Idle,
    /// Nobody knows whose the guest is; it is paused here.
    Unresolved,
    /// The guest is here and has stopped by itself.
    Failed,
    /// The process is ending, and a guest that is here with it.
    Shutdown,
}

impl VmStatus {
    /// What the exit code of `status` is by this alone.
    fn exit(self) -> Exit {
        match self {
            Self::Running | Self::Paused | Self::Inmigrate | Self::Postmigrate | Self::Idle => Exit::Done,
            Self::Failed | Self::Shutdown => Exit::Failed,
            Self::Unresolved => Exit::Unresolved,
        }
    }
}

impl fmt::Display for VmStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Inmigrate => "inmigrate",
            Self::Postmigrate => "postmigrate",
            Self::Idle => "idle",
            Self::Unresolved => "unresolved",
            Self::Failed => "failed",
            Self::Shutdown => "shutdown",
        })
    }
}

/// States of a migration. Matched without a default, so that a new one does not compile until it is told everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "MigrationState")]
pub(crate) enum MigrationStatus {
    /// Begun and not ended: `phase` says how far.
    Active,
    /// Waiting for `migrate-continue`.
    PreSwitchover,
    /// Cancelled, and being undone: `waits-for` says what is waited for.
    Cancelling,
    /// It has failed, or was refused, and is being undone: `failure` says why, `waits-for` what is waited for.
    Failing,
    /// The guest has moved, and is at the destination what it was to be: running, or paused (`paused-by`).
    Completed,
    /// The guest is the destination's, which could not start it and holds it paused: `failure` says why.
    NotStarted,
    /// The guest is the destination's; whether it runs there is not known.
    Unknown,
    /// It was cancelled; the guest is where it was.
    Cancelled,
    /// It failed; the guest is where it was, unless `error` says otherwise.
    Failed,
    /// It is not known whose the guest is.
    Unresolved,
    /// It was only rehearsed; the guest is where it was.
    Rehearsed,
}

impl fmt::Display for MigrationStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Active => "under way",
            Self::PreSwitchover => "waits for `continue`",
            Self::Cancelling => "cancelling",
            Self::Failing => "failed, and being undone",
            Self::Completed => "completed",
            Self::NotStarted => "moved, and not started",
            Self::Unknown => "moved, and not known whether it runs",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
            Self::Unresolved => "unresolved",
            Self::Rehearsed => "rehearsed",
        })
    }
}

impl MigrationStatus {
    /// Whether it is under way.
    pub(crate) fn is_under_way(self) -> bool {
        match self {
            Self::Active | Self::PreSwitchover | Self::Cancelling | Self::Failing => true,
            Self::Completed
            | Self::NotStarted
            | Self::Unknown
            | Self::Cancelled
            | Self::Failed
            | Self::Unresolved
            | Self::Rehearsed => false,
        }
    }
}

/// What became of a guest that is the destination's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum ArrivedGuest {
    /// Its vCPUs run.
    Running,
    /// It is paused, as it was to be: `paused-by` says why.
    Paused,
    /// It could not be started, and is held paused.
    NotStarted,
    /// Whether it runs is not known.
    Unknown,
}

/// Why a guest that is the destination's, or a file's, is paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum PausedBy {
    /// It was paused before it was sent.
    Operator,
    /// Its source asked for that (`migrate --suspend`).
    Source,
    /// Its receiver was started so (`vm --paused`).
    Destination,
    /// It was saved (`save --stop`): it is in the file.
    File,
}

impl From<PauseCause> for PausedBy {
    fn from(cause: PauseCause) -> Self {
        match cause {
            PauseCause::BeforeItWasSent => Self::Operator,
            PauseCause::SourceAsked => Self::Source,
            PauseCause::DestinationAsked => Self::Destination,
            PauseCause::IntoFile => Self::File,
        }
    }
}

/// How a migration stands: the same document on both sides.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct MigrationInfo {
    /// State of the migration.
    pub(crate) status: MigrationStatus,
    /// `"outgoing"` at the source, `"incoming"` at the destination.
    pub(crate) direction: Option<String>,
    /// Code of the phase, `"P0"` to `"P9"`.
    pub(crate) phase: Option<String>,
    /// Its name: `"plan"`, `"hello"`, `"setup"`, `"pre-copy"`, `"quiesce"`, `"final"`, `"ready"`, `"commit"`, `"run"`, `"clean-up"`.
    #[serde(default)]
    pub(crate) phase_name: Option<String>,
    /// Milliseconds since it began, like all times here whole and rounded up.
    pub(crate) total_ms: u64,
    /// Name of the attempt, in hexadecimal: the same on both sides.
    #[serde(default)]
    pub(crate) attempt: Option<String>,
    /// What carried it: `"tcp"`, `"unix"` or `"fd"`.
    #[serde(default)]
    pub(crate) transport: Option<String>,
    /// How its connection is secured, and what the peer has proved to be; null before there is one, and of a file.
    #[serde(default)]
    pub(crate) security: Option<SecurityInfo>,
    /// What became of the guest at the destination, once it is the destination's.
    #[serde(default)]
    pub(crate) guest: Option<ArrivedGuest>,
    /// Why it is paused, if it is.
    #[serde(default)]
    pub(crate) paused_by: Option<PausedBy>,
    /// Milliseconds that the guest was paused, once it runs again: at the destination, or here after a migration that was undone.
    pub(crate) downtime_ms: Option<u64>,
    /// Whether `downtime-ms` was read from one clock, both sides being on one host; else the answer's way back is in it.
    #[serde(default)]
    pub(crate) one_clock: bool,
    /// Milliseconds spent on digests while it was paused, not in `downtime-ms`.
    pub(crate) verify_ms: u64,
    /// Downtime that the next switchover is predicted to cost, in milliseconds.
    pub(crate) expected_downtime_ms: Option<u64>,
    /// Longest downtime that is allowed, in milliseconds: at the source, which is told.
    #[serde(default)]
    pub(crate) downtime_limit_ms: Option<u64>,
    /// Iterations of pre-copy so far: the first sends all RAM.
    pub(crate) iterations: u32,
    /// Payload bytes moved so far.
    pub(crate) transferred: TransferInfo,
    /// Bytes on the wire, headers included; null where they are not counted.
    #[serde(default)]
    pub(crate) wire_bytes: Option<u64>,
    /// Bytes moved of each device.
    #[serde(default)]
    pub(crate) devices: Vec<DeviceInfo>,
    /// Interrupt vectors armed at the destination.
    #[serde(default)]
    pub(crate) vectors: u32,
    /// Bytes left, RAM and devices, while it is under way: of the pass under way, and what is known to be dirty. Null before that is known,
    /// at its end, and at the destination, which is not told.
    pub(crate) remaining: Option<u64>,
    /// Bytes each second on the wire, lately.
    pub(crate) rate: u64,
    /// What each phase took so far, also of a migration that did not complete: together `total-ms`, but that each is rounded up.
    pub(crate) phases: Vec<PhaseInfo>,
    /// RAM at the source's pause equals RAM before the destination ran; absent when not asked for.
    pub(crate) ram_digest_match: Option<bool>,
    /// Device bytes read at the source equal those written at the destination.
    pub(crate) device_digest_match: Option<bool>,
    /// Why it did not complete.
    pub(crate) error: Option<String>,
    /// The failure behind `error` by its parts, where there is one.
    #[serde(default)]
    pub(crate) failure: Option<FailureInfo>,
    /// Of one that left the guest paused: when a later `cont` started it, RFC 3339 in UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) started: Option<String>,
    /// What could not be done after the guest was the destination's, such as releasing a device: no harm to the guest, but work for
    /// a person. Of one that was cancelled, or failed: what did not answer, and is undone when it does; once it is, what could not be.
    #[serde(default)]
    pub(crate) left_undone: Vec<FailureInfo>,
    /// While it is under way: answers that have been waited for longer than a second, or a fifth of one when it is being cancelled, the
    /// longest first.
    #[serde(default)]
    pub(crate) waits_for: Vec<AwaitedInfo>,
    /// It was refused, and another attempt comes to the same as long as nothing is changed: the two sides do not fit, or the limits cannot be
    /// met. The guest never noticed.
    pub(crate) incompatible: bool,
    /// Why not, or what should be known, by the rules of both sides.
    pub(crate) reasons: Vec<Reason>,
    /// What a rehearsal found.
    pub(crate) rehearsal: Option<RehearsalInfo>,
}

impl MigrationInfo {
    /// Its status in words, with what is so of a guest that does not run although all went well.
    pub(crate) fn status_text(&self) -> String {
        let guest = match (self.guest, self.paused_by) {
            (Some(ArrivedGuest::Paused), Some(PausedBy::Operator)) => ", paused as it was before",
            (Some(ArrivedGuest::Paused), Some(PausedBy::Source)) => ", paused as its source asked",
            (Some(ArrivedGuest::Paused), Some(PausedBy::Destination)) => {
                ", paused as its receiver was started"
            }
            (Some(ArrivedGuest::Paused), Some(PausedBy::File)) => ", in the file",
            (Some(ArrivedGuest::Paused), None) => ", paused",
            // The status says it.
            (Some(ArrivedGuest::Running | ArrivedGuest::NotStarted | ArrivedGuest::Unknown) | None, _) => "",
        };
        format!("{}{guest}", self.status)
    }

    /// The exit code of a verb that asked for it.
    pub(crate) fn exit(&self) -> Exit {
        match self.status {
            MigrationStatus::Completed
            | MigrationStatus::Active
            | MigrationStatus::PreSwitchover
            | MigrationStatus::Cancelling
            | MigrationStatus::Failing => Exit::Done,
            MigrationStatus::NotStarted | MigrationStatus::Unknown => Exit::NotStarted,
            MigrationStatus::Unresolved => Exit::Unresolved,
            MigrationStatus::Cancelled | MigrationStatus::Failed | MigrationStatus::Rehearsed
                if self.incompatible =>
            {
                Exit::Incompatible
            }
            MigrationStatus::Rehearsed => Exit::Done,
            MigrationStatus::Cancelled | MigrationStatus::Failed => Exit::Failed,
        }
    }

    /// One of which nothing is known but its state.
    pub(crate) fn new(status: MigrationStatus) -> Self {
        Self {
            status,
            direction: None,
            phase: None,
            phase_name: None,
            total_ms: 0,
            attempt: None,
            transport: None,
            security: None,
            guest: None,
            paused_by: None,
            downtime_ms: None,
            one_clock: false,
            verify_ms: 0,
            expected_downtime_ms: None,
            downtime_limit_ms: None,
            iterations: 0,
            transferred: TransferInfo::default(),
            wire_bytes: None,
            devices: Vec::new(),
            vectors: 0,
            remaining: None,
            rate: 0,
            phases: Vec::new(),
            ram_digest_match: None,
            device_digest_match: None,
            error: None,
            failure: None,
            started: None,
            left_undone: Vec::new(),
            waits_for: Vec::new(),
            incompatible: false,
            reasons: Vec::new(),
            rehearsal: None,
        }
    }
}

/// What `query` returns and `status --json` prints.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct StatusReport {
    /// The VM, at the same moment as its migration.
    pub(crate) vm: StatusInfo,
    /// The migration, save or rehearsal that is under way; null while none is.
    pub(crate) migration: Option<MigrationInfo>,
    /// The last one that ended, of this process; null before there was one.
    pub(crate) last: Option<MigrationInfo>,
}

impl StatusReport {
    /// The exit code of `status`: of the VM as it is, and of a guest that its last migration left the destination's and not running,
    /// as far as is known here.
    pub(crate) fn exit(&self) -> Exit {
        let of_vm = self.vm.status.exit();
        let left = matches!(self.vm.status, VmStatus::Postmigrate | VmStatus::Paused);
        let last =
            self.last.as_ref().filter(|last| left && self.migration.is_none() && last.started.is_none());
        match last.map(MigrationInfo::exit) {
            Some(Exit::NotStarted) if of_vm == Exit::Done => Exit::NotStarted,
            _ => of_vm,
        }
    }

    /// The one under way, or else the last.
    pub(crate) fn latest(self) -> Option<FollowedReport> {
        let Self { vm, migration, last } = self;
        migration.or(last).map(|migration| FollowedReport { vm, migration })
    }
}

/// What the verbs that follow a migration or a save to its end print with `--json`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "MigrateReport")]
pub(crate) struct FollowedReport {
    /// The VM, at the same moment as its migration.
    pub(crate) vm: StatusInfo,
    /// The migration or save, as it ended.
    pub(crate) migration: MigrationInfo,
}

/// Bytes moved of one device, payload only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub(crate) struct DeviceInfo {
    /// Name of the device, at the source.
    pub(crate) id: String,
    /// Bytes moved while the guest ran.
    pub(crate) precopy: u64,
    /// Bytes moved while it was paused.
    pub(crate) stopcopy: u64,
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
    /// Code of the phase, `"P0"` to `"P9"`.
    pub(crate) phase: String,
    /// Its name.
    pub(crate) name: String,
    /// Time that the phase took, in milliseconds, in all if it was entered more than once.
    pub(crate) ms: u64,
}
