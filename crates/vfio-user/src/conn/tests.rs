//! Requests that are held back until the command of the peer is answered, and what is read while another thread sends.

use std::io::{ErrorKind, Read, Write};
use std::thread::{JoinHandle, spawn};

use super::*;

/// Longer than anything here takes.
const LONG: Duration = Duration::from_secs(60);

const ASK: SocketRequest<'static> = SocketRequest {
    command: Command::DMA_READ,
    parts: &[],
    fds: &[],
    max_reply: 0,
    limit: LONG,
    until: None,
    after_reply: true,
};

/// A connection that holds requests back for so long, a command of its peer in service, and the peer.
fn serving(hold: Duration) -> (Arc<Conn>, Header, UnixStream) {
    let (near, mut peer) = UnixStream::pair().unwrap();
    let mut conn = Conn::new(near, 64, 0, None).unwrap();
    conn.hold = hold;
    let kind = Kind::Command { no_reply: false };
    let header = Header { id: 7, command: Command::DEVICE_RESET, size: 16, kind };
    peer.write_all(&header.encode()).unwrap();
    peer.set_read_timeout(Some(LONG / 2)).unwrap();
    let command = conn.next_command(LONG).unwrap();
    (Arc::new(conn), command.header, peer)
}

fn next(peer: &mut UnixStream) -> Header {
    let mut raw = [0; HEADER_SIZE];
    peer.read_exact(&mut raw).unwrap();
    Header::decode(&raw).unwrap()
}

/// Takes a request, which has to be what comes next, and answers it.
fn answers(peer: &mut UnixStream) {
    let asked = next(peer);
    assert_eq!((asked.command, asked.kind), (Command::DMA_READ, Kind::Command { no_reply: false }));
    peer.write_all(&Header { kind: Kind::Reply, ..asked }.encode()).unwrap();
}

fn ask(conn: &Arc<Conn>) -> JoinHandle<Result<SocketMessage, ConnError>> {
    let conn = Arc::clone(conn);
    spawn(move || conn.exchange(&ASK, None))
}

#[test]
fn a_request_waits_until_the_command_in_service_is_answered() {
    let (conn, command, mut peer) = serving(LONG);
    let asking = ask(&conn);
    // Nothing comes before the reply, however long it takes.
    peer.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    assert_eq!(peer.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    peer.set_read_timeout(Some(LONG / 2)).unwrap();
    conn.reply(&command, Kind::Reply, &[], &[], LONG).unwrap();
    let next_one = spawn({
        let conn = Arc::clone(&conn);
        move || conn.next_command(LONG)
    });
    assert_eq!((next(&mut peer).id, command.id), (7, 7));
    answers(&mut peer);
    asking.join().unwrap().unwrap();
    conn.kill("the test is over");
    next_one.join().unwrap().unwrap_err();
}

#[test]
fn whoever_serves_the_command_is_not_held_back() {
    let (conn, command, mut peer) = serving(LONG);
    let peer = spawn(move || {
        answers(&mut peer);
        next(&mut peer)
    });
    conn.exchange(&ASK, None).unwrap();
    conn.reply(&command, Kind::Reply, &[], &[], LONG).unwrap();
    assert_eq!(peer.join().unwrap().id, 7);
}

/// The device waits for its own thread's DMA before it answers: the thread is held back once, and then no more.
#[test]
fn a_command_that_waits_for_the_request_gets_it() {
    let (conn, command, mut peer) = serving(Duration::from_millis(1));
    let peer = spawn(move || {
        answers(&mut peer);
        answers(&mut peer);
        next(&mut peer)
    });
    ask(&conn).join().unwrap().unwrap();
    assert_eq!(lock(&conn.rx).taker, None);
    ask(&conn).join().unwrap().unwrap();
    conn.reply(&command, Kind::Reply, &[], &[], LONG).unwrap();
    assert_eq!(peer.join().unwrap().id, 7);
}

/// Waits until the connection has read all that its peer has sent.
fn all_read(conn: &Conn) {
    while rustix::io::ioctl_fionread(&conn.socket).unwrap() > 0 {
        std::thread::yield_now();
    }
}

/// A connection whose peer has sent a command.
fn commanded() -> (Arc<Conn>, UnixStream) {
    let (near, mut peer) = UnixStream::pair().unwrap();
    let kind = Kind::Command { no_reply: false };
    let header = Header { id: 9, command: Command::DMA_WRITE, size: 16, kind };
    peer.write_all(&header.encode()).unwrap();
    peer.set_read_timeout(Some(LONG / 2)).unwrap();
    (Arc::new(Conn::new(near, 64, 0, None).unwrap()), peer)
}

#[test]
fn what_is_read_while_another_thread_sends_is_served() {
    let (conn, mut peer) = commanded();
    let sending = lock(&conn.tx);
    let waiting = spawn({
        let conn = Arc::clone(&conn);
        move || {
            let serve =
                |message: &SocketMessage| Header { kind: Kind::Reply, ..message.header }.encode().to_vec();
            let mut rx = lock(&conn.rx);
            rx.awaited = Some(Awaited { id: 1, command: Command::DMA_READ, max_reply: 0 });
            conn.answer(&mut rx, Some(&serve), deadline(LONG))
        }
    });
    all_read(&conn);
    drop(sending);
    assert_eq!(next(&mut peer).id, 9);
    let reply = Header { id: 1, command: Command::DMA_READ, size: 16, kind: Kind::Reply };
    peer.write_all(&reply.encode()).unwrap();
    waiting.join().unwrap().unwrap();
}

#[test]
fn what_is_read_while_another_thread_sends_is_handed_out() {
    let (conn, _peer) = commanded();
    let sending = lock(&conn.tx);
    let (sender, taken) = std::sync::mpsc::channel();
    let taking = spawn({
        let conn = Arc::clone(&conn);
        move || sender.send(conn.next_command(LONG).map(|message| message.header.id))
    });
    all_read(&conn);
    drop(sending);
    assert_eq!(taken.recv_timeout(LONG / 2).unwrap().unwrap(), 9);
    taking.join().unwrap().unwrap();
}
