//! One value of every frame, with every field set to something recognisable.

use vfio_migration_types::{AttemptId, Epoch, Failure, GuestOutcome, MigrationState, Phase, Side, VmId};
use vfio_migration_wire::{
    Accept, Applied, Bulk, Commit, DeviceEnd, DeviceTotal, FEATURE_ASK, FEATURE_REHEARSE, Final, FinalEnd,
    Hello, HelloReply, Lease, Message, Offer, RamDigests, Ready, Reason, Running, VersionRange,
};

const VM: VmId = VmId(*b"\x00\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff");
const ATTEMPT: AttemptId = AttemptId(*b"attempt-attempt-");
const TOTAL: DeviceTotal = DeviceTotal { bytes: 0x0102_0304_0506, digest: [0xd1; 32] };

fn running(guest: GuestOutcome) -> Message {
    Message::Running(Running {
        epoch: Epoch(42),
        guest,
        boot_id: *b"boot-id-boot-id-",
        at_ns: 0x0102_0304_0506_0708,
    })
}

/// Name of the golden file, and the message in it.
pub(crate) fn messages() -> Vec<(&'static str, Message)> {
    let totals = vec![TOTAL, DeviceTotal { bytes: 0, digest: [0xd2; 32] }];
    let full = Failure {
        side: Side::Source,
        phase: Phase::Ready,
        device: Some("net0".into()),
        arc: Some((MigrationState::Resuming, MigrationState::Stop)),
        errno: Some(22),
        text: "the device refused its state".into(),
        remedy: "update the firmware — both hosts".into(),
    };
    let empty = Failure {
        side: Side::Source,
        phase: Phase::Plan,
        device: None,
        arc: None,
        errno: None,
        text: "gone".into(),
        remedy: String::new(),
    };
    let reasons = vec![
        Reason { code: "ram-layout".into(), text: "4 GiB offered, 2 GiB here".into(), ..Reason::default() },
        Reason {
            code: "device-model".into(),
            text: "net0: other model".into(),
            device: "net0".into(),
            field: "model".into(),
            source: "\"a.org/nic\"".into(),
            destination: "null".into(),
            severity: "no".into(),
            fix: "configuration".into(),
        },
    ];
    let names = vec![("net0".to_owned(), "nic1".to_owned()), ("disk0".to_owned(), "disk0".to_owned())];
    let manifest = || b"{\"manifest\": true}".to_vec();
    vec![
        (
            "hello",
            Message::Hello(Hello {
                versions: VersionRange { min: 1, max: 0x0203 },
                features: 0x8000_0000_0000_0003,
                vm: VM,
                attempt: ATTEMPT,
                epoch: Epoch(41),
            }),
        ),
        (
            "hello_of_a_question",
            Message::Hello(Hello {
                versions: VersionRange { min: 1, max: 1 },
                features: FEATURE_REHEARSE | FEATURE_ASK,
                vm: VmId::NIL,
                attempt: ATTEMPT,
                epoch: Epoch(0),
            }),
        ),
        ("hello_reply", Message::HelloReply(HelloReply { version: 1, features: 3 })),
        ("refuse", Message::Refuse(reasons.clone())),
        ("refuse_without_reason", Message::Refuse(Vec::new())),
        ("abort", Message::Abort(full.clone())),
        ("abort_least", Message::Abort(empty)),
        ("query", Message::Query { vm: VM, attempt: ATTEMPT, epoch: Epoch(42), proof: [0xa5; 32] }),
        ("offer", Message::Offer(Offer { names: names.clone(), manifest: manifest(), ..Offer::default() })),
        ("offer_least", Message::Offer(Offer { manifest: b"{}".to_vec(), ..Offer::default() })),
        (
            "offer_with_configuration",
            Message::Offer(Offer {
                names,
                configuration: b"own words".to_vec(),
                configuration_digest: [0x5a; 32],
                manifest: manifest(),
            }),
        ),
        (
            "accept",
            Message::Accept(Accept {
                lease: Lease { id: *b"lease-lease-leas", valid_ms: 0x0001_0203 },
                reasons,
                manifest: manifest(),
            }),
        ),
        ("begin", Message::Begin { lease: *b"lease-lease-leas" }),
        ("begun", Message::Begun),
        ("initial_sent", Message::InitialSent { device: 3, generation: 0x0a0b_0c0d }),
        ("initial_loaded", Message::InitialLoaded { device: 63, generation: 1 }),
        ("end_iteration", Message::EndIteration { iteration: 0x0102_0304 }),
        (
            "applied",
            Message::Applied(Applied { iteration: 9, device_bytes: 0x1122_3344_5566, device_ns: 77 }),
        ),
        ("credit", Message::Credit { device: 2, bytes: 0x0100_0000 }),
        ("final", Message::Final(Final { guest_ran: true, suspend: false, identity: [0x1d; 32] })),
        ("final_guest_stood", Message::Final(Final { guest_ran: false, suspend: false, identity: [0; 32] })),
        ("final_suspend", Message::Final(Final { guest_ran: true, suspend: true, identity: [0; 32] })),
        ("locks_free", Message::LocksFree),
        (
            "final_end",
            Message::FinalEnd(FinalEnd {
                ram_pages: 0x1234,
                ram_digest: Some([0xaa; 32]),
                sections: 17,
                devices: totals.clone(),
            }),
        ),
        (
            "final_end_least",
            Message::FinalEnd(FinalEnd { ram_pages: 1, ram_digest: None, sections: 2, devices: Vec::new() }),
        ),
        ("digest_ram", Message::DigestRam { first: 0x0010_0000, count: 0x0102_0304 }),
        (
            "ram_digests",
            Message::RamDigests(RamDigests {
                first: 0x0010_0000,
                count: 2,
                digests: vec![[0xbb; 32], [0xcc; 32]],
                logs: String::new(),
            }),
        ),
        (
            "ram_digests_of_page",
            Message::RamDigests(RamDigests {
                first: 5,
                count: 1,
                digests: vec![[0xbb; 32]],
                logs: "device net0, kvm".into(),
            }),
        ),
        (
            "ready",
            Message::Ready(Ready {
                ram_pages: 0x1234,
                ram_digest: Some([0xaa; 32]),
                verify_ns: 0x5678,
                sections: 17,
                devices: totals,
                vectors: 5,
            }),
        ),
        (
            "ready_least",
            Message::Ready(Ready {
                ram_pages: 1,
                ram_digest: None,
                verify_ns: 0,
                sections: 2,
                devices: vec![TOTAL],
                vectors: 0,
            }),
        ),
        ("commit", Message::Commit(Commit { epoch: Epoch(42), attempt: ATTEMPT })),
        ("declined", Message::Declined(full.clone())),
        ("limits_unmet", Message::LimitsUnmet(full.clone())),
        ("end_rehearsal", Message::EndRehearsal { obstacle: None }),
        ("end_rehearsal_obstacle", Message::EndRehearsal { obstacle: Some(full.clone()) }),
        ("rehearsed", Message::Rehearsed { left_undone: None }),
        ("rehearsed_in_part", Message::Rehearsed { left_undone: Some(full.clone()) }),
        ("running", running(GuestOutcome::Running)),
        ("running_paused", running(GuestOutcome::Paused)),
        ("running_not_started", running(GuestOutcome::NotStarted(Box::new(full)))),
        ("running_unknown", running(GuestOutcome::Unknown)),
        ("ping", Message::Ping { token: 0x7000_0000_0000_0001 }),
        ("pong", Message::Pong { token: 0x7000_0000_0000_0001 }),
    ]
}

/// Name of the golden file, and the bulk in it (without the body of a page frame).
pub(crate) fn bulk() -> Vec<(&'static str, Bulk<'static>)> {
    vec![
        ("pages", Bulk::Pages { first: 0x10_0000, count: 256, crc: None }),
        ("pages_with_crc", Bulk::Pages { first: 1, count: 1, crc: Some(0x0102_0304) }),
        ("pages_with_crc_of_zero", Bulk::Pages { first: 0, count: 2, crc: Some(0) }),
        ("zero_pages", Bulk::ZeroPages { first: 0x20_0000, count: 0x1_0000_0000 }),
        (
            "device_data",
            Bulk::DeviceData { device: 1, sequence: 5, offset: 0x0500_0000, bytes: b"device state" },
        ),
        ("device_end", Bulk::DeviceEnd(DeviceEnd { device: 1, total: TOTAL })),
        ("section", Bulk::Section { name: "kvm.vcpu.0", version: 2, bytes: b"registers" }),
        ("section_without_bytes", Bulk::Section { name: "x", version: 0, bytes: b"" }),
    ]
}
