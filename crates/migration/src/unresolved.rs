//! A migration whose COMMIT was sent and never answered, and what can be done about it: ask again, or decide.

use std::fmt;
use std::sync::{Arc, Mutex};

use vfio_migration_types::{AttemptId, Epoch, Failure, GuestOutcome, Phase, Side, VmId};

use crate::session::lock::lock;
use crate::uri::Uri;

/// A migration of which nobody here knows whether the guest is the destination's. The guest is paused, its devices are stopped, its
/// storage locks released, and the journal says so; while this value (or a clone) is kept, so are they, the session of the journal
/// and the hold on guest RAM, and no other attempt begins. Dropped, it changes nothing: the guest stays paused, and what the journal
/// says is left to a person.
#[derive(Clone)]
pub struct UnresolvedMigration {
    /// The VM.
    pub vm: VmId,
    /// The attempt.
    pub attempt: AttemptId,
    /// The epoch that the COMMIT begins, if it arrived.
    pub epoch: Epoch,
    /// Where the COMMIT was sent.
    pub peer: String,
    /// The known facts, for the person who decides.
    pub why: String,
    /// The source's half of the session. `None` once it is decided, and where this process did not have the session.
    pending: Arc<Mutex<Option<Box<dyn PendingCommit>>>>,
}

/// Which side the guest turned out to be.
#[derive(Clone, Debug, PartialEq)]
pub enum Resolution {
    /// It is the destination's. The journal says so here, and what the machine held for the session is released.
    Moved {
        /// What became of the guest there, if the destination said.
        guest: Option<GuestOutcome>,
        /// What could not be done any more: the journal's entry, a device that was not released. No harm to the guest.
        left_undone: Vec<Failure>,
    },
    /// It is this side's, as the journal says: the destination will never run it. The attempt was undone.
    Undone {
        /// Why it did not move.
        cause: Failure,
        /// Whether the guest is as it was before the attempt. If not, [`start_held`](crate::start_held) tries again.
        restored: bool,
        /// What could not be undone.
        not_undone: Vec<Failure>,
    },
}

/// The source of a session that waits for the answer to its COMMIT.
pub(crate) trait PendingCommit: Send {
    /// Asks the destination, at another address than before if one is given.
    fn ask(&mut self, at: Option<&Uri>, given_up: &dyn Fn() -> bool) -> Result<CommitAnswer, Failure>;
    /// The guest is the destination's.
    fn has_moved(&mut self) -> Vec<Failure>;
    /// The guest is this side's: the journal first, then the way back, whose end is whether the guest is as before, and what could not
    /// be undone.
    ///
    /// # Errors
    /// The journal could not be written: all is as it was.
    fn go_back(&mut self, cause: &Failure) -> Result<(bool, Vec<Failure>), Failure>;
}

/// What a destination answers that is asked what became of a COMMIT.
pub(crate) enum CommitAnswer {
    /// The guest is its own.
    Running(GuestOutcome),
    /// It will never run the guest.
    Declined(Failure),
}

impl UnresolvedMigration {
    /// One of which no session is left in this process: what a journal says.
    pub fn of_journal(vm: VmId, attempt: AttemptId, epoch: Epoch, peer: String, why: String) -> Self {
        Self { vm, attempt, epoch, peer, why, pending: Arc::default() }
    }

    /// The same, of a session that can ask on.
    pub(crate) fn that_can_ask(mut self, pending: Box<dyn PendingCommit>) -> Self {
        self.pending = Arc::new(Mutex::new(Some(pending)));
        self
    }

    /// Whether [`ask`](Self::ask) and [`decide`](Self::decide) can do anything: the session was this process's, and is not resolved.
    pub fn is_pending(&self) -> bool {
        lock(&self.pending).is_some()
    }

    /// Asks the destination once more, over a new connection secured as the session's was, and does what follows from its answer:
    /// records it, and releases the machine or lets the guest go on here. `at`: its address now, if that is another. Blocks for
    /// the connect timeout and 5 s at most, and for the way back; ends early when `given_up` says so.
    ///
    /// # Errors
    /// There was no answer, or the journal could not be written. Nothing has changed, and it can be tried again.
    pub fn ask(&self, at: Option<&Uri>, given_up: impl Fn() -> bool) -> Result<Resolution, Failure> {
        self.resolve(|pending| pending.ask(at, &given_up))
    }

    /// Takes a person's word for whose the guest is, who has seen to it that the other side will never run it, or does. That cannot be
    /// checked: a guest that is let go on here while it runs there ruins its storage.
    ///
    /// # Errors
    /// The journal could not be written. Nothing has changed, and it can be tried again.
    pub fn decide(&self, owner: Side) -> Result<Resolution, Failure> {
        let text = "its operator decided that the guest is the source's";
        self.resolve(|_| match owner {
            Side::Source => Ok(Decided::Source(Failure::new(Side::Source, Phase::Commit, text))),
            Side::Destination => Ok(Decided::Destination(None)),
        })
    }

    fn resolve<A: Into<Decided>>(
        &self,
        decide: impl FnOnce(&mut dyn PendingCommit) -> Result<A, Failure>,
    ) -> Result<Resolution, Failure> {
        let mut pending = lock(&self.pending);
        let Some(session) = pending.as_mut() else {
            let text = "no session is left here that could resolve it";
            return Err(Failure::new(Side::Source, Phase::Commit, text));
        };
        let resolution = match decide(&mut **session)?.into() {
            Decided::Destination(guest) => Resolution::Moved { guest, left_undone: session.has_moved() },
            Decided::Source(cause) => {
                let (restored, not_undone) = session.go_back(&cause)?;
                Resolution::Undone { cause, restored, not_undone }
            }
        };
        drop(pending.take());
        Ok(resolution)
    }
}

/// The owner of the guest, once it is known.
enum Decided {
    Source(Failure),
    Destination(Option<GuestOutcome>),
}

impl From<CommitAnswer> for Decided {
    fn from(answer: CommitAnswer) -> Self {
        match answer {
            CommitAnswer::Running(guest) => Self::Destination(Some(guest)),
            CommitAnswer::Declined(cause) => Self::Source(cause),
        }
    }
}

impl fmt::Debug for UnresolvedMigration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { vm, attempt, epoch, peer, why, pending: _ } = self;
        f.debug_struct("UnresolvedMigration")
            .field("vm", vm)
            .field("attempt", attempt)
            .field("epoch", epoch)
            .field("peer", peer)
            .field("why", why)
            .finish_non_exhaustive()
    }
}
