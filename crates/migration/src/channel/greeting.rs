//! Connections whose first message has not come. None of them is waited for: a stray connection, or one that
//! sends a byte now and then, holds up neither a session nor the next one to come.

use std::cmp::Reverse;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vfio_migration_engine::Attempt;
use vfio_migration_types::{Failure, Phase, Side, error_chain};
use vfio_migration_wire::{Hello, Message, Reason};

use crate::channel::error::ChannelError;
use crate::channel::link::Link;
use crate::channel::reader::Reader;
use crate::channel::source_host::Origin;
use crate::channel::transport::Transport;
use crate::unix_peer::AllowedUnixPeers;

/// Connections that may wait at once. For one more, another is dropped.
const MOST: usize = 64;
/// Longest wait for a connection's first message.
pub(crate) const FIRST_MESSAGE: Duration = Duration::from_secs(5);

/// What helps a source that comes when no guest can be taken in.
const TRY_AGAIN: &str = "try again later: `status` there says what it does meanwhile";

/// The first message of a connection.
pub(crate) enum Greeting {
    /// HELLO: a source wants a session.
    Session(Box<Accepted>),
    /// QUERY: a source asks what became of an attempt.
    Query(Question),
}

/// The question of a source that lost the answer to its COMMIT.
pub(crate) struct Question {
    pub(crate) link: Arc<Link>,
    /// With the epoch that the commit would begin.
    pub(crate) about: Attempt,
    /// What it says to prove that it was in the session.
    pub(crate) proof: [u8; 32],
}

/// A connection that did not begin as a migration does.
pub(crate) struct DroppedConnection {
    pub(crate) link: Arc<Link>,
    pub(crate) why: String,
    /// It was closed by its peer, who had not said a word.
    pub(crate) left: bool,
    /// Nothing was read of it: its process may not be at the other end of a unix socket.
    pub(crate) not_allowed: bool,
}

/// A connection whose HELLO has been read.
#[derive(Debug)]
pub(crate) struct Accepted {
    pub(crate) link: Arc<Link>,
    pub(crate) reader: Reader,
    pub(crate) hello: Hello,
}

impl Accepted {
    /// Refuses the connection: no migration is taken in now, and this is why.
    pub(crate) fn turn_away(&self, why: &str) {
        let told = Failure::new(Side::Destination, Phase::Hello, why).with_remedy(TRY_AGAIN);
        self.end(&Message::Abort(told));
    }

    /// Refuses the connection, for these reasons.
    pub(crate) fn refuse(&self, reasons: Vec<Reason>) {
        self.end(&Message::Refuse(reasons));
    }

    fn end(&self, last: &Message) {
        let _ = self.link.send(last);
        self.link.shutdown_write();
    }
}

/// The connections that have sent nothing yet.
#[derive(Debug, Default)]
pub(crate) struct PendingConnections {
    waiting: Vec<PendingConnection>,
    /// Who may be at the other end of a unix socket.
    peers: AllowedUnixPeers,
}

#[derive(Debug)]
struct PendingConnection {
    link: Arc<Link>,
    reader: Reader,
    origin: Origin,
    patience: Duration,
    since: Instant,
}

impl PendingConnections {
    /// None yet; over unix sockets these may be heard.
    pub(crate) fn of(peers: AllowedUnixPeers) -> Self {
        Self { waiting: Vec::new(), peers }
    }

    /// Takes in a connection, which has `patience` to send its first message whole, and has to be [looked at](Self::poll) before one is
    /// [dropped](Self::drop_one_too_many) for it. One of a process that may not be at the other end is given back as dropped: it is told
    /// why, and nothing is read of it.
    pub(crate) fn add(
        &mut self,
        transport: Box<dyn Transport>,
        patience: Duration,
    ) -> Option<DroppedConnection> {
        let stranger = transport.security().check_unix_peer(&self.peers).err();
        let link = Link::accepted(transport);
        if let Some(stranger) = stranger {
            // It is a process of this host, which may know whom it has to do with.
            let welcomed = link.welcome();
            tracing::debug!(welcomed = welcomed.is_ok(), "a peer is refused");
            return Some(DroppedConnection { not_allowed: true, ..dropped(link, error_chain(&stranger)) });
        }
        let reader = Reader::new(&link, Side::Source);
        let origin = Origin::of(&link);
        self.waiting.push(PendingConnection { link, reader, origin, patience, since: Instant::now() });
        None
    }

    /// Drops one of those that say nothing, if more wait than may.
    pub(crate) fn drop_one_too_many(&mut self) -> Option<DroppedConnection> {
        if self.waiting.len() <= MOST {
            return None;
        }
        let all: Vec<_> =
            self.waiting.iter().map(|pending| (&pending.origin, pending.reader.has_heard())).collect();
        let PendingConnection { link, reader, .. } = self.waiting.remove(dropped_first(&all)?);
        let said = if reader.has_heard() { "did not say what it wants" } else { "said nothing" };
        let why = format!("it {said}, and {MOST} others came that wait to be heard");
        Some(dropped(link, why))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The sockets, to be waited for.
    pub(crate) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.waiting.iter().map(|pending| pending.reader.fd())
    }

    /// The next whose first message has come, or why one was dropped. Never waits.
    pub(crate) fn poll(&mut self) -> Option<Result<Greeting, DroppedConnection>> {
        for at in 0..self.waiting.len() {
            let pending = self.waiting.get_mut(at)?;
            let mut left = false;
            let first = match pending.reader.first() {
                Ok(Some(message)) => Ok(message),
                Ok(None) if pending.since.elapsed() < pending.patience => continue,
                Ok(None) => Err(format!("it said nothing within {:?}", pending.patience)),
                Err(error) => {
                    left = matches!(error, ChannelError::Closed);
                    Err(error_chain(&error))
                }
            };
            return Some(self.waiting.remove(at).accepted(first, left));
        }
        None
    }
}

impl PendingConnection {
    fn accepted(self, first: Result<Message, String>, left: bool) -> Result<Greeting, DroppedConnection> {
        let Self { link, reader, .. } = self;
        let why = match first {
            Ok(Message::Query { vm, attempt, epoch, proof }) => {
                let about = Attempt { vm, attempt, epoch };
                return Ok(Greeting::Query(Question { link, about, proof }));
            }
            Ok(Message::Hello(hello)) => {
                return Ok(Greeting::Session(Box::new(Accepted { link, reader, hello })));
            }
            Ok(_) => "it began with neither HELLO nor QUERY".to_owned(),
            Err(why) => why,
        };
        Err(DroppedConnection { left, ..dropped(link, why) })
    }
}

/// Which of these, the oldest first, is dropped where they are too many: one of the network that has the most, and there of the address
/// that has the most, so that nobody is dropped for the connections of one who has more. Of that address one that has sent nothing before one
/// that has, and of these the oldest: each has the same time to say something, however many come.
fn dropped_first(all: &[(&Origin, bool)]) -> Option<usize> {
    let of_network =
        |origin: &Origin| all.iter().filter(|(other, _)| other.network == origin.network).count();
    let of_address = |origin: &Origin| all.iter().filter(|(other, _)| *other == origin).count();
    let rank = |(at, (origin, heard)): (usize, &(&Origin, bool))| {
        ((of_network(origin), of_address(origin), !heard, Reverse(at)), at)
    };
    all.iter().enumerate().map(rank).max().map(|(_, at)| at)
}

/// Ends a connection. A peer that speaks a little of our language is sent the reason; to anybody else the link sends nothing.
fn dropped(link: Arc<Link>, why: String) -> DroppedConnection {
    let told: Result<(), ChannelError> =
        link.send(&Message::Abort(Failure::new(Side::Destination, Phase::Hello, why.clone())));
    tracing::debug!(told = told.is_ok(), "a connection is dropped");
    link.shutdown();
    DroppedConnection { link, why, left: false, not_allowed: false }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(address: &str) -> Origin {
        Origin::of_ip(address.parse().unwrap())
    }

    #[test]
    fn whoever_has_most_is_dropped_first() {
        let drops = |all: &[(&str, bool)]| {
            let all: Vec<_> = all.iter().map(|(address, heard)| (origin(address), *heard)).collect();
            let all: Vec<_> = all.iter().map(|(origin, heard)| (origin, *heard)).collect();
            dropped_first(&all)
        };
        assert_eq!(drops(&[]), None);
        // One that is silent is not dropped for those of another who has more, and has begun.
        assert_eq!(drops(&[("192.0.2.1", false), ("192.0.2.2", true), ("192.0.2.2", true)]), Some(1));
        assert_eq!(drops(&[("192.0.2.2", true), ("192.0.2.2", false), ("192.0.2.2", false)]), Some(1));
        // Addresses that one host has as many of as it likes.
        let many = [("2001:db8::1", true), ("2001:db8::2", true), ("2001:db8:0:1::1", false)];
        assert_eq!(drops(&many), Some(0));
        // And in such a network it is the one address that has more.
        let one = [("2001:db8::1", false), ("2001:db8::2", true), ("2001:db8::2", true)];
        assert_eq!(drops(&one), Some(1));
        // IPv4 at a socket for both is no network of IPv6.
        let mapped = [("::ffff:192.0.2.1", false), ("192.0.2.2", true), ("::ffff:192.0.2.2", true)];
        assert_eq!(drops(&mapped), Some(1));
    }
}
