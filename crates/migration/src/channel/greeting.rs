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
use crate::channel::source_host::SourceHost;
use crate::channel::transport::Transport;
use crate::unix_peer::AllowedUnixPeers;

/// Connections that may wait at once. For one more another is dropped, or it waits itself, in the backlog of the system.
const MOST: usize = 64;
/// Time for which none is dropped for another's sake, that has sent nothing yet: a source sends the first of its handshake, or HELLO, at
/// once. And of one that has: the rest of a handshake crosses the network once or twice more.
const SILENT_PATIENCE: Duration = Duration::from_millis(250);
const SPOKEN_PATIENCE: Duration = Duration::from_secs(2);
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

/// What became of a connection that was to be taken in.
pub(crate) enum Added {
    /// It waits for its first message to come.
    Waits,
    /// The same, and this one was dropped for it.
    InsteadOf(DroppedConnection),
    /// It may not be heard, and was dropped.
    Refused(DroppedConnection),
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
    /// The address at its other end, without a port: connections of one host are dropped for one another.
    host: SourceHost,
    patience: Duration,
    since: Instant,
}

impl PendingConnections {
    /// None yet; over unix sockets these may be heard.
    pub(crate) fn of(peers: AllowedUnixPeers) -> Self {
        Self { waiting: Vec::new(), peers }
    }

    /// Whether one more may be taken in: there is room, or one has had time enough to be dropped.
    pub(crate) fn has_room(&self) -> bool {
        self.waiting.len() < MOST || self.dropped_next().is_some()
    }

    /// The one that is dropped for the next: of those that have had their time one that has sent nothing, before one that has; of these
    /// one of the host that has the most, and of its connections the oldest.
    fn dropped_next(&self) -> Option<usize> {
        let of_host = |host: &SourceHost| self.waiting.iter().filter(|other| other.host == *host).count();
        let had_time = |pending: &PendingConnection| {
            let patience = if pending.reader.has_heard() { SPOKEN_PATIENCE } else { SILENT_PATIENCE };
            pending.since.elapsed() >= patience
        };
        let candidates = self.waiting.iter().enumerate().filter(|(_, pending)| had_time(pending));
        let rank = |(at, pending): (usize, &PendingConnection)| {
            ((!pending.reader.has_heard(), of_host(&pending.host), Reverse(at)), at)
        };
        candidates.map(rank).max().map(|(_, at)| at)
    }

    /// Takes in a connection, which has `patience` to send its first message whole. One of a process that may not be at the other end is
    /// dropped instead, and takes nobody's place: it is told why, and nothing is read of it. To be asked before:
    /// [`has_room`](Self::has_room).
    pub(crate) fn add(&mut self, transport: Box<dyn Transport>, patience: Duration) -> Added {
        let stranger = transport.security().check_unix_peer(&self.peers).err();
        let link = Link::accepted(transport);
        if let Some(stranger) = stranger {
            // It is a process of this host, which may know whom it has to do with.
            let welcomed = link.welcome();
            tracing::debug!(welcomed = welcomed.is_ok(), "a peer is refused");
            return Added::Refused(DroppedConnection {
                not_allowed: true,
                ..dropped(link, error_chain(&stranger))
            });
        }
        let full = self.waiting.len() >= MOST;
        let instead = self.dropped_next().filter(|_| full).map(|at| self.waiting.remove(at));
        let reader = Reader::new(&link, Side::Source);
        let host = SourceHost::of(&link);
        self.waiting.push(PendingConnection { link, reader, host, patience, since: Instant::now() });
        match instead {
            Some(PendingConnection { link, reader, .. }) => {
                let said = if reader.has_heard() { "did not say what it wants" } else { "said nothing" };
                let why = format!("it {said}, and {MOST} others came that wait to be heard");
                Added::InsteadOf(dropped(link, why))
            }
            None => Added::Waits,
        }
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

/// Ends a connection. A peer that speaks a little of our language is sent the reason; to anybody else the link sends nothing.
fn dropped(link: Arc<Link>, why: String) -> DroppedConnection {
    let told: Result<(), ChannelError> =
        link.send(&Message::Abort(Failure::new(Side::Destination, Phase::Hello, why.clone())));
    tracing::debug!(told = told.is_ok(), "a connection is dropped");
    link.shutdown();
    DroppedConnection { link, why, left: false, not_allowed: false }
}
