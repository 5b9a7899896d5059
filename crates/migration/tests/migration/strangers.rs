//! Peers that are no source of ours: strangers who say nothing or something else, and sources that break the rules.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddrV4, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};

use crate::tls::hosts::Waiting;
use crate::toy::secure::tls_stream;
use crate::toy::*;
use vfio_migration::rustls::{ClientConnection, StreamOwned};
use vfio_migration::{
    Arrived, Destination, DestinationOptions, IncomingError, Machine, NotBuilt, Source, Uri,
};
use vfio_migration_types::{AttemptId, Epoch, Side};
use vfio_migration_wire::{
    Bulk, Crc, DeviceEnd, DeviceTotal, FEATURE_RAM_CRC, Final, FinalEnd, Frame, FrameHeader, HEADER_LEN,
    Hello, Message, Offer, PREAMBLE, VERSIONS, encode, encode_bulk,
};

fn incoming() -> DestinationOptions {
    let mut options = tls_destination();
    options.peer_timeout = Duration::from_secs(5);
    options
}

fn plan() -> Plan {
    Plan { pages: 64, hot: 8, devices: vec![], ..Plan::default() }
}

fn connect(to: &Uri) -> TcpStream {
    let Uri::Tcp { host, port } = to else { panic!("{to}") };
    let stream = TcpStream::connect((host.as_str(), *port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

/// Everything that comes until the other side hangs up.
fn all(mut stream: &TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}"),
    }
    bytes
}

fn hello(features: u64) -> Message {
    let (vm, attempt, epoch) = (VM, AttemptId([3; 16]), Epoch(0));
    Message::Hello(Hello { versions: VERSIONS, features, vm, attempt, epoch })
}

/// A source by hand.
pub(crate) struct Peer {
    stream: Stream,
    sent: u64,
    heard: u64,
}

/// Its connection, over TLS or in plain text.
trait Conversation: Read + Write {
    fn hang_up(&self);
}

type Stream = Box<dyn Conversation>;

impl Conversation for TcpStream {
    fn hang_up(&self) {
        self.shutdown(Shutdown::Both).unwrap();
    }
}

impl Conversation for StreamOwned<ClientConnection, TcpStream> {
    fn hang_up(&self) {
        self.sock.hang_up();
    }
}

impl Peer {
    pub(crate) fn new(to: &Uri) -> Self {
        Self::over(Box::new(tls_stream(connect(to))))
    }

    pub(crate) fn in_plain_text(to: &Uri) -> Self {
        Self::over(Box::new(connect(to)))
    }

    pub(crate) fn in_plain_text_from(from: [u8; 4], to: &Uri) -> Self {
        let stream = connect_from(from, to);
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Self::over(Box::new(stream))
    }

    pub(crate) fn hang_up(&self) {
        self.stream.hang_up();
    }

    fn over(mut stream: Stream) -> Self {
        stream.write_all(&PREAMBLE).unwrap();
        Self { stream, sent: 0, heard: 0 }
    }

    pub(crate) fn say(&mut self, message: &Message) {
        self.stream.write_all(&encode(message, self.sent).unwrap()).unwrap();
        self.sent += 1;
    }

    /// Bulk, and the body behind it. The other side may have hung up on us.
    fn bulk(&mut self, bulk: &Bulk<'_>, body: &[u8]) {
        let frame = encode_bulk(bulk, self.sent).unwrap();
        self.sent += 1;
        for part in [frame.parts()[0], frame.parts()[1], body] {
            let _ = self.stream.write_all(part);
        }
    }

    pub(crate) fn hear(&mut self) -> Message {
        if self.heard == 0 {
            let mut preamble = [0; PREAMBLE.len()];
            self.stream.read_exact(&mut preamble).unwrap();
            assert_eq!(preamble, PREAMBLE);
        }
        loop {
            let mut head = [0; HEADER_LEN];
            self.stream.read_exact(&mut head).unwrap();
            let header = FrameHeader::parse(&head, self.heard).unwrap();
            self.heard += 1;
            let mut payload = vec![0; header.payload_len()];
            self.stream.read_exact(&mut payload).unwrap();
            match Frame::decode(&header, &payload, Side::Destination).unwrap() {
                Frame::Message(Message::Ping { .. } | Message::Pong { .. } | Message::Credit { .. }) => {}
                Frame::Message(message) => return message,
                other => panic!("{other:?}"),
            }
        }
    }

    pub(crate) fn hear_abort(&mut self) -> String {
        loop {
            if let Message::Abort(cause) | Message::Declined(cause) = self.hear() {
                return cause.text;
            }
        }
    }

    /// Up to where bulk may come.
    pub(crate) fn begin(&mut self, machine: &Toy, features: u64) {
        self.say(&hello(features));
        assert!(matches!(self.hear(), Message::HelloReply(_)));
        let manifest = machine.manifest().unwrap().to_json().unwrap();
        self.say(&Message::Offer(Offer { manifest, ..Offer::default() }));
        let Message::Accept(accept) = self.hear() else { panic!("it did not accept") };
        self.say(&Message::Begin { lease: accept.lease.id });
        assert_eq!(self.hear(), Message::Begun);
    }
}

fn last(machine: &Toy) -> Final {
    Final { guest_ran: true, suspend: false, identity: machine.manifest().unwrap().identity_digest() }
}

/// A destination that takes in what `speak` sends.
fn receive(speak: impl FnOnce(&Uri, &Toy)) -> (Result<Arrived, IncomingError>, Arc<Toy>) {
    receive_into(&plan(), speak)
}

fn receive_into(plan: &Plan, speak: impl FnOnce(&Uri, &Toy)) -> (Result<Arrived, IncomingError>, Arc<Toy>) {
    let mut options = incoming();
    // An attempt that was given up after READY stays answerable for four of these.
    options.peer_timeout = Duration::from_secs(2);
    let mut destination = Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), options).unwrap();
    let to = destination.local().clone();
    let machine = Toy::new(plan);
    let built = machine.clone();
    let there = std::thread::scope(|scope| {
        let arriving = scope.spawn(move || destination.accept(|_| Ok(built as Arc<dyn Machine>)));
        speak(&to, &machine);
        arriving.join().unwrap()
    });
    (there, machine)
}

fn aborted(there: Result<Arrived, IncomingError>) -> String {
    match there {
        Err(IncomingError::Aborted(cause)) => cause.text.clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_configuration_that_is_not_the_one_of_its_digest_makes_no_machine() {
    let (there, _) = receive(|to, machine| {
        let mut source = Peer::new(to);
        source.say(&hello(0));
        assert!(matches!(source.hear(), Message::HelloReply(_)));
        let manifest = machine.manifest().unwrap().to_json().unwrap();
        let (configuration, configuration_digest) = (b"own words".to_vec(), [1; 32]);
        let offer = Offer { configuration, configuration_digest, manifest, ..Offer::default() };
        source.say(&Message::Offer(offer));
        assert!(source.hear_abort().contains("not the one that its digest is of"));
    });
    assert!(aborted(there).contains("not the one that its digest is of"));
}

#[test]
fn strangers_read_nothing_and_hold_nobody_up() {
    let mut options = incoming();
    // Over TLS they would be sent an alert.
    options.security = plain_destination().security;
    // Whoever says nothing is given this long.
    options.peer_timeout = Duration::from_secs(3);
    let plan = plan();
    let mut destination = Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), options).unwrap();
    let to = destination.local().clone();
    let source = Toy::booted(&plan);
    let built = Toy::new(&plan);
    // They come first, and stay.
    let silent: Vec<_> = (0..4).map(|_| connect(&to)).collect();
    let mut half = connect(&to);
    half.write_all(&PREAMBLE[..5]).unwrap();
    let mut http = connect(&to);
    http.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    std::thread::scope(|scope| {
        let arriving = scope.spawn(move || {
            let arrived = destination.accept(|_| Ok(built as Arc<dyn Machine>));
            (arrived, destination)
        });
        assert_eq!(all(&http), b"", "an HTTP client was answered");
        let begun = Instant::now();
        Source::new(source.clone(), plain_source()).migrate_to(&to, |_| {}).unwrap();
        assert!(begun.elapsed() < Duration::from_secs(2), "strangers held a source up");
        let (arrived, mut destination) = arriving.join().unwrap();
        arrived.unwrap();
        // Their time comes to its end, whoever looks.
        destination.answer_queries(Duration::from_secs(4)).unwrap();
    });
    for stranger in silent.iter().chain([&half]) {
        assert_eq!(all(stranger), b"", "a stranger was answered");
    }
}

#[test]
fn strangers_and_dribble_do_not_hold_up_a_session() {
    let (there, _) = receive(|to, machine| {
        let mut peer = Peer::new(to);
        peer.begin(machine, 0);
        let silent: Vec<_> = (0..30).map(|_| connect(to)).collect();
        let mut slow = connect(to);
        let begun = Instant::now();
        for round in 1..=20u32 {
            if let Some(byte) = PREAMBLE.get(round as usize) {
                let _ = slow.write_all(&[*byte]);
            }
            peer.say(&Message::EndIteration { iteration: round });
            let Message::Applied(applied) = peer.hear() else { panic!("no APPLIED") };
            assert_eq!(applied.iteration, round);
        }
        // One of them has 5 s to say something.
        assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
        drop(silent);
        peer.stream.hang_up();
    });
    aborted(there);
}

#[test]
fn a_source_that_came_first_is_not_dropped_for_those_behind_it() {
    // Over TLS it says HELLO once it is listened to.
    let mut options = incoming();
    options.security = plain_destination().security;
    let mut destination = Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), options).unwrap();
    let to = destination.local().clone();
    // All of them are in the backlog before the first is accepted.
    let mut peer = Peer::in_plain_text(&to);
    peer.say(&hello(0));
    let silent: Vec<_> = (0..80).map(|_| connect(&to)).collect();
    std::thread::scope(|scope| {
        let built = Toy::new(&plan());
        let control = destination.control();
        let arriving = scope.spawn(move || destination.accept(|_| Ok(built as Arc<dyn Machine>)));
        assert!(matches!(peer.hear(), Message::HelloReply(_)), "the rightful source was dropped unread");
        peer.stream.hang_up();
        control.cancel();
        assert!(matches!(arriving.join().unwrap(), Err(IncomingError::Cancelled(_))));
    });
    drop(silent);
}

/// A connection of a host with this address.
fn connect_from(from: [u8; 4], to: &Uri) -> TcpStream {
    let Uri::Tcp { port, .. } = to else { panic!("{to}") };
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
    bind(&socket, &SocketAddrV4::new(from.into(), 0)).unwrap();
    rustix::net::connect(&socket, &SocketAddrV4::new([127, 0, 0, 1].into(), *port)).unwrap();
    socket.into()
}

/// What is in its handshake is not thrown out for those that come behind it: neither for those of its own host that say nothing, nor for
/// those of another that begin as it does, however many and long.
#[test]
fn a_flood_throws_nobody_out_who_is_in_its_handshake() {
    for (from, speak) in [([127, 0, 0, 1], false), ([127, 0, 0, 2], false), ([127, 0, 0, 2], true)] {
        let mut destination =
            Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), tls_destination()).unwrap();
        let (to, control) = (destination.local().clone(), destination.control());
        let stopped = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let built = Toy::new(&plan());
            let arriving = scope.spawn(move || destination.accept(|_| Ok(built as Arc<dyn Machine>)));
            let waiting = Waiting(control.clone());
            // It has begun, and the network takes its time.
            let mut stream = tls_stream(connect(&to));
            stream.conn.write_tls(&mut stream.sock).unwrap();
            let stop = Stop(&stopped);
            let stopped = &stopped;
            let at = &to;
            scope.spawn(move || {
                let mut flood = VecDeque::new();
                while !stopped.load(Ordering::Relaxed) {
                    let mut one = connect_from(from, at);
                    if speak {
                        // The head of a record, and no more.
                        one.write_all(&[0x16, 3, 1, 2, 0]).unwrap();
                    }
                    one.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
                    flood.push_back(one);
                    // As many as wait at once, and some behind them; another for each that is thrown out.
                    while flood.len() > 100 && !stopped.load(Ordering::Relaxed) {
                        let oldest = flood.front_mut().unwrap();
                        let is_late = |error: &std::io::Error| {
                            matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
                        };
                        if !oldest.read(&mut [0; 64]).is_err_and(|error| is_late(&error)) {
                            flood.pop_front();
                        }
                    }
                }
            });
            wait_for("one of them to be thrown out", || {
                let last = control.refused().last;
                last.is_some_and(|last| last.to_string().contains("others came that wait to be heard"))
            });
            drop(stop);
            let mut peer = Peer::over(Box::new(stream));
            peer.say(&hello(0));
            assert!(matches!(peer.hear(), Message::HelloReply(_)), "{from:?}, speaks: {speak}");
            drop(waiting);
            drop(arriving.join().unwrap());
        });
    }
}

/// Holds so many connections from one address, each of which has begun a handshake, and comes back when it is closed.
fn come_back(count: usize, from: [u8; 4], to: &Uri, stopped: &AtomicBool, came: &AtomicUsize) {
    let Uri::Tcp { port, .. } = to else { panic!("{to}") };
    let open = || {
        let socket =
            socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::NONBLOCK, None).unwrap();
        bind(&socket, &SocketAddrV4::new(from.into(), 0)).unwrap();
        let _ = rustix::net::connect(&socket, &SocketAddrV4::new([127, 0, 0, 1].into(), *port));
        (TcpStream::from(socket), false)
    };
    let mut sockets: Vec<_> = (0..count).map(|_| open()).collect();
    let slice = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
    while !stopped.load(Ordering::Relaxed) {
        let wanted = |spoken: bool| if spoken { PollFlags::IN } else { PollFlags::OUT };
        let mut polled: Vec<_> =
            sockets.iter().map(|(socket, spoken)| PollFd::new(socket, wanted(*spoken))).collect();
        let _ = poll(&mut polled, Some(&slice));
        let ready: Vec<_> = polled.iter().map(|polled| !polled.revents().is_empty()).collect();
        for (connection, _) in sockets.iter_mut().zip(ready).filter(|(_, ready)| *ready) {
            let (socket, spoken) = connection;
            let lives = match spoken {
                false => socket.write(&[0x16, 3, 1, 2, 0, 1, 0]).is_ok(),
                true => socket.read(&mut [0; 64]).is_ok_and(|bytes| bytes > 0),
            };
            came.fetch_add(usize::from(!*spoken), Ordering::Relaxed);
            *spoken = true;
            if !lives {
                *connection = open();
            }
        }
    }
}

/// They fill all places, and the backlog too, if one waits there for another's time to be over.
#[test]
fn many_connections_of_one_address_keep_no_other_out() {
    let mut destination =
        Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), tls_destination()).unwrap();
    let (to, control) = (destination.local().clone(), destination.control());
    let (stopped, came) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let arriving = scope.spawn(move || {
            destination.accept(|_| -> Result<Arc<dyn Machine>, NotBuilt> { panic!("nothing was offered") })
        });
        let waiting = Waiting(control);
        let stop = Stop(&stopped);
        scope.spawn(|| come_back(250, [127, 0, 0, 2], &to, &stopped, &came));
        wait_for("the flood", || came.load(Ordering::Relaxed) >= 250);
        let begun = Instant::now();
        // Each comes while nobody is received, or while the session of the one before it ends.
        for round in 0..6 {
            let mut peer = Peer::new(&to);
            peer.say(&hello(0));
            assert!(matches!(peer.hear(), Message::HelloReply(_)), "round {round}");
            peer.hang_up();
        }
        assert!(begun.elapsed() < Duration::from_secs(12), "{:?}", begun.elapsed());
        drop((stop, waiting));
        drop(arriving.join().unwrap());
    });
}

/// Ends a flood, however a test ends.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn many_strangers_are_counted_and_told_in_few_words() {
    const MANY: u64 = 200;
    let mut options = incoming();
    options.security = plain_destination().security;
    let mut destination = Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), options).unwrap();
    let (to, control) = (destination.local().clone(), destination.control());
    let (heard, told) = std::sync::mpsc::channel();
    control.on_refused(move |refused| heard.send(refused.clone()).unwrap());
    std::thread::scope(|scope| {
        let waiting = scope.spawn(move || {
            drop(destination.accept(|_| -> Result<Arc<dyn Machine>, NotBuilt> { panic!("nobody came") }));
        });
        for _ in 0..MANY {
            let mut stranger = connect(&to);
            stranger.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
            assert_eq!(all(&stranger), b"");
        }
        wait_for("all of them to be counted", || control.refused().count == MANY);
        control.cancel();
        waiting.join().unwrap();
    });
    // The last of them when the wait ends, if not before.
    let told: Vec<_> = told.try_iter().collect();
    let left_out: u64 = told.iter().map(|refused| refused.left_out).sum();
    assert_eq!(told.len() as u64 + left_out, MANY, "some were forgotten");
    assert!(told.len() < 100, "{} of {MANY} were told one by one", told.len());
    let last = told.last().unwrap().to_string();
    assert!(last.ends_with("more before it)"), "{last}");
}

#[test]
fn bulk_behind_final_end_is_refused() {
    let (there, machine) = receive(|to, machine| {
        let mut peer = Peer::new(to);
        peer.begin(machine, 0);
        peer.say(&Message::EndIteration { iteration: 1 });
        assert!(matches!(peer.hear(), Message::Applied(_)));
        peer.say(&Message::Final(last(machine)));
        peer.bulk(&Bulk::Section { name: "toy.vcpu", version: 1, bytes: &[0; 8] }, &[]);
        peer.say(&Message::LocksFree);
        peer.say(&Message::FinalEnd(FinalEnd {
            ram_pages: 0,
            ram_digest: None,
            sections: 1,
            devices: vec![],
        }));
        assert!(matches!(peer.hear(), Message::Ready(_)));
        peer.bulk(&Bulk::ZeroPages { first: 0, count: 1 }, &[]);
        let text = peer.hear_abort();
        assert!(text.contains("after FINAL_END"), "{text}");
        assert!(
            !machine.locked.load(std::sync::atomic::Ordering::Relaxed),
            "DECLINED came before the locks went"
        );
    });
    assert!(aborted(there).contains("after FINAL_END"));
    machine.prove_standing();
}

/// Machine state and the end of a device's state can only be whole once nothing runs any more.
#[test]
fn what_ends_something_is_refused_before_final() {
    let total = DeviceTotal { bytes: 0, digest: *blake3::hash(&[]).as_bytes() };
    let plan = Plan { devices: vec![FakeDeviceKind::default()], ..plan() };
    for early in [
        Bulk::Section { name: "toy.vcpu", version: 1, bytes: &[0; 8] },
        Bulk::DeviceEnd(DeviceEnd { device: 0, total }),
    ] {
        let (there, _) = receive_into(&plan, |to, machine| {
            let mut peer = Peer::new(to);
            peer.begin(machine, 0);
            peer.bulk(&early, &[]);
            let text = peer.hear_abort();
            assert!(text.contains("before FINAL"), "{text}");
        });
        assert!(aborted(there).contains("before FINAL"), "{early:?}");
    }
}

#[test]
fn pages_without_the_checksum_that_is_due_are_refused() {
    let page = [7; 4096];
    let bare = Bulk::Pages { first: 1, count: 1, crc: None };
    for (features, behind_final) in [(0, true), (FEATURE_RAM_CRC, false)] {
        let (there, _) = receive(|to, machine| {
            let mut peer = Peer::new(to);
            peer.begin(machine, features);
            if behind_final {
                // Before FINAL it is as it should be.
                peer.bulk(&bare, &page);
                peer.say(&Message::EndIteration { iteration: 1 });
                assert!(matches!(peer.hear(), Message::Applied(_)));
                peer.say(&Message::Final(last(machine)));
            }
            peer.bulk(&bare, &page);
            let text = peer.hear_abort();
            assert!(text.contains("checksum"), "{text}");
        });
        assert!(aborted(there).contains("checksum"));
    }
}

#[test]
fn pages_whose_checksum_is_wrong_are_refused() {
    let body = [7; 3 * 4096];
    let right = Crc::of(&body).value();
    for (features, behind_final) in [(0, true), (FEATURE_RAM_CRC, false)] {
        let (there, _) = receive(|to, machine| {
            let mut peer = Peer::new(to);
            peer.begin(machine, features);
            if behind_final {
                peer.say(&Message::EndIteration { iteration: 1 });
                assert!(matches!(peer.hear(), Message::Applied(_)));
                peer.say(&Message::Final(last(machine)));
            }
            peer.bulk(&Bulk::Pages { first: 1, count: 3, crc: Some(right) }, &body);
            peer.bulk(&Bulk::Pages { first: 1, count: 3, crc: Some(right ^ 1) }, &body);
            let text = peer.hear_abort();
            assert!(text.contains("CRC-32C"), "{text}");
        });
        assert!(aborted(there).contains("CRC-32C"));
    }
}

/// A piece that was lost, doubled or swapped: as its first, or after one that is in its place.
#[test]
fn a_piece_of_device_state_that_is_out_of_place_is_refused() {
    let bytes = [9; 4096];
    let plan = Plan { devices: vec![FakeDeviceKind::default()], ..plan() };
    let piece = |sequence, offset| Bulk::DeviceData { device: 0, sequence, offset, bytes: &bytes };
    for wrong in [piece(0, 0), piece(2, 4096), piece(1, 0), piece(1, 8192)] {
        let (there, _) = receive_into(&plan, |to, machine| {
            let mut peer = Peer::new(to);
            peer.begin(machine, 0);
            peer.bulk(&piece(0, 0), &[]);
            peer.bulk(&wrong, &[]);
            let text = peer.hear_abort();
            assert!(text.contains("came where piece 1 at byte 4096 was due"), "{text}");
        });
        assert!(aborted(there).contains("was due"), "{wrong:?}");
    }
}

#[test]
fn a_source_that_asks_and_never_reads_is_given_up() {
    let (there, _) = receive(|to, machine| {
        let mut peer = Peer::new(to);
        peer.begin(machine, 0);
        // Its answers fill the sockets, and then wait.
        for round in 1..u32::MAX {
            let frame = encode(&Message::EndIteration { iteration: round }, peer.sent).unwrap();
            peer.sent += 1;
            if peer.stream.write_all(&frame).is_err() {
                break;
            }
        }
    });
    assert!(aborted(there).contains("does not read"), "another reason");
}

#[test]
fn a_panic_of_the_vmm_ends_the_attempt() {
    let plan = plan();
    let mut destination = Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), incoming()).unwrap();
    let to = destination.local().clone();
    let source = Toy::booted(&plan);
    let (here, there) = std::thread::scope(|scope| {
        let arriving = scope.spawn(move || {
            destination.accept(|_| -> Result<Arc<dyn Machine>, vfio_migration::NotBuilt> {
                panic!("no machine today")
            })
        });
        let here = Source::new(source.clone(), tls_source()).migrate_to(&to, |_| {});
        (here, arriving.join().unwrap())
    });
    assert!(here.is_err());
    let text = aborted(there);
    assert!(text.contains("panic") && text.contains("no machine today"), "{text}");
    source.prove_restored();
}
