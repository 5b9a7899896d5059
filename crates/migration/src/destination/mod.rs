//! The incoming half of a session.
//!
//! While [`Destination::accept`] runs: the caller's own thread turns what happens into the engine's events and the
//! engine's actions into jobs; a worker does the jobs; a reader receives from the source and puts pages where they
//! belong; one thread per device writes its state into it. All of them end before `accept` returns.
//!
//! The code of a phase is in the file of its name, from [`hello`] (P1) to [`run`] (P8), and the way back in [`rollback`];
//! P3 to P5 are received by the [`reader`].

mod attempt;
mod commit;
mod final_pass;
mod hello;
mod progress;
mod reader;
mod ready;
mod rollback;
mod run;
mod session;
mod setup;
mod worker;

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vfio_migration_types::{Failure, Phase, RateLimit, Side, VmId, error_chain};

use crate::admission::{Admission, Admitted, NoTurn};
use crate::channel::connect::{self, CHOOSE, ConnectError};
use crate::channel::greeting::{
    Accepted, DroppedConnection, FIRST_MESSAGE, Greeting, PendingConnections, Question,
};
use crate::channel::handed::IncomingConnections;
use crate::channel::listener::Listener;
use crate::channel::source_host::SourceHost;
use crate::control::IncomingControl;
use crate::destination::commit::KnownOutcome;
use crate::destination::progress::Ended;
use crate::destination::session::Place;
use crate::error::{IncomingError, errno_of};
use crate::expectation::Expectations;
use crate::incoming_machine::IncomingMachine;
use crate::offer::{Arrived, IncomingOffer, NotBuilt};
use crate::options::DestinationOptions;
use crate::session::threads::set_up;
use crate::uri::Uri;
use crate::waiting_sources::WaitingSources;

/// Longest time that a source is kept waiting for a VMM that is not ready, which is less than it waits for its first answer. It is to hear
/// at once that it must try again where something keeps the VMM waiting, and need not where a machine is made anew as fast as the host can.
const READY_WITHIN: Duration = Duration::from_secs(8);
/// The same once something has kept the VMM waiting for so long.
const READY_AT_ONCE: Duration = Duration::from_secs(1);
const KEPT_WAITING: Duration = Duration::from_secs(2);
/// How often that is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A place where a guest may arrive.
pub struct Destination {
    listener: Listener,
    local: Uri,
    options: DestinationOptions,
    control: IncomingControl,
    admission: Admission,
    /// What is said of questions that were answered.
    answers: RateLimit<String>,
    /// Outcome of the latest attempt, for a source that asks.
    known: Option<KnownOutcome>,
    /// Sources that came while there was a session, and are next.
    waiting: WaitingSources,
    /// Who had the last session, and with which VM.
    last: Option<(SourceHost, VmId)>,
    /// Connections that have sent nothing yet.
    pending: PendingConnections,
}

impl Destination {
    /// Binds a socket; for `fd:N`, takes over one that is connected, or listens.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub fn listen(uri: &Uri, options: DestinationOptions) -> Result<Self, IncomingError> {
        let (listener, local) =
            Listener::bind(uri, options.security.as_ref(), &options.unix_peers).map_err(not_begun)?;
        Self::new(listener, local, options)
    }

    /// Receives at a stream socket that listens already: a service manager's, or one that was bound where this process may not. It is
    /// closed with this value, and the file of a unix socket stays. [`local`](Self::local) is the address that it is bound to.
    ///
    /// # Errors
    /// It is no stream socket, or does not listen.
    pub fn at_listener(listener: OwnedFd, options: DestinationOptions) -> Result<Self, IncomingError> {
        let known = Uri::Fd(std::os::fd::AsRawFd::as_raw_fd(&listener));
        let (listener, local) =
            Listener::listening(listener, &known, options.security.as_ref()).map_err(not_begun)?;
        Self::new(listener, local, options)
    }

    /// Receives over a stream socket that is already connected to a source. The session takes it over.
    ///
    /// # Errors
    /// It is not a connected stream socket.
    pub fn over(socket: OwnedFd, options: DestinationOptions) -> Result<Self, IncomingError> {
        let number = std::os::fd::AsRawFd::as_raw_fd(&socket);
        connect::check_stream(&socket, number).map_err(not_begun)?;
        let local = Uri::Fd(number);
        let listener = Listener::connected(socket, &local, options.security.as_ref()).map_err(not_begun)?;
        Self::new(listener, local, options)
    }

    /// Receives over stream sockets that the VMM connects or accepts itself and hands over one after another, as long as anybody has what
    /// is returned beside it: sources, and those that ask what became of their COMMIT. [`local`](Self::local) says nothing then. What is no
    /// unix socket is refused unless [`DestinationOptions::security`] says how it is secured.
    ///
    /// # Errors
    /// The host has no descriptor left, or what it is to be secured with cannot be used.
    pub fn of_connections(options: DestinationOptions) -> Result<(Self, IncomingConnections), IncomingError> {
        let (listener, local, connections) =
            Listener::handed(options.security.as_ref()).map_err(not_begun)?;
        Ok((Self::new(listener, local, options)?, connections))
    }

    fn new(listener: Listener, local: Uri, options: DestinationOptions) -> Result<Self, IncomingError> {
        let control = IncomingControl::new();
        // A file is no source: whoever has it restored has chosen it.
        let expect =
            if options.from_file.is_some() { Expectations::default() } else { options.expect.clone() };
        let admission = Admission::new(expect, listener.proof(), control.clone()).map_err(|error| {
            let text = format!("nobody can be taken at {local}: {error}");
            IncomingError::NotBegun(Failure::new(Side::Destination, Phase::Hello, text))
        })?;
        let pending = PendingConnections::of(options.unix_peers.clone());
        let answers = RateLimit::new(20, Duration::from_secs(60));
        Ok(Self {
            listener,
            local,
            options,
            control,
            admission,
            answers,
            known: None,
            waiting: WaitingSources::default(),
            last: None,
            pending,
        })
    }

    /// Address that it listens at: with the port that was given for port 0.
    pub fn local(&self) -> &Uri {
        &self.local
    }

    /// Whether there is one connection, which was handed over, and no next one.
    pub fn is_connected(&self) -> bool {
        self.listener.is_connected()
    }

    /// A handle for other threads.
    pub fn control(&self) -> IncomingControl {
        self.control.clone()
    }

    /// Receives one migration; blocks until all is over. `build` gives the machine for what is offered (an
    /// `Arc<dyn Machine>`, or what will [become one](IncomingMachine)), or a reason to refuse it; it is called on a thread of
    /// the session, at most once. The machine's vCPUs must not run, and its RAM holds whatever the VMM put there: it is made zero before the guest's comes.
    ///
    /// A source that is not [expected](DestinationOptions::expect), or brings what is not, is refused, and so is a connection that does not
    /// begin as a migration does; the next one is waited for (not so with `fd:N`, where there is no next one).
    /// [`IncomingControl::refused`] tells of them. May be called again after an error.
    ///
    /// # Errors
    /// Nothing ran here, and every device is reset and released; but see [`IncomingError::OwnedNotStarted`]. A rehearsal ends so too:
    /// [`IncomingError::Rehearsed`]. Nothing but a [cancel](IncomingControl::cancel) keeps the next from being accepted, and with
    /// `fd:N` that there is no next one.
    pub fn accept<M: IncomingMachine + 'static>(
        &mut self,
        build: impl FnOnce(&IncomingOffer) -> Result<M, NotBuilt> + Send,
    ) -> Result<Arrived, IncomingError> {
        let _threads = set_up(self.options.thread_setup.as_ref());
        let begun = Instant::now();
        let build = |offer: &IncomingOffer| Ok(Arc::new(build(offer)?) as Arc<dyn IncomingMachine>);
        let mut build = Some(build);
        loop {
            let limit = self.options.accept_timeout.map(|limit| limit.saturating_sub(begun.elapsed()));
            let greeted = match self.waiting.next() {
                Some(next) => Ok(Greeting::Session(next)),
                None => self.greet(limit).map_err(|error| self.not_accepted(error))?,
            };
            match greeted {
                Ok(Greeting::Session(accepted)) => match self.admission.admit(&accepted) {
                    Ok(admitted) => {
                        if let Some(why) = self.outlast_not_ready() {
                            self.admission.turn_away(&accepted, &NoTurn::because(&why));
                        } else if let Some(ended) = self.session(*accepted, &admitted, &mut build) {
                            return ended;
                        }
                    }
                    Err(reasons) if self.listener.is_connected() => {
                        return Err(IncomingError::Refused(reasons));
                    }
                    Err(_) => {}
                },
                Ok(Greeting::Query(question)) => self.answer(&question),
                Err(DroppedConnection { why, .. }) if self.listener.is_connected() => {
                    let remedy = "check what is connected to the descriptor";
                    return Err(IncomingError::NotBegun(
                        Failure::new(Side::Destination, Phase::Hello, why).with_remedy(remedy),
                    ));
                }
                Err(dropped) => self.admission.dropped(dropped),
            }
        }
    }

    /// Answers sources that lost the answer to their COMMIT and ask what became of it, for as long as `patience`, or
    /// until cancelled. To be called, on a thread of the VMM's choice, after [`accept`](Self::accept) has returned and
    /// while the address is kept.
    ///
    /// # Errors
    /// The socket failed.
    pub fn answer_queries(&mut self, patience: Duration) -> Result<(), IncomingError> {
        let _threads = set_up(self.options.thread_setup.as_ref());
        let begun = Instant::now();
        let arrived = NoTurn::because("a guest has arrived");
        for waiting in self.waiting.take() {
            self.admission.turn_away(&waiting, &arrived);
        }
        loop {
            let left = patience.saturating_sub(begun.elapsed());
            if left.is_zero() {
                return Ok(());
            }
            match self.greet(Some(left)) {
                Ok(Ok(Greeting::Query(question))) => self.answer(&question),
                Ok(Ok(Greeting::Session(session))) => self.admission.turn_away(&session, &arrived),
                Ok(Err(dropped)) => self.admission.dropped(dropped),
                Err(ConnectError::NobodyCame(_) | ConnectError::Cancelled | ConnectError::Used(_)) => {
                    return Ok(());
                }
                Err(error) => return Err(not_begun(error)),
            }
        }
    }

    /// Whether the source of the session that ended last has come again, with the same VM, while its attempt was being undone. If so it is
    /// the next to be [accepted](Self::accept), and whoever else waits is turned away.
    pub fn has_source_again(&mut self) -> bool {
        let Some((host, vm)) = &self.last else { return false };
        let (again, others) = self.waiting.keep_only(host, *vm);
        let no_turn = NoTurn::because("the source of the last attempt is being received again");
        for other in others {
            self.admission.turn_away(&other, &no_turn);
        }
        again
    }

    /// Runs a session. `None`: its source offered nothing, or nothing that was expected, and the next is waited for.
    fn session<F>(
        &mut self,
        accepted: Accepted,
        admitted: &Admitted,
        build: &mut Option<F>,
    ) -> Option<Result<Arrived, IncomingError>>
    where
        F: FnOnce(&IncomingOffer) -> Result<Arc<dyn IncomingMachine>, NotBuilt> + Send,
    {
        self.control.begin_session();
        self.admission.count_attempt(admitted, true);
        let (link, hello) = (Arc::clone(&accepted.link), accepted.hello.clone());
        let host = SourceHost::of(&link);
        self.waiting.serve(host.clone());
        self.last = Some((host, hello.vm));
        let place = Place {
            listener: &mut self.listener,
            pending: &mut self.pending,
            options: &self.options,
            control: &self.control,
            admission: &self.admission,
            waiting: &mut self.waiting,
        };
        let Ended { arrived, known, unexpected, offered_nothing } =
            session::run(place, accepted, admitted, build);
        if let Some(why) = offered_nothing {
            self.control.discard_session();
            self.admission.count_attempt(admitted, false);
            self.admission.brought_nothing(&link, &hello, &why);
            return self.listener.is_connected().then_some(arrived);
        }
        if matches!(arrived, Err(IncomingError::GaveWay(_))) {
            self.admission.count_attempt(admitted, false);
        }
        if let Some(unexpected) = unexpected {
            self.control.discard_session();
            self.admission.count_attempt(admitted, false);
            self.admission.refused_in_session(&link, &hello, unexpected);
            // It may have been cancelled meanwhile, which the next wait finds.
            return self.listener.is_connected().then_some(arrived);
        }
        if matches!(arrived, Ok(_) | Err(IncomingError::OwnedNotStarted(_))) {
            self.admission.count_arrival(admitted);
        }
        self.known = known;
        self.control.end_session();
        Some(arrived)
    }

    /// Waits a moment for a VMM that is not ready to take a guest in. Why it is not, if it is not by then.
    fn outlast_not_ready(&self) -> Option<String> {
        let begun = Instant::now();
        loop {
            let why = self.control.why_not_ready()?;
            let kept_waiting = self.control.awaited().iter().any(|answer| answer.waited >= KEPT_WAITING);
            let limit = if kept_waiting { READY_AT_ONCE } else { READY_WITHIN };
            if begun.elapsed() >= limit || self.control.cancelled().is_some() {
                return Some(why);
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    fn not_accepted(&self, error: ConnectError) -> IncomingError {
        match (&error, self.control.cancelled()) {
            (ConnectError::Cancelled, Some(why)) => {
                IncomingError::Cancelled(why.failure(Side::Destination, Phase::Hello))
            }
            _ => not_begun(error),
        }
    }

    fn answer(&mut self, question: &Question) {
        let dir = self.options.state_dir.as_deref();
        let own = self.known.as_ref().filter(|known| known.record.attempt == question.about.attempt);
        let security = self.options.security.as_ref();
        // Whoever was let in with it is told what became of it, whoever is expected now.
        let was_in_session = match own {
            Some(known) => !commit::refuse_stranger(question, &known.source, security),
            None => match commit::is_proved_by_journal(dir, question) {
                Some(proved) => {
                    if !proved {
                        commit::refuse(question);
                    }
                    proved
                }
                None if self.admission.may_query(&question.link) => true,
                None => return,
            },
        };
        if !was_in_session {
            return self.admission.asked_for_another(&question.link);
        }
        commit::answer(self.known.as_ref(), dir, question, &mut self.answers);
    }

    /// The next connection whose first message comes, or why one was dropped; waits for `limit` (`None`: without end), or
    /// until cancelled.
    fn greet(
        &mut self,
        limit: Option<Duration>,
    ) -> Result<Result<Greeting, DroppedConnection>, ConnectError> {
        let begun = Instant::now();
        loop {
            if self.control.cancelled().is_some() {
                return Err(ConnectError::Cancelled);
            }
            self.control.tell_overdue_refusals();
            // Each is looked at before the next is let in, so that none is dropped unread for those that come after it.
            if let Some(greeting) = self.pending.poll() {
                return Ok(greeting);
            }
            if let Some(dropped) = self.pending.drop_one_too_many() {
                return Ok(Err(dropped));
            }
            if let Some(socket) = self.listener.try_accept(true) {
                match self.pending.add(socket, self.options.peer_timeout.min(FIRST_MESSAGE)) {
                    Some(refused) => return Ok(Err(refused)),
                    None => continue,
                }
            }
            if self.pending.is_empty() {
                self.listener.check()?;
            }
            if let Some(limit) = limit.filter(|limit| begun.elapsed() >= *limit) {
                return Err(ConnectError::NobodyCame(limit));
            }
            self.listener.wait(self.pending.fds());
        }
    }
}

/// Whoever still waits for an answer is told that none comes.
impl Drop for Destination {
    fn drop(&mut self) {
        let no_turn = NoTurn::because("no guest is waited for any more");
        for waiting in self.waiting.take() {
            self.admission.turn_away(&waiting, &no_turn);
        }
        while let Some(greeting) = self.pending.poll() {
            match greeting {
                Ok(Greeting::Session(session)) => self.admission.turn_away(&session, &no_turn),
                Ok(Greeting::Query(question)) => self.answer(&question),
                Err(dropped) => self.admission.dropped(dropped),
            }
        }
    }
}

impl fmt::Debug for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Destination")
            .field("local", &self.local)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

#[expect(clippy::needless_pass_by_value, reason = "the shape that map_err wants")]
fn not_begun(error: ConnectError) -> IncomingError {
    let remedy = match error {
        ConnectError::NotAStream(_) => "pass a connected stream socket",
        ConnectError::NotChosen(_) => CHOOSE,
        _ => "",
    };
    let failure = Failure::new(Side::Destination, Phase::Hello, error_chain(&error)).with_remedy(remedy);
    IncomingError::NotBegun(Failure { errno: errno_of(&error), ..failure })
}
