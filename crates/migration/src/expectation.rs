//! What a destination is told to expect: who may come, for what, with which VM, from which epoch on, how large, how often.
//!
//! One rule, asked in two steps: of HELLO before a session begins, and of OFFER before the machine is built.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use vfio_migration_compat::{Reason, SessionCode};
use vfio_migration_types::{Epoch, VmId, error_chain, quote};
use vfio_migration_wire::{FEATURE_ASK, FEATURE_REHEARSE, FEATURES, Hello};

use crate::session::lock::lock;
use crate::tls::config::{Proof, Security};
use crate::tls::identity::{PeerIdentity, Pin};
use crate::uri::Uri;

/// What a source may do at a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Right {
    /// Ask whether a guest could come: a check, a rehearsal.
    Ask,
    /// Move a guest there. Whoever may also may ask what became of that.
    Move,
}

impl Right {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Ask, Self::Move];
}

/// A source that may come, by what it has to prove. One that neither names a name nor a key is nobody.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExpectedSource {
    /// A DNS name or IP address of its certificate, for which a CA has to vouch. Letter for letter, but for upper and lower case: `*` is
    /// no wildcard.
    pub name: Option<String>,
    /// Its public key.
    pub pin: Option<Pin>,
    /// What it may do; `None`: what [`Expectation::may`] says.
    pub may: Option<BTreeSet<Right>>,
}

/// What a destination takes. The default is whatever comes over a connection that is secured as it must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expectation {
    /// Who may come; `None`: whoever is trusted. An empty list is nobody.
    pub sources: Option<Vec<ExpectedSource>>,
    /// What those may do of whom nothing else is said. Both.
    pub may: BTreeSet<Right>,
    /// The VM that may be offered; `None`: any.
    pub vm: Option<VmId>,
    /// The least epoch under which its source owns it. 0: any.
    pub min_epoch: Epoch,
    /// Most bytes of RAM that it may have; `None`: as many as there are.
    pub max_memory: Option<u64>,
    /// Most attempts to move that are let in, whatever becomes of them; `None`: any number. Questions and rehearsals do not count.
    pub max_attempts: Option<u64>,
    /// Most guests that may arrive; `None`: any number.
    pub max_arrivals: Option<u64>,
}

impl Default for Expectation {
    fn default() -> Self {
        Self {
            sources: None,
            may: BTreeSet::from(Right::ALL),
            vm: None,
            min_epoch: Epoch(0),
            max_memory: None,
            max_attempts: None,
            max_arrivals: None,
        }
    }
}

/// The reason why a source, or what it brought, is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unexpected {
    /// Nobody can be taken: it is not known whom to expect.
    #[error("it is not known whom to expect: {0}")]
    NotKnown(ExpectationError),
    /// The source is none of those that may come.
    #[error("it is none of the sources that may come")]
    OtherSource,
    /// The source may move a guest, and no more.
    #[error("it may not ask")]
    MayNotAsk,
    /// The source may ask, and no more.
    #[error("it may ask, and not move a guest here")]
    MayNotMove,
    /// Another VM is expected.
    #[error("VM {expected} is expected, not VM {offered}")]
    OtherVm {
        /// The VM that may be offered.
        expected: VmId,
        /// The VM that was.
        offered: VmId,
    },
    /// The source owns the VM under an epoch that is over.
    #[error("it is offered under epoch {}, and is expected from epoch {} on", .offered.0, .least.0)]
    OldEpoch {
        /// The least that is expected.
        least: Epoch,
        /// The epoch that was offered.
        offered: Epoch,
    },
    /// The guest has more RAM than is expected.
    #[error("it has {offered} bytes of RAM, and {most} are expected at most")]
    TooLarge {
        /// Most bytes that are expected.
        most: u64,
        /// Bytes that it has.
        offered: u64,
    },
    /// As many attempts as are expected were made.
    #[error(
        "no more than {most} attempt{} {} expected, and {}",
        if *.most == 1 { "" } else { "s" },
        if *.most == 1 { "is" } else { "are" },
        if *.under_way { "the last of them is under way" } else { "so many were made" }
    )]
    TooManyAttempts {
        /// Most attempts that are expected.
        most: u64,
        /// Whether the last of them has not ended yet.
        under_way: bool,
    },
    /// As many guests as are expected have arrived.
    #[error(
        "no more than {most} guest{} {} expected, and so many have arrived",
        if *.most == 1 { "" } else { "s" },
        if *.most == 1 { "is" } else { "are" }
    )]
    TooManyArrivals {
        /// Most guests that are expected.
        most: u64,
    },
}

impl Unexpected {
    /// The code of the reason.
    pub fn code(&self) -> SessionCode {
        match self {
            Self::NotKnown(_) => SessionCode::NoExpectation,
            Self::OtherSource => SessionCode::OtherSource,
            Self::MayNotAsk => SessionCode::MayNotAsk,
            Self::MayNotMove => SessionCode::MayNotMove,
            Self::OtherVm { .. } => SessionCode::OtherVm,
            Self::OldEpoch { .. } => SessionCode::OldEpoch,
            Self::TooLarge { .. } => SessionCode::TooLarge,
            Self::TooManyAttempts { .. } => SessionCode::TooManyAttempts,
            Self::TooManyArrivals { .. } => SessionCode::TooManyArrivals,
        }
    }

    /// What the source is told. One that is `named` in what is expected is told all; another learns nothing of what is expected
    /// beyond that it is something else.
    pub(crate) fn told(&self, named: bool) -> Reason {
        let text = match self {
            // Files and paths of this side are nobody's affair.
            Self::NotKnown(_) => {
                "it is not known at the destination whom to expect: its log says why".to_owned()
            }
            Self::OtherSource => "the destination does not expect this source".to_owned(),
            Self::MayNotAsk => "the destination does not let this source ask".to_owned(),
            Self::MayNotMove => "the destination lets this source ask, and not move a guest there".to_owned(),
            _ if named => format!("at the destination: {self}"),
            Self::OtherVm { offered, .. } => format!("the destination expects another VM than VM {offered}"),
            Self::OldEpoch { offered, .. } => {
                format!("the destination expects the VM under a later epoch than {}", offered.0)
            }
            Self::TooLarge { offered, .. } => {
                format!("the destination expects no guest with {offered} bytes of RAM")
            }
            Self::TooManyAttempts { under_way: true, .. } => {
                "the destination expects no further attempt: one is under way".to_owned()
            }
            Self::TooManyAttempts { .. } => "the destination expects no further attempt".to_owned(),
            Self::TooManyArrivals { .. } => "the destination expects no further guest".to_owned(),
        };
        Reason::new(self.code(), text)
    }
}

/// The reason why nobody can be taken, whoever comes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ExpectationError {
    /// It cannot be had.
    #[error("{0}")]
    Unreadable(String),
    /// An entry names nobody.
    #[error("a source that is expected has neither a name nor a pin")]
    Nobody,
    /// Sources are to be told apart where none proves who it is.
    #[error(
        "sources are expected by name or pin, and connections {0} prove neither: only TLS does (--tls-creds); expect none by name or pin"
    )]
    NothingProved(&'static str),
    /// Names are asked for where keys alone are trusted.
    #[error("the source {} is expected by name, and where keys are pinned nobody vouches for names: expect its pin", quote(.0))]
    NoNames(String),
}

/// How often something happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExpectationCounts {
    /// Attempts to move that were let in.
    pub attempts: u64,
    /// Guests that have arrived.
    pub arrivals: u64,
}

/// Who comes, and with what: what HELLO and the connection say.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Newcomer<'a> {
    pub(crate) hello: &'a Hello,
    /// What the source has proved to be.
    pub(crate) peer: Option<&'a PeerIdentity>,
    pub(crate) proof: Proof,
}

impl Newcomer<'_> {
    /// Whether it wants a verdict alone.
    fn only_asks(&self) -> bool {
        let both = FEATURE_REHEARSE | FEATURE_ASK;
        self.hello.features & FEATURES & both == both
    }

    /// What it has come for.
    pub(crate) fn wants(&self) -> Right {
        if self.hello.features & FEATURES & FEATURE_REHEARSE == 0 { Right::Move } else { Right::Ask }
    }
}

impl Expectation {
    /// Whether it can be held to at all over connections at `uri` that are secured so.
    ///
    /// # Errors
    /// Why nobody could be taken.
    pub fn check(&self, uri: &Uri, security: Option<&Security>) -> Result<(), ExpectationError> {
        let proof = |of: fn(&Security) -> Proof| security.map_or(Proof::Nothing, of);
        match uri {
            Uri::Tcp { .. } => self.provable(proof(Security::proof), "in plain text"),
            Uri::Unix(_) => self.provable(proof(Security::proof_over_unix), "over a unix socket"),
            // What it is shows when it is taken over.
            Uri::Fd(_) => Ok(()),
        }
    }

    /// The same over connections `of` a kind that prove this of their peers.
    pub(crate) fn provable(&self, proof: Proof, of: &'static str) -> Result<(), ExpectationError> {
        for source in self.sources.iter().flatten() {
            match (proof, &source.name, source.pin) {
                (_, None, None) => return Err(ExpectationError::Nobody),
                (Proof::Nothing, ..) => return Err(ExpectationError::NothingProved(of)),
                (Proof::Key, Some(name), _) => return Err(ExpectationError::NoNames(name.clone())),
                _ => {}
            }
        }
        Ok(())
    }

    /// What who has proved to be `peer` may do. The set is empty if it may not come.
    pub(crate) fn rights(&self, peer: Option<&PeerIdentity>, proof: Proof) -> BTreeSet<Right> {
        let Some(sources) = &self.sources else { return self.may.clone() };
        let Some(peer) = peer else { return BTreeSet::new() };
        let his = sources.iter().filter(|source| source.is(peer, proof));
        his.flat_map(|source| source.may.as_ref().unwrap_or(&self.may)).copied().collect()
    }

    /// Whether what is expected is told to who has proved to be `peer`: it is expected itself.
    pub(crate) fn names(&self, peer: Option<&PeerIdentity>, proof: Proof) -> bool {
        self.sources.is_some() && !self.rights(peer, proof).is_empty()
    }

    /// Judges who comes. First who it is, so that nobody else learns anything of what is expected.
    pub(crate) fn judge(&self, who: &Newcomer<'_>, so_far: ExpectationCounts) -> Result<(), Unexpected> {
        let (rights, wants) = (self.rights(who.peer, who.proof), who.wants());
        if rights.is_empty() {
            return Err(Unexpected::OtherSource);
        }
        if !rights.contains(&wants) {
            return Err(match wants {
                Right::Ask => Unexpected::MayNotAsk,
                Right::Move => Unexpected::MayNotMove,
            });
        }
        let (offered, epoch) = (who.hello.vm, who.hello.epoch);
        // Who only asks may name no VM, and is answered for the rest.
        let named = offered.names_a_vm() || !who.only_asks();
        if let Some(expected) = self.vm.filter(|expected| *expected != offered && named) {
            return Err(Unexpected::OtherVm { expected, offered });
        }
        if epoch < self.min_epoch && named {
            return Err(Unexpected::OldEpoch { least: self.min_epoch, offered: epoch });
        }
        if let Some(most) = self.max_arrivals.filter(|most| so_far.arrivals >= *most) {
            return Err(Unexpected::TooManyArrivals { most });
        }
        match self.max_attempts.filter(|most| so_far.attempts >= *most) {
            Some(most) => Err(Unexpected::TooManyAttempts { most, under_way: false }),
            None => Ok(()),
        }
    }

    /// Judges how large the guest is: `offered`, in bytes of RAM.
    pub(crate) fn judge_memory(&self, offered: u64) -> Result<(), Unexpected> {
        match self.max_memory.filter(|most| offered > *most) {
            Some(most) => Err(Unexpected::TooLarge { most, offered }),
            None => Ok(()),
        }
    }
}

impl ExpectedSource {
    fn is(&self, peer: &PeerIdentity, proof: Proof) -> bool {
        let named = match &self.name {
            Some(name) => proof == Proof::Name && peer.names.iter().any(|known| same_name(known, name)),
            None => self.pin.is_some(),
        };
        named && self.pin.is_none_or(|pin| pin == peer.pin)
    }
}

/// Whether two texts name one host: DNS knows no case, a dot at the end says that a name is whole, and an address may be written in several ways.
fn same_name(one: &str, other: &str) -> bool {
    match (one.parse::<IpAddr>(), other.parse::<IpAddr>()) {
        (Ok(one), Ok(other)) => one == other,
        _ => absolute(one).eq_ignore_ascii_case(absolute(other)),
    }
}

fn absolute(name: &str) -> &str {
    name.strip_suffix('.').unwrap_or(name)
}

type Reading = dyn Fn() -> Result<Expectation, Box<dyn std::error::Error + Send + Sync>> + Send + Sync;

/// What a destination is told to expect, as it stands when somebody comes, and how often somebody came. Clones share the counts, so
/// that they hold for all waits of a process.
#[derive(Clone, Default)]
pub struct Expectations {
    reading: Option<Arc<Reading>>,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Debug, Default)]
struct Seen {
    latest: Expectation,
    counts: ExpectationCounts,
}

impl Expectations {
    /// What `read` returns, which is called anew for each source that comes, on the thread that waits for them: while it fails,
    /// nobody is taken. When it returns something else than before, the counts begin anew.
    pub fn read_by(
        read: impl Fn() -> Result<Expectation, Box<dyn std::error::Error + Send + Sync>> + Send + Sync + 'static,
    ) -> Self {
        Self { reading: Some(Arc::new(read)), seen: Arc::default() }
    }

    /// What is expected now.
    ///
    /// # Errors
    /// It cannot be had.
    pub fn read(&self) -> Result<Expectation, ExpectationError> {
        let Some(reading) = &self.reading else { return Ok(lock(&self.seen).latest.clone()) };
        let read = reading().map_err(|error| ExpectationError::Unreadable(error_chain(error.as_ref())))?;
        let mut seen = lock(&self.seen);
        if seen.latest != read {
            *seen = Seen { latest: read.clone(), counts: ExpectationCounts::default() };
        }
        Ok(read)
    }

    /// How often somebody came, since what is expected was changed last.
    pub fn counts(&self) -> ExpectationCounts {
        lock(&self.seen).counts
    }

    /// Counts for `what` was expected of those that came: not for what is expected instead since.
    pub(crate) fn count(&self, what: &Expectation, count: impl FnOnce(&mut ExpectationCounts)) {
        let mut seen = lock(&self.seen);
        if seen.latest == *what {
            count(&mut seen.counts);
        }
    }
}

/// What is expected always.
impl From<Expectation> for Expectations {
    fn from(latest: Expectation) -> Self {
        let seen = Seen { latest, counts: ExpectationCounts::default() };
        Self { reading: None, seen: Arc::new(Mutex::new(seen)) }
    }
}

impl fmt::Debug for Expectations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Expectations").field("seen", &*lock(&self.seen)).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::same_name;

    #[test]
    fn a_name_is_compared_letter_for_letter_but_for_case_and_one_dot_at_the_end() {
        for (one, other, same) in [
            ("src-a", "SRC-A", true),
            ("src-a.", "src-a", true),
            ("src-a", "src-a..", false),
            ("src-a", "src-a.example", false),
            ("*.example", "src-a.example", false),
            ("::1", "0:0:0:0:0:0:0:1", true),
        ] {
            assert_eq!((same_name(one, other), same_name(other, one)), (same, same), "{one} {other}");
        }
    }
}
