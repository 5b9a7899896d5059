//! The session's loop: what happens becomes the engine's events, the engine's actions become jobs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use vfio_migration_compat::MachineManifest;
use vfio_migration_engine::ownership::SourceState;
use vfio_migration_engine::{
    self as engine, DeviceFacts, SourceAction, SourceConfig, SourceEvent, SourceOutcome,
};
use vfio_migration_types::{AttemptId, Bitmap, Epoch, Granule, Phase, VmId};
use vfio_migration_wire::{FEATURE_RAM_CRC, FEATURE_VERIFY, Frame, Message, Offer, VERSIONS};

use crate::channel::credit::Credit;
use crate::channel::link::{Link, LinkError, Reader};
use crate::channel::liveness::{self, GRACE, TICK};
use crate::control::Control;
use crate::device::send::{DeviceCounters, Stream};
use crate::error::MigrateError;
use crate::machine::{Machine, MigratableDevice};
use crate::options::SourceOptions;
use crate::ownership::journal::{Journal, JournalFile, Side, read_journal};
use crate::rehearsal::{Rehearsal, Rehearse};
use crate::report::{Completed, Progress};
use crate::session::fail::{self, InPhase};
use crate::session::interrupt::Interrupt;
use crate::uri::Uri;

use super::{draw_attempt, hello, not_begun, refused_here};
use crate::session::progress::{self, Shown};
use crate::source::sabotage::Saboteur;
use crate::source::worker::{Counters, Worker};

/// Nobody is there to do what the engine asks for.
const GONE: &str = "the session's own threads are gone: a defect of this program";

/// What the threads of a session share.
#[derive(Debug, Default)]
pub(crate) struct Wires {
    pub(crate) interrupt: Interrupt,
    pub(crate) ram_crc: AtomicBool,
    credits: Vec<Credit>,
    /// The engine's phase, by its index in [`Phase::ALL`].
    phase: AtomicUsize,
}

/// Where a session's threads put what happened.
#[derive(Clone, Debug)]
pub(crate) struct Events(Sender<SourceEvent>);

impl Events {
    pub(crate) fn tell(&self, event: SourceEvent) {
        // Nobody listens any more: the session is at its end.
        let _ = self.0.send(event);
    }
}

/// How a session ended well.
pub(crate) enum Ended {
    Completed(Completed),
    Rehearsed(Rehearsal),
}

impl Ended {
    pub(crate) fn completed(self) -> Result<Completed, MigrateError> {
        match self {
            Self::Completed(completed) => Ok(completed),
            Self::Rehearsed(_) => {
                Err(not_begun(Phase::Plan, "it was only rehearsed: a defect of this program"))
            }
        }
    }

    pub(crate) fn rehearsed(self) -> Result<Rehearsal, MigrateError> {
        match self {
            Self::Rehearsed(rehearsal) => Ok(rehearsal),
            Self::Completed(_) => {
                let why = "the guest moved where a rehearsal was asked for: a defect of this program".into();
                Err(MigrateError::Unresolved { why })
            }
        }
    }
}

/// A source whose own preconditions hold: nothing has been touched, nobody has been talked to.
pub(crate) struct Prepared {
    machine: Arc<dyn Machine>,
    options: SourceOptions,
    control: Control,
    uri: Uri,
    journal: Journal,
    attempt: AttemptId,
    epoch: Epoch,
    manifest: MachineManifest,
    devices: Vec<(MigratableDevice, vfio_migration_device::Capabilities)>,
    engine: engine::Source,
}

impl Prepared {
    pub(crate) fn new(
        machine: Arc<dyn Machine>,
        options: SourceOptions,
        control: Control,
        uri: Uri,
        rehearse: Option<Rehearse>,
    ) -> Result<Self, MigrateError> {
        let vm = machine.id();
        if control.cancel_waits() {
            return Err(not_begun(Phase::Plan, "cancelled before it began"));
        }
        let attempt = draw_attempt()?;
        // A rehearsal reads the journal and leaves no trace in it.
        let dir = options.state_dir.as_deref().filter(|_| rehearse.is_none());
        let journal = Journal::open(dir, vm, Side::Source)
            .map_err(|error| refused_here(error.in_phase(Phase::Plan)))?;
        let epoch = owned_epoch(known(&journal, &options, vm)?, &options)?;
        let manifest = machine.manifest().map_err(|error| refused_here(error.in_phase(Phase::Plan)))?;
        let json = manifest.to_json().map_err(|error| {
            not_begun(Phase::Plan, format!("the manifest cannot be written: {}", fail::sentence(&error)))
        })?;
        let offer = Offer { names: hello::names(&options.device_map), manifest: json };
        let devices = usable_devices(machine.as_ref(), &options)?;
        let facts = devices.iter().map(|(moved, capabilities)| DeviceFacts {
            id: moved.device.id().clone(),
            flags: capabilities.flags,
            precopy_info: capabilities.precopy_info,
        });
        let limit = options.downtime_limit;
        let verify = options.verify && !options.sabotage.as_ref().is_some_and(|plan| plan.verify_blind);
        let features =
            if verify { FEATURE_VERIFY } else { 0 } | if options.ram_crc { FEATURE_RAM_CRC } else { 0 };
        let mut engine = engine::Source::new(SourceConfig {
            vm,
            attempt,
            epoch,
            versions: VERSIONS,
            features,
            offer,
            devices: facts.collect(),
            no_peer_dma: options.no_peer_dma,
            downtime_limit: limit,
            // COMMIT, its answer, and the start of the devices there: a tenth of the limit, within reason.
            commit_reserve: options.commit_reserve.unwrap_or(
                (limit / 10).clamp(Duration::from_millis(5), Duration::from_millis(100)).min(limit / 2),
            ),
            give_up_after: options.give_up_after,
            pause_before_switchover: options.pause_before_switchover && rehearse.is_none(),
            verify,
            peer_timeout: options.peer_timeout,
            rehearse,
        });
        // An engine that refuses its configuration says so before anything else.
        if let Some(SourceAction::Finish(SourceOutcome::Aborted(abort))) = engine.poll_action() {
            return Err(refused_here(abort.cause));
        }
        Ok(Self { machine, options, control, uri, journal, attempt, epoch, manifest, devices, engine })
    }

    pub(crate) fn options(&self) -> &SourceOptions {
        &self.options
    }

    /// Runs the attempt over a connected socket.
    pub(crate) fn run(
        self,
        socket: std::os::fd::OwnedFd,
        begun: Instant,
        mut observer: impl FnMut(&Progress),
    ) -> Result<Ended, MigrateError> {
        let link = Link::new(socket)
            .map_err(|error| refused_here(fail::plain(Phase::Hello, fail::sentence(&error))))?;
        let counters = Counters {
            devices: self.devices.iter().map(|_| DeviceCounters::default()).collect(),
            ..Counters::default()
        };
        let wires =
            Wires { credits: self.devices.iter().map(|_| Credit::default()).collect(), ..Wires::default() };
        let (sender, events) = mpsc::channel();
        let tell = Events(sender.clone());
        self.control.attach(sender);
        let ram = self.machine.ram();
        let mut streams: Vec<Stream<'_>> = Vec::with_capacity(self.devices.len());
        let saboteur = Saboteur::new(self.options.sabotage.clone());
        for (index, (moved, capabilities)) in self.devices.iter().enumerate() {
            let (Some(credit), Some(counts)) = (wires.credits.get(index), counters.devices.get(index)) else {
                break;
            };
            let index = u16::try_from(index).unwrap_or(u16::MAX);
            let device = Arc::clone(&moved.device);
            let mut stream = Stream::new(index, device, *capabilities, credit, counts);
            stream.alter_tail = saboteur.alters_device_tail();
            streams.push(stream);
        }
        let worker = Worker {
            machine: Arc::clone(&self.machine),
            dirty: Bitmap::new(ram.size(), Granule::PAGE),
            ram,
            options: &self.options,
            control: &self.control,
            uri: &self.uri,
            link: Arc::clone(&link),
            wires: &wires,
            counters: &counters,
            journal: &self.journal,
            attempt: self.attempt,
            epoch: self.epoch,
            manifest: &self.manifest,
            functions: self.devices.iter().map(|(moved, _)| moved.clone()).collect(),
            streams,
            sources: Vec::new(),
            logging: false,
            ram_pages: 0,
            paused: None,
            locks_free: false,
            pause_unknown: false,
            saboteur,
        };
        let names: Vec<_> = self.devices.iter().map(|(moved, _)| moved.device.id().clone()).collect();
        let precopy = self.devices.iter().map(|(_, capabilities)| capabilities.flags.pre_copy).collect();
        let mut shown = Shown::new(begun, self.machine.ram().size(), names, precopy);
        let outcome = std::thread::scope(|scope| {
            let (jobs, queue) = mpsc::channel();
            let reader = link.reader();
            let reading = (Arc::clone(&link), tell.clone());
            let wires = &wires;
            let hearing = scope.spawn(move || hear(reader, &reading.0, &reading.1, wires));
            let working = scope.spawn(move || worker.run(&queue, &tell));
            let session = Session {
                engine: self.engine,
                link: &link,
                wires,
                counters: &counters,
                jobs,
                events,
                control: &self.control,
                begun,
                peer_timeout: self.options.peer_timeout,
                submitted: 0,
                interrupted: None,
                link_lost: false,
            };
            let outcome = session.run(&mut shown, &mut observer);
            liveness::farewell(&link, &working, &hearing);
            outcome
        });
        self.control.detach();
        progress::tell(outcome, &shown, &counters, &link, &self.uri, self.machine.id(), self.attempt)
    }
}

/// The loop, on the caller's thread.
struct Session<'a> {
    engine: engine::Source,
    link: &'a Link,
    wires: &'a Wires,
    counters: &'a Counters,
    jobs: Sender<SourceAction>,
    events: Receiver<SourceEvent>,
    control: &'a Control,
    begun: Instant,
    peer_timeout: Duration,
    submitted: u64,
    /// Actions were interrupted, up to the job of this number: a link that holds them up is cut.
    interrupted: Option<u64>,
    link_lost: bool,
}

impl Session<'_> {
    /// Runs until the engine has finished. The job queue closes with it, and the worker ends.
    fn run(mut self, shown: &mut Shown, observer: &mut impl FnMut(&Progress)) -> SourceOutcome {
        self.engine.handle(SourceEvent::Connected, self.now());
        self.wires.note(&self.engine);
        loop {
            if let Some(outcome) = self.act() {
                self.show(shown, observer, true);
                return outcome;
            }
            self.show(shown, observer, false);
            let now = self.now();
            let due = self.engine.deadline().map_or(TICK, |due| due.saturating_sub(now).min(TICK));
            match self.events.recv_timeout(due) {
                Ok(event) => {
                    self.link_lost |= matches!(event, SourceEvent::LinkLost(_));
                    self.engine.handle(event, self.now());
                    self.wires.note(&self.engine);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return SourceOutcome::Unresolved(GONE.into());
                }
            }
            let now = self.now();
            if self.engine.deadline().is_some_and(|due| due <= now) {
                self.engine.handle(SourceEvent::Tick, now);
            }
            self.watch();
        }
    }

    /// Hands the engine's actions to the worker; gives the outcome when there is one.
    fn act(&mut self) -> Option<SourceOutcome> {
        while let Some(action) = self.engine.poll_action() {
            tracing::debug!(?action, "action");
            match action {
                SourceAction::Finish(outcome) => return Some(outcome),
                // The way back must not wait for what is being sent, the abort itself included.
                SourceAction::RollBack => self.interrupt(self.submitted),
                SourceAction::Send(Message::Abort(_)) => self.interrupt(self.submitted + 1),
                SourceAction::AskAgain => self.wires.interrupt.raise(),
                _ => {}
            }
            self.submitted += 1;
            if self.jobs.send(action).is_err() {
                // The worker lives as long as the queue, whatever the VMM's code does in it.
                return Some(SourceOutcome::Unresolved(GONE.into()));
            }
        }
        None
    }

    /// Tells the action under way to end. If the jobs up to number `job` are not done soon, and it is the link that holds
    /// them up, the link is cut.
    fn interrupt(&mut self, job: u64) {
        self.wires.interrupt.raise();
        self.interrupted = Some(job);
    }

    /// What nobody tells: an action that does not notice its interrupt, a peer that went silent.
    fn watch(&mut self) {
        if let Some(job) = self.interrupted {
            if self.counters.jobs_done.load(Ordering::Acquire) >= job {
                self.interrupted = None;
            } else if self.link.blocked() > GRACE {
                // Not so while a device holds them up: the peer is yet to be told why.
                self.link.give_up(
                    "the connection did not take what was being sent when the migration was given up",
                );
                self.interrupted = None;
            }
        }
        if self.link_lost {
            return;
        }
        liveness::keep(self.link, "the destination", self.peer_timeout);
    }

    fn show(&self, shown: &mut Shown, observer: &mut impl FnMut(&Progress), last: bool) {
        let progress = self.engine.progress(self.now());
        if let Some(progress) = shown.update(&progress, self.counters, self.link.wire_bytes(), last) {
            self.control.set_progress(progress.clone());
            observer(&progress);
        }
    }

    fn now(&self) -> Duration {
        self.begun.elapsed()
    }
}

impl Drop for Session<'_> {
    /// An observer that panics must not leave the other threads waiting: the queue closes with the session, and the
    /// link ends here. The worker then undoes what was done.
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.wires.interrupt.raise();
            self.link.shutdown();
        }
    }
}

impl Wires {
    /// Takes note of what was negotiated.
    fn note(&self, engine: &engine::Source) {
        let phase = Phase::ALL.iter().position(|phase| *phase == engine.phase());
        self.phase.store(phase.unwrap_or(0), Ordering::Relaxed);
        let crc = engine.negotiated().is_some_and(|reply| reply.features & FEATURE_RAM_CRC != 0);
        self.ram_crc.store(crc, Ordering::Relaxed);
    }

    /// Where the engine is: what other threads' failures name.
    pub(crate) fn phase(&self) -> Phase {
        Phase::ALL.get(self.phase.load(Ordering::Relaxed)).copied().unwrap_or(Phase::Plan)
    }
}

/// The reader's thread: hears the destination until the connection ends, then says why it did.
fn hear(mut reader: Reader, link: &Link, events: &Events, wires: &Wires) {
    let error = loop {
        match reader.next() {
            Ok(Frame::Message(Message::Credit { device, bytes })) => {
                match wires.credits.get(usize::from(device)) {
                    Some(credit) => credit.grant(bytes),
                    None => break LinkError::Unexpected,
                }
            }
            Ok(Frame::Message(message)) => events.tell(SourceEvent::Peer(message)),
            Ok(_) => break LinkError::Unexpected,
            Err(error) => break error,
        }
    };
    let damaged = matches!(error, LinkError::Wire(_) | LinkError::Unexpected);
    // If our own writing failed first, that is the reason.
    let why = link.write_error().unwrap_or_else(|| fail::sentence(&error));
    if damaged {
        // Told first, so that the destination learns why.
        events.tell(SourceEvent::Damaged(fail::plain(wires.phase(), why.clone())));
    }
    events.tell(SourceEvent::LinkLost(why));
    if damaged {
        reader.drain();
    } else {
        // Nobody reads any more: whoever is writing need not wait.
        link.shutdown();
    }
}

/// What the journal on disk says, also where none is open.
fn known(journal: &Journal, options: &SourceOptions, vm: VmId) -> Result<JournalFile, MigrateError> {
    let on_disk = match &options.state_dir {
        Some(dir) => read_journal(dir, vm),
        None => Ok(None),
    };
    let known = on_disk.and_then(|file| file.map_or_else(|| journal.read(), Ok));
    known.map_err(|error| refused_here(error.in_phase(Phase::Plan)))
}

/// The epoch under which this side owns the guest, if the journal does not say that it does not.
fn owned_epoch(file: JournalFile, options: &SourceOptions) -> Result<Epoch, MigrateError> {
    let committing = |record: &&engine::ownership::SourceRecord| record.state == SourceState::Committing;
    let unanswered = file.source.as_ref().filter(committing);
    if let Some(record) = unanswered.filter(|record| file.owned_epoch() <= Some(record.epoch)) {
        return Err(MigrateError::Unresolved {
            why: format!(
                "the journal says that attempt {} to {} was committed to and never answered",
                record.attempt, record.peer
            ),
        });
    }
    let epoch = file.owned_epoch().map_or(options.epoch, |known| known.max(options.epoch));
    match file.released_epoch() {
        Some(released) if released >= epoch => {
            let text = format!(
                "the journal says that this VM was given away under epoch {}, and nothing says that it came back",
                released.0
            );
            let remedy = "if it did come back, pass the epoch under which it did";
            Err(refused_here(fail::with_remedy(Phase::Plan, text, remedy)))
        }
        _ => Ok(epoch),
    }
}

/// The machine's devices, if each of them can migrate.
fn usable_devices(
    machine: &dyn Machine,
    options: &SourceOptions,
) -> Result<Vec<(MigratableDevice, vfio_migration_device::Capabilities)>, MigrateError> {
    let devices = machine.devices();
    if devices.len() > usize::from(vfio_migration_wire::limits::DEVICES) {
        return Err(not_begun(
            Phase::Plan,
            format!("{} devices are more than can migrate at once", devices.len()),
        ));
    }
    devices
        .into_iter()
        .map(|moved| {
            let id = moved.device.id();
            let capabilities = moved.device.capabilities().map_err(|why| {
                refused_here(fail::of_device(
                    Phase::Plan,
                    id,
                    format!("device {id} cannot migrate: {}", why.0),
                ))
            })?;
            if !capabilities.dirty_log && !options.allow_all_dirty {
                let text = format!(
                    "device {id} has no log of its DMA writes: nobody would know which pages it wrote"
                );
                let mut failure = fail::of_device(Phase::Plan, id, text);
                failure.remedy =
                    "allow all of RAM to be sent again while the guest stands, if its downtime may grow by \
                                  that"
                        .into();
                return Err(refused_here(failure));
            }
            Ok((moved, capabilities))
        })
        .collect()
}
