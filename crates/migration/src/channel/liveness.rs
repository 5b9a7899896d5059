//! Keep-alives, the silence of a peer, and the end of a connection, for both sides of a session.

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use crate::channel::link::Link;

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

/// Ends the connection when the last message has been sent and received, or after a while without that. `working` says whether
/// the thread that sends it has ended, as it does with its job queue, which the caller has closed; `reading` ends when the peer
/// closes, which it does when it has read the last message. A peer that does not is not waited for.
pub(crate) fn close_gracefully(
    link: &Link,
    work_ended: impl Fn() -> bool,
    reading: &ScopedJoinHandle<'_, ()>,
) {
    let begun = Instant::now();
    let wait = |ended: &dyn Fn() -> bool| {
        while !ended() && begun.elapsed() < CLOSE_LIMIT {
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    wait(&work_ended);
    link.shutdown_write();
    wait(&|| reading.is_finished());
    link.shutdown();
}
