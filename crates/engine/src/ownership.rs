//! Ownership of the guest: one pure transition table for both sides' journals, which says who may run it.
//!
//! The rule, in one sentence each:
//!
//! * Only the owner of (VM, epoch) may run vCPUs, or put a device that holds the VM's state in RUNNING or RUNNING_P2P.
//! * A journal is on disk before the message that it covers is sent.
//! * Before COMMIT the destination never runs, whatever it has received. After journalling COMMITTING the source never
//!   runs by itself, except on the destination's DECLINED, which the destination journals as ABORTED before it sends it.
//! * A process that restarts has lost its guest's RAM: from the journal it learns what it was, cleans up, and never runs.
//!
//! [`SourceState::next`] and [`DestinationState::next`] are the table. The engine's state machines take every step
//! through them, and the test below explores the product of both exhaustively: lossy, duplicating, reordering channel,
//! crashes of either side at any point, a second attempt while messages of the first are still about.

use std::fmt;

use serde::{Deserialize, Serialize};
use vfio_migration_types::{AttemptId, Epoch, Failure, Phase, Side, VmId};
use vfio_migration_wire::Message;

/// A state of the source's journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceState {
    /// The guest is ours; no attempt is under way.
    Owner,
    /// An attempt is under way; the guest is still ours.
    Sending,
    /// COMMIT may have been sent: we never run it again by ourselves.
    Committing,
    /// The guest is the destination's.
    Released,
}

/// A step of the source from one journal state to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceStep {
    /// An attempt begins: BEGIN is about to be sent.
    Begin,
    /// The attempt is given up, for any reason; COMMIT has not been sent.
    Abort,
    /// READY was received and everything in it agrees: COMMIT is about to be sent.
    Commit,
    /// The destination sent DECLINED.
    Declined,
    /// The destination sent RUNNING.
    Running,
}

/// A state of the destination's journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DestinationState {
    /// An attempt was let in.
    Reserved,
    /// State is being loaded.
    Loading,
    /// READY may have been sent.
    Ready,
    /// The guest is ours.
    Owner,
    /// The attempt was given up: it will never run here.
    Aborted,
}

/// A step of the destination from one journal state to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationStep {
    /// State begins to arrive.
    Load,
    /// Everything is loaded and verified: READY is about to be sent.
    Ready,
    /// COMMIT was received, with this attempt's nonce and the source's epoch plus one.
    Commit,
    /// The attempt is given up, for any reason.
    Abort,
}

/// A step that a journal state does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OwnershipError {
    /// The source's state does not allow the step.
    #[error("a source in state {0} cannot take the step {1}")]
    Source(SourceState, SourceStep),
    /// The destination's state does not allow the step.
    #[error("a destination in state {0} cannot take the step {1}")]
    Destination(DestinationState, DestinationStep),
}

/// Gives the values of an enum the names that texts and documents show.
macro_rules! named {
    ($of:ident: $($value:ident = $name:literal),+) => {
        impl fmt::Display for $of {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$value => $name),+ })
            }
        }
    };
}

named!(SourceState: Owner = "owner", Sending = "sending", Committing = "committing", Released = "released");
named!(SourceStep: Begin = "begin", Abort = "abort", Commit = "commit", Declined = "declined", Running = "running");
named!(
    DestinationState: Reserved = "reserved", Loading = "loading", Ready = "ready", Owner = "owner",
    Aborted = "aborted"
);
named!(DestinationStep: Load = "load", Ready = "ready", Commit = "commit", Abort = "abort");

impl SourceState {
    /// The phase in which it is journaled.
    #[must_use]
    pub const fn phase(self) -> Phase {
        match self {
            Self::Sending => Phase::Hello,
            Self::Committing => Phase::Commit,
            Self::Owner | Self::Released => Phase::Clean,
        }
    }

    /// The state after `step`.
    ///
    /// # Errors
    /// The step is not allowed here.
    pub fn next(self, step: SourceStep) -> Result<Self, OwnershipError> {
        match (self, step) {
            (Self::Owner, SourceStep::Begin) => Ok(Self::Sending),
            (Self::Sending, SourceStep::Abort) => Ok(Self::Owner),
            (Self::Sending, SourceStep::Commit) => Ok(Self::Committing),
            (Self::Committing, SourceStep::Declined) => Ok(Self::Owner),
            (Self::Committing, SourceStep::Running) => Ok(Self::Released),
            _ => Err(OwnershipError::Source(self, step)),
        }
    }

    /// Whether a process that still has the guest's RAM may run it.
    pub fn may_run(self) -> bool {
        matches!(self, Self::Owner | Self::Sending)
    }

    /// The action of a process that restarts and finds this state. It has no guest, and runs none.
    pub fn on_restart(self) -> SourceRestart {
        match self {
            Self::Owner | Self::Sending => SourceRestart::GuestLost,
            Self::Committing => SourceRestart::Ask,
            Self::Released => SourceRestart::CleanUp,
        }
    }
}

/// The action of a restarted source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceRestart {
    /// The VM was ours and died with its process. Whoever starts it anew starts it from its disks.
    GuestLost,
    /// Ask the destination what became of the COMMIT ([`Message::Query`]); until it has answered, or a person has decided, nobody
    /// starts this VM.
    Ask,
    /// The guest is the destination's: remove what is left.
    CleanUp,
}

impl DestinationState {
    /// The phase in which it is journaled.
    #[must_use]
    pub const fn phase(self) -> Phase {
        match self {
            Self::Reserved => Phase::Hello,
            Self::Loading => Phase::Setup,
            Self::Ready => Phase::Ready,
            Self::Owner => Phase::Commit,
            Self::Aborted => Phase::Clean,
        }
    }

    /// The state after `step`.
    ///
    /// # Errors
    /// The step is not allowed here.
    pub fn next(self, step: DestinationStep) -> Result<Self, OwnershipError> {
        match (self, step) {
            (Self::Reserved, DestinationStep::Load) => Ok(Self::Loading),
            (Self::Loading, DestinationStep::Ready) => Ok(Self::Ready),
            (Self::Ready, DestinationStep::Commit) => Ok(Self::Owner),
            (Self::Reserved | Self::Loading | Self::Ready | Self::Aborted, DestinationStep::Abort) => {
                Ok(Self::Aborted)
            }
            _ => Err(OwnershipError::Destination(self, step)),
        }
    }

    /// Whether a process that holds the guest may run it.
    pub fn may_run(self) -> bool {
        self == Self::Owner
    }

    /// The action of a process that restarts and finds this state. It has no guest, and runs none.
    pub fn on_restart(self) -> DestinationRestart {
        match self {
            Self::Reserved | Self::Loading | Self::Ready => DestinationRestart::Abort,
            Self::Owner => DestinationRestart::GuestLost,
            Self::Aborted => DestinationRestart::CleanUp,
        }
    }
}

/// The action of a restarted destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationRestart {
    /// Journal ABORTED, then clean up.
    Abort,
    /// The VM was ours and died with its process. The source must not resume its old state: a [`Message::Query`] is
    /// answered with RUNNING.
    GuestLost,
    /// Remove what is left.
    CleanUp,
}

/// A source's journal, as written to disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceRecord {
    /// The VM that the attempt migrates.
    pub vm: VmId,
    /// Nonce of the attempt.
    pub attempt: AttemptId,
    /// The epoch under which this side owned the VM when the attempt began.
    pub epoch: Epoch,
    /// The attempt's state.
    pub state: SourceState,
    /// URI at which the destination was reached.
    pub peer: String,
}

impl SourceRecord {
    /// The question of a source that lost the answer to its COMMIT, with its connection's `proof` (zero: it has none).
    pub fn query(&self, proof: [u8; 32]) -> Message {
        Message::Query { vm: self.vm, attempt: self.attempt, epoch: self.epoch.next(), proof }
    }
}

/// A destination's journal, as written to disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DestinationRecord {
    /// The VM that the attempt migrates.
    pub vm: VmId,
    /// Nonce of the attempt.
    pub attempt: AttemptId,
    /// The *source's* epoch; the one that a commit begins is the next.
    pub epoch: Epoch,
    /// The attempt's state.
    pub state: DestinationState,
    /// Address that the source came from, for a person to read.
    pub peer: String,
}

/// Epochs of a VM, as far as the records of one host know: the rule of who may take or send it, in one place.
///
/// An epoch that this host has seen end is never taken again, whoever offers it: a host that gave the VM away under it, or
/// took the VM over from it, knows that another epoch has begun since.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KnownEpochs {
    /// The epoch under which this host owns the VM.
    pub owned: Option<Epoch>,
    /// The epoch under which this host gave the VM away.
    pub released: Option<Epoch>,
    /// The latest epoch that this host has seen end.
    pub ended: Option<Epoch>,
    /// The source's latest attempt: what it offers may be taken on this host too, or out of the file it was saved into.
    sent: Option<AttemptId>,
}

impl KnownEpochs {
    /// What both records of a host say, of which either may be missing.
    ///
    /// An offer that was not taken proves nothing: anybody may make one.
    pub fn of(source: Option<&SourceRecord>, destination: Option<&DestinationRecord>) -> Self {
        let taken = destination.filter(|record| record.state == DestinationState::Owner);
        let released = source.filter(|record| record.state == SourceState::Released);
        let kept = source.filter(|record| record.state != SourceState::Released);
        let before = |record: &SourceRecord| record.epoch.0.checked_sub(1).map(Epoch);
        let ended =
            [released.map(|record| record.epoch), taken.map(|record| record.epoch), kept.and_then(before)];
        let owned = taken.map(|record| record.epoch.next()).max(kept.map(|record| record.epoch));
        Self {
            // What came here and was given away since is not owned.
            owned: owned.filter(|owned| released.is_none_or(|record| record.epoch < *owned)),
            released: released.map(|record| record.epoch),
            ended: ended.into_iter().flatten().max(),
            sent: source.map(|record| record.attempt),
        }
    }

    /// Whether this host may take the VM in from a source that owns it under `epoch`.
    ///
    /// # Errors
    /// The epoch is over, or this host owns the VM under a later one.
    pub fn may_take(&self, epoch: Epoch, attempt: AttemptId) -> Result<(), EpochOver> {
        let own =
            self.owned.filter(|owned| *owned > epoch).map(|owned| EpochOver::OwnedHere { owned, epoch });
        let ended = self.ended.filter(|ended| *ended >= epoch && self.sent != Some(attempt));
        let ended = ended.map(|ended| EpochOver::Ended { ended, epoch });
        own.or(ended).map_or(Ok(()), Err)
    }

    /// The epoch under which this host may send the VM, if its VMM says that it owns the VM under `wanted`: the later of
    /// that and what the records know.
    ///
    /// # Errors
    /// That epoch is over.
    pub fn may_send(&self, wanted: Epoch) -> Result<Epoch, EpochOver> {
        let epoch = self.owned.map_or(wanted, |owned| owned.max(wanted));
        match self.ended.filter(|ended| *ended >= epoch) {
            Some(ended) => Err(EpochOver::Ended { ended, epoch }),
            None => Ok(epoch),
        }
    }
}

/// Why a VM may not be taken, or sent, under an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EpochOver {
    /// This host owns the VM under a later epoch.
    #[error("this host owns the VM under epoch {}, later than the epoch {} of the source", .owned.0, .epoch.0)]
    OwnedHere {
        /// The epoch under which this host owns it.
        owned: Epoch,
        /// The epoch that was offered.
        epoch: Epoch,
    },
    /// The epoch has ended: the VM was given away under it, or under a later one.
    #[error("the journal says that epoch {} of this VM is over (the latest to end was {})", .epoch.0, .ended.0)]
    Ended {
        /// The latest epoch that this host has seen end.
        ended: Epoch,
        /// The epoch that was offered, or wanted.
        epoch: Epoch,
    },
}

/// A destination's answer to a [`Message::Query`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum QueryAnswer {
    /// The guest is ours, under this epoch: send [`Message::Running`].
    Running {
        /// The epoch that began.
        epoch: Epoch,
    },
    /// Journal ABORTED and fsync it; only then send [`Message::Declined`]. If the journal cannot be written, send
    /// [`Message::Abort`], which decides nothing.
    AbortThenDecline(Failure),
    /// ABORTED is in the journal already: send [`Message::Declined`].
    Decline(Failure),
    /// The attempt is not in this journal, so it cannot say what became of it: send [`Message::Abort`], never DECLINED.
    Unknown(Failure),
}

/// The answer to a query of a destination whose journal holds `record` (fsynced; `None`: it has none).
///
/// For a session or a restarted process; a live [`DestinationEngine`](crate::DestinationEngine) answers by itself.
pub fn answer_query(
    record: Option<&DestinationRecord>,
    vm: VmId,
    attempt: AttemptId,
    epoch: Epoch,
) -> QueryAnswer {
    let error = |text: &str| Failure::new(Side::Destination, Phase::Commit, text);
    let Some(record) = record.filter(|record| (record.vm, record.attempt) == (vm, attempt)) else {
        return QueryAnswer::Unknown(error("the destination's journal knows nothing of this attempt"));
    };
    if record.epoch.next() != epoch {
        return QueryAnswer::Unknown(error(
            "the destination's journal knows this attempt under another epoch",
        ));
    }
    match record.state {
        DestinationState::Owner => QueryAnswer::Running { epoch },
        DestinationState::Aborted => QueryAnswer::Decline(error("the destination had given this attempt up")),
        DestinationState::Reserved | DestinationState::Loading | DestinationState::Ready => {
            QueryAnswer::AbortThenDecline(error("the destination had not received COMMIT"))
        }
    }
}

#[cfg(test)]
mod model;

#[cfg(test)]
mod tests {
    use super::*;

    fn record(state: DestinationState) -> DestinationRecord {
        let (vm, attempt) = (VmId([1; 16]), AttemptId([2; 16]));
        DestinationRecord { vm, attempt, epoch: Epoch(7), state, peer: "tcp:a:1".to_owned() }
    }

    #[test]
    fn states_are_shown_as_they_are_journaled() {
        use DestinationState::{Aborted, Loading, Owner, Ready, Reserved};

        let journaled = |state: serde_json::Value| state.as_str().map(str::to_owned);
        for state in
            [SourceState::Owner, SourceState::Sending, SourceState::Committing, SourceState::Released]
        {
            assert_eq!(journaled(serde_json::to_value(state).unwrap()), Some(state.to_string()));
        }
        for state in [Reserved, Loading, Ready, Owner, Aborted] {
            assert_eq!(journaled(serde_json::to_value(state).unwrap()), Some(state.to_string()));
        }
        let refused = SourceState::Released.next(SourceStep::Begin).unwrap_err();
        assert_eq!(refused.to_string(), "a source in state released cannot take the step begin");
    }

    #[test]
    fn every_query_is_answered_from_the_journal() {
        let (vm, attempt, epoch) = (VmId([1; 16]), AttemptId([2; 16]), Epoch(8));
        let ask = |state| answer_query(Some(&record(state)), vm, attempt, epoch);
        assert_eq!(ask(DestinationState::Owner), QueryAnswer::Running { epoch });
        assert!(matches!(ask(DestinationState::Aborted), QueryAnswer::Decline(_)));
        for state in [DestinationState::Reserved, DestinationState::Loading, DestinationState::Ready] {
            assert!(matches!(ask(state), QueryAnswer::AbortThenDecline(_)), "{state:?}");
        }
    }

    #[test]
    fn a_journal_says_nothing_of_an_attempt_it_does_not_know() {
        let ready = record(DestinationState::Aborted);
        let (vm, attempt, epoch) = (VmId([1; 16]), AttemptId([2; 16]), Epoch(8));
        for answer in [
            answer_query(None, vm, attempt, epoch),
            answer_query(Some(&ready), VmId([9; 16]), attempt, epoch),
            answer_query(Some(&ready), vm, AttemptId([9; 16]), epoch),
            answer_query(Some(&ready), vm, attempt, Epoch(7)),
        ] {
            assert!(matches!(answer, QueryAnswer::Unknown(_)), "{answer:?}");
        }
    }

    #[test]
    fn records_are_json_and_read_back() {
        let ready = record(DestinationState::Ready);
        let json = serde_json::to_string(&ready).unwrap();
        assert!(json.contains(r#""state":"ready""#), "{json}");
        assert_eq!(serde_json::from_str::<DestinationRecord>(&json).unwrap(), ready);
        assert!(serde_json::from_str::<DestinationRecord>(&json.replace("ready", "running")).is_err());

        let source = SourceRecord {
            vm: ready.vm,
            attempt: ready.attempt,
            epoch: ready.epoch,
            state: SourceState::Committing,
            peer: "tcp:b:1".to_owned(),
        };
        let json = serde_json::to_string(&source).unwrap();
        assert_eq!(serde_json::from_str::<SourceRecord>(&json).unwrap(), source);
        assert!(source.state.next(SourceStep::Abort).is_err());
        assert_eq!(source.state.next(SourceStep::Running), Ok(SourceState::Released));
        assert_eq!(ready.state.next(DestinationStep::Commit), Ok(DestinationState::Owner));
    }

    fn sent(state: SourceState, epoch: u64) -> SourceRecord {
        let (vm, attempt) = (VmId([1; 16]), AttemptId([7; 16]));
        SourceRecord { vm, attempt, epoch: Epoch(epoch), state, peer: "tcp:b:1".to_owned() }
    }

    /// Every pair of records, every epoch offered: none that this host has seen end is taken by another attempt, and a VM
    /// that is owned here is never taken under an earlier epoch.
    #[test]
    fn no_epoch_that_ended_is_taken_again() {
        use DestinationState::{Aborted, Loading, Owner as Arrived, Ready, Reserved};
        use SourceState::{Committing, Owner, Released, Sending};
        let sources = [Owner, Sending, Committing, Released].iter();
        let sources = sources.flat_map(|state| (0..4).map(|epoch| Some(sent(*state, epoch)))).chain([None]);
        for source in sources {
            let destinations = [Reserved, Loading, Ready, Arrived, Aborted].iter();
            let destinations = destinations.flat_map(|state| {
                (0..4).map(|epoch| Some(DestinationRecord { epoch: Epoch(epoch), ..record(*state) }))
            });
            for destination in destinations.chain([None]) {
                let known = KnownEpochs::of(source.as_ref(), destination.as_ref());
                for epoch in (0..6).map(Epoch) {
                    let (stranger, own) = (AttemptId([9; 16]), AttemptId([7; 16]));
                    let over = known.ended.is_some_and(|ended| epoch <= ended);
                    let here = known.owned.is_some_and(|owned| owned > epoch);
                    let said = format!("{source:?} {destination:?} {epoch:?}");
                    assert_eq!(known.may_take(epoch, stranger).is_err(), over || here, "{said}");
                    // What this host sends itself may come back to it.
                    assert_eq!(
                        known.may_take(epoch, own).is_err(),
                        here || (over && source.is_none()),
                        "{said}"
                    );
                    let sends = known.owned.map_or(epoch, |owned| owned.max(epoch));
                    let gone = known.ended.is_some_and(|ended| ended >= sends);
                    assert_eq!(known.may_send(epoch).ok(), (!gone).then_some(sends), "{said}");
                }
            }
        }
    }

    #[test]
    fn a_vm_that_went_away_comes_back_under_a_later_epoch_alone() {
        let given = sent(SourceState::Released, 3);
        let known = KnownEpochs::of(Some(&given), None);
        let stranger = AttemptId([9; 16]);
        assert_eq!((known.owned, known.ended), (None, Some(Epoch(3))));
        assert!(known.may_take(Epoch(3), stranger).is_err() && known.may_send(Epoch(3)).is_err());
        assert_eq!(known.may_take(Epoch(4), stranger), Ok(()));
        // An offer that was not taken proves nothing.
        let offered = DestinationRecord { epoch: Epoch(u64::MAX), ..record(DestinationState::Ready) };
        assert_eq!(KnownEpochs::of(Some(&given), Some(&offered)), known);
    }

    #[test]
    fn nothing_runs_after_a_restart() {
        assert_eq!(SourceState::Committing.on_restart(), SourceRestart::Ask);
        assert_eq!(SourceState::Sending.on_restart(), SourceRestart::GuestLost);
        assert_eq!(DestinationState::Ready.on_restart(), DestinationRestart::Abort);
        assert_eq!(DestinationState::Owner.on_restart(), DestinationRestart::GuestLost);
    }
}
