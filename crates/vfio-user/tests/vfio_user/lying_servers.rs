//! Servers that lie, by hand: each lie ends in one clear error within the time limit.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::by_hand::{answer_version, message, read_message};
use crate::rig::untouched;
use vfio_user_peer::codec::{Command, Header, Kind};
use vfio_user_peer::{
    Client, ClientError, ClientOptions, Errno, Feature, FeatureOp, IovaRange, MigrationState, OnConnect,
};

const SHORT: Duration = Duration::from_millis(300);

fn options() -> ClientOptions {
    ClientOptions { timeout: SHORT, ..untouched() }
}

/// A server that negotiates, then gives each request's header and payload to `lie` and sends what that returns; it hangs
/// up where that is `None`.
fn server(
    mut lie: impl FnMut(Header, Vec<u8>) -> Option<Vec<u8>> + Send + 'static,
) -> (Client, JoinHandle<()>) {
    let (near, mut far) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        answer_version(&mut far);
        while let Some((header, body)) = read_message(&mut far) {
            match lie(header, body) {
                Some(bytes) => drop(far.write_all(&bytes)),
                None => return,
            }
        }
    });
    (Client::from_stream(near, options()).unwrap(), thread)
}

fn protocol<T: std::fmt::Debug>(result: Result<T, ClientError>) {
    let error = result.unwrap_err();
    assert!(matches!(error, ClientError::Protocol { .. }), "{error}");
}

#[test]
fn short_replies_are_noticed_and_leave_the_stream_in_step() {
    let (client, _thread) = server(|header, _| Some(message(header, Kind::Reply, &[1, 2, 3])));
    protocol(client.device_info());
    protocol(client.region_info(0));
    protocol(client.region_io_fds(0));
    protocol(client.irq_info(0));
    protocol(client.region_read(0, 0, &mut [0; 8]));
    protocol(client.region_write(0, 0, &[0; 8]));
    protocol(client.mig_state());
    protocol(client.migration_flags());
    protocol(client.mig_data_read(&mut [0; 8]));
    protocol(client.set_mig_state(MigrationState::Stop));
    protocol(client.dma_logging_report(IovaRange { iova: 0, len: 4096 }, 4096, &mut [0]));
    assert!(client.is_alive());
}

#[test]
fn padded_migration_data_is_read_by_its_size() {
    let mut left = 2288u32;
    let (client, _thread) = server(move |header, body| {
        let size = u32::from_ne_bytes(body[4..8].try_into().unwrap());
        let got = left.min(size);
        left -= got;
        let mut reply = (8 + got).to_ne_bytes().to_vec();
        reply.extend_from_slice(&got.to_ne_bytes());
        reply.resize(8 + got as usize, 7);
        // As long as was asked for, whatever there is.
        reply.resize(8 + size as usize, 0);
        Some(message(header, Kind::Reply, &reply))
    });
    let mut buffer = vec![0; 5000];
    assert_eq!(client.mig_data_read(&mut buffer).unwrap(), 2288);
    assert!(buffer[..2288].iter().all(|byte| *byte == 7));
    assert_eq!(client.mig_data_read(&mut buffer).unwrap(), 0);
}

#[test]
fn sizes_that_exceed_the_request_are_refused() {
    for size in [5001, u32::MAX] {
        let (client, _thread) = server(move |header, body| {
            let mut reply = body[..4].to_vec();
            reply.extend_from_slice(&size.to_ne_bytes());
            reply.resize(5008, 0);
            Some(message(header, Kind::Reply, &reply))
        });
        protocol(client.mig_data_read(&mut [0; 5000]));
    }
}

#[test]
fn huge_messages_cost_no_memory() {
    let (client, _thread) =
        server(|header, _| Some(Header { size: u32::MAX, kind: Kind::Reply, ..header }.encode().to_vec()));
    let before = Instant::now();
    protocol(client.device_info());
    assert!(before.elapsed() < SHORT && !client.is_alive());
    assert!(matches!(client.device_info(), Err(ClientError::ConnectionLost { .. })));
}

#[test]
fn messages_below_their_header_are_refused() {
    let (client, _thread) =
        server(|header, _| Some(Header { size: 3, kind: Kind::Reply, ..header }.encode().to_vec()));
    protocol(client.device_info());
    assert!(!client.is_alive());
}

#[test]
fn too_long_replies_are_refused() {
    let (client, _thread) = server(|header, _| Some(message(header, Kind::Reply, &[0; 100])));
    protocol(client.device_info());
}

#[test]
fn refusals_carry_their_errno_or_none() {
    let mut errnos = [libc_errno(Errno::NOSPC), 0, u32::MAX].into_iter();
    let (client, _thread) =
        server(move |header, _| Some(message(header, Kind::Error(errnos.next().unwrap()), &[])));
    for wanted in [Some(Errno::NOSPC), None, None] {
        match client.device_info() {
            Err(ClientError::Refused { errno, .. }) => assert_eq!(errno, wanted),
            other => panic!("{other:?}"),
        }
    }
    assert!(client.is_alive());
}

fn libc_errno(errno: Errno) -> u32 {
    errno.raw_os_error().unsigned_abs()
}

#[test]
fn a_refusal_with_a_payload_keeps_the_stream_in_step() {
    let mut first = true;
    let (client, _thread) = server(move |header, body| {
        let kind = if first { Kind::Error(22) } else { Kind::Reply };
        let reply = if first { vec![9; 70_000] } else { body };
        first = false;
        Some(message(header, kind, &reply))
    });
    assert_eq!(client.device_info().unwrap_err().errno(), Some(Errno::INVAL));
    client.device_info().unwrap();
}

#[test]
fn a_feature_refused_without_an_errno_ends_the_connection() {
    let (client, _thread) = server(|header, _| Some(message(header, Kind::Error(0), &[])));
    assert!(matches!(client.migration_flags(), Err(ClientError::ConnectionLost { .. })));
    assert!(!client.is_alive());
}

#[test]
fn a_server_that_hangs_up_on_probe_is_reported() {
    let (client, _thread) = server(|_, _| None);
    let error = client.probe_feature(Feature::MIGRATION, FeatureOp::Get).unwrap_err();
    assert!(matches!(error, ClientError::ConnectionLost { .. }), "{error}");
}

#[test]
fn replies_to_another_request_are_refused() {
    let (client, _thread) =
        server(|header, body| Some(message(Header { id: header.id ^ 1, ..header }, Kind::Reply, &body)));
    protocol(client.device_info());
    let (client, _thread) = server(|header, body| {
        Some(message(Header { command: Command::DMA_MAP, ..header }, Kind::Reply, &body))
    });
    protocol(client.device_info());
    assert!(!client.is_alive());
}

#[test]
fn a_server_that_hangs_is_given_up() {
    let (client, _thread) = server(|_, _| Some(Vec::new()));
    let before = Instant::now();
    let error = client.device_info().unwrap_err();
    assert!(matches!(error, ClientError::Timeout { .. }), "{error}");
    assert!(matches!(client.device_info(), Err(ClientError::Timeout { .. })));
    assert!(before.elapsed() < 10 * SHORT);
}

#[test]
fn a_server_that_trickles_is_given_up() {
    let (client, _thread) = server(|header, _| Some(message(header, Kind::Reply, &[0; 16])[..20].to_vec()));
    assert!(matches!(client.device_info(), Err(ClientError::Timeout { .. })));
}

#[test]
fn a_server_that_dies_in_a_reply_is_lost() {
    for cut in [1, 15, 16, 20] {
        let (near, mut far) = UnixStream::pair().unwrap();
        let thread = std::thread::spawn(move || {
            answer_version(&mut far);
            let (header, _) = read_message(&mut far).unwrap();
            far.write_all(&message(header, Kind::Reply, &[0; 16])[..cut]).unwrap();
        });
        let client = Client::from_stream(near, options()).unwrap();
        let before = Instant::now();
        assert!(matches!(client.device_info(), Err(ClientError::ConnectionLost { .. })));
        assert!(before.elapsed() < SHORT);
        thread.join().unwrap();
    }
    let (client, _thread) = server(|_, _| None);
    assert!(matches!(client.device_info(), Err(ClientError::ConnectionLost { .. })));
}

#[test]
fn regions_that_point_outside_are_refused() {
    // A capability chain in a circle, one outside of the reply, an area outside of the region.
    let circle = |reply: &mut Vec<u8>| reply.extend_from_slice(&[2, 0, 1, 0, 32, 0, 0, 0]);
    let outside = |reply: &mut Vec<u8>| reply[12..16].copy_from_slice(&4000u32.to_ne_bytes());
    let area = |reply: &mut Vec<u8>| {
        reply.extend_from_slice(&[1, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        reply.extend_from_slice(&0x1000u64.to_ne_bytes());
        reply.extend_from_slice(&u64::MAX.to_ne_bytes());
    };
    let many = |reply: &mut Vec<u8>| {
        reply.extend_from_slice(&[1, 0, 1, 0, 0, 0, 0, 0, 255, 255, 255, 255, 0, 0, 0, 0]);
    };
    type Lie = &'static (dyn Fn(&mut Vec<u8>) + Sync);
    let lies: [Lie; 4] = [
        Box::leak(Box::new(circle)),
        Box::leak(Box::new(outside)),
        Box::leak(Box::new(area)),
        Box::leak(Box::new(many)),
    ];
    for lie in lies {
        let (client, _thread) = server(move |header, _| {
            let mut reply = Vec::new();
            for word in [64u32, 0b1001, 0, 32] {
                reply.extend_from_slice(&word.to_ne_bytes());
            }
            reply.extend_from_slice(&0x1000u64.to_ne_bytes());
            reply.extend_from_slice(&0u64.to_ne_bytes());
            lie(&mut reply);
            Some(message(header, Kind::Reply, &reply))
        });
        protocol(client.region_info(0));
    }
    // A description that never fits.
    let (client, _thread) = server(|header, body| {
        let mut reply = body;
        reply[..4].copy_from_slice(&u32::MAX.to_ne_bytes());
        Some(message(header, Kind::Reply, &reply))
    });
    protocol(client.region_info(0));
}

#[test]
fn more_descriptors_than_announced_are_refused_and_closed() {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use std::io::IoSlice;
    use std::os::fd::AsFd;
    let (near, mut far) = UnixStream::pair().unwrap();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let thread = std::thread::spawn(move || {
        answer_version(&mut far);
        let (header, body) = read_message(&mut far).unwrap();
        let fds = [writer.as_fd(); 5];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(5))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let bytes = message(header, Kind::Reply, &body);
        sendmsg(&far, &[IoSlice::new(&bytes)], &mut control, SendFlags::empty()).unwrap();
        far
    });
    let client = Client::from_stream(near, ClientOptions { max_msg_fds: 3, ..options() }).unwrap();
    protocol(client.device_info());
    drop(thread.join().unwrap());
    // Every copy of the pipe's other end is closed, so it reads as ended.
    assert_eq!(rustix::io::read(&reader, &mut [0u8; 1]), Ok(0));
}

/// A device like libvfio-user's: a reset leaves its migration state, and is refused in STOP.
#[derive(Debug)]
struct Retaining {
    state: MigrationState,
    /// Half a state has become the device's.
    half_loaded: bool,
}

impl Retaining {
    fn answer(&mut self, header: Header, mut body: Vec<u8>) -> Vec<u8> {
        let stopped = self.state == MigrationState::Stop;
        match header.command {
            Command::DEVICE_RESET if stopped => {
                return message(header, Kind::Error(libc_errno(Errno::INVAL)), &[]);
            }
            Command::DEVICE_RESET => self.half_loaded = false,
            Command::DEVICE_FEATURE if body.len() == 8 => {
                body[..4].copy_from_slice(&16u32.to_ne_bytes());
                body.extend_from_slice(&(self.state as u32).to_ne_bytes());
                body.extend_from_slice(&u32::MAX.to_ne_bytes());
            }
            Command::DEVICE_FEATURE => {
                let to = u32::from_ne_bytes(body[8..12].try_into().unwrap());
                self.half_loaded |= self.state == MigrationState::Resuming;
                self.state = MigrationState::try_from(to).unwrap();
            }
            other => panic!("{other}"),
        }
        message(header, Kind::Reply, &body)
    }
}

#[test]
fn a_reset_that_keeps_the_state_is_made_whole() {
    use MigrationState::{Error, PreCopy, Resuming, Running, Stop, StopCopy};
    for from in [Running, Stop, PreCopy, StopCopy, Resuming, Error] {
        for recover in [false, true] {
            let device = Arc::new(Mutex::new(Retaining { state: from, half_loaded: false }));
            let (client, _thread) = server({
                let device = Arc::clone(&device);
                move |header, body| Some(device.lock().unwrap().answer(header, body))
            });
            let done = if recover { client.recover().map(|_| ()) } else { client.reset_to_running() };
            let device = device.lock().unwrap();
            assert!(!device.half_loaded, "{from}: what was loaded so far is its state");
            if from == Error {
                assert_eq!(done.is_err(), recover, "nothing is SET in ERROR");
                assert_eq!(device.state, Error);
            } else {
                done.unwrap();
                assert_eq!(device.state, Running, "{from}");
            }
        }
    }
}

#[test]
fn bad_versions_are_refused() {
    let reply = |body: &'static [u8]| {
        let (near, mut far) = UnixStream::pair().unwrap();
        let thread = std::thread::spawn(move || {
            let (header, _) = read_message(&mut far).unwrap();
            far.write_all(&message(header, Kind::Reply, body)).unwrap();
            far
        });
        let result = Client::from_stream(near, options());
        drop(thread.join().unwrap());
        result
    };
    reply(b"\0\0\0\0").unwrap();
    reply(b"\0\0\0\0{}").unwrap();
    protocol(reply(b"\x01\0\0\0{}\0"));
    protocol(reply(b"\0\0\xff\0{}\0"));
    protocol(reply(b"\0"));
    protocol(reply(b"\0\0\0\0{\"capabilities\":7}\0"));
    protocol(reply(b"\0\0\0\0{\"capabilities\":{\"max_msg_fds\":-1}}\0"));
    protocol(reply(b"\0\0\0\0{\"capabilities\":{\"max_data_xfer_size\":0}}\0"));
    protocol(reply(b"\0\0\0\0{\"capabilities\":{\"twin_socket\":{\"supported\":true,\"fd_index\":0}}}\0"));
}

#[test]
fn a_server_that_speaks_out_of_turn_is_refused_politely() {
    let (near, mut far) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        answer_version(&mut far);
        let (header, body) = read_message(&mut far).unwrap();
        // A command that only clients send, in the middle of a request.
        let ask = Header {
            id: 99,
            command: Command::DEVICE_RESET,
            size: 16,
            kind: Kind::Command { no_reply: false },
        };
        far.write_all(&ask.encode()).unwrap();
        let (refusal, _) = read_message(&mut far).unwrap();
        assert_eq!((refusal.id, refusal.command), (99, Command::DEVICE_RESET));
        assert!(matches!(refusal.kind, Kind::Error(errno) if errno != 0));
        far.write_all(&message(header, Kind::Reply, &body)).unwrap();
    });
    let client = Client::from_stream(near, options()).unwrap();
    client.device_info().unwrap();
    thread.join().unwrap();
}

/// libvfio-user in STOP refuses everything but DEVICE_FEATURE, RESET included.
#[test]
fn a_device_left_in_stop_is_set_running_before_anything_else() {
    let (near, mut far) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        answer_version(&mut far);
        let mut state = 1u32;
        while let Some((header, body)) = read_message(&mut far) {
            if header.command != Command::DEVICE_FEATURE && state != 2 {
                far.write_all(&message(header, Kind::Error(22), &[])).unwrap();
                continue;
            }
            let mut reply = body.clone();
            if header.command == Command::DEVICE_FEATURE {
                if body.len() == 16 {
                    state = u32::from_ne_bytes(body[8..12].try_into().unwrap());
                } else {
                    reply.extend_from_slice(&state.to_ne_bytes());
                    reply.extend_from_slice(&u32::MAX.to_ne_bytes());
                }
            }
            far.write_all(&message(header, Kind::Reply, &reply)).unwrap();
        }
    });
    let client =
        Client::from_stream(near, ClientOptions { on_connect: OnConnect::Recover, ..options() }).unwrap();
    assert_eq!(client.state_at_connect(), Some(MigrationState::Stop));
    client.device_info().unwrap();
    drop(client);
    thread.join().unwrap();
}
