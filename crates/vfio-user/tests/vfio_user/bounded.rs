//! What one call of a client costs is bounded, whatever the server answers: requests, and what each item of a reply stands for.

use std::io::Write;
use std::os::unix::net::UnixStream;

use crate::by_hand::{message, read_message};
use crate::rig::{quick, untouched};
use vfio_user_peer::codec::{
    Command, Header, Kind, MAX_IO_FDS, MAX_MMAP_AREAS, VersionCapabilities, VersionPayload,
};
use vfio_user_peer::{
    Client, ClientError, ClientOptions, Extension, Feature, FeatureOp, IovaRange, IrqAction, IrqData,
    MigrationState, Prot, RegionWrite,
};

type Lie = fn(Header, Vec<u8>) -> Vec<u8>;

/// A client of a server that has everything and answers each request by `lie`.
fn client(lie: Lie) -> Client {
    let (near, mut far) = UnixStream::pair().unwrap();
    std::thread::spawn(move || {
        let (header, _) = read_message(&mut far).unwrap();
        let capabilities = VersionCapabilities {
            max_msg_fds: 8,
            write_multiple: true,
            extension: Extension::ALL,
            ..VersionCapabilities::default()
        };
        let mut body = Vec::new();
        VersionPayload { major: 0, minor: 1, capabilities }.encode(&mut body);
        far.write_all(&message(header, Kind::Reply, &body)).unwrap();
        while let Some((header, body)) = read_message(&mut far) {
            if far.write_all(&lie(header, body)).is_err() {
                return;
            }
        }
    });
    Client::from_stream(near, ClientOptions { on_connect: untouched().on_connect, ..quick() }).unwrap()
}

/// The request again, with its first number, `argsz` as a rule, raised by one.
fn wants_more(header: Header, mut body: Vec<u8>) -> Vec<u8> {
    if let Some((first, _)) = body.split_first_chunk_mut::<4>() {
        *first = u32::from_ne_bytes(*first).wrapping_add(1).to_ne_bytes();
    }
    message(header, Kind::Reply, &body)
}

/// A device that is in RESUMING whatever it is told, and does whatever it is told.
fn resuming(header: Header, mut body: Vec<u8>) -> Vec<u8> {
    if header.command == Command::DEVICE_FEATURE && body.len() == 8 {
        body[..4].copy_from_slice(&16u32.to_ne_bytes());
        body.extend(4u32.to_ne_bytes());
        body.extend(u32::MAX.to_ne_bytes());
    }
    message(header, Kind::Reply, &body)
}

fn errno(header: Header, _body: Vec<u8>) -> Vec<u8> {
    message(header, Kind::Error(16), &[])
}

fn again(header: Header, body: Vec<u8>) -> Vec<u8> {
    message(header, Kind::Reply, &body)
}

fn nothing(header: Header, _body: Vec<u8>) -> Vec<u8> {
    message(header, Kind::Reply, &[])
}

type Call = Box<dyn Fn(&Client)>;

/// Every call that asks the server something, and the most requests that it may cost.
fn calls() -> Vec<(&'static str, u64, Call)> {
    fn call<T>(
        name: &'static str,
        most: u64,
        call: impl Fn(&Client) -> Result<T, ClientError> + 'static,
    ) -> (&'static str, u64, Call) {
        (name, most, Box::new(move |client| drop(call(client))))
    }
    let page = IovaRange { iova: 0, len: 4096 };
    let write = RegionWrite { offset: 0, region: 0, count: 8, data: [0; 8] };
    vec![
        call("device_info", 1, Client::device_info),
        call("region_info", 2, |client| client.region_info(0)),
        call("region_io_fds", 2, |client| client.region_io_fds(0)),
        call("irq_info", 1, |client| client.irq_info(2)),
        call("set_irqs", 1, |client| client.set_irqs(2, 0, IrqAction::Mask, IrqData::Bool(&[true; 64]))),
        call("irq_connect", 0, |client| client.irq_connect(2, 0, &[])),
        call("irq_disconnect", 1, |client| client.irq_disconnect(2, 0, 4)),
        call("irq_disable", 1, |client| client.irq_disable(2)),
        call("irq_trigger", 1, |client| client.irq_trigger(2, 0, 1)),
        call("irq_mask", 1, |client| client.irq_mask(2, 0, 1)),
        call("irq_unmask", 1, |client| client.irq_unmask(2, 0, 1)),
        call("region_read", 3, |client| client.region_read(0, 0, &mut vec![0; 3 << 20])),
        call("region_write", 3, |client| client.region_write(0, 0, &vec![0; 3 << 20])),
        call("region_write_multi", 2, move |client| client.region_write_multi(&[write; 400])),
        call("dma_map", 1, |client| client.dma_map(0, 4096, Prot::READ, None)),
        call("dma_unmap", 1, |client| client.dma_unmap(0, 4096)),
        call("dma_unmap_all", 1, Client::dma_unmap_all),
        call("reset", 1, Client::reset),
        call("probe_feature", 1, |client| client.probe_feature(Feature::MIGRATION, FeatureOp::Get)),
        call("migration_flags", 1, Client::migration_flags),
        call("mig_state", 1, Client::mig_state),
        call("set_mig_state", 1, |client| client.set_mig_state(MigrationState::Stop)),
        call("mig_data_read", 1, |client| client.mig_data_read(&mut vec![0; 3 << 20])),
        call("mig_data_write", 3, |client| client.mig_data_write(&vec![0; 3 << 20])),
        call("dma_logging_start", 1, move |client| client.dma_logging_start(4096, &[page; 1000])),
        call("dma_logging_stop", 1, Client::dma_logging_stop),
        call("dma_logging_report", 1, move |client| client.dma_logging_report(page, 4096, &mut [0])),
        call("precopy_info", 1, Client::precopy_info),
        call("mig_data_size", 1, Client::mig_data_size),
        call("device_manifest", 1, Client::device_manifest),
        // Asks, resets, asks, sets, resets, and asks what became of it.
        call("recover", 6, Client::recover),
        call("reset_to_running", 4, Client::reset_to_running),
    ]
}

#[test]
fn no_call_asks_on_and_on() {
    let lies: [(&str, Lie); 5] = [
        ("one byte more", wants_more),
        ("for ever in RESUMING", resuming),
        ("EBUSY", errno),
        ("the request again", again),
        ("nothing", nothing),
    ];
    for (lie, answers) in lies {
        for (name, most, call) in calls() {
            let client = client(answers);
            call(&client);
            let sent = client.requests_sent();
            assert!(sent <= most, "{name} sent {sent} requests to a server that answers {lie}");
        }
    }
}

/// The table is whole: every public method is in it, but for those that ask the server nothing.
#[test]
fn every_call_is_bounded() {
    let asks_nothing = [
        "negotiated",
        "is_alive",
        "lost",
        "state_at_connect",
        "requests_sent",
        "dma_settled",
        "limit_all",
        "limit_question",
        "timeout",
        "transition_timeout",
    ];
    let sources = [
        include_str!("../../src/client/connection.rs"),
        include_str!("../../src/client/device.rs"),
        include_str!("../../src/client/dma.rs"),
        include_str!("../../src/client/migration.rs"),
        include_str!("../../src/client/recovery.rs"),
    ];
    let calls = calls();
    let mut found = 0;
    for source in sources {
        for rest in source.split("    pub fn ").skip(1) {
            let name = rest.split(['(', '<']).next().unwrap();
            found += 1;
            let listed = calls.iter().any(|call| call.0 == name) || asks_nothing.contains(&name);
            assert!(listed, "how many requests may {name} send?");
        }
    }
    assert!(found >= 38, "{found}");
}

fn lie(result: Result<impl std::fmt::Debug, ClientError>, says: &str) {
    let error = result.unwrap_err();
    assert!(matches!(error, ClientError::Protocol { .. }), "{error}");
    assert!(error.to_string().contains(says), "{error}");
}

#[test]
fn what_costs_the_client_is_counted() {
    lie(client(wants_more).region_info(0), "after it had");
    lie(client(wants_more).region_io_fds(0), "after it had");
    let areas = |header: Header, _: Vec<u8>| {
        let count = MAX_MMAP_AREAS as u64 + 1;
        let len = u32::try_from(48 + count * 16).unwrap();
        let mut reply: Vec<u8> = [len, 0b1111, 0, 32].iter().flat_map(|n| n.to_ne_bytes()).collect();
        reply.extend((count << 12).to_ne_bytes());
        reply.extend([0; 8]);
        reply.extend([1, 0, 1, 0, 0, 0, 0, 0]);
        reply.extend(count.to_ne_bytes());
        (0..count).for_each(|n| [n << 12, 4096].iter().for_each(|n| reply.extend(n.to_ne_bytes())));
        message(header, Kind::Reply, &reply)
    };
    lie(client(areas).region_info(0), "65 mappable areas of one region, where 64 are the most");
    let table = |header: Header, _: Vec<u8>| {
        let count = u32::try_from(MAX_IO_FDS + 1).unwrap();
        let len = 16 + count * 40;
        let mut reply: Vec<u8> = [len, 0, 0, count].iter().flat_map(|n| n.to_ne_bytes()).collect();
        // The entries would not fit the room of the first request.
        reply.truncate(16);
        message(header, Kind::Reply, &reply)
    };
    lie(client(table).region_io_fds(0), "129 descriptors for accesses to one region, where 128");
    let irqs = |header: Header, mut body: Vec<u8>| {
        body[12..16].copy_from_slice(&2049u32.to_ne_bytes());
        message(header, Kind::Reply, &body)
    };
    lie(client(irqs).irq_info(2), "2049 interrupts of one type, where 2048 are the most");
}
