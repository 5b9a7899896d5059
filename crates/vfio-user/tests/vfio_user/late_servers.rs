//! Servers that answer late, and servers that send much before they take anything.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::{JoinHandle, sleep};
use std::time::Duration;

use crate::by_hand::{answer_version, message, read_message};
use crate::rig::{Memory, untouched};
use rustix::net::sockopt;
use vfio_user_peer::codec::{Command, DmaAccess, Header, Kind};
use vfio_user_peer::{Client, ClientError, ClientOptions, MigrationState};

const SHORT: Duration = Duration::from_millis(300);

/// A server of which `serve` is told everything after the version.
fn server(
    options: ClientOptions,
    serve: impl FnOnce(&mut UnixStream) + Send + 'static,
) -> (Client, JoinHandle<()>) {
    let (near, mut far) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        answer_version(&mut far);
        serve(&mut far);
    });
    (Client::from_stream(near, options).unwrap(), thread)
}

fn late<T: std::fmt::Debug>(result: Result<T, ClientError>) {
    let error = result.unwrap_err();
    assert!(matches!(error, ClientError::Timeout { .. }), "{error}");
}

/// Answers a read of a region by as many bytes as it asks for, all `fill`.
fn region_reply(header: Header, body: &[u8], fill: u8) -> Vec<u8> {
    let count = u32::from_ne_bytes(body[12..16].try_into().unwrap());
    let mut reply = body.to_vec();
    reply.resize(body.len() + count as usize, fill);
    message(header, Kind::Reply, &reply)
}

/// A server that holds its first answer back after `front` bytes, and goes on when told.
fn held(front: usize, options: ClientOptions) -> (Client, JoinHandle<()>, Sender<()>) {
    let (go, wait) = channel();
    let (client, thread) = server(options, move |stream| {
        let (header, body) = read_message(stream).unwrap();
        let reply = region_reply(header, &body, 1);
        stream.write_all(&reply[..front]).unwrap();
        wait.recv().unwrap();
        stream.write_all(&reply[front..]).unwrap();
        while let Some((header, body)) = read_message(stream) {
            stream.write_all(&region_reply(header, &body, 2)).unwrap();
        }
    });
    (client, thread, go)
}

/// Its answer is dropped, wherever the time ran out in it, and the next request gets its own.
#[test]
fn a_late_answer_is_dropped_and_the_connection_goes_on() {
    for with_dma_thread in [false, true] {
        for front in [0, 1, 15, 16, 20, 35] {
            let dma = with_dma_thread.then(|| Memory::new(4096) as Arc<_>);
            let (client, thread, go) = held(front, ClientOptions { timeout: SHORT, dma, ..untouched() });
            let mut into = [0; 4];
            late(client.region_read(0, 0, &mut into));
            assert_eq!(client.lost(), None);
            // Nothing else is sent while it is late.
            late(client.region_read(0, 0, &mut into));
            assert_eq!(client.lost(), None);
            go.send(()).unwrap();
            client.region_read(0, 0, &mut into).unwrap();
            assert_eq!(into, [2; 4], "{front} bytes were there in time");
            drop(client);
            thread.join().unwrap();
        }
    }
}

/// A server that hangs up while it is late is lost.
#[test]
fn a_late_server_that_hangs_up_is_lost() {
    let (client, thread, go) = held(0, ClientOptions { timeout: SHORT, ..untouched() });
    late(client.region_read(0, 0, &mut [0; 4]));
    drop(go);
    assert!(thread.join().is_err());
    let lost = client.region_read(0, 0, &mut [0; 4]).unwrap_err();
    assert!(matches!(lost, ClientError::ConnectionLost { .. }), "{lost}");
    assert!(client.lost().is_some());
}

/// What was begun is sent to its end before the next.
#[test]
fn a_request_that_was_half_sent_is_finished_later() {
    let (go, wait) = channel::<()>();
    let options = ClientOptions { timeout: SHORT, ..untouched() };
    let (client, thread) = server(options, move |stream| {
        wait.recv().unwrap();
        let mut seen = 0;
        while let Some((header, body)) = read_message(stream) {
            let (head, data) = body.split_at(16);
            if header.command == Command::REGION_WRITE {
                assert!(data.iter().all(|byte| *byte == 7));
                seen += data.len();
                stream.write_all(&message(header, Kind::Reply, head)).unwrap();
            } else {
                stream.write_all(&region_reply(header, &body, 3)).unwrap();
            }
        }
        assert!(seen > 0);
    });
    // Each is as long as a request may be; the socket takes only so many.
    for _ in 0..3 {
        late(client.region_write(0, 0, &vec![7; 8 << 20]));
    }
    go.send(()).unwrap();
    let mut into = [0; 4];
    client.region_read(0, 0, &mut into).unwrap();
    assert_eq!(into, [3; 4]);
    drop(client);
    thread.join().unwrap();
}

/// Two answers, each in time: the second request waits for the first, and its time begins after that.
#[test]
fn time_spent_behind_another_request_does_not_count() {
    const LIMIT: Duration = Duration::from_secs(2);
    let options = ClientOptions { timeout: LIMIT, ..untouched() };
    let (client, thread) = server(options, move |stream| {
        while let Some((header, body)) = read_message(stream) {
            // As slow as a server may be, and not a way to wait for anything.
            sleep(LIMIT * 6 / 10);
            stream.write_all(&region_reply(header, &body, 1)).unwrap();
        }
    });
    std::thread::scope(|scope| {
        let reads: Vec<_> = (0..3).map(|_| scope.spawn(|| client.region_read(0, 0, &mut [0; 4]))).collect();
        for read in reads {
            read.join().unwrap().unwrap();
        }
    });
    drop(client);
    thread.join().unwrap();
}

/// Each answer is in time, and there is no end of them.
#[test]
fn many_requests_have_one_limit_where_somebody_waits_for_all() {
    let (client, thread) = server(untouched(), move |stream| {
        while let Some((header, body)) = read_message(stream) {
            sleep(SHORT);
            stream.write_all(&region_reply(header, &body, 1)).unwrap();
        }
    });
    client.limit_all(Some(SHORT * 4));
    let mut answers = (0..100).map(|_| client.region_read(0, 0, &mut [0; 4]));
    let error = answers.find_map(Result::err).unwrap();
    assert!(matches!(error, ClientError::OutOfTime { limit, .. } if limit == SHORT * 4), "{error}");
    let asked = client.requests_sent();
    assert!((1..=4).contains(&asked), "{asked}");
    assert!(matches!(client.region_read(0, 0, &mut [0; 4]), Err(ClientError::OutOfTime { .. })));
    assert_eq!(client.requests_sent(), asked, "nothing is sent any more");
    client.limit_all(None);
    client.region_read(0, 0, &mut [0; 4]).unwrap();
    drop(client);
    thread.join().unwrap();
}

/// Changes of state have a limit of their own.
#[test]
fn a_transition_may_take_longer_than_a_request() {
    let options =
        ClientOptions { timeout: SHORT, transition_timeout: Duration::from_secs(60), ..untouched() };
    let (client, thread) = server(options, move |stream| {
        while let Some((header, body)) = read_message(stream) {
            sleep(2 * SHORT);
            // The last answer comes too late for anybody.
            let _ = stream.write_all(&message(header, Kind::Reply, &body));
        }
    });
    client.set_mig_state(MigrationState::Stop).unwrap();
    client.reset().unwrap();
    late(client.mig_state());
    drop(client);
    thread.join().unwrap();
}

/// Sends commands at one go and then reads their answers. Gives the client's own request, if it is among them.
fn pipeline(stream: &mut UnixStream, count: usize, size: usize, mixed: usize) -> Option<(Header, Vec<u8>)> {
    let is_read = |n: usize| mixed == 0 || n % mixed == 1;
    for n in 0..count {
        let access = DmaAccess { address: (n * size) as u64, count: size as u64 };
        let mut body = access.to_vec();
        let command = if is_read(n) { Command::DMA_READ } else { Command::DMA_WRITE };
        if !is_read(n) {
            body.resize(body.len() + size, 9);
        }
        let id = 1000 + u16::try_from(n).unwrap();
        let header = Header { id, command, size: 0, kind: Kind::Command { no_reply: false } };
        stream.write_all(&message(header, header.kind, &body)).unwrap();
    }
    // Long enough for the client to fill the socket. That it did is no condition of the test.
    sleep(Duration::from_millis(10));
    let (mut asked, mut answered) = (None, 0);
    while answered < count {
        let (header, body) = read_message(stream).unwrap();
        if matches!(header.kind, Kind::Command { .. }) {
            asked = Some((header, body));
            continue;
        }
        assert_eq!(header.kind, Kind::Reply);
        let n = usize::from(header.id - 1000);
        assert_eq!(body.len(), DmaAccess::SIZE + if is_read(n) { size } else { 0 });
        answered += 1;
    }
    asked
}

/// Any number of DMA requests of any size on the one socket ends, whatever the socket holds and whenever they are read: inside
/// a request of the client's, and with none under way.
#[test]
fn pipelined_dma_ends_at_any_size() {
    for count in [1, 2, 8, 24] {
        for size in [4096, 200_000, 1 << 20] {
            for buffer in [4096, 64 << 10, 1 << 20] {
                for mixed in [0, 2, 3] {
                    for inside in [true, false] {
                        let memory = Memory::new(count * size);
                        let dma = Some(memory as Arc<_>);
                        let timeout = Duration::from_secs(20);
                        let options = ClientOptions { dma, timeout, twin_socket: false, ..untouched() };
                        let (client, thread) = server(options, move |stream| {
                            sockopt::set_socket_send_buffer_size(&*stream, buffer).unwrap();
                            let mut asked = None;
                            if inside {
                                asked = read_message(stream);
                            }
                            let among = pipeline(stream, count, size, mixed);
                            let asked = asked.or(among).or_else(|| read_message(stream));
                            let (header, body) = asked.unwrap();
                            stream.write_all(&region_reply(header, &body, 5)).unwrap();
                            let _ = stream.read(&mut [0]);
                        });
                        let mut into = [0; 4];
                        let read = client.region_read(0, 0, &mut into);
                        assert!(
                            read.is_ok() && into == [5; 4],
                            "{count} of {size} bytes, buffer {buffer}, mixed {mixed}, inside {inside}: {read:?}"
                        );
                        drop(client);
                        thread.join().unwrap();
                    }
                }
            }
        }
    }
}

/// A question waits behind others' requests no longer than it may take itself, however many requests it is.
#[test]
fn a_question_has_one_limit_with_the_wait_behind_others() {
    let (asked, is_asked) = channel();
    let (go, wait) = channel::<()>();
    // Longer than the test may take.
    let options = ClientOptions { timeout: Duration::from_secs(60), ..untouched() };
    let (client, thread) = server(options, move |stream| {
        let (header, body) = read_message(stream).unwrap();
        asked.send(()).unwrap();
        wait.recv().unwrap();
        stream.write_all(&region_reply(header, &body, 1)).unwrap();
        while let Some((header, body)) = read_message(stream) {
            stream.write_all(&region_reply(header, &body, 2)).unwrap();
        }
    });
    let begun = std::time::Instant::now();
    std::thread::scope(|scope| {
        let other = scope.spawn(|| client.region_read(0, 0, &mut [0; 4]));
        is_asked.recv().unwrap();
        let question = client.limit_question(SHORT);
        for _ in 0..3 {
            let error = client.region_read(0, 0, &mut [0; 4]).unwrap_err();
            assert!(matches!(error, ClientError::Timeout { after: SHORT, sent: false, .. }), "{error}");
        }
        assert!(
            begun.elapsed() >= SHORT && begun.elapsed() < Duration::from_secs(30),
            "{:?}",
            begun.elapsed()
        );
        drop(question);
        // The other's own is none of it, and its answer is its own.
        assert!(!other.is_finished());
        go.send(()).unwrap();
        other.join().unwrap().unwrap();
    });
    let mut into = [0; 4];
    client.region_read(0, 0, &mut into).unwrap();
    assert_eq!(into, [2; 4]);
    drop(client);
    thread.join().unwrap();
}
