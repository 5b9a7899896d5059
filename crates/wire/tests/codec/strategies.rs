//! Every value that version 1 can carry, for property tests.

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use vfio_migration_types::{
    AttemptId, Epoch, Failure, GuestOutcome, MigrationState, Phase, Side, VmId, is_control,
};
use vfio_migration_wire::{
    Accept, Applied, Bulk, Commit, DeviceEnd, DeviceTotal, Final, FinalEnd, Hello, HelloReply, Lease,
    Message, Offer, RamDigests, Ready, Reason, Running, VersionRange, limits,
};

pub(crate) fn message() -> impl Strategy<Value = Message> {
    let bytes16 = any::<[u8; 16]>;
    let ids = (bytes16(), bytes16(), any::<u64>());
    let hello = (ids, 1..=u16::MAX, 0..=u16::MAX, any::<u64>()).prop_map(|(ids, min, more, features)| {
        let versions = VersionRange { min, max: min.saturating_add(more) };
        let (vm, attempt, epoch) = ids;
        Message::Hello(Hello {
            versions,
            features,
            vm: VmId(vm),
            attempt: AttemptId(attempt),
            epoch: Epoch(epoch),
        })
    });
    let reply = (1..=u16::MAX, any::<u64>())
        .prop_map(|(version, features)| Message::HelloReply(HelloReply { version, features }));
    let name = || text(limits::DEVICE_NAME);
    let configuration =
        prop_oneof![Just((Vec::new(), [0; 32])), (vec(any::<u8>(), 1..5000), any::<[u8; 32]>()),];
    let names = vec((name(), name()), 0..=usize::from(limits::DEVICES));
    let offer = (names, configuration, vec(any::<u8>(), 2..5000));
    let accept = (bytes16(), any::<u32>(), vec(reason(), 0..9), vec(any::<u8>(), 2..5000));
    let accept = accept.prop_map(|(id, valid_ms, reasons, manifest)| {
        Message::Accept(Accept { lease: Lease { id, valid_ms }, reasons, manifest })
    });
    let applied = any::<(u32, u64, u64)>().prop_map(|(iteration, device_bytes, device_ns)| {
        Message::Applied(Applied { iteration, device_bytes, device_ns })
    });
    let query = (ids, any::<[u8; 32]>()).prop_map(|((vm, attempt, epoch), proof)| Message::Query {
        vm: VmId(vm),
        attempt: AttemptId(attempt),
        epoch: Epoch(epoch),
        proof,
    });
    prop_oneof![
        hello,
        reply,
        vec(reason(), 0..=limits::REASONS).prop_map(Message::Refuse),
        peer_error().prop_map(Message::Abort),
        peer_error().prop_map(Message::Declined),
        query,
        offer.prop_map(|(names, (configuration, configuration_digest), manifest)| {
            Message::Offer(Offer { names, configuration, configuration_digest, manifest })
        }),
        accept,
        bytes16().prop_map(|lease| Message::Begin { lease }),
        select([Message::Begun, Message::LocksFree]),
        option::of(peer_error()).prop_map(|obstacle| Message::EndRehearsal { obstacle }),
        peer_error().prop_map(Message::LimitsUnmet),
        option::of(peer_error()).prop_map(|left_undone| Message::Rehearsed { left_undone }),
        (device(), any::<u32>()).prop_map(|(device, generation)| Message::InitialSent { device, generation }),
        (device(), any::<u32>())
            .prop_map(|(device, generation)| Message::InitialLoaded { device, generation }),
        any::<u32>().prop_map(|iteration| Message::EndIteration { iteration }),
        applied,
        (device(), any::<u64>()).prop_map(|(device, bytes)| Message::Credit { device, bytes }),
        any::<(bool, bool, [u8; 32])>().prop_map(|(guest_ran, suspend, identity)| Message::Final(Final {
            guest_ran,
            suspend,
            identity
        })),
        final_end(),
        stretch().prop_map(|(first, count)| Message::DigestRam { first, count }),
        (stretch(), vec(any::<[u8; 32]>(), 0..=usize::from(limits::RAM_DIGESTS)), text(limits::DIRTY_LOGS))
            .prop_map(|((first, count), digests, logs)| {
                Message::RamDigests(RamDigests { first, count, digests, logs })
            }),
        ready(),
        (any::<u64>(), bytes16()).prop_map(|(epoch, attempt)| {
            Message::Commit(Commit { epoch: Epoch(epoch), attempt: AttemptId(attempt) })
        }),
        (any::<(u64, u64)>(), bytes16(), guest_outcome()).prop_map(|((epoch, at_ns), boot_id, guest)| {
            Message::Running(Running { epoch: Epoch(epoch), guest, boot_id, at_ns })
        }),
        any::<u64>().prop_map(|token| Message::Ping { token }),
        any::<u64>().prop_map(|token| Message::Pong { token }),
    ]
}

/// Bulk that owns its bytes.
#[derive(Clone, Debug)]
pub(crate) enum OwnedBulk {
    Pages(u64, u32, Option<u32>),
    ZeroPages(u64, u64),
    DeviceData(u16, u64, u64, Vec<u8>),
    DeviceEnd(DeviceEnd),
    Section(String, u32, Vec<u8>),
}

impl OwnedBulk {
    pub(crate) fn borrow(&self) -> Bulk<'_> {
        match self {
            Self::Pages(first, count, crc) => Bulk::Pages { first: *first, count: *count, crc: *crc },
            Self::ZeroPages(first, count) => Bulk::ZeroPages { first: *first, count: *count },
            Self::DeviceData(device, sequence, offset, bytes) => {
                Bulk::DeviceData { device: *device, sequence: *sequence, offset: *offset, bytes }
            }
            Self::DeviceEnd(end) => Bulk::DeviceEnd(*end),
            Self::Section(name, version, bytes) => Bulk::Section { name, version: *version, bytes },
        }
    }
}

pub(crate) fn bulk() -> impl Strategy<Value = OwnedBulk> {
    let zero = stretch().prop_map(|(first, count)| OwnedBulk::ZeroPages(first, count));
    prop_oneof![
        (0..=limits::PAGE_NUMBERS - 256, 1..=limits::PAGES, any::<Option<u32>>())
            .prop_map(|(first, count, crc)| OwnedBulk::Pages(first, count, crc)),
        zero,
        (device(), any::<u64>(), 0..u64::MAX - 5000, vec(any::<u8>(), 1..5000)).prop_map(
            |(device, sequence, offset, bytes)| OwnedBulk::DeviceData(device, sequence, offset, bytes)
        ),
        (device(), total()).prop_map(|(device, total)| OwnedBulk::DeviceEnd(DeviceEnd { device, total })),
        (vec(0x21u8..=0x7e, 1..=limits::SECTION_NAME), any::<u32>(), vec(any::<u8>(), 0..5000)).prop_map(
            |(name, version, bytes)| OwnedBulk::Section(String::from_utf8(name).unwrap(), version, bytes)
        ),
    ]
}

fn reason() -> impl Strategy<Value = Reason> {
    let texts = (text(limits::REASON_CODE), text(limits::REASON_TEXT), text(limits::DEVICE_NAME));
    let values = (text(limits::REASON_FIELD), text(limits::REASON_VALUE), text(limits::REASON_VALUE));
    let words = (text(limits::REASON_WORD), text(limits::REASON_WORD));
    (texts, values, words).prop_map(
        |((code, text, device), (field, source, destination), (severity, fix))| Reason {
            code,
            text,
            device,
            field,
            source,
            destination,
            severity,
            fix,
        },
    )
}

fn guest_outcome() -> impl Strategy<Value = GuestOutcome> {
    prop_oneof![
        select([GuestOutcome::Running, GuestOutcome::Paused, GuestOutcome::Unknown]),
        peer_error().prop_map(|failure| GuestOutcome::NotStarted(Box::new(failure))),
    ]
}

pub(crate) fn peer_error() -> impl Strategy<Value = Failure> {
    let state = || select(MigrationState::ALL);
    (
        Just(Side::Source),
        select(Phase::ALL),
        option::of(text(limits::ERROR_DEVICE)),
        option::of((state(), state())),
        any::<Option<u32>>(),
        text(limits::ERROR_TEXT),
        text(limits::ERROR_REMEDY),
    )
        .prop_map(|(side, phase, device, arc, errno, text, remedy)| Failure {
            side,
            phase,
            device,
            arc,
            errno,
            text,
            remedy,
        })
}

/// Text of at most `max` bytes without control characters, often as long as it can be.
fn text(max: usize) -> impl Strategy<Value = String> {
    let legal = any::<char>().prop_map(|char| if is_control(char) { '·' } else { char });
    (vec(legal, 0..40), any::<bool>()).prop_map(move |(chars, fill)| {
        let mut text = String::new();
        for char in chars {
            if text.len() + char.len_utf8() <= max {
                text.push(char);
            }
        }
        let left = max - text.len();
        if fill { text + &"x".repeat(left) } else { text }
    })
}

/// First page and number of pages.
fn stretch() -> impl Strategy<Value = (u64, u64)> {
    (0..limits::PAGE_NUMBERS, any::<u64>())
        .prop_map(|(first, count)| (first, 1 + count % (limits::PAGE_NUMBERS - first)))
}

fn device() -> impl Strategy<Value = u16> {
    0..limits::DEVICES
}

fn total() -> impl Strategy<Value = DeviceTotal> {
    any::<(u64, [u8; 32])>().prop_map(|(bytes, digest)| DeviceTotal { bytes, digest })
}

fn devices() -> impl Strategy<Value = Vec<DeviceTotal>> {
    vec(total(), 0..=usize::from(limits::DEVICES))
}

fn final_end() -> impl Strategy<Value = Message> {
    (any::<(u64, Option<[u8; 32]>, u32)>(), devices()).prop_map(
        |((ram_pages, ram_digest, sections), devices)| {
            Message::FinalEnd(FinalEnd { ram_pages, ram_digest, sections, devices })
        },
    )
}

fn ready() -> impl Strategy<Value = Message> {
    (any::<(u64, Option<[u8; 32]>, u64, u32, u32)>(), devices()).prop_map(|(numbers, devices)| {
        let (ram_pages, ram_digest, verify_ns, sections, vectors) = numbers;
        Message::Ready(Ready { ram_pages, ram_digest, verify_ns, sections, devices, vectors })
    })
}

fn select<T: Clone + std::fmt::Debug + 'static, const N: usize>(of: [T; N]) -> impl Strategy<Value = T> {
    proptest::sample::select(of.to_vec())
}
