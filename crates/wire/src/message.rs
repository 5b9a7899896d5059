//! Messages between the two sides.
//!
//! [`Message`] is what the engine sees: small, rare, decided upon. [`Bulk`] is what the workers move: RAM, device
//! state, machine state. Both travel in one ordered stream, so a message also says that all bulk before it has
//! been received.

use vfio_migration_types::{AttemptId, Epoch, Failure, GuestOutcome, VmId};

/// Protocol versions a side can speak, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VersionRange {
    /// Oldest version.
    pub min: u16,
    /// Newest version.
    pub max: u16,
}

/// A control message. `S` goes source to destination, `D` the other way, `B` both ways.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Message {
    /// S, first: who I am and what I speak.
    Hello(Hello),
    /// D: the version and features selected.
    HelloReply(HelloReply),
    /// S: what is to come, and what its devices are called at the destination.
    Offer(Offer),
    /// D: everything that could be lacking is reserved, and leased to this session.
    Accept(Accept),
    /// B, before BEGIN: not here, or not there, for these reasons. Ends the session.
    Refuse(Vec<Reason>),
    /// S: open the resuming sessions.
    Begin {
        /// Of the [`Lease`] that was granted.
        lease: [u8; 16],
    },
    /// D: they are open.
    Begun,
    /// S: behind this message, all initial bytes of this device's `generation` have been sent.
    InitialSent {
        /// Index of the device in the manifest.
        device: u16,
        /// Counts up with each REINIT, from 0.
        generation: u32,
    },
    /// D: they have been written to the device, which took them.
    InitialLoaded {
        /// Index of the device in the manifest.
        device: u16,
        /// The generation announced in [`Message::InitialSent`].
        generation: u32,
    },
    /// S: iteration `iteration` ends here.
    EndIteration {
        /// The iteration's number, from 1.
        iteration: u32,
    },
    /// D: all of an iteration has been applied.
    Applied(Applied),
    /// D to S: `bytes` more of this device's state may be sent.
    Credit {
        /// Index of the device in the manifest.
        device: u16,
        /// Bytes granted on top of what was granted before.
        bytes: u64,
    },
    /// S: the guest is paused; what follows is the last of everything.
    Final(Final),
    /// S: storage locks have been released; take them.
    LocksFree,
    /// S: nothing more follows; load, verify, and say READY.
    FinalEnd(FinalEnd),
    /// D, in place of READY, where the digest of its RAM is not that of [`FinalEnd`]: digest these pages in chunks.
    DigestRam {
        /// First page (RAM offset / 4096).
        first: u64,
        /// Number of pages, at least 1.
        count: u64,
    },
    /// S: the digests that [`Message::DigestRam`] asks for.
    RamDigests(RamDigests),
    /// D: everything is loaded and verified; nothing but COMMIT is missing.
    Ready(Ready),
    /// S: the guest is yours. Journalled as COMMITTING before it is said.
    Commit(Commit),
    /// D: I will never run this attempt. Journalled as ABORTED before it is said.
    Declined(Failure),
    /// D: the guest is mine and runs (or stays paused, if it was sent paused).
    Running(Running),
    /// B, before COMMIT: I give up.
    Abort(Failure),
    /// S, before FINAL: I give up, since the limits cannot be met; another attempt under these limits comes to the same.
    LimitsUnmet(Failure),
    /// S, on a connection of its own, after a COMMIT whose answer was lost: what became of it?
    Query {
        /// The VM that is asked about.
        vm: VmId,
        /// The attempt that is asked about.
        attempt: AttemptId,
        /// The epoch the commit would begin.
        epoch: Epoch,
        /// Over TLS: what only the source of the session can say on this very connection. Zero: nothing is proved.
        proof: [u8; 32],
    },
    /// S, in a rehearsal ([`FEATURE_REHEARSE`](crate::FEATURE_REHEARSE)): that was all; release everything.
    EndRehearsal {
        /// The limits that a migration could not meet, if that was found; `None` when it would come to its end.
        obstacle: Option<Failure>,
    },
    /// D: everything is reset and released. Ends the session.
    Rehearsed {
        /// The failure to release something; `None` when all was released.
        left_undone: Option<Failure>,
    },
    /// B: are you there?
    Ping {
        /// Any number; the answer repeats it.
        token: u64,
    },
    /// B: the answer to a ping.
    Pong {
        /// The ping's number.
        token: u64,
    },
}

/// First message of the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Versions that the source can speak.
    pub versions: VersionRange,
    /// Optional features it offers, a bit set; see `docs/protocol.md`.
    pub features: u64,
    /// The VM to be migrated. Nil, if none is named: by who [only asks](crate::FEATURE_ASK).
    pub vm: VmId,
    /// The attempt: the nonce that every channel of the session is bound to.
    pub attempt: AttemptId,
    /// The epoch under which the source owns the VM.
    pub epoch: Epoch,
}

/// The destination's answer to HELLO: version and features of the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HelloReply {
    /// Version of everything that follows.
    pub version: u16,
    /// Features in force: a subset of those offered.
    pub features: u64,
}

/// The source's offer: its manifest, and the devices that have another name at the destination.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Offer {
    /// Devices that have another name at the destination: name at the source, name there. At most
    /// [`limits::DEVICES`](crate::limits::DEVICES).
    pub names: Vec<(String, String)>,
    /// The VMM's own configuration, of which nobody else knows the layout: at most
    /// [`limits::CONFIGURATION`](crate::limits::CONFIGURATION) bytes, none where it has none.
    pub configuration: Vec<u8>,
    /// The BLAKE3 digest of `configuration`; zero where there is none.
    pub configuration_digest: [u8; 32],
    /// UTF-8 JSON of the machine's manifest, at most [`limits::MANIFEST`](crate::limits::MANIFEST) bytes.
    pub manifest: Vec<u8>,
}

/// The destination has room for it, and keeps it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Accept {
    /// On what it may begin.
    pub lease: Lease,
    /// Reasons that forbid nothing, but should be known.
    pub reasons: Vec<Reason>,
    /// UTF-8 JSON of the destination's machine manifest, for the source to judge by its own rules.
    pub manifest: Vec<u8>,
}

/// The reservation of a destination: RAM allocated, devices opened and bound, for whom and how long. The session that
/// presents it in time gets exactly what was compared, so that nothing changes between the check and the use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lease {
    /// The lease's nonce, which BEGIN repeats.
    pub id: [u8; 16],
    /// Milliseconds until everything is released again.
    pub valid_ms: u32,
}

/// One reason of a verdict. Absent texts are empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reason {
    /// A stable code, for example `"ram-layout"`.
    pub code: String,
    /// A sentence for a person.
    pub text: String,
    /// Device concerned, by the source's name.
    pub device: String,
    /// The manifest's field that was compared.
    pub field: String,
    /// The field's value at the source, JSON.
    pub source: String,
    /// The field's value at the destination, JSON.
    pub destination: String,
    /// The verdict, for example `"no"`.
    pub severity: String,
    /// The place of a fix, for example `"host-driver"`.
    pub fix: String,
}

/// Progress of the destination in applying an iteration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Applied {
    /// The iteration's number, from 1.
    pub iteration: u32,
    /// Device bytes written so far, all devices.
    pub device_bytes: u64,
    /// Nanoseconds the destination has spent in writing device state so far, summed over devices.
    pub device_ns: u64,
}

/// The guest's pause: whether it ran before, and the machine's identity now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Final {
    /// Whether it ran when the migration paused it: a guest that its operator had paused arrives paused.
    pub guest_ran: bool,
    /// Whether it is to arrive paused although it ran.
    pub suspend: bool,
    /// Digest of the identity that the source's manifest has now. The destination has judged one of the same digest.
    pub identity: [u8; 32],
}

/// Totals that the destination compares with what it got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FinalEnd {
    /// RAM pages sent in all, data and zero, repeated pages counted each time.
    pub ram_pages: u64,
    /// Digest of all RAM, when both sides agreed to verify.
    pub ram_digest: Option<[u8; 32]>,
    /// Number of machine-state sections sent.
    pub sections: u32,
    /// Per device, in manifest order.
    pub devices: Vec<DeviceTotal>,
}

/// A device's state stream as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceTotal {
    /// Bytes of the device's state.
    pub bytes: u64,
    /// Digest of all bytes in order.
    pub digest: [u8; 32],
}

/// Digests of a stretch of the source's RAM, by which the destination finds the first page that differs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RamDigests {
    /// First page, as asked for.
    pub first: u64,
    /// Number of pages, as asked for.
    pub count: u64,
    /// Of each chunk, ascending, in the form of the digest of all RAM. A chunk is the smallest number of pages of which
    /// [`limits::RAM_DIGESTS`](crate::limits::RAM_DIGESTS) chunks hold all; the last may be shorter. None from a source
    /// that has no RAM to digest (a file).
    pub digests: Vec<[u8; 32]>,
    /// Where a single page was asked for: the dirty logs that it is for to report, for a person. Otherwise empty.
    pub logs: String,
}

/// Counts and digests that the destination verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ready {
    /// Number of RAM pages placed.
    pub ram_pages: u64,
    /// Digest of all RAM, when agreed to verify; computed outside the downtime that is counted.
    pub ram_digest: Option<[u8; 32]>,
    /// Nanoseconds that the digest took.
    pub verify_ns: u64,
    /// Number of machine-state sections loaded.
    pub sections: u32,
    /// Per device, in manifest order: what was written to it.
    pub devices: Vec<DeviceTotal>,
    /// Interrupt vectors armed, all devices.
    pub vectors: u32,
}

/// The message that moves ownership.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commit {
    /// The epoch that begins: the source's plus one.
    pub epoch: Epoch,
    /// Must be the session's.
    pub attempt: AttemptId,
}

/// The destination owns the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Running {
    /// The epoch that began.
    pub epoch: Epoch,
    /// What became of the guest.
    pub guest: GuestOutcome,
    /// The host's boot id, so that a source on the same host knows that the next field is of its own clock.
    pub boot_id: [u8; 16],
    /// CLOCK_MONOTONIC in nanoseconds when the vCPUs began to run.
    pub at_ns: u64,
}

/// The end mark of a device's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceEnd {
    /// Index of the device in the manifest.
    pub device: u16,
    /// Size and digest of the whole state.
    pub total: DeviceTotal,
}

/// Bulk data that the workers move. Payloads are borrowed: RAM goes from and into guest memory without a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Bulk<'a> {
    /// A run of pages, whose bytes follow the frame: `count` pages from page `first` (RAM offset / 4096).
    Pages {
        /// First page of the run (RAM offset / 4096).
        first: u64,
        /// Number of pages, 1 to [`limits::PAGES`](crate::limits::PAGES); `count × 4096` bytes follow, the *body*.
        count: u32,
        /// CRC-32C of the body. `None` only while the guest runs and
        /// [`FEATURE_RAM_CRC`](crate::FEATURE_RAM_CRC) is not in force: RAM that changes under the sender has no checksum.
        crc: Option<u32>,
    },
    /// A run of pages that are all zero.
    ZeroPages {
        /// First page of the run (RAM offset / 4096).
        first: u64,
        /// Number of pages of the run.
        count: u64,
    },
    /// A piece of a device's state.
    DeviceData {
        /// Index of the device in the manifest.
        device: u16,
        /// Counts from 0 per device: a piece lost, doubled or swapped shows.
        sequence: u64,
        /// Bytes of this device before this piece.
        offset: u64,
        /// The piece itself, at most one payload.
        bytes: &'a [u8],
    },
    /// A device's state ends.
    DeviceEnd(DeviceEnd),
    /// A piece of machine state: a named, versioned section.
    Section {
        /// Name, for example `"kvm.vcpu.0"`.
        name: &'a str,
        /// Version of the section's layout.
        version: u32,
        /// The section's content, which only its owner reads.
        bytes: &'a [u8],
    },
}
