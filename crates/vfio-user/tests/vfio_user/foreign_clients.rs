//! Clients as other projects have them (QEMU, libvfio-user, SPDK), by hand: what they announce, send and stumble over.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use crate::by_hand::{Raw, message, read_message, words};
use crate::rig::{Device, Served, event, memfd, quick, quick_server, untouched};
use vfio_user_peer::codec::{Command, Kind, VersionCapabilities, VersionPayload};
use vfio_user_peer::{
    Client, ClientOptions, Errno, Extension, MigrationFlags, MigrationState, Prot, ServerOptions, irq_index,
};

const GET: u32 = 1 << 16;
const SET: u32 = 1 << 17;
const PROBE: u32 = 1 << 18;

/// libvfio-user at efd091b: what its server announces, which every client that exists takes.
const LIBVFIO_USER: VersionCapabilities = VersionCapabilities {
    max_msg_fds: 8,
    max_data_xfer_size: 1 << 20,
    max_dma_maps: 65535,
    pgsizes: 4096,
    twin_socket: vfio_user_peer::codec::TwinSocket { supported: true, fd_index: None },
    write_multiple: true,
    extension: Extension::NONE,
};

#[test]
fn no_number_of_a_server_is_above_what_clients_take() {
    let below = |served: &Served, announced: VersionCapabilities| {
        let (_, VersionPayload { minor, capabilities: ours, .. }) = Raw::announcing(served, announced);
        assert!(minor <= 2);
        assert!(ours.max_msg_fds <= announced.max_msg_fds.min(16), "{ours:?} for {announced:?}");
        assert!(ours.max_data_xfer_size <= LIBVFIO_USER.max_data_xfer_size);
        assert!(ours.max_dma_maps <= LIBVFIO_USER.max_dma_maps);
        assert_eq!(ours.pgsizes, LIBVFIO_USER.pgsizes);
        ours
    };
    let served = Served::new(Device::new(), ServerOptions::default());
    let most = Served::new(Device::new(), ServerOptions { max_msg_fds: u32::MAX, ..quick_server() });
    for max_msg_fds in [1, 4, 8, 16, 32, 64, u32::MAX] {
        let announced = VersionCapabilities { max_msg_fds, ..LIBVFIO_USER };
        assert!(below(&served, announced).max_msg_fds <= LIBVFIO_USER.max_msg_fds);
        // Not even where a device's author asks for more.
        below(&most, announced);
    }
}

#[test]
fn no_number_of_a_client_is_above_what_servers_take() {
    let (near, mut far) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        let (header, body) = read_message(&mut far).unwrap();
        std::io::Write::write_all(&mut far, &message(header, Kind::Reply, b"\0\0\0\0{}\0")).unwrap();
        VersionPayload::decode(&body).unwrap()
    });
    let options = ClientOptions { on_connect: untouched().on_connect, ..ClientOptions::default() };
    drop(Client::from_stream(near, options).unwrap());
    let VersionPayload { major, minor, capabilities: ours } = thread.join().unwrap();
    assert!((major, minor) <= (0, 2));
    // libvfio-user's own client announces 32, QEMU's 16.
    assert!(ours.max_msg_fds <= 16);
    assert!(ours.max_data_xfer_size <= LIBVFIO_USER.max_data_xfer_size);
    assert!(ours.max_dma_maps <= LIBVFIO_USER.max_dma_maps);
    assert_eq!(ours.pgsizes, LIBVFIO_USER.pgsizes);
}

#[test]
fn capabilities_and_a_descriptor_come_only_where_there_is_room() {
    let served = Served::start();
    let mut raw = Raw::negotiated(&served);
    let flags = |body: &[u8]| u32::from_ne_bytes(body[4..8].try_into().unwrap());
    for argsz in [32, 79] {
        let ask = words(&[argsz, 0, 2, 0, 0, 0, 0, 0]);
        let (kind, body, fds) = raw.ask_with_fds(Command::DEVICE_GET_REGION_INFO, &ask, &[]);
        assert_eq!((kind, body.len(), fds), (Kind::Reply, 32, 0), "argsz {argsz}");
        // Readable, writable, mappable; no capabilities, and no offset of any.
        assert_eq!((flags(&body), &body[12..16]), (0b0111, &[0; 4][..]), "argsz {argsz}");
        assert_eq!(body[..4], 80u32.to_ne_bytes(), "how much room it takes");
    }
    for argsz in [80, 4096] {
        let ask = words(&[argsz, 0, 2, 0, 0, 0, 0, 0]);
        let (kind, body, fds) = raw.ask_with_fds(Command::DEVICE_GET_REGION_INFO, &ask, &[]);
        assert_eq!((kind, body.len(), fds), (Kind::Reply, 80, 1));
        assert_eq!((flags(&body), &body[12..16]), (0b1111, &32u32.to_ne_bytes()[..]));
    }
}

#[test]
fn requests_as_long_as_their_room_are_taken() {
    let served = Served::start();
    let mut raw = Raw::negotiated(&served);
    for argsz in [32u32, 48, 80, 4096] {
        for (command, index) in [
            (Command::DEVICE_GET_INFO, 0),
            (Command::DEVICE_GET_REGION_INFO, 2),
            (Command::DEVICE_GET_REGION_IO_FDS, 0),
            (Command::DEVICE_GET_IRQ_INFO, 2),
        ] {
            let mut ask = words(&[argsz, 0, index, 0]);
            ask.resize(argsz as usize, 0);
            let (kind, body) = raw.ask(command, &ask);
            assert_eq!(kind, Kind::Reply, "{command} of {argsz} bytes");
            assert!(body.len() >= 16);
            if command != Command::DEVICE_GET_INFO {
                assert_eq!(body[8..12], index.to_ne_bytes());
            }
        }
    }
}

/// Every request that has an argsz: the least that it needs is enough, and one byte less is not.
#[test]
fn room_is_looked_at_in_every_command_that_has_it() {
    let numbers = |head: &[u32], numbers: &[u64]| {
        let mut body = words(head);
        numbers.iter().for_each(|number| body.extend(number.to_ne_bytes()));
        body
    };
    let feature = |feature: u32, op: u32| numbers(&[0, feature | op], &[]);
    let mut cases = vec![
        (Command::DMA_MAP, numbers(&[0, 3], &[0, 0x1000, 0x1000]), 32),
        (Command::DMA_UNMAP, numbers(&[0, 0], &[0x1000, 0x1000]), 24),
        (Command::DEVICE_GET_INFO, words(&[0; 4]), 16),
        (Command::DEVICE_GET_REGION_INFO, words(&[0; 8]), 32),
        (Command::DEVICE_GET_REGION_IO_FDS, words(&[0; 4]), 16),
        (Command::DEVICE_GET_IRQ_INFO, words(&[0, 0, 2, 0]), 16),
        // Disable; mask four of five by a table.
        (Command::DEVICE_SET_IRQS, words(&[0, 0b100_001, 2, 0, 0]), 20),
        (Command::DEVICE_SET_IRQS, [words(&[0, 0b001_010, 2, 0, 5]), vec![1, 1, 1, 1, 0]].concat(), 25),
        (Command::DEVICE_FEATURE, feature(1, GET), 16),
        (Command::DEVICE_FEATURE, feature(2, GET), 16),
        (Command::DEVICE_FEATURE, [feature(2, SET), words(&[1, u32::MAX])].concat(), 16),
        (Command::DEVICE_FEATURE, numbers(&[0, 6 | SET], &[4096, 0]), 24),
        (Command::DEVICE_FEATURE, numbers(&[0, 6 | SET], &[4096, 1, 0, 0x10000]), 40),
        (Command::DEVICE_FEATURE, numbers(&[0, 8 | GET], &[0, 0x10000, 4096]), 40),
        (Command::DEVICE_FEATURE, feature(7, SET), 8),
        (Command::DEVICE_FEATURE, feature(9, GET), 16),
        (Command::DEVICE_FEATURE, [feature(2, SET), words(&[6, u32::MAX])].concat(), 16),
        (Command::MIG_DATA_READ, words(&[0, 100]), 108),
        (Command::X_PRECOPY_INFO, words(&[0; 6]), 24),
    ];
    for number in [1, 2, 6, 7, 8, 9] {
        let op = if matches!(number, 6 | 7) { SET } else { GET };
        cases.push((Command::DEVICE_FEATURE, feature(number, PROBE | op), 8));
        cases.push((Command::DEVICE_FEATURE, [feature(number, PROBE | op), vec![0; 24]].concat(), 32));
    }
    let served = Served::start();
    let capabilities = VersionCapabilities { extension: Extension::ALL, ..LIBVFIO_USER };
    let capabilities = VersionCapabilities { twin_socket: Default::default(), ..capabilities };
    let (mut raw, _) = Raw::announcing(&served, capabilities);
    for (command, mut body, least) in cases {
        let case = format!("{command} {body:?}");
        for argsz in [0, 7, least - 1] {
            body[..4].copy_from_slice(&u32::to_ne_bytes(argsz));
            let before = served.device.state.lock().unwrap().requests.len();
            assert_eq!(raw.refused(command, &body), Errno::INVAL, "argsz {argsz} of {case}");
            assert_eq!(served.device.state.lock().unwrap().requests.len(), before, "{case}");
        }
        body[..4].copy_from_slice(&u32::to_ne_bytes(least));
        assert_eq!(raw.ask(command, &body).0, Kind::Reply, "argsz {least} of {case}");
    }
}

/// RUNNING_P2P and PRE_COPY_P2P do not exist without the extension: whatever arc fails, no GET answers 5 or 7, and the device
/// is in the state that is told.
#[test]
fn the_peer_to_peer_states_never_show_without_the_extension() {
    use MigrationState::{PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};
    let named = [Stop, Running, StopCopy, Resuming, PreCopy];
    let mut failed = 0;
    for fails in [Stop, Running, StopCopy, Resuming, PreCopy, RunningP2p, PreCopyP2p] {
        for from in named {
            for to in named {
                let served = Served::start();
                let client = served.client(ClientOptions { extension: Extension::NONE, ..quick() });
                client.set_mig_state(from).unwrap();
                served.device.state.lock().unwrap().fail_arc = Some(fails);
                failed += u32::from(client.set_mig_state(to).is_err());
                let told = client.mig_state().unwrap();
                let is = served.device.state.lock().unwrap().mig;
                assert!(named.contains(&told), "{from} to {to} with {fails} failing: {told}");
                assert_eq!(told, is, "{from} to {to} with {fails} failing");
            }
        }
    }
    assert!(failed > 30, "{failed}");
    // A device that was left there by a client with the extension, or that does not go back.
    let served = Served::start();
    for (is, shown) in [(RunningP2p, Running), (PreCopyP2p, PreCopy)] {
        served.device.state.lock().unwrap().mig = is;
        let client = served.client(ClientOptions { extension: Extension::NONE, ..untouched() });
        assert_eq!(client.mig_state().unwrap(), shown);
        client.set_mig_state(Running).unwrap();
        assert_eq!(served.device.state.lock().unwrap().mig, Running);
        assert_eq!(
            client.migration_flags().unwrap(),
            Some(MigrationFlags::new(false, true)),
            "nor does the flag"
        );
    }
}

#[test]
fn interrupts_that_were_half_connected_are_given_back() {
    let served = Served::start();
    let client = served.client(quick());
    served.device.state.lock().unwrap().fail_irqs = true;
    let events: Vec<_> = (0..4).map(|_| event()).collect();
    let fds: Vec<_> = events.iter().map(AsFd::as_fd).collect();
    let error = client.irq_connect(irq_index::MSIX, 0, &fds).unwrap_err();
    assert_eq!(error.errno(), Some(Errno::NOSPC));
    assert_eq!(served.device.state.lock().unwrap().irqs.len(), 2, "the test's own half");
    drop(client);
    served.device.wait("the end of the client", |state| state.gone == 1);
    let state = served.device.state.lock().unwrap();
    assert!(state.irqs.is_empty(), "{:?}", state.irqs);
}

/// libvfio-user's clients since 2026-06 say what can be done with a mapping's descriptor.
#[test]
fn mappings_that_say_what_their_descriptor_can_are_taken() {
    let served = Served::start();
    let mut raw = Raw::negotiated(&served);
    let ram = memfd(0x1000);
    // Whether a descriptor comes, flags beside the rights, and whether the device is to map it.
    let cases = [
        (true, 0, true),
        (true, 1 << 2, true),
        (true, 1 << 2 | 1 << 3, true),
        (true, 1 << 3, false),
        (false, 0, false),
        (false, 1 << 2, false),
        (false, 1 << 3, false),
    ];
    for (number, (with_fd, flags, maps)) in (1u64..).zip(cases) {
        let mut body = words(&[32, 3 | flags]);
        [0, number << 12, 0x1000].iter().for_each(|number| body.extend(number.to_ne_bytes()));
        let fds: &[_] = if with_fd { &[ram.as_fd()] } else { &[] };
        let (kind, _, _) = raw.ask_with_fds(Command::DMA_MAP, &body, fds);
        assert_eq!(kind, Kind::Reply, "flags {flags:#x}, descriptor {with_fd}");
        let state = served.device.state.lock().unwrap();
        let map = &state.maps[&(number << 12)];
        assert_eq!((map.fd.is_some(), map.prot), (maps, Prot::READ_WRITE), "flags {flags:#x}");
    }
    let mut body = words(&[32, 3 | 1 << 4]);
    [0u64, 0x10_0000, 0x1000].iter().for_each(|number| body.extend(number.to_ne_bytes()));
    assert_eq!(raw.refused(Command::DMA_MAP, &body), Errno::INVAL);
}

/// libvfio-user reads a payload with one recv(2), which gives no more than about 36 KiB of a longer one.
#[test]
fn dma_by_message_is_no_longer_than_a_client_without_the_extension_reads_at_once() {
    for (extension, longest) in [(Extension::NONE, 32 << 10), (Extension::ALL, 16 + 16 + 100_000)] {
        let served = Served::start();
        let capabilities = VersionCapabilities { extension, twin_socket: Default::default(), ..LIBVFIO_USER };
        let (Raw(mut stream), _) = Raw::announcing(&served, capabilities);
        let dma = served.device.channel();
        let device = std::thread::spawn(move || {
            let (data, mut back) = (vec![3; 100_000], vec![0; 100_000]);
            dma.write(0x1000, &data).and_then(|()| dma.read(0x1000, &mut back)).map(|()| back == data)
        });
        let (mut written, mut read, mut seen) = (0, 0, 0);
        while written + read < 200_000 {
            let (header, body) = read_message(&mut stream).unwrap();
            let count = usize::try_from(u64::from_ne_bytes(body[8..16].try_into().unwrap())).unwrap();
            let mut reply = body[..16].to_vec();
            if header.command == Command::DMA_WRITE {
                written += count;
            } else {
                reply.resize(16 + count, 3);
                read += count;
            }
            seen = seen.max(16 + body.len()).max(16 + reply.len());
            std::io::Write::write_all(&mut stream, &message(header, Kind::Reply, &reply)).unwrap();
        }
        assert_eq!(device.join().unwrap(), Ok(true));
        assert_eq!((written, read, seen), (100_000, 100_000, longest), "{extension:?}");
    }
}
