//! The engine's interface, events in and actions out: the contract between deciding (here) and doing (the session).
//!
//! Every [`SourceAction`] or [`DestinationAction`] that does something in the world is answered by the session with
//! the one event named in its documentation, or with `Failed`. Bulk data is never seen here; its counts are.
//!
//! One such action is under way at a time, with one exception: an abort. [`SourceAction::RollBack`] and, at the
//! destination, [`DestinationAction::Journal`] of ABORTED and [`DestinationAction::Release`] are asked for while an
//! action may still be under way. The session interrupts that action first; its answer may be dropped, or come before the
//! answer of what interrupted it, and is then ignored.

use std::time::Duration;

use vfio_migration_types::{
    AttemptId, CancelCause, DeviceId, Epoch, Failure, GuestOutcome, MigrationFlags, PauseCause, Phase, VmId,
};
use vfio_migration_wire::{
    Accept, Applied, FinalEnd, Message, Offer, RamDigests, Ready, Reason, Running, VersionRange,
};

use crate::ownership::{DestinationState, SourceState};

/// A point in time: the session's monotonic clock since its start.
pub type Time = Duration;

/// Configuration of the source's engine, fixed before it starts.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    /// The VM that is migrated; nil, where a mere question names none.
    pub vm: VmId,
    /// Nonce of this attempt.
    pub attempt: AttemptId,
    /// The epoch under which this side owns the VM.
    pub epoch: Epoch,
    /// Protocol versions that this side speaks.
    pub versions: VersionRange,
    /// Features it offers, but for [`FEATURE_REHEARSE`](vfio_migration_wire::FEATURE_REHEARSE) and
    /// [`FEATURE_ASK`](vfio_migration_wire::FEATURE_ASK), which follow from `rehearse`;
    /// those in force are in [`SourceEngine::negotiated`](crate::SourceEngine::negotiated).
    pub features: u64,
    /// The machine's manifest, JSON, and what its devices are called at the destination.
    pub offer: Offer,
    /// The devices, in manifest order.
    pub devices: Vec<DeviceFacts>,
    /// Longest time the guest may be paused. A ceiling, not a target.
    pub downtime_limit: Duration,
    /// Of the limit, what is kept back for everything after the decision to commit.
    pub commit_reserve: Duration,
    /// Give up when P3 has lasted this long, time in which only the operator was waited for left out; `None`: never.
    pub give_up_after: Option<Duration>,
    /// Wait for [`SourceEvent::ContinueSwitchover`] before P4.
    pub pause_before_switchover: bool,
    /// The guest arrives paused, whether it runs here or not.
    pub suspend: bool,
    /// Compare digests of all RAM. The time it takes is kept out of the downtime.
    pub verify: bool,
    /// Longest silence of the destination where it has no work to do before its answer.
    pub peer_timeout: Duration,
    /// Move nothing: go so far, find out, and undo it all.
    pub rehearse: Option<Rehearse>,
}

/// The phase at whose end a rehearsal stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rehearse {
    /// To the end of P1: only the verdict.
    Ask,
    /// To the end of P3: the guest is never paused.
    Precopy,
    /// To READY: the guest is paused for as long as it would be, less the commit and the start.
    Switchover,
}

/// A device, as far as the engine must know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFacts {
    /// The device's name in the manifest.
    pub id: DeviceId,
    /// The device's migration capabilities: STOP_COPY, P2P, PRE_COPY.
    pub flags: MigrationFlags,
    /// Pre-copy progress is known.
    pub precopy_info: bool,
}

/// Amounts that an iteration moved, and that are left.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IterationReport {
    /// Bytes put on the wire, all kinds.
    pub wire_bytes: u64,
    /// Time from the iteration's begin to its end.
    pub took: Duration,
    /// RAM bytes dirty now, not yet sent.
    pub ram_left: u64,
    /// RAM bytes that are sent again while the guest is paused, dirty or not, because nobody knows what a device wrote.
    pub ram_again: u64,
    /// Per device, in manifest order.
    pub devices: Vec<DeviceProgress>,
}

/// A device's progress, as it says of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceProgress {
    /// Initial bytes not yet sent; `None` when the device cannot say.
    pub initial_left: Option<u64>,
    /// Bytes changed since sent; `None` when the device cannot say.
    pub dirty_left: Option<u64>,
    /// Estimated STOP_COPY bytes; `None` when the device cannot say.
    pub stop_copy: Option<u64>,
    /// Counts REINITs. The initial bytes of this generation must be acknowledged before a switchover.
    pub generation: u32,
    /// All initial bytes of this generation have been sent (the session has sent [`Message::InitialSent`]).
    pub initial_sent: bool,
}

/// Positions that all devices take together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Barrier {
    /// PRE_COPY again (or RUNNING, for a device without it).
    Running,
    /// PRE_COPY_P2P or RUNNING_P2P; devices without P2P stay.
    P2p,
    /// STOP_COPY, every device.
    StopCopy,
}

/// An action that the source's session is asked to do.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum SourceAction {
    /// Send this message, after all bulk that was sent before.
    Send(Message),
    /// P1: judge the destination's manifest by the source's own rules. Answer: [`SourceEvent::Judged`] or
    /// [`SourceEvent::Refused`].
    Judge(Accept),
    /// P2: start every dirty log, then open pre-copy on every device that has it. Answer: [`SourceEvent::SetUp`].
    SetUp,
    /// P3: send what is dirty (everything, in iteration 1) and what the devices have, then END_ITERATION.
    /// Answer: [`SourceEvent::IterationSent`].
    SendIteration {
        /// Number of the iteration, from 1.
        iteration: u32,
    },
    /// P4: read the manifest's identity once more, then pause the vCPUs and gate every BAR access. Answer: [`SourceEvent::Paused`].
    Pause,
    /// P4, or its way back: take every device, in parallel, to a position. Answer: [`SourceEvent::Reached`].
    Devices(Barrier),
    /// Way back to P3: let the vCPUs run again (if they ran). Answer: [`SourceEvent::Resumed`].
    Resume,
    /// P5: read every dirty source a last time, send the pages, the machine state, and each device's state to its end;
    /// with `verify`, digest RAM. Answer: [`SourceEvent::FinalSent`].
    SendFinal {
        /// Whether RAM is digested too.
        verify: bool,
    },
    /// P5: release the storage locks. Answer: [`SourceEvent::LocksReleased`].
    ReleaseLocks,
    /// P6: the destination's RAM differs, and it looks for the page. Digest these pages in chunks. Answer:
    /// [`SourceEvent::RamDigested`].
    DigestRam {
        /// First page (RAM offset / 4096), as the destination said: it may lie outside of RAM.
        first: u64,
        /// Number of pages.
        count: u64,
    },
    /// Write the journal and fsync it. Answer: [`SourceEvent::Journaled`].
    Journal(SourceState),
    /// Undo everything that was done: interrupt the action under way, locks taken back, dirty logging off, devices RUNNING
    /// through the P2P barrier, vCPUs running if they ran. Answer: [`SourceEvent::RolledBack`], also when not all could be
    /// undone: it has fields for that.
    RollBack,
    /// P7, COMMIT sent and its answer lost: connect anew, send [`Message::Query`], report the answer as
    /// [`SourceEvent::Peer`], or [`SourceEvent::LinkLost`]. Asked again after each loss, and when no answer comes in time:
    /// it then replaces the one under way. What comes over the old connection still counts.
    AskAgain,
    /// P9: end the saving sessions, stop logging, release the machine. Answer: [`SourceEvent::CleanedUp`].
    CleanUp,
    /// Nothing more will come.
    Finish(SourceOutcome),
}

/// An event that the source's session reports to the engine.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum SourceEvent {
    /// The connection is up. First event.
    Connected,
    /// A message came. Credit, Ping and Pong are the session's own.
    Peer(Message),
    /// Answers [`SourceAction::Judge`].
    Judged,
    /// Answers [`SourceAction::Judge`] too: why not.
    Refused(Vec<Reason>),
    /// Answers [`SourceAction::SetUp`].
    SetUp {
        /// Per device, in manifest order.
        devices: Vec<DeviceProgress>,
    },
    /// Answers [`SourceAction::SendIteration`].
    IterationSent(IterationReport),
    /// Answers [`SourceAction::Pause`].
    Paused {
        /// Whether the guest ran until now.
        guest_ran: bool,
        /// Digest of the manifest's identity, read just before.
        identity: [u8; 32],
    },
    /// Answers [`SourceAction::Devices`].
    Reached {
        /// The position that all devices have taken.
        barrier: Barrier,
        /// Per device, one last look at the pre-copy progress.
        devices: Vec<DeviceProgress>,
    },
    /// Answers [`SourceAction::Resume`].
    Resumed,
    /// Answers [`SourceAction::SendFinal`].
    FinalSent {
        /// Totals; the engine sends them as [`Message::FinalEnd`].
        totals: FinalEnd,
        /// Time the digest took on the way, kept out of the downtime.
        verify: Duration,
    },
    /// Answers [`SourceAction::ReleaseLocks`].
    LocksReleased,
    /// Answers [`SourceAction::DigestRam`]; the engine sends it.
    RamDigested(RamDigests),
    /// Answers [`SourceAction::Journal`].
    Journaled(SourceState),
    /// Answers [`SourceAction::RollBack`].
    RolledBack {
        /// Devices that had to be reset: their guest state is gone.
        reset: Vec<DeviceId>,
        /// Devices whose reset failed too: a paused guest stays paused.
        not_reset: Vec<DeviceId>,
        /// Storage locks that could not be taken back: the guest stays paused.
        locks_lost: Vec<String>,
        /// Whether the guest runs again (or stays paused, as its operator had left it).
        restored: bool,
    },
    /// While [`SourceAction::RollBack`], the journal after it, or [`SourceAction::CleanUp`] is under way: something does not answer, and
    /// is not waited for. The session goes on with it behind the attempt's end.
    RollBackLate {
        /// What does not answer, one failure each.
        left_undone: Vec<Failure>,
        /// Whether the guest runs meanwhile (or stays paused, as its operator had left it). One that the attempt has paused goes
        /// on when all is undone.
        restored: bool,
    },
    /// Answers [`SourceAction::CleanUp`].
    CleanedUp,
    /// The action under way failed.
    Failed(Failure),
    /// The destination sent something that cannot be read. No action has failed: the one under way still answers. The
    /// session reports [`SourceEvent::LinkLost`] next.
    Damaged(Failure),
    /// The connection ended or broke.
    LinkLost(String),
    /// The migration is cancelled, by this.
    Cancel(CancelCause),
    /// The operator changes the limit.
    SetDowntimeLimit(Duration),
    /// The operator lets a migration that waits before its switchover begin it. Ignored before it has waited.
    ContinueSwitchover,
    /// A device lost its session by itself (guest FLR, reset): this attempt cannot go on.
    DeviceLost(Failure),
    /// [`deadline`](crate::SourceEngine::deadline) has passed.
    Tick,
}

/// The end of the source's attempt.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum SourceOutcome {
    /// The guest is the destination's.
    Completed(SourceSummary),
    /// The guest runs here (or is paused here, if its operator had paused it).
    Aborted(Abort),
    /// The destination refused, or this side did: the guest never noticed.
    Refused(Vec<Reason>),
    /// The rehearsal has ended, and all of it is undone.
    Rehearsed(Box<RehearsalResult>),
    /// COMMIT was sent and its outcome is not known: the guest stays paused here, and nothing runs by itself.
    Unresolved(String),
}

/// An attempt that was undone: its cause, and the state the machine is left in.
#[derive(Clone, Debug, PartialEq)]
pub struct Abort {
    /// The failure that ended the attempt, or the cancellation.
    pub cause: Failure,
    /// Cancelled at this side, not failed.
    pub cancelled: bool,
    /// The limits cannot be met, as was found with the guest running: what a rehearsal calls its obstacle.
    pub obstacle: bool,
    /// Devices that had to be reset.
    pub reset: Vec<DeviceId>,
    /// Devices that could neither go back nor be reset: the guest has them no more.
    pub lost: Vec<DeviceId>,
    /// Storage locks that could not be taken back.
    pub locks_lost: Vec<String>,
    /// Whether the guest is as it was before the attempt.
    pub restored: bool,
    /// What did not answer, and is being undone behind this end. A guest that is not restored goes on when it is.
    pub left_undone: Vec<Failure>,
}

/// Times and totals of a completed migration, as far as the engine knows them.
#[derive(Clone, Debug, PartialEq)]
pub struct SourceSummary {
    /// Number of iterations in P3.
    pub iterations: u32,
    /// Time at which the vCPUs were paused here.
    pub paused_at: Time,
    /// Time at which READY arrived.
    pub ready_at: Time,
    /// Time at which RUNNING arrived.
    pub running_at: Time,
    /// RUNNING, which says what became of the guest at the destination.
    pub running: Running,
    /// Why the guest is paused there, if it is.
    pub paused: Option<PauseCause>,
    /// READY, whose counts and digests agree with those of the source.
    pub ready: Ready,
    /// Time spent on digests while the guest was paused.
    pub verify: Duration,
    /// Failures after ownership had moved (journalling RELEASED, cleaning up): no harm to the guest, work for a person.
    pub left_undone: Vec<Failure>,
    /// Downtime predicted when P4 was entered.
    pub predicted: Duration,
    /// The phases in order, each with the time at which it was entered.
    pub phases: Vec<(Phase, Time)>,
}

/// Findings of a rehearsal.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RehearsalResult {
    /// The obstacle that would have kept the migration from its end, if there is one.
    pub obstacle: Option<Failure>,
    /// Number of iterations in P3.
    pub iterations: u32,
    /// Bytes per second on the wire, as measured.
    pub wire: Option<u64>,
    /// Bytes per second of device state loaded at the destination, as measured.
    pub load: Option<u64>,
    /// Bytes of RAM that became dirty per second, as measured in the last iteration.
    pub ram_dirty: Option<u64>,
    /// The same per device, in manifest order; `None` for one that cannot say.
    pub devices_dirty: Vec<Option<u64>>,
    /// Parts of the predicted downtime; empty when nothing was measured.
    pub parts: Vec<Part>,
    /// The destination's failure to release something, or to report that it has.
    pub left_undone: Option<Failure>,
    /// The phases in order, each with the time at which it was entered.
    pub phases: Vec<(Phase, Time)>,
}

/// A part of a downtime that is predicted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The part's purpose.
    pub name: PartName,
    /// The part's duration, as predicted or measured.
    pub took: Duration,
    /// The ground on which the duration is known.
    pub basis: PartBasis,
}

/// A part of the downtime, named by its purpose.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PartName {
    /// Pausing the vCPUs, and the devices' transitions.
    Quiesce,
    /// Round trips to the destination.
    RoundTrips,
    /// Sending the last dirty pages.
    Ram,
    /// A device's last bytes, sent and loaded.
    Device(DeviceId),
    /// Sending everything that is sent while the guest is paused.
    Final,
    /// Loading and verifying at the destination.
    Load,
    /// COMMIT, the devices' start, the vCPUs' start.
    Start,
}

/// The ground on which a figure is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartBasis {
    /// Measured in this session.
    Measured,
    /// Computed from what the device declares, at a measured rate.
    Declared,
    /// Assumed, or left at zero.
    Unknown,
}

/// Configuration of the destination's engine, fixed before it starts.
#[derive(Clone, Debug)]
pub struct DestinationConfig {
    /// Protocol versions that this side speaks.
    pub versions: VersionRange,
    /// Features that this side knows.
    pub features: u64,
    /// Longest silence of the source where something must come from it.
    pub peer_timeout: Duration,
    /// Longest time between HELLO_REPLY and OFFER.
    pub offer_timeout: Duration,
    /// The guest arrives paused, whatever FINAL says.
    pub suspend: bool,
    /// Nonce of the lease that this attempt is granted: random, new for each.
    pub lease: [u8; 16],
    /// Time for which what was reserved is kept for a source that does not begin.
    pub lease_time: Duration,
}

/// An action that the destination's session is asked to do.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum DestinationAction {
    /// Send this message to the source, over the connection of the migration.
    Send(Message),
    /// Send this message over the connection that the latest [`Message::Query`] came over (it has one of its own).
    Answer(Message),
    /// P1: compare this manifest with the machine at hand, allocate, open, reset and bind everything.
    /// Answer: [`DestinationEvent::Reserved`] or [`DestinationEvent::Refused`].
    Reserve(Offer),
    /// P2: open a resuming session on every device. Answer: [`DestinationEvent::ResumingBegun`].
    BeginResuming,
    /// P5: take the storage locks. Answer: [`DestinationEvent::LocksTaken`].
    TakeLocks,
    /// P6: wait until all bulk is loaded; compare with `totals`; load machine state; put PCI and interrupts back; RESUMING → STOP.
    /// Answer: [`DestinationEvent::Loaded`].
    Load {
        /// Totals of all that the source sent, as it counted them.
        totals: FinalEnd,
    },
    /// Write the journal and fsync it. Answer: [`DestinationEvent::Journaled`].
    Journal(DestinationState),
    /// P8: devices RUNNING_P2P, barrier, RUNNING; vCPUs, if `run_guest`. Answer: [`DestinationEvent::Started`].
    Start {
        /// The epoch under which this side owns the guest now.
        epoch: Epoch,
        /// Whether the vCPUs run: `false` if they were paused at the source already, or are to arrive paused.
        run_guest: bool,
    },
    /// Reset and release every device, free what was reserved. Answer: [`DestinationEvent::Released`].
    Release,
    /// Nothing more will come.
    Finish(DestinationOutcome),
}

/// An event that the destination's session reports to the engine.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum DestinationEvent {
    /// A message came, over the connection of the migration, or a [`Message::Query`] over one of its own. Credit, Ping and
    /// Pong are the session's own.
    Peer(Message),
    /// Answers [`DestinationAction::Reserve`].
    Reserved {
        /// This side's manifest, in JSON.
        manifest: Vec<u8>,
        /// Reasons that should be known, and forbid nothing.
        reasons: Vec<Reason>,
        /// Digest of the identity in the manifest that was offered.
        identity: [u8; 32],
    },
    /// Answers [`DestinationAction::Reserve`] too: why not.
    Refused(Vec<Reason>),
    /// Answers [`DestinationAction::BeginResuming`].
    ResumingBegun,
    /// A device took all of its initial bytes (of what [`Message::InitialSent`] announced).
    InitialLoaded {
        /// Index of the device in the manifest.
        device: u16,
        /// The generation that was announced.
        generation: u32,
    },
    /// All of an iteration has been applied (after [`Message::EndIteration`]).
    Applied(Applied),
    /// Answers [`DestinationAction::TakeLocks`].
    LocksTaken,
    /// Answers [`DestinationAction::Load`].
    Loaded(Ready),
    /// Answers [`DestinationAction::Journal`].
    Journaled(DestinationState),
    /// Answers [`DestinationAction::Start`].
    Started(Running),
    /// Answers [`DestinationAction::Release`].
    Released,
    /// The action under way failed.
    Failed(Failure),
    /// The receiving of bulk failed: what the source sent cannot be read, or a device does not take it. No action has
    /// failed: the one under way still answers.
    Damaged(Failure),
    /// A device is gone, as its VMM says: its server died, or its host took it. The action under way still answers, or comes to its limit.
    DeviceLost(Failure),
    /// The connection ended or broke.
    LinkLost(String),
    /// This incoming migration is cancelled, by this.
    Cancel(CancelCause),
    /// The first of the guest has come: bytes of its RAM or of a device's state.
    GuestComes,
    /// A source wants the place of an attempt that [gives way](crate::DestinationEngine::gives_way).
    Superseded,
    /// [`deadline`](crate::DestinationEngine::deadline) has passed.
    Tick,
}

/// The end of the destination's attempt.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum DestinationOutcome {
    /// The guest is ours.
    Owner {
        /// The epoch under which this side owns it.
        epoch: Epoch,
        /// READY, as it was sent.
        ready: Ready,
        /// What became of it: it runs, or is paused as it was to be.
        guest: GuestOutcome,
        /// Why it is paused, if it is.
        paused: Option<PauseCause>,
    },
    /// The guest is ours, but it could not be started: it stays paused, and nobody else may run it.
    OwnedNotStarted {
        /// The epoch under which this side owns it.
        epoch: Epoch,
        /// The failure that kept the guest from being started.
        cause: Failure,
    },
    /// Nothing ran here; every device is reset and released.
    Aborted(Failure),
    /// The same, since it was cancelled at this side.
    Cancelled(Failure),
    /// We refused it, or the source did.
    Refused(Vec<Reason>),
    /// The same, since the source has found that its limits cannot be met.
    LimitsUnmet(Failure),
    /// The rehearsal has ended, and everything is reset and released.
    Rehearsed {
        /// The limits that the source found a migration could not meet.
        obstacle: Option<Failure>,
        /// What could not be released.
        left_undone: Option<Failure>,
    },
}

/// Identity of the attempt a destination is in, once it knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// The VM that is migrated; nil, where a mere question names none.
    pub vm: VmId,
    /// Nonce that the source gave the attempt.
    pub attempt: AttemptId,
    /// The epoch under which the source owns the VM.
    pub epoch: Epoch,
}

/// Progress of a source: what a progress bar needs.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineProgress {
    /// The phase under way.
    pub phase: Phase,
    /// Iteration under way or ended last; 0 before the first.
    pub iteration: u32,
    /// Bytes put on the wire in P3, all kinds.
    pub wire_bytes: u64,
    /// RAM bytes dirty when the last iteration ended.
    pub ram_left: u64,
    /// Device bytes left when the last iteration ended, as far as the devices can say.
    pub device_left: u64,
    /// Measured bandwidth, bytes per second; `None` before the first iteration has ended.
    pub bandwidth: Option<u64>,
    /// Downtime, were the guest paused now; `None` as above.
    pub predicted: Option<Duration>,
    /// The downtime limit in force.
    pub limit: Duration,
    /// The reason why P3 waits, if it does.
    pub waiting: Option<SwitchoverWait>,
}

/// A word that the source waits for, with nothing else to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExpectedWord {
    /// Who the destination is, and whether it takes the guest.
    Offer,
    /// READY.
    Ready,
    /// RUNNING.
    Running,
    /// What became of COMMIT, whose answer was lost.
    Outcome,
}

/// A reason why P3 waits.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SwitchoverWait {
    /// The destination has not acknowledged these devices' initial bytes.
    InitialBytes(Vec<DeviceId>),
    /// The predicted downtime is above the limit.
    Convergence,
    /// [`SourceEvent::ContinueSwitchover`] has not come.
    Operator,
}
