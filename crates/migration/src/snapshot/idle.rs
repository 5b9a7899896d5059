//! Keep-alives of the file's end of a session: the other end gives up on a peer that sends nothing.

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use crate::channel::link::Link;

/// Nothing sent for this long: a ping.
const KEEP_ALIVE: Duration = Duration::from_millis(250);

/// Keeps `link` alive until the sender of `ended` is dropped.
pub(super) fn keep_alive(link: &Link, ended: &Receiver<()>) {
    while ended.recv_timeout(KEEP_ALIVE) == Err(RecvTimeoutError::Timeout) {
        link.keep_alive(KEEP_ALIVE);
    }
}
