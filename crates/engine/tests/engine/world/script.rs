//! What a simulated migration is like: machine, devices, link, operator, faults.

use std::time::Duration;

use vfio_migration_engine::{DestinationEvent, DeviceFacts, Rehearse, SourceEvent, Time};
use vfio_migration_types::{DeviceId, MigrationFlags};
use vfio_migration_wire::{FEATURES, Ready, Reason, VERSIONS, VersionRange};

pub const MS: Duration = Duration::from_millis(1);
pub const SECOND: Duration = Duration::from_secs(1);

/// A simulated device.
#[derive(Clone, Debug)]
pub struct Device {
    pub name: String,
    pub flags: MigrationFlags,
    pub precopy_info: bool,
    pub initial: u64,
    /// Bytes per second, and at most how many are dirty at a time.
    pub dirty_rate: u64,
    pub dirty_most: u64,
    pub stop_copy: u64,
    /// Iterations at whose end it declares new initial bytes.
    pub reinit_at: Vec<u32>,
    /// How many times it declares new initial bytes when it reaches its P2P position.
    pub reinit_at_p2p: u32,
    /// How long the destination takes to load its initial bytes.
    pub load: Duration,
}

impl Device {
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            flags: MigrationFlags { p2p: true, pre_copy: true },
            precopy_info: true,
            initial: 64 << 20,
            dirty_rate: 1 << 20,
            dirty_most: 64 << 20,
            stop_copy: 1 << 20,
            reinit_at: Vec::new(),
            reinit_at_p2p: 0,
            load: 20 * MS,
        }
    }

    pub fn facts(&self) -> DeviceFacts {
        DeviceFacts {
            id: DeviceId::new(self.name.clone()).unwrap(),
            flags: self.flags,
            precopy_info: self.precopy_info,
        }
    }
}

/// What the simulated world is like.
#[derive(Clone, Debug)]
pub struct Script {
    pub devices: Vec<Device>,
    pub ram: u64,
    pub ram_dirty_rate: u64,
    pub ram_working_set: u64,
    /// Bytes per second.
    pub bandwidth: u64,
    pub latency: Duration,
    pub guest_runs: bool,

    pub limit: Duration,
    pub reserve: Duration,
    pub give_up_after: Option<Duration>,
    pub pause_before_switchover: bool,
    /// The guest is to arrive paused: because the source asks for it, because the destination does.
    pub suspend: bool,
    pub suspend_there: bool,
    pub verify: bool,
    pub peer_timeout: Duration,
    pub source_versions: VersionRange,
    pub destination_versions: VersionRange,
    pub destination_features: u64,
    pub refuse: Option<Vec<Reason>>,
    /// The source's own rules refuse.
    pub refuse_here: Option<Vec<Reason>>,
    pub rehearse: Option<Rehearse>,
    pub lease_time: Duration,
    /// The source presents another lease than it was granted.
    pub stale_lease: bool,
    /// What the source's manifest says has changed since it was offered.
    pub changed: bool,
    /// How long judging takes.
    pub judging: Duration,

    /// How long anything local takes.
    pub action: Duration,
    pub journal: Duration,
    /// Each arc of all devices.
    pub arc: Duration,
    pub digest: Duration,
    /// A journal write that a crash interrupts is on disk all the same.
    pub torn_writes: bool,
    /// Answers of interrupted actions come all the same.
    pub late_answers: bool,
    /// A destination that has finished still hears questions.
    pub listens_after_end: bool,

    pub source_events: Vec<(Time, SourceEvent)>,
    pub destination_events: Vec<(Time, DestinationEvent)>,
    pub corrupt: Option<Corrupt>,
    /// The destination is the one that says it, against its own knowledge.
    pub corrupt_by_liar: bool,

    pub fault: Option<Fault>,
    /// This action (counting from 0) fails.
    pub source_fails_at: Option<usize>,
    pub destination_fails_at: Option<usize>,
    pub start_fails: bool,
    /// The operator cancels when this action (counting from 0) begins.
    pub cancel_at_action: Option<usize>,
    pub destination_cancel_at_action: Option<usize>,
    pub sabotage: Option<Sabotage>,
}

/// READY differs from what was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Corrupt {
    Pages,
    Sections,
    DeviceMissing,
    DeviceBytes,
    DeviceDigest,
    RamDigest,
    NoRamDigest,
}

impl Corrupt {
    pub fn apply(self, ready: &mut Ready) {
        match self {
            Self::Pages => ready.ram_pages += 1,
            Self::Sections => ready.sections -= 1,
            Self::DeviceMissing => drop(ready.devices.pop()),
            Self::DeviceBytes => ready.devices[0].bytes += 1,
            Self::DeviceDigest => ready.devices[0].digest[5] ^= 1,
            Self::RamDigest => ready.ram_digest = Some([9; 32]),
            Self::NoRamDigest => ready.ram_digest = None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    ToDestination,
    ToSource,
}

/// Something happens to the message of this index (counting from 0) in this direction.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    pub direction: Direction,
    pub index: usize,
    pub what: What,
}

#[derive(Clone, Copy, Debug)]
pub enum What {
    /// It alone is lost; neither side learns of it.
    Drop,
    /// It and all behind it come so much later.
    Delay(Duration),
    /// It comes twice.
    Duplicate,
    /// It and all later ones in both directions are lost; each side learns that the connection is lost after a time of its own.
    Cut { source_learns: Duration, destination_learns: Duration, heals_after: Option<Duration> },
    /// A process dies: before it sends or has handled the message, or right after it.
    Kill { source: bool, before: bool, peer_learns: Duration },
}

/// Broken rules, on purpose: each must be noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// The source takes a lost link for DECLINED.
    SourceResumesOnSilence,
    /// The destination takes a lost link at READY for COMMIT.
    DestinationRunsOnSilence,
    /// A question is answered DECLINED, whatever the journal says.
    DeclinesUnread,
    /// The journal answers, but writes nothing.
    JournalLies,
    /// The source's cause is lost: RollBack leaves the guest paused.
    RollbackForgetsTheGuest,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            devices: vec![Device::new("net0")],
            ram: 512 << 20,
            ram_dirty_rate: 50 << 20,
            ram_working_set: 64 << 20,
            bandwidth: 1 << 30,
            latency: MS,
            guest_runs: true,
            limit: 300 * MS,
            reserve: 50 * MS,
            give_up_after: Some(120 * SECOND),
            pause_before_switchover: false,
            suspend: false,
            suspend_there: false,
            verify: false,
            peer_timeout: 5 * SECOND,
            source_versions: VERSIONS,
            destination_versions: VERSIONS,
            destination_features: FEATURES,
            refuse: None,
            refuse_here: None,
            rehearse: None,
            lease_time: 60 * SECOND,
            stale_lease: false,
            changed: false,
            judging: MS,
            action: 2 * MS,
            journal: 3 * MS,
            arc: 4 * MS,
            digest: 800 * MS,
            torn_writes: false,
            late_answers: false,
            listens_after_end: true,
            source_events: Vec::new(),
            destination_events: Vec::new(),
            corrupt: None,
            corrupt_by_liar: false,
            fault: None,
            source_fails_at: None,
            destination_fails_at: None,
            start_fails: false,
            cancel_at_action: None,
            destination_cancel_at_action: None,
            sabotage: None,
        }
    }
}
