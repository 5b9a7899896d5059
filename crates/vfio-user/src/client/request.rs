//! How a request is made: limits before it, deadline over it, errors after it.

use std::os::fd::BorrowedFd;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::connection::Client;
use super::dma::answer;
use crate::codec::{self, CodecError, Command, Feature, FeatureHead, Kind};
use crate::conn::{ConnError, SocketMessage, SocketRequest, Unfit};
use crate::error::ClientError;

/// The commands that every server knows.
pub(super) const BASICS: [Command; 10] = [
    Command::VERSION,
    Command::DMA_MAP,
    Command::DMA_UNMAP,
    Command::DEVICE_GET_INFO,
    Command::DEVICE_GET_REGION_INFO,
    Command::DEVICE_GET_IRQ_INFO,
    Command::DEVICE_SET_IRQS,
    Command::REGION_READ,
    Command::REGION_WRITE,
    Command::DEVICE_RESET,
];

impl Client {
    /// A request with its payload in one piece.
    pub(super) fn request(
        &self,
        command: Command,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
        max_reply: usize,
    ) -> Result<SocketMessage, ClientError> {
        self.request_parts(command, &[body], fds, max_reply)
    }

    /// A request. Its reply has at most `max_reply` bytes of payload.
    pub(super) fn request_parts(
        &self,
        command: Command,
        parts: &[&[u8]],
        fds: &[BorrowedFd<'_>],
        max_reply: usize,
    ) -> Result<SocketMessage, ClientError> {
        if let Some(why) = self.conn.death() {
            return Err(ClientError::ConnectionLost { why });
        }
        if self.basics_only && !BASICS.contains(&command) {
            // The kernel's word for what a device does not have.
            return Err(ClientError::Refused { command, errno: Some(Errno::NOTTY) });
        }
        let len = parts.iter().fold(0usize, |len, part| len.saturating_add(part.len()));
        self.fit("the payload of a request, in bytes,", len, self.longest_payload())?;
        let question = self.questions.of_this_thread();
        // Whoever asks a question has been told how long its answer may take, however many requests that is.
        let own = question.map_or_else(|| self.limit(command, parts), |question| question.limit);
        let (limit, all) = self.within_all(own);
        if question.is_some_and(|question| question.until <= Instant::now()) {
            return Err(ClientError::Timeout { command, after: own, sent: false });
        }
        if limit.is_zero()
            && let Some(limit) = all
        {
            return Err(ClientError::OutOfTime { command, limit });
        }
        self.requests.fetch_add(1, Ordering::Relaxed);
        let until = question.map(|question| question.until);
        let request = SocketRequest { command, parts, fds, max_reply, limit, until, after_reply: false };
        let handler = self.dma.as_deref();
        let max = self.announced_xfer;
        // With a twin socket the server has no business sending commands on this one; it is told so by a refusal.
        let handler = handler.filter(|_| !self.negotiated.twin_socket);
        let reply = self.conn.exchange(&request, Some(&|message| answer(message, handler, max)));
        let reply = reply.map_err(|error| match (error, all) {
            (ConnError::Timeout | ConnError::Behind, Some(all)) if limit < own => {
                ClientError::OutOfTime { command, limit: all }
            }
            (error, _) => failure(command, limit, error),
        })?;
        own_lack(&reply)?;
        match reply.header.kind {
            Kind::Error(errno) => {
                let errno = real_errno(errno);
                if errno.is_none() && !BASICS.contains(&command) {
                    // Servers that do not know the command refuse it so, and take its payload for the next message.
                    let why = format!(
                        "the server refused {command} without an errno, as servers do that lose step over it"
                    );
                    self.conn.kill(why.clone());
                    return Err(ClientError::ConnectionLost { why });
                }
                Err(ClientError::Refused { command, errno })
            }
            _ => Ok(reply),
        }
    }

    /// A DEVICE_FEATURE request with `data`; its reply has at most `room` bytes behind the head. The head is checked.
    pub(super) fn feature(
        &self,
        feature: Feature,
        op: u32,
        data: &[u8],
        room: usize,
    ) -> Result<SocketMessage, ClientError> {
        let room = FeatureHead::SIZE + room.max(data.len());
        let ask = FeatureHead { argsz: super::device::size_u32(room), flags: u32::from(feature.0) | op };
        let command = Command::DEVICE_FEATURE;
        let reply = self.request_parts(command, &[&ask.to_vec(), data], &[], room)?;
        let head = self.parse(&reply, FeatureHead::decode_prefix)?;
        if head.flags != ask.flags {
            return Err(
                self.lie(&reply, format!("feature flags {:#x} instead of {:#x}", head.flags, ask.flags))
            );
        }
        Ok(reply)
    }

    /// Reads a reply's payload.
    pub(super) fn parse<'m, T>(
        &self,
        reply: &'m SocketMessage,
        decode: impl FnOnce(&'m [u8]) -> Result<T, CodecError>,
    ) -> Result<T, ClientError> {
        decode(&reply.body).map_err(|error| self.lie(reply, error.to_string()))
    }

    /// The error for a reply in a sound frame that makes no sense.
    #[expect(clippy::unused_self, reason = "reads as the others at its many places of use")]
    pub(super) fn lie(&self, reply: &SocketMessage, what: impl Into<String>) -> ClientError {
        ClientError::Protocol { command: reply.header.command, what: what.into() }
    }

    /// Refuses a count that is over the limit.
    #[expect(clippy::unused_self, reason = "reads as the others at its many places of use")]
    pub(super) fn fit<N: TryInto<u64>>(
        &self,
        what: &'static str,
        value: N,
        limit: usize,
    ) -> Result<u32, ClientError> {
        let (value, limit) = (value.try_into().unwrap_or(u64::MAX), limit as u64);
        match u32::try_from(value) {
            Ok(fits) if value <= limit => Ok(fits),
            _ => Err(ClientError::Limit { what, value, limit }),
        }
    }

    /// The most data that one reply is asked for.
    pub(super) fn piece(&self) -> usize {
        usize::try_from(self.negotiated.max_data_xfer_size).unwrap_or(usize::MAX).max(1)
    }

    /// The most data in one request, behind `head` bytes that say what it is.
    pub(super) fn piece_behind(&self, head: usize) -> usize {
        self.piece().min(self.longest_payload().saturating_sub(head)).max(1)
    }

    /// The longest payload of a request.
    pub(super) fn longest_payload(&self) -> usize {
        self.negotiated.extension.longest_payload()
    }

    /// What is left of `own`, the limit on a request, where all of them have one; and that.
    fn within_all(&self, own: Duration) -> (Duration, Option<Duration>) {
        match *self.all_until.lock().unwrap_or_else(PoisonError::into_inner) {
            Some((until, all)) => (own.min(until.saturating_duration_since(Instant::now())), Some(all)),
            None => (own, None),
        }
    }

    /// How long the answer to a request may take: longer where the device changes its state.
    fn limit(&self, command: Command, parts: &[&[u8]]) -> Duration {
        let set_state = u32::from(Feature::MIG_DEVICE_STATE.0) | codec::FEATURE_SET;
        let sets_state = command == Command::DEVICE_FEATURE
            && parts
                .first()
                .and_then(|head| FeatureHead::decode_prefix(head).ok())
                .is_some_and(|head| head.flags == set_state);
        if sets_state || command == Command::DEVICE_RESET { self.transition_timeout } else { self.timeout }
    }
}

fn failure(command: Command, after: Duration, error: ConnError) -> ClientError {
    match error {
        ConnError::Timeout => ClientError::Timeout { command, after, sent: true },
        ConnError::Behind => ClientError::Timeout { command, after, sent: false },
        ConnError::Interrupted => ClientError::ConnectionLost { why: "the client was closed".into() },
        ConnError::Closed(why) => ClientError::ConnectionLost { why },
        error @ (ConnError::Late(_) | ConnError::System { .. }) => {
            ClientError::ConnectionLost { why: error.why() }
        }
        ConnError::Violation(what) => ClientError::Protocol { command, what },
    }
}

/// Fails where a reply's descriptors could not be taken for want of room in this process: the server did nothing wrong.
pub(super) fn own_lack(reply: &SocketMessage) -> Result<(), ClientError> {
    if reply.unfit != Some(Unfit::NoRoomForFds) {
        return Ok(());
    }
    let command = reply.header.command;
    let doing = format!(
        "the descriptors of the reply to {command} could not be taken: this process has too many open"
    );
    Err(ClientError::Io { doing, source: Errno::MFILE.into() })
}

/// The errno of a refusal, if it is one.
fn real_errno(errno: u32) -> Option<Errno> {
    // The kernel's own range of error numbers.
    i32::try_from(errno).ok().filter(|errno| (1..4096).contains(errno)).map(Errno::from_raw_os_error)
}
