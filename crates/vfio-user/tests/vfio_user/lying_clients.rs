//! Clients that lie, by hand: refused commands are read to their end, the stream stays in step, and the next client is served.

use std::io::{IoSlice, Write};
use std::os::fd::AsFd;
use std::time::Duration;

use crate::by_hand::{Raw, words};
use crate::rig::{Device, Served, quick, quick_server, untouched};
use vfio_user_peer::codec::{Command, Header, Kind};
use vfio_user_peer::{ClientOptions, Errno, ServerOptions};

#[test]
fn refused_commands_are_drained() {
    let served = Served::start();
    let mut raw = Raw::negotiated(&served);
    for command in [0, 11, 12, 14, 19, 0x7fff, 0x8001, 0x8002, 0xffff] {
        assert_eq!(raw.refused(Command(command), &[7; 333]), Errno::OPNOTSUPP);
        raw.in_step();
    }
    // Truncated and overlong payloads of commands that exist; longer than any message may be, too.
    for command in (1..=18).filter(|number| ![11, 12, 13, 14].contains(number)) {
        for len in [0, 1, 3, 7, 100, 5 << 20] {
            // GET_INFO looks at nothing but argsz, and takes requests of a later version.
            if (command, len) != (4, 100) {
                raw.refused(Command(command), &vec![0xff; len]);
            }
        }
        raw.in_step();
    }
    raw.refused(Command::DEVICE_RESET, &[1]);
    raw.in_step();
}

#[test]
fn lies_about_sizes_are_refused() {
    let served = Served::start();
    let mut raw = Raw::negotiated(&served);
    let read = |offset: u64, region: u32, count: u32| {
        let mut body = offset.to_ne_bytes().to_vec();
        body.extend(words(&[region, count]));
        body
    };
    for (offset, region, count) in
        [(0, 0, u32::MAX), (u64::MAX, 0, 1), (0, 99, 1), (0, 1, 1), (4 << 20, 0, 1), (0, 0, (1 << 20) + 1)]
    {
        assert_eq!(raw.refused(Command::REGION_READ, &read(offset, region, count)), Errno::INVAL);
    }
    let mut write = read(0, 0, 100);
    write.extend([1; 99]);
    assert_eq!(raw.refused(Command::REGION_WRITE, &write), Errno::INVAL);
    // argsz below what the reply needs, and features with flags that mean nothing.
    assert_eq!(raw.refused(Command::DEVICE_GET_INFO, &words(&[15, 0, 0, 0])), Errno::INVAL);
    assert_eq!(raw.refused(Command::DEVICE_FEATURE, &words(&[8, 1 | 1 << 16])), Errno::INVAL);
    assert_eq!(raw.refused(Command::DEVICE_FEATURE, &words(&[16, 1 | 3 << 16])), Errno::INVAL);
    assert_eq!(raw.refused(Command::DEVICE_FEATURE, &words(&[16, 1 | 1 << 20])), Errno::INVAL);
    assert_eq!(raw.refused(Command::DEVICE_FEATURE, &words(&[16, 1])), Errno::INVAL);
    assert_eq!(raw.refused(Command::DEVICE_FEATURE, &words(&[16, 77 | 1 << 16])), Errno::NOTTY);
    // P2P was not negotiated, so its states do not exist.
    assert_eq!(raw.refused(Command::DEVICE_FEATURE, &words(&[16, 2 | 1 << 17, 5, 0])), Errno::INVAL);
    assert_eq!(raw.refused(Command::DEVICE_FEATURE, &words(&[16, 2 | 1 << 17, 0xabcd, 0])), Errno::INVAL);
    assert_eq!(raw.refused(Command::MIG_DATA_READ, &words(&[u32::MAX, u32::MAX])), Errno::INVAL);
    // A report on 2^64 bytes, started or not.
    let mut start = words(&[24, 6 | 1 << 17]);
    start.extend(4096u64.to_ne_bytes());
    start.extend(words(&[0, 0]));
    assert_eq!(raw.ask(Command::DEVICE_FEATURE, &start).0, Kind::Reply);
    let mut report = words(&[u32::MAX, 8 | 1 << 16]);
    for number in [0u64, u64::MAX, 4096] {
        report.extend(number.to_ne_bytes());
    }
    assert_eq!(raw.refused(Command::DEVICE_FEATURE, &report), Errno::TOOBIG);
    // SET_IRQS: two sorts of data, two actions, none, a short table.
    for flags in [0b100_011, 0b011_001, 0b000_001, 0b100_000, 1 << 9] {
        assert_eq!(raw.refused(Command::DEVICE_SET_IRQS, &words(&[20, flags, 2, 0, 1])), Errno::INVAL);
    }
    assert_eq!(raw.refused(Command::DEVICE_SET_IRQS, &words(&[20, 0b100_010, 2, 0, 5, 1])), Errno::INVAL);
    raw.in_step();
}

#[test]
fn mappings_beyond_the_limits_are_refused() {
    let served = Served::new(Device::new(), ServerOptions { max_dma_maps: 1, ..quick_server() });
    let mut raw = Raw::negotiated(&served);
    let map = |flags: u32, iova: u64, len: u64| {
        let mut body = words(&[32, flags, 0, 0]);
        body.extend(iova.to_ne_bytes());
        body.extend(len.to_ne_bytes());
        body
    };
    assert_eq!(raw.refused(Command::DMA_MAP, &map(3, 0x1000, 12)), Errno::INVAL);
    assert_eq!(raw.refused(Command::DMA_MAP, &map(3, 12, 0x1000)), Errno::INVAL);
    assert_eq!(raw.refused(Command::DMA_MAP, &map(16, 0, 0x1000)), Errno::INVAL);
    assert_eq!(raw.ask(Command::DMA_MAP, &map(3, 0, 0x1000)).0, Kind::Reply);
    assert_eq!(raw.refused(Command::DMA_MAP, &map(3, 0x1000, 0x1000)), Errno::NOSPC);
    raw.in_step();
}

#[test]
fn messages_that_cannot_be_followed_end_the_connection() {
    let served = Served::start();
    for size in [0, 15, u32::MAX] {
        let mut raw = Raw::negotiated(&served);
        let header =
            Header { id: 5, command: Command::REGION_WRITE, size, kind: Kind::Command { no_reply: false } };
        raw.0.write_all(&header.encode()).unwrap();
        assert!(raw.ended());
    }
    let mut raw = Raw::negotiated(&served);
    raw.0
        .write_all(&Header { id: 1, command: Command::DMA_READ, size: 16, kind: Kind::Reply }.encode())
        .unwrap();
    assert!(raw.ended());
    let mut raw = Raw::connect(&served);
    raw.0.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    assert!(raw.ended());
    let mut raw = Raw::connect(&served);
    raw.refused(Command::DEVICE_GET_INFO, &words(&[16, 0, 0, 0]));
    assert!(raw.ended());
    for version in [&b"\x01\0\0\0{}\0"[..], b"\0\0\0\0{nonsense\0", b"\0"] {
        let mut raw = Raw::connect(&served);
        raw.refused(Command::VERSION, version);
        assert!(raw.ended());
    }
    // And the server is as good as new.
    served.client(quick()).device_info().unwrap();
}

#[test]
fn a_client_that_stops_in_a_message_is_dropped() {
    let options = ServerOptions { message_timeout: Duration::from_millis(200), ..quick_server() };
    let served = Served::new(Device::new(), options);
    let mut raw = Raw::negotiated(&served);
    raw.0.write_all(&[1, 2, 3]).unwrap();
    assert!(raw.ended());
    let mut raw = Raw::negotiated(&served);
    let header =
        Header { id: 5, command: Command::REGION_WRITE, size: 100, kind: Kind::Command { no_reply: false } };
    raw.0.write_all(&header.encode()).unwrap();
    // Dying there is no different.
    drop(raw);
    served.client(quick()).device_info().unwrap();
}

#[test]
fn commands_without_reply_get_none() {
    let served = Served::start();
    let mut raw = Raw::negotiated(&served);
    for _ in 0..50 {
        raw.send(Command::DEVICE_RESET, &[], true);
        raw.send(Command(999), &[1, 2, 3], true);
    }
    raw.in_step();
}

#[test]
fn descriptors_are_limited_and_closed() {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let served = Served::new(Device::new(), ServerOptions { max_msg_fds: 2, ..quick_server() });
    let mut raw = Raw::negotiated(&served);
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let requests = [
        // Three where two are allowed; one for a command that takes none; two for a mapping; one for a refused command.
        (Command::DEVICE_SET_IRQS, words(&[20, 0b100_100, 2, 0, 3]), 3),
        (Command::DEVICE_GET_INFO, words(&[16, 0, 0, 0]), 1),
        (Command::DMA_MAP, words(&[32, 3, 0, 0, 0, 0, 0, 0x1000, 0, 0]), 2),
        (Command(500), words(&[1]), 1),
        (Command::DEVICE_SET_IRQS, words(&[20, 0b100_100, 2, 0, 3]), 2),
    ];
    for (command, body, count) in requests {
        let fds = vec![writer.as_fd(); count];
        let size = u32::try_from(16 + body.len()).unwrap();
        let header = Header { id: 5, command, size, kind: Kind::Command { no_reply: false } }.encode();
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let parts = [IoSlice::new(&header), IoSlice::new(&body)];
        sendmsg(&raw.0, &parts, &mut control, SendFlags::empty()).unwrap();
        assert!(matches!(raw.receive().0, Kind::Error(_)), "{command}");
        raw.in_step();
    }
    drop(writer);
    assert_eq!(rustix::io::read(&reader, &mut [0u8; 1]), Ok(0), "a descriptor was kept");
}

#[test]
fn more_descriptors_than_the_client_takes_are_not_sent() {
    let served = Served::start();
    let mut raw = Raw::negotiated(&served);
    // Two entries share one descriptor, and one is what this client takes.
    let (kind, body) = raw.ask(Command::DEVICE_GET_REGION_IO_FDS, &words(&[4096, 0, 0, 0]));
    assert_eq!((kind, body.len()), (Kind::Reply, 96));
    // Too little room: only how much is needed.
    let (kind, body) = raw.ask(Command::DEVICE_GET_REGION_IO_FDS, &words(&[16, 0, 0, 0]));
    assert_eq!((kind, body), (Kind::Reply, words(&[96, 0, 0, 2])));
    let (kind, body) = raw.ask(Command::DEVICE_GET_REGION_INFO, &words(&[32, 0, 2, 0, 0, 0, 0, 0]));
    assert_eq!((kind, body.len(), &body[..4]), (Kind::Reply, 32, &80u32.to_ne_bytes()[..]));
}

#[test]
fn garbage_of_every_length_leaves_a_working_server() {
    let served = Served::start();
    let mut seed = 12345u64;
    for round in 0..200usize {
        let mut raw = if round % 2 == 0 { Raw::connect(&served) } else { Raw::negotiated(&served) };
        let garbage: Vec<u8> = (0..round * 3)
            .map(|_| {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                seed.to_be_bytes()[0]
            })
            .collect();
        let _ = raw.0.write_all(&garbage);
    }
    served.client(ClientOptions { timeout: Duration::from_secs(10), ..untouched() }).device_info().unwrap();
}
