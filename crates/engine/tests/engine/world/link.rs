//! The link: two ordered directions, faults by message index, and connections of their own for questions.

use std::time::Duration;

use vfio_migration_engine::ownership::{
    DestinationRecord, DestinationState, QueryAnswer, SourceState, answer_query,
};
use vfio_migration_engine::{DestinationEvent, SourceEvent, Time};
use vfio_migration_types::GuestOutcome;
use vfio_migration_wire::{Message, Running};

use super::script::{Direction, Sabotage, What};
use super::{ATTEMPT, EPOCH, Guest, Happening, VM, World};

#[derive(Debug, Default)]
pub struct Link {
    /// Messages sent so far, by direction, names included.
    pub to_destination: Vec<String>,
    pub to_source: Vec<String>,
    /// Nothing overtakes: the earliest arrival of the next message.
    next_arrival: [Time; 2],
    extra: [Duration; 2],
    pub cut: bool,
    /// New connections fail until then; `None`: for ever.
    down_until: Option<Option<Time>>,
    closed: [bool; 2],
    question: u64,
    /// The question whose answer the source waits for.
    pending: Option<u64>,
}

impl World {
    pub(super) fn send(&mut self, direction: Direction, message: Message) {
        let text = format!("{message:?}");
        let list = match direction {
            Direction::ToDestination => &mut self.link.to_destination,
            Direction::ToSource => &mut self.link.to_source,
        };
        let index = list.len();
        list.push(text);
        if self.link.cut {
            return;
        }
        let way = direction as usize;
        match self.fault_at(direction, index) {
            Some(What::Drop) => return,
            Some(What::Delay(by)) => self.link.extra[way] = by,
            Some(What::Duplicate) => self.carry(direction, usize::MAX, message.clone()),
            Some(What::Cut { source_learns, destination_learns, heals_after }) => {
                self.link.cut = true;
                self.link.down_until = Some(heals_after.map(|after| self.now + after));
                self.after(source_learns, Happening::Closed(Direction::ToSource, "cut".to_owned()));
                self.after(destination_learns, Happening::Closed(Direction::ToDestination, "cut".to_owned()));
                return;
            }
            Some(What::Kill { source, before, peer_learns })
                if source == (direction == Direction::ToDestination) =>
            {
                if !before {
                    self.carry(direction, index, message);
                }
                return self.kill(source, peer_learns);
            }
            _ => {}
        }
        self.carry(direction, index, message);
    }

    fn carry(&mut self, direction: Direction, index: usize, message: Message) {
        let way = direction as usize;
        let at = (self.now + self.script.latency + self.link.extra[way]).max(self.link.next_arrival[way]);
        self.link.extra[way] = Duration::ZERO;
        self.link.next_arrival[way] = at;
        self.at(at, Happening::Arrives(direction, index, message));
    }

    /// One side ended its connection: the other learns it after everything that was sent before.
    pub(super) fn close(&mut self, by_source: bool) {
        let direction = if by_source { Direction::ToDestination } else { Direction::ToSource };
        if self.link.cut || self.link.closed[direction as usize] {
            return;
        }
        let at = (self.now + self.script.latency).max(self.link.next_arrival[direction as usize]);
        self.at(at, Happening::Closed(direction, "closed by the peer".to_owned()));
    }

    pub(super) fn arrives(&mut self, direction: Direction, index: usize, message: Message) {
        let kill = match self.fault_at(direction, index) {
            Some(What::Kill { source, before, peer_learns })
                if source == (direction == Direction::ToSource) =>
            {
                Some((source, before, peer_learns))
            }
            _ => None,
        };
        if let Some((source, true, peer_learns)) = kill {
            return self.kill(source, peer_learns);
        }
        match direction {
            Direction::ToDestination => self.destination_hears(message),
            Direction::ToSource => self.tell_source(SourceEvent::Peer(message)),
        }
        if let Some((source, false, peer_learns)) = kill {
            self.kill(source, peer_learns);
        }
    }

    pub(super) fn closed(&mut self, direction: Direction, why: String) {
        if std::mem::replace(&mut self.link.closed[direction as usize], true) {
            return;
        }
        match direction {
            Direction::ToSource => self.tell_source(SourceEvent::LinkLost(why)),
            Direction::ToDestination => {
                let ready = self.other.disk == Some(DestinationState::Ready);
                if ready && self.script.sabotage == Some(Sabotage::DestinationRunsOnSilence) {
                    let commit = vfio_migration_wire::Commit { epoch: EPOCH.next(), attempt: ATTEMPT };
                    self.tell_destination(DestinationEvent::Peer(Message::Commit(commit)));
                }
                self.tell_destination(DestinationEvent::LinkLost(why));
            }
        }
    }

    fn kill(&mut self, source: bool, peer_learns: Duration) {
        self.note(format!("{} is killed", if source { "source" } else { "destination" }));
        self.link.cut = true;
        if source {
            self.source = None;
            self.side.killed = true;
            self.side.guest = Guest::None;
            self.side.interrupted_by_kill(self.script.torn_writes);
            self.after(peer_learns, Happening::Closed(Direction::ToDestination, "reset".to_owned()));
            self.after(Duration::from_secs(1), Happening::SourceRestarts);
        } else {
            self.destination = None;
            self.other.killed = true;
            self.other.guest = Guest::None;
            self.other.interrupted_by_kill(self.script.torn_writes);
            self.after(peer_learns, Happening::Closed(Direction::ToSource, "reset".to_owned()));
            self.after(Duration::from_secs(1), Happening::DestinationRestarts);
        }
    }

    /// The source's session connects anew and asks.
    pub(super) fn ask(&mut self) {
        self.link.question += 1;
        let question = self.link.question;
        self.link.pending = Some(question);
        let up = match self.link.down_until {
            None => true,
            Some(None) => false,
            Some(Some(until)) => self.now >= until,
        };
        let listens = self.other.restarted
            || (self.destination.is_some()
                && (self.script.listens_after_end || self.other.outcome.is_none()));
        if up && listens {
            let query = Message::Query { vm: VM, attempt: ATTEMPT, epoch: EPOCH.next(), proof: [0; 32] };
            self.after(self.script.latency, Happening::Asked(question, query));
        } else {
            let refused = SourceEvent::LinkLost("connection refused".to_owned());
            self.after(Duration::from_millis(50), Happening::Source(refused));
            if self.script.sabotage == Some(Sabotage::SourceResumesOnSilence) {
                let declined = Message::Declined(super::failed("nobody there"));
                self.after(Duration::ZERO, Happening::Source(SourceEvent::Peer(declined)));
            }
        }
    }

    pub(super) fn asked(&mut self, question: u64, message: Message) {
        if self.script.sabotage == Some(Sabotage::DeclinesUnread) {
            return self.answer(question, Message::Declined(super::failed("never heard of it")));
        }
        self.other.question = Some(question);
        if self.destination.is_some() {
            return self.tell_destination(DestinationEvent::Peer(message));
        }
        // A restarted process: it has its journal, and nothing else.
        let record = self.other.disk.map(|state| DestinationRecord {
            vm: VM,
            attempt: ATTEMPT,
            epoch: EPOCH,
            state,
            peer: String::new(),
        });
        let said = match answer_query(record.as_ref(), VM, ATTEMPT, EPOCH.next()) {
            QueryAnswer::Running { epoch } => {
                let guest = GuestOutcome::Unknown;
                Message::Running(Running { epoch, guest, boot_id: [0; 16], at_ns: 0 })
            }
            QueryAnswer::AbortThenDecline(cause) => {
                self.other.disk = Some(DestinationState::Aborted);
                Message::Declined(cause)
            }
            QueryAnswer::Decline(cause) => Message::Declined(cause),
            QueryAnswer::Unknown(cause) => Message::Abort(cause),
            other => panic!("{other:?}"),
        };
        self.answer(question, said);
    }

    pub(super) fn answer(&mut self, question: u64, message: Message) {
        let disk = self.other.disk;
        match &message {
            Message::Declined(_) if disk != Some(DestinationState::Aborted) => {
                self.violated("DECLINED without ABORTED in the journal");
            }
            Message::Running(_) if disk != Some(DestinationState::Owner) => {
                self.violated("RUNNING without OWNER in the journal");
            }
            _ => {}
        }
        self.after(self.script.latency, Happening::Answered(question, message));
    }

    pub(super) fn answered(&mut self, question: u64, message: Message) {
        if self.link.pending != Some(question) {
            return;
        }
        self.link.pending = None;
        self.note(format!("answer: {message:?}"));
        if self.source.is_some() {
            return self.tell_source(SourceEvent::Peer(message));
        }
        // A restarted source: it writes down what it learns, and runs nothing.
        self.side.disk = match message {
            Message::Running(_) => SourceState::Released,
            Message::Declined(_) => SourceState::Owner,
            _ => self.side.disk,
        };
    }

    pub(super) fn source_restarts(&mut self) {
        if self.side.disk == SourceState::Committing {
            self.restarted_asks(0);
        }
    }

    pub(super) fn restarted_asks(&mut self, times: u32) {
        if self.side.disk == SourceState::Committing && times < 5 {
            self.ask();
            self.after(Duration::from_secs(5), Happening::RestartedAsks(times + 1));
        }
    }

    pub(super) fn destination_restarts(&mut self) {
        self.other.restarted = true;
        if let Some(state) = self.other.disk {
            use vfio_migration_engine::ownership::DestinationRestart;
            if state.on_restart() == DestinationRestart::Abort {
                self.other.disk = Some(DestinationState::Aborted);
            }
        }
    }
}
