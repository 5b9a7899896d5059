//! The model check of the table: every reachable state of both sides, their journals, and a channel that
//! loses, doubles, delays and reorders.
//!
//! The channel is the set of everything ever sent: a message in it may be received never, once or often, in any order.
//! That covers loss, duplication, reordering and any cut. A journal write and the message it covers are two moves, so a
//! crash fits between them.

use std::collections::{HashMap, HashSet, VecDeque};

use super::*;

type SourceTable = fn(SourceState, SourceStep) -> Result<SourceState, OwnershipError>;
type DestinationTable = fn(DestinationState, DestinationStep) -> Result<DestinationState, OwnershipError>;

/// The rules under test: the real table, or one broken on purpose.
#[derive(Clone, Copy)]
struct Rules {
    source: SourceTable,
    destination: DestinationTable,
    source_may_run: fn(SourceState) -> bool,
    destination_may_run: fn(DestinationState) -> bool,
    /// COMMIT's nonce is compared.
    nonce: bool,
    /// ABORTED is journalled before DECLINED is sent.
    abort_before_declined: bool,
    /// COMMITTING is journalled before COMMIT is sent.
    committing_before_commit: bool,
}

const REAL: Rules = Rules {
    source: SourceState::next,
    destination: DestinationState::next,
    source_may_run: SourceState::may_run,
    destination_may_run: DestinationState::may_run,
    nonce: true,
    abort_before_declined: true,
    committing_before_commit: true,
};

const ATTEMPTS: u8 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Sent {
    Ready,
    Commit,
    Query,
    Running,
    Declined,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    source: SourceState,
    /// Of the attempt under way or last; 0 before the first.
    source_attempt: u8,
    /// The source's process has the guest's RAM.
    source_guest: bool,
    destination: Option<(u8, DestinationState)>,
    destination_guest: bool,
    /// The destination has run the guest at some time.
    ever_ran_there: bool,
    /// Bits: attempt × message.
    channel: u16,
}

impl State {
    fn bit(message: Sent, attempt: u8) -> u16 {
        1 << ((u16::from(attempt) - 1) * 5 + message as u16)
    }

    fn has(&self, message: Sent, attempt: u8) -> bool {
        attempt > 0 && self.channel & Self::bit(message, attempt) != 0
    }

    fn sent(&self, message: Sent, attempt: u8) -> Self {
        Self { channel: self.channel | Self::bit(message, attempt), ..self.clone() }
    }

    fn moves(&self, rules: &Rules) -> Vec<(&'static str, Self)> {
        let mut out = self.source_moves(rules);
        out.extend(self.destination_moves(rules));
        out
    }

    fn source_moves(&self, rules: &Rules) -> Vec<(&'static str, Self)> {
        let mut out = Vec::new();
        let at = self.source_attempt;
        let mut step = |name, step| {
            if let Ok(source) = (rules.source)(self.source, step) {
                let begun = u8::from(step == SourceStep::Begin);
                out.push((name, Self { source, source_attempt: at + begun, ..self.clone() }));
            }
        };
        // A restarted process has no guest to send or to run, so it begins and commits nothing.
        if self.source_guest && at < ATTEMPTS {
            step("source begins", SourceStep::Begin);
        }
        // No guard: a timeout, a lost link, an operator, a failed device.
        step("source aborts", SourceStep::Abort);
        if self.source_guest && self.has(Sent::Ready, at) {
            step("source journals COMMITTING", SourceStep::Commit);
        }
        if self.has(Sent::Declined, at) {
            step("source hears DECLINED", SourceStep::Declined);
        }
        if self.has(Sent::Running, at) {
            step("source hears RUNNING", SourceStep::Running);
        }
        let committing = self.source == SourceState::Committing;
        let early = !rules.committing_before_commit && self.source == SourceState::Sending;
        if self.source_guest && (committing || early && self.has(Sent::Ready, at)) {
            out.push(("source says COMMIT", self.sent(Sent::Commit, at)));
        }
        if committing {
            out.push(("source asks", self.sent(Sent::Query, at)));
        }
        if self.source_guest {
            out.push(("source crashes", Self { source_guest: false, ..self.clone() }));
        }
        out
    }

    fn destination_moves(&self, rules: &Rules) -> Vec<(&'static str, Self)> {
        let mut out = Vec::new();
        let Some((at, state)) = self.destination else {
            for attempt in 1..=self.source_attempt {
                let destination = Some((attempt, DestinationState::Reserved));
                out.push((
                    "destination reserves",
                    Self { destination, destination_guest: true, ..self.clone() },
                ));
            }
            return out;
        };
        let mut step = |name, step| {
            if let Ok(next) = (rules.destination)(state, step) {
                out.push((name, Self { destination: Some((at, next)), ..self.clone() }));
            }
        };
        if self.destination_guest {
            step("destination loads", DestinationStep::Load);
            step("destination journals READY", DestinationStep::Ready);
            let heard = (1..=ATTEMPTS)
                .any(|attempt| self.has(Sent::Commit, attempt) && (attempt == at || !rules.nonce));
            if heard {
                step("destination hears COMMIT", DestinationStep::Commit);
            }
        }
        // No guard: a timeout, a lost link, a query, a restart.
        step("destination aborts", DestinationStep::Abort);
        let ready = state == DestinationState::Ready;
        if ready && self.destination_guest {
            out.push(("destination says READY", self.sent(Sent::Ready, at)));
        }
        if state == DestinationState::Owner && (self.destination_guest || self.has(Sent::Query, at)) {
            let mut next = self.sent(Sent::Running, at);
            next.ever_ran_there |= self.destination_guest;
            out.push(("destination says RUNNING", next));
        }
        if state == DestinationState::Aborted || (ready && !rules.abort_before_declined) {
            out.push(("destination says DECLINED", self.sent(Sent::Declined, at)));
        }
        if state == DestinationState::Aborted && at < self.source_attempt {
            let destination = Some((self.source_attempt, DestinationState::Reserved));
            out.push(("destination reserves", Self { destination, destination_guest: true, ..self.clone() }));
        }
        if self.destination_guest {
            out.push(("destination crashes", Self { destination_guest: false, ..self.clone() }));
        }
        out
    }

    /// Stronger than "never two running": never two *allowed* to run, and never a source that goes back to a state
    /// of before the destination ran.
    fn violation(&self, rules: &Rules) -> Option<&'static str> {
        let source = (rules.source_may_run)(self.source);
        let destination = self.destination.is_some_and(|(_, state)| (rules.destination_may_run)(state));
        if source && destination {
            return Some("two owners");
        }
        (source && self.ever_ran_there).then_some("the source owns what the destination has run")
    }
}

/// Every reachable state; the shortest way to a violation if there is one.
fn explore(rules: &Rules) -> Result<HashSet<State>, (&'static str, Vec<&'static str>)> {
    let start = State {
        source: SourceState::Owner,
        source_attempt: 0,
        source_guest: true,
        destination: None,
        destination_guest: false,
        ever_ran_there: false,
        channel: 0,
    };
    let mut came: HashMap<State, Option<(State, &'static str)>> = HashMap::from([(start.clone(), None)]);
    let mut open = VecDeque::from([start]);
    while let Some(state) = open.pop_front() {
        if let Some(what) = state.violation(rules) {
            let (mut way, mut at) = (Vec::new(), &state);
            while let Some(Some((before, name))) = came.get(at) {
                way.insert(0, *name);
                at = before;
            }
            return Err((what, way));
        }
        for (name, next) in state.moves(rules) {
            came.entry(next.clone()).or_insert_with(|| {
                open.push_back(next);
                Some((state.clone(), name))
            });
        }
    }
    Ok(came.into_keys().collect())
}

#[test]
fn never_two_owners() {
    let seen = explore(&REAL).unwrap_or_else(|(what, way)| panic!("{what}: {way:#?}"));
    // The exploration is of something: both ends of the story are in it, and a second attempt.
    assert!(seen.len() > 500, "only {} states", seen.len());
    let completed = |state: &&State| state.source == SourceState::Released && state.ever_ran_there;
    assert!(seen.iter().filter(completed).any(|state| state.source_attempt == 2));
    assert!(seen.iter().any(|state| state.source == SourceState::Owner && state.has(Sent::Declined, 1)));
}

/// Liveness: from every reachable state in which no process with a guest has died, one side can still come to own it.
#[test]
fn no_state_is_a_dead_end_while_both_live() {
    let seen = explore(&REAL).expect("safe");
    for start in seen.iter().filter(|state| state.source_guest && state.source == SourceState::Committing) {
        let mut open = vec![start.clone()];
        let mut known = HashSet::from([start.clone()]);
        let mut resolved = false;
        while let Some(state) = open.pop() {
            resolved |= matches!(state.source, SourceState::Released | SourceState::Owner);
            if resolved {
                break;
            }
            open.extend(
                state
                    .moves(&REAL)
                    .into_iter()
                    .map(|(_, next)| next)
                    .filter(|next| known.insert(next.clone())),
            );
        }
        assert!(resolved, "stuck: {start:?}");
    }
}

#[test]
fn the_checker_finds_a_source_that_resumes_on_a_timeout() {
    fn broken(state: SourceState, step: SourceStep) -> Result<SourceState, OwnershipError> {
        match (state, step) {
            (SourceState::Committing, SourceStep::Abort) => Ok(SourceState::Owner),
            _ => state.next(step),
        }
    }
    assert!(explore(&Rules { source: broken, ..REAL }).is_err());
}

#[test]
fn the_checker_finds_a_source_that_runs_while_committing() {
    let may_run = |state: SourceState| state != SourceState::Released;
    assert!(explore(&Rules { source_may_run: may_run, ..REAL }).is_err());
}

#[test]
fn the_checker_finds_a_destination_that_runs_at_ready() {
    let may_run = |state| matches!(state, DestinationState::Ready | DestinationState::Owner);
    assert!(explore(&Rules { destination_may_run: may_run, ..REAL }).is_err());
}

#[test]
fn the_checker_finds_a_destination_that_commits_after_it_aborted() {
    fn broken(state: DestinationState, step: DestinationStep) -> Result<DestinationState, OwnershipError> {
        match (state, step) {
            (DestinationState::Aborted, DestinationStep::Commit) => Ok(DestinationState::Owner),
            _ => state.next(step),
        }
    }
    assert!(explore(&Rules { destination: broken, ..REAL }).is_err());
}

#[test]
fn the_checker_finds_an_owner_that_gives_up() {
    fn broken(state: DestinationState, step: DestinationStep) -> Result<DestinationState, OwnershipError> {
        match (state, step) {
            (DestinationState::Owner, DestinationStep::Abort) => Ok(DestinationState::Aborted),
            _ => state.next(step),
        }
    }
    assert!(explore(&Rules { destination: broken, ..REAL }).is_err());
}

#[test]
fn the_checker_finds_a_commit_of_another_attempt() {
    assert!(explore(&Rules { nonce: false, ..REAL }).is_err());
}

#[test]
fn the_checker_finds_messages_said_before_their_journal() {
    assert!(explore(&Rules { abort_before_declined: false, ..REAL }).is_err());
    assert!(explore(&Rules { committing_before_commit: false, ..REAL }).is_err());
}
