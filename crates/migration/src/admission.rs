//! Who is let in: each source that comes is judged by what is expected at that moment, before anything is made for it, and whoever
//! is refused is told why as far as he may know.

use std::time::SystemTime;

use vfio_migration_compat::Reason;
use vfio_migration_types::{Failure, Phase, Side};
use vfio_migration_wire::{Hello, Message};

use crate::channel::greeting::{Accepted, DroppedConnection};
use crate::channel::link::Link;
use crate::control::IncomingControl;
use crate::expectation::{Expectation, ExpectationError, Expectations, Newcomer, Right, Unexpected};
use crate::reasons;
use crate::refused::{RefusalCause, RefusedConnection};
use crate::tls::config::Proof;

/// The judge at the door of one destination.
#[derive(Debug)]
pub(crate) struct Admission {
    expectations: Expectations,
    /// What connections prove of their peers here.
    proof: Proof,
    /// What was expected when somebody came the last time.
    latest: Result<Expectation, ExpectationError>,
    control: IncomingControl,
}

/// A source that is let in, and what is expected of what it brings.
#[derive(Debug)]
pub(crate) struct Admitted {
    pub(crate) expectation: Expectation,
    pub(crate) wants: Right,
}

/// Why a source that may come has no session now.
#[derive(Debug, Default)]
pub(crate) struct NoTurn {
    /// What is told to whoever may come.
    pub(crate) why: String,
    /// Who is being received: told to those that may move a guest here themselves.
    pub(crate) holder: Option<String>,
    /// An attempt is under way, and may still come to its end.
    pub(crate) under_way: bool,
}

impl NoTurn {
    /// No attempt is under way, and this is why none is taken in.
    pub(crate) fn because(why: &str) -> Self {
        Self { why: why.to_owned(), ..Self::default() }
    }

    fn text(&self, named: bool) -> String {
        let holder = self.holder.as_ref().filter(|_| named);
        let holder = holder.map_or_else(String::new, |holder| format!(", {holder}"));
        format!("no migration is taken in here now: {}{holder}", self.why)
    }
}

/// Nobody is refused any more.
impl Drop for Admission {
    fn drop(&mut self) {
        self.control.tell_remaining_refusals();
    }
}

impl Admission {
    /// # Errors
    /// What is expected now can be held to by no connection `of` this kind, which prove this of their peers. What cannot be read now may be later.
    pub(crate) fn new(
        expectations: Expectations,
        (proof, of): (Proof, &'static str),
        control: IncomingControl,
    ) -> Result<Self, ExpectationError> {
        let latest = expectations.read();
        match &latest {
            Ok(expectation) => expectation.provable(proof, of)?,
            Err(error) => {
                tracing::warn!("no source is taken as long as it is not known whom to expect: {error}")
            }
        }
        Ok(Self { expectations, proof, latest, control })
    }

    /// Judges a source that wants a session. One that is refused is told so; the reasons are for this side.
    pub(crate) fn admit(&mut self, accepted: &Accepted) -> Result<Admitted, Vec<Reason>> {
        self.latest = self.expectations.read();
        self.judge(accepted, true).map_err(|unexpected| {
            self.refuse(accepted, unexpected.clone());
            vec![Reason::new(unexpected.code(), unexpected.to_string())]
        })
    }

    /// Refuses a source because no session can be had now. What is expected is not read: a guest's downtime does not wait for the disk
    /// that it is on.
    pub(crate) fn turn_away(&self, accepted: &Accepted, no_turn: &NoTurn) {
        if let Err(unexpected) = self.judge(accepted, true) {
            let unexpected = match unexpected {
                Unexpected::TooManyAttempts { most, .. } => {
                    Unexpected::TooManyAttempts { most, under_way: no_turn.under_way }
                }
                other => other,
            };
            return self.refuse(accepted, unexpected);
        }
        accepted.turn_away(&no_turn.text(self.may_move(&accepted.link)));
        self.record(&accepted.link, Some(&accepted.hello), RefusalCause::NotNow(no_turn.text(true)));
    }

    /// What a source wants that would be let in, by what was expected when somebody came the last time. `counted`: the attempt under way
    /// is one of those that are expected.
    pub(crate) fn wants(&self, accepted: &Accepted, counted: bool) -> Option<Right> {
        self.judge(accepted, counted).ok().map(|admitted| admitted.wants)
    }

    /// Whether the source of this connection may move a guest here, by what was expected when somebody came the last time.
    pub(crate) fn may_move(&self, link: &Link) -> bool {
        let peer = link.security().peer;
        let may_move = |latest: &Expectation| latest.rights(peer.as_ref(), self.proof).contains(&Right::Move);
        self.latest.as_ref().is_ok_and(may_move)
    }

    /// Whether who asks on `link` what became of a migration may come at all. If not, it is refused.
    pub(crate) fn may_query(&mut self, link: &Link) -> bool {
        self.latest = self.expectations.read();
        let security = link.security();
        let expected = self.latest.as_ref();
        if expected.is_ok_and(|expected| !expected.rights(security.peer.as_ref(), self.proof).is_empty()) {
            return true;
        }
        let unexpected = self
            .latest
            .as_ref()
            .err()
            .map_or(Unexpected::OtherSource, |error| Unexpected::NotKnown(error.clone()));
        let text = unexpected.told(false).text;
        let _ = link.send(&Message::Abort(Failure::new(Side::Destination, Phase::Commit, text)));
        link.shutdown_write();
        self.record(link, None, unexpected.into());
        false
    }

    /// Somebody asked on `link` what became of a migration whose source he is not, and was refused.
    pub(crate) fn asked_for_another(&self, link: &Link) {
        self.record(link, None, RefusalCause::AskedForAnother);
    }

    /// A connection was dropped before it had said what it came for.
    pub(crate) fn dropped(&self, dropped: DroppedConnection) {
        let DroppedConnection { link, why, left, not_allowed } = dropped;
        if left {
            tracing::debug!(peer = %link.peer(), "a connection was closed by its peer");
            return;
        }
        let why = if not_allowed { RefusalCause::NotAllowed } else { RefusalCause::NoMigration(why) };
        self.record(&link, None, why);
    }

    /// Counts an attempt that was let in, or one less: what came with it was not expected.
    pub(crate) fn count_attempt(&self, admitted: &Admitted, made: bool) {
        if admitted.wants == Right::Move {
            self.expectations.count(&admitted.expectation, |counts| {
                let attempts = counts.attempts;
                counts.attempts = if made { attempts + 1 } else { attempts.saturating_sub(1) };
            });
        }
    }

    /// Counts a guest that has arrived.
    pub(crate) fn count_arrival(&self, admitted: &Admitted) {
        self.expectations.count(&admitted.expectation, |counts| counts.arrivals += 1);
    }

    /// Writes down that the source of a session, which has been told, was refused for what it brought.
    pub(crate) fn refused_in_session(&self, link: &Link, hello: &Hello, unexpected: Unexpected) {
        self.record(link, Some(hello), unexpected.into());
    }

    /// Writes down that a source had its turn and brought nothing.
    pub(crate) fn brought_nothing(&self, link: &Link, hello: &Hello, why: &str) {
        let why = RefusalCause::NoMigration(format!("it said HELLO and offered no guest: {why}"));
        self.record(link, Some(hello), why);
    }

    /// Whether what is expected is told to the source of this connection.
    pub(crate) fn names(&self, link: &Link, expectation: &Expectation) -> bool {
        expectation.names(link.security().peer.as_ref(), self.proof)
    }

    fn judge(&self, accepted: &Accepted, counted: bool) -> Result<Admitted, Unexpected> {
        let expectation = self.latest.clone().map_err(Unexpected::NotKnown)?;
        let security = accepted.link.security();
        let who = Newcomer { hello: &accepted.hello, peer: security.peer.as_ref(), proof: self.proof };
        let mut counts = self.expectations.counts();
        counts.attempts = counts.attempts.saturating_sub(u64::from(!counted));
        expectation.judge(&who, counts)?;
        let wants = who.wants();
        Ok(Admitted { expectation, wants })
    }

    fn refuse(&self, accepted: &Accepted, unexpected: Unexpected) {
        let named = self.latest.as_ref().is_ok_and(|latest| self.names(&accepted.link, latest));
        accepted.refuse(reasons::to_wire(&[unexpected.told(named)]));
        self.record(&accepted.link, Some(&accepted.hello), unexpected.into());
    }

    fn record(&self, link: &Link, hello: Option<&Hello>, why: RefusalCause) {
        let (security, proof) = (link.security(), self.proof);
        let wanted = hello.map(|hello| (Newcomer { hello, peer: None, proof }.wants(), hello.vm));
        let (at, from) = (SystemTime::now(), link.peer());
        self.control.refused_one(RefusedConnection { at, from, security, wanted, why, left_out: 0 });
    }
}
