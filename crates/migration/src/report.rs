//! Progress of a session while it runs, and its report at the end. All of it serialises; times are milliseconds in
//! JSON.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use vfio_migration_compat::Report;
use vfio_migration_types::{
    AttemptId, DeviceId, Epoch, Failure, GuestOutcome, PauseCause, Phase, VmId, rfc3339,
};

use crate::session::awaited::AwaitedAnswer;
use crate::tls::security::ConnectionSecurity;

/// Progress of a migration, at either side. Counts are of this side.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Progress {
    /// The phase under way.
    pub phase: Phase,
    /// Iteration of the pre-copy, from 1; 0 before.
    pub iteration: u32,
    /// Since the session began.
    #[serde(rename = "elapsed_ms", with = "crate::millis")]
    pub elapsed: Duration,
    /// Whether the guest is paused because of this session.
    pub paused: bool,
    /// The session waits for [`Control::continue_switchover`](crate::Control::continue_switchover) before it pauses the guest.
    pub waiting: bool,
    /// RAM in all, bytes.
    pub ram_total: u64,
    /// Bytes moved so far.
    pub bytes: Bytes,
    /// RAM bytes to be sent: of the pass under way, or found dirty after it. What the guest dirties during a pass is known
    /// at its end. 0 at the destination, which is not told.
    pub ram_left: u64,
    /// RAM and device bytes left, as far as is known. 0 at the destination.
    pub remaining: u64,
    /// Bytes per second on the wire, headers included, over the last second or so; at the destination, payload.
    pub rate: u64,
    /// The downtime, were the guest paused now; `None` until there is something to predict it from.
    #[serde(rename = "predicted_downtime_ms", with = "crate::millis::option")]
    pub predicted_downtime: Option<Duration>,
    /// The limit in force.
    #[serde(rename = "downtime_limit_ms", with = "crate::millis")]
    pub downtime_limit: Duration,
    /// Per device, in manifest order.
    pub devices: Vec<DeviceStatus>,
    /// Time in each phase so far, in order, together `elapsed`; whatever comes of the attempt, at its end they are those that it went through.
    #[serde(default)]
    pub phases: Vec<PhaseTime>,
    /// The attempt, once it is known: at the destination, when its source has said so.
    #[serde(default)]
    pub attempt: Option<AttemptInfo>,
    /// It was cancelled, and is being undone.
    #[serde(default)]
    pub cancelling: bool,
    /// It was given up, for this, and is being undone; cancelled or not.
    #[serde(default)]
    pub failing: Option<Failure>,
    /// At the destination: the epoch under which the guest is this side's, once its journal says so.
    #[serde(default)]
    pub owned: Option<Epoch>,
    /// Answers that have been waited for longer than a device takes as a rule, the longest first.
    #[serde(default)]
    pub awaited: Vec<AwaitedAnswer>,
}

/// What a session is about, and with whom.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct AttemptInfo {
    /// The VM.
    pub vm: VmId,
    /// The attempt.
    pub attempt: AttemptId,
    /// The epoch under which the source owns the VM.
    pub epoch: Epoch,
    /// What is attempted.
    pub kind: AttemptKind,
    /// The other end: an address, or `file:` and the path of a snapshot.
    pub peer: String,
    /// When it began, by the host's wall clock: RFC 3339 in UTC.
    pub began: String,
    /// How its connection is secured, and what the peer has proved to be; `None` before there is one, and of a file.
    #[serde(default)]
    pub security: Option<ConnectionSecurity>,
}

impl AttemptInfo {
    /// An attempt that begins now.
    pub fn beginning(vm: VmId, attempt: AttemptId, epoch: Epoch, kind: AttemptKind, peer: String) -> Self {
        Self { vm, attempt, epoch, kind, peer, began: rfc3339(SystemTime::now()), security: None }
    }
}

/// What an attempt is to come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum AttemptKind {
    /// The guest moves to another host.
    Migration,
    /// Nothing is to stay.
    Rehearsal,
    /// Nothing is tried either: both sides are asked for their verdict.
    Check,
    /// The guest goes into a file.
    Save,
    /// The guest comes out of a file.
    Restore,
}

impl Default for Progress {
    fn default() -> Self {
        Self {
            phase: Phase::Plan,
            iteration: 0,
            elapsed: Duration::ZERO,
            paused: false,
            waiting: false,
            ram_total: 0,
            bytes: Bytes::default(),
            ram_left: 0,
            remaining: 0,
            rate: 0,
            predicted_downtime: None,
            downtime_limit: Duration::ZERO,
            devices: Vec::new(),
            phases: Vec::new(),
            attempt: None,
            cancelling: false,
            failing: None,
            owned: None,
            awaited: Vec::new(),
        }
    }
}

/// Payload moved over the wire, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bytes {
    /// RAM; zero pages do not count.
    pub ram: u64,
    /// Device state while the guest ran.
    pub device_precopy: u64,
    /// Device state while the guest was paused.
    pub device_stopcopy: u64,
}

/// Progress of one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// Name of the device, at the source.
    pub id: DeviceId,
    /// Bytes moved while the guest ran.
    pub precopy: u64,
    /// Bytes moved while the guest was paused.
    pub stopcopy: u64,
    /// Initial bytes left, where the device can say.
    pub initial_left: Option<u64>,
    /// Changed bytes left, where the device can say.
    pub dirty_left: Option<u64>,
    /// Estimated STOP_COPY bytes, where the device can say.
    pub stop_copy_estimate: Option<u64>,
}

/// Time of a phase.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PhaseTime {
    /// The phase that took it.
    pub phase: Phase,
    /// In all, if it was entered more than once.
    #[serde(rename = "ms", with = "crate::millis")]
    pub took: Duration,
}

/// A migration after which the guest is the destination's, as its source reports it. That is the end of the source's part, and
/// not yet a success: [`guest`](Self::guest) says what became of it.
///
/// It is exhaustive, as all reports at an end are: whoever tells it further destructures it, and does not compile while it
/// leaves something untold.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Completed {
    /// The VM that moved.
    pub vm: VmId,
    /// The attempt by which it moved.
    pub attempt: AttemptId,
    /// The epoch under which the destination owns the guest.
    pub epoch: Epoch,
    /// `"tcp"`, `"unix"` or `"fd"`.
    pub transport: String,
    /// From the call to the end of the session, clean-up included: what the `phases` took together.
    #[serde(rename = "total_ms", with = "crate::millis")]
    pub total: Duration,
    /// What became of the guest there.
    pub guest: GuestOutcome,
    /// Why it is paused there, if it is.
    #[serde(default)]
    pub paused: Option<PauseCause>,
    /// vCPUs paused here to vCPUs running there, less `verify`; `None` while they do not run.
    #[serde(rename = "downtime_ms", with = "crate::millis::option")]
    pub downtime: Option<Duration>,
    /// Whether `downtime` was read from one clock (both sides on one host); else the answer's way back is in it.
    pub one_clock: bool,
    /// The downtime that had been predicted when the guest was paused.
    #[serde(rename = "predicted_downtime_ms", with = "crate::millis")]
    pub predicted: Duration,
    /// Time spent on RAM digests while the guest was paused, both sides.
    #[serde(rename = "verify_ms", with = "crate::millis")]
    pub verify: Duration,
    /// Iterations of the pre-copy.
    pub iterations: u32,
    /// Payload moved, by kind.
    pub bytes: Bytes,
    /// Everything put on the wire, headers included.
    pub wire_bytes: u64,
    /// Each phase that was entered.
    pub phases: Vec<PhaseTime>,
    /// Whether both sides' digests of RAM agree; `None` when not asked for.
    pub ram_digest_match: Option<bool>,
    /// Whether what was written to each device is what was read from it, by digest.
    pub device_digest_match: bool,
    /// Interrupt vectors armed at the destination.
    pub vectors: u32,
    /// Totals per device, in manifest order.
    pub devices: Vec<DeviceStatus>,
    /// Failures after the guest was the destination's (the journal's last entry, releasing devices): no harm to the
    /// guest, but work for a person.
    pub left_undone: Vec<Failure>,
    /// The verdict of both sides' rules, before anything moved.
    pub report: Report,
}

/// A guest that arrived, as its destination reports it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ArrivalReport {
    /// The VM that arrived.
    pub vm: VmId,
    /// The attempt by which it arrived.
    pub attempt: AttemptId,
    /// The epoch under which it is ours.
    pub epoch: Epoch,
    /// Whether its vCPUs run, or it is paused as it was to be. A guest that could not be started is
    /// [`IncomingError::OwnedNotStarted`](crate::IncomingError::OwnedNotStarted).
    pub guest: GuestOutcome,
    /// Why it is paused, if it is.
    #[serde(default)]
    pub paused: Option<PauseCause>,
    /// From the connection to the end of the session.
    #[serde(rename = "total_ms", with = "crate::millis")]
    pub total: Duration,
    /// RAM pages placed, data and zero.
    pub ram_pages: u64,
    /// Number of machine-state sections loaded.
    pub sections: u32,
    /// Payload received, by kind.
    pub bytes: Bytes,
    /// Number of interrupt vectors armed.
    pub vectors: u32,
    /// Time the RAM digest took.
    #[serde(rename = "verify_ms", with = "crate::millis")]
    pub verify: Duration,
    /// Steps of loading in order, each with its time.
    pub steps: Vec<StepTime>,
    /// Totals per device, in manifest order.
    pub devices: Vec<DeviceStatus>,
}

/// Time of a step of loading or starting.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepTime {
    /// Name of the step.
    pub step: String,
    /// Time that the step took.
    #[serde(rename = "ms", with = "crate::millis")]
    pub took: Duration,
}
