//! Keep-alives, the silence of a peer, and the end of a connection, for both sides of a session.

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use crate::channel::link::Link;
use crate::session::abort::AbortOnce;

/// Time after which a session's loop looks again at what no event reports: keep-alives, silence, progress.
pub(crate) const TICK: Duration = Duration::from_millis(100);
/// Time that the link may hold up what is to be given up, before it is cut under it.
pub(crate) const GRACE: Duration = Duration::from_millis(250);
/// Nothing sent for this long: a ping, so that the peer knows that we live.
const KEEP_ALIVE: Duration = Duration::from_millis(250);
/// Silence below this proves nothing: the other side pings, but only so often, and not when its host is busy.
const SHORTEST_SILENCE: Duration = Duration::from_secs(1);
/// Time after which a cancel does not wait for an answer any more, if the guest runs. Most devices change their state in less.
pub(crate) const UNANSWERED: Duration = Duration::from_millis(400);
/// Time that a last message may take to reach the peer.
const CLOSE_LIMIT: Duration = Duration::from_millis(500);

/// Sends `peer` ("the source", "the destination") a sign that we live, and gives the link up if it has sent nothing for
/// `peer_timeout`.
pub(crate) fn keep_alive(link: &Link, peer: &str, peer_timeout: Duration) {
    link.keep_alive(KEEP_ALIVE);
    let limit = peer_timeout.max(SHORTEST_SILENCE);
    if link.silence() > limit {
        link.give_up(&format!("{peer} has said nothing for {limit:?}"));
    }
}

/// Keeps `link` alive until the sender of `ended` is dropped, whoever is silent: a file at one end of a session takes its time.
pub(crate) fn keep_alive_until(link: &Link, ended: &Receiver<()>) {
    while ended.recv_timeout(KEEP_ALIVE) == Err(RecvTimeoutError::Timeout) {
        link.keep_alive(KEEP_ALIVE);
    }
}

/// Ends the connection when the last message has been sent and received, or after a while without that. `work_ended` says whether
/// the thread that sends it has ended, as it does with its job queue, which the caller has closed, and `abort` whether another still
/// sends it; `reading` ends when the peer closes, which it does when it has read the last message. A peer that does not is not waited for.
pub(crate) fn close_gracefully(
    link: &Link,
    work_ended: impl Fn() -> bool,
    abort: &AbortOnce,
    reading: &ScopedJoinHandle<'_, ()>,
) {
    close_within(CLOSE_LIMIT, link, work_ended, abort, reading);
}

fn close_within(
    limit: Duration,
    link: &Link,
    work_ended: impl Fn() -> bool,
    abort: &AbortOnce,
    reading: &ScopedJoinHandle<'_, ()>,
) {
    let begun = Instant::now();
    let wait = |ended: &dyn Fn() -> bool| {
        while !ended() && begun.elapsed() < limit {
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    wait(&|| work_ended() && !abort.is_under_way());
    link.shutdown_write();
    wait(&|| reading.is_finished());
    link.shutdown();
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::os::unix::net::UnixStream;
    use std::sync::{Arc, mpsc};

    use vfio_migration_types::{Failure, Phase, Side};
    use vfio_migration_wire::{Frame, Message};

    use super::*;
    use crate::channel::reader::Reader;
    use crate::channel::transport::Socket;

    /// The thread that sends ABORT comes to it when the connection could long be closed: that is asked again and again before.
    #[test]
    fn a_connection_is_closed_behind_an_abort_that_another_thread_sends() {
        let (own, other) = UnixStream::pair().unwrap();
        let link = Link::accepted(Box::new(Socket::new(own.into())));
        let peer = Link::accepted(Box::new(Socket::new(other.into())));
        peer.welcome().unwrap();
        link.welcome().unwrap();
        let (go, wait) = mpsc::channel();
        let (of_thread, abort) = (Arc::clone(&link), AbortOnce::default());
        let cause = Failure::new(Side::Source, Phase::Iterate, "given up");
        let message = Message::Abort(cause.clone());
        abort.sent_by(std::thread::spawn(move || {
            if wait.recv().is_ok() {
                of_thread.send(&message).unwrap();
            }
        }));
        let mut heard = Reader::new(&peer, Side::Source);
        std::thread::scope(|scope| {
            let reading = scope.spawn(|| ());
            let (asked, go) = (Cell::new(0), Cell::new(Some(go)));
            let work_ended = || {
                asked.set(asked.get() + 1);
                if asked.get() >= 3
                    && let Some(go) = go.take()
                {
                    go.send(()).unwrap();
                }
                true
            };
            close_within(Duration::from_secs(60), &link, work_ended, &abort, &reading);
        });
        let Ok(Frame::Message(Message::Abort(told))) = heard.next() else { panic!("it was not told why") };
        assert_eq!(told.text, cause.text);
    }
}
