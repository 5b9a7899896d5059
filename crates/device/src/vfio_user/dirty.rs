//! The log of a vfio-user device's DMA writes: the server's own, for what it maps, and ours, for what it asks us to write.

use std::error::Error;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::io::Errno;
use vfio_migration_memory::{Coverage, DirtySource, MemoryError};
use vfio_migration_types::{Bitmap, DeviceId, Granule, Iova, PAGE_SIZE, RamOffset, Range, error_chain};
use vfio_user_peer::{Client, ClientError, Feature, FeatureOp, IovaRange};

use super::dma::GuestDma;
use crate::contract::DirtyLog;
use crate::error::{DeviceError, UnknownRam, is_late, is_passing};

/// The log of one device: the server's own and [`GuestDma`]'s, reported as one.
#[derive(Debug)]
pub(super) struct ServerLog(Arc<Shared>);

/// What the log shares with a thread that stops it.
#[derive(Debug)]
struct Shared {
    id: DeviceId,
    client: Arc<Client>,
    dma: Arc<GuestDma>,
    log: Mutex<Log>,
}

#[derive(Debug, Default)]
struct Log {
    active: Option<Active>,
    /// The server has not answered a START or a STOP: it may be logging, for nobody.
    may_run: bool,
    /// A thread waits for the server, to stop that.
    stopping: bool,
    tried: Option<Tried>,
}

#[derive(Debug)]
struct Active {
    /// As mapped, with the RAM there: libvfio-user reports one mapping at a time.
    ranges: Vec<(Range<Iova>, RamOffset)>,
    granule: Granule,
}

/// The outcome of a trial that the server answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tried {
    Works,
    Fails,
    /// It was refused for a lack that may pass.
    FailsNow,
}

type Cause = Box<dyn Error + Send + Sync>;

impl ServerLog {
    pub(super) fn new(id: DeviceId, client: Arc<Client>, dma: Arc<GuestDma>) -> Self {
        Self(Arc::new(Shared { id, client, dma, log: Mutex::default() }))
    }

    /// Whether it logs, by a START, REPORT, STOP trial: START can succeed where REPORT is not supported. What the server
    /// answers once and for all is kept.
    ///
    /// # Errors
    /// The server has not answered, which says nothing of its log.
    pub(super) fn works(&self) -> Result<bool, DeviceError> {
        let mut log = self.0.lock();
        match log.tried {
            Some(Tried::Works) => return Ok(true),
            Some(Tried::Fails) => return Ok(false),
            // It runs, which is proof enough.
            _ if log.active.is_some() => return Ok(true),
            _ => {}
        }
        let tried = match self.0.trial(&mut log) {
            Ok(true) => Tried::Works,
            Ok(false) => Tried::Fails,
            Err((doing, cause)) => {
                let Some(tried) = verdict(&*cause) else {
                    return Err(DeviceError::new(self.0.id.clone(), doing, errno(&*cause), cause));
                };
                tracing::info!(device = %self.0.id, error = %error_chain(&*cause), "no DMA log: {doing} failed");
                tried
            }
        };
        log.tried = Some(tried);
        Ok(tried == Tried::Works)
    }

    /// Whether there is a log, as far as is known, which is found out when it is first asked for. One whose server has not
    /// answered is there: who starts it is told.
    pub(super) fn is_there(&self) -> bool {
        let tried = self.0.lock().tried;
        tried.map_or_else(|| self.works().unwrap_or(true), |tried| tried == Tried::Works)
    }
}

impl Shared {
    /// Whether the server logs. A failure has what was being done.
    fn trial(self: &Arc<Self>, log: &mut Log) -> Result<bool, (&'static str, Cause)> {
        if self.dma.serves_all() {
            return Ok(true);
        }
        // With nothing mapped there is nothing to report on: the probe is all there is to go by.
        if self.dma.shared_ram().is_empty() {
            let probed = self.client.probe_feature(Feature::DMA_LOGGING_START, FeatureOp::Set);
            return probed.map_err(|error| ("asking for a DMA log", error.into()));
        }
        self.start(log).map_err(|cause| ("starting its DMA log on trial", cause))?;
        let mut scratch = Bitmap::new(self.dma.ram().size(), Granule::PAGE);
        let reported = self.report(log, &mut scratch);
        let stopped = match &reported {
            // Nor would it answer that.
            Err((_, cause)) if is_late(&**cause) => {
                log.active = None;
                self.stop_later(log);
                self.dma.writes.stop().map_err(Cause::from)
            }
            _ => self.stop(log),
        };
        reported.map_err(|(_, cause)| ("reading its DMA log on trial", cause))?;
        stopped.map(|()| true).map_err(|cause| ("stopping its DMA log on trial", cause))
    }

    fn start(self: &Arc<Self>, log: &mut Log) -> Result<(), Cause> {
        // One that refuses did not log.
        if log.may_run
            && let Err(error) = self.stop_server(log)
            && is_unanswered(&error)
        {
            return Err(error.into());
        }
        if !self.dma.knows_ram() {
            return Err(UnknownRam.into());
        }
        self.dma.writes.start()?;
        let ranges = self.dma.begin();
        match self.start_server(log, &ranges) {
            Ok(granule) => {
                log.active = Some(Active { ranges, granule });
                Ok(())
            }
            Err(error) => {
                // The cause is what matters; the write log stops in any case.
                let _ = self.dma.writes.stop();
                Err(error)
            }
        }
    }

    fn start_server(
        self: &Arc<Self>,
        log: &mut Log,
        ranges: &[(Range<Iova>, RamOffset)],
    ) -> Result<Granule, Cause> {
        if ranges.is_empty() {
            // An empty list would mean "log everything", the opposite.
            return Ok(Granule::PAGE);
        }
        let wire: Vec<IovaRange> = ranges.iter().map(|(range, _)| wire_range(range)).collect();
        let chosen = match self.client.dma_logging_start(PAGE_SIZE, &wire) {
            Ok(chosen) => chosen,
            Err(error) => {
                match error {
                    // It was not begun, or not even asked for.
                    ClientError::Refused { .. }
                    | ClientError::Limit { .. }
                    | ClientError::NotNegotiated(_)
                    | ClientError::Timeout { sent: false, .. } => {}
                    // It makes no sense, and the log may run all the same.
                    ClientError::Protocol { .. } => drop(self.stop_server(log)),
                    _ => self.stop_later(log),
                }
                return Err(error.into());
            }
        };
        let granule = Granule::new(chosen).ok().filter(|granule| {
            // Bits must fall on whole stretches of each mapping.
            ranges.iter().all(|(range, _)| range.start().0.is_multiple_of(granule.bytes()))
        });
        match granule {
            Some(granule) => Ok(granule),
            None => {
                self.stop_server(log)?;
                Err(format!("the server logs in pages of {chosen} bytes, which do not fit guest RAM").into())
            }
        }
    }

    /// ORs into `into` what the log has. A failure has what was being done.
    fn report(&self, log: &Log, into: &mut Bitmap) -> Result<(), (&'static str, Cause)> {
        let reporting = |error: ClientError| ("reporting", Cause::from(error));
        let Some(Active { ranges, granule }) = &log.active else {
            return Err(("reporting", "it was not started".into()));
        };
        // What the server wrote by message before it reported that it has stopped may still wait in the other socket.
        self.client.dma_settled().map_err(|error| ("waiting for writes under way", error.into()))?;
        self.dma.writes.report(into).map_err(|error| ("reporting", error.into()))?;
        for (range, ram) in ranges {
            // Of what is not mapped any more a server may know nothing; it counts as dirty below.
            if !self.dma.contains(*range) {
                continue;
            }
            let pages = granule.count(range.len());
            let mut words = vec![0; usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX)];
            self.client
                .dma_logging_report(wire_range(range), granule.bytes(), &mut words)
                .map_err(reporting)?;
            into.or_scaled(ram.0, &words, *granule);
        }
        for (ram, bytes) in self.dma.moved() {
            into.set_bytes(ram.0, bytes);
        }
        Ok(())
    }

    fn stop(self: &Arc<Self>, log: &mut Log) -> Result<(), Cause> {
        let Some(active) = log.active.take() else {
            // No thread could be had for it.
            if log.may_run && !log.stopping {
                self.stop_server(log)?;
            }
            return Ok(());
        };
        let ours = self.dma.writes.stop();
        if !active.ranges.is_empty() {
            self.stop_server(log)?;
        }
        Ok(ours?)
    }

    /// Has the server stop logging. One that does not answer is asked again as soon as it does.
    fn stop_server(self: &Arc<Self>, log: &mut Log) -> Result<(), ClientError> {
        let stopped = self.client.dma_logging_stop();
        match &stopped {
            Err(error) if is_unanswered(error) => self.stop_later(log),
            // A refusal is an answer, and one that asks again gets the same.
            _ => log.may_run = false,
        }
        stopped
    }

    /// Leaves a log that may run, since the server has not answered, to a thread that stops it when it does.
    fn stop_later(self: &Arc<Self>, log: &mut Log) {
        log.may_run = true;
        if log.stopping || !self.client.is_alive() {
            return;
        }
        let (device, shared) = (&self.id, Arc::downgrade(self));
        let thread = std::thread::Builder::new().name("dma-log-stop".into());
        match thread.spawn(move || stop_when_it_answers(&shared)) {
            Ok(_) => {
                log.stopping = true;
                tracing::warn!(%device, "its server may go on logging DMA until it answers, and is told to stop then");
            }
            Err(error) => {
                let error = error_chain(&error);
                tracing::warn!(%device, error, "its server may go on logging DMA until the log is next started");
            }
        }
    }

    fn failed(&self, doing: &str, source: Cause) -> MemoryError {
        MemoryError::DirtyLog { source_name: format!("device {}", self.id), doing: doing.into(), source }
    }

    fn lock(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits until the server answers, and stops a log that nobody has started since. Ends when the device is closed or lost, too.
fn stop_when_it_answers(shared: &Weak<Shared>) {
    loop {
        let Some(client) = shared.upgrade().map(|shared| Arc::clone(&shared.client)) else { return };
        // Without the lock, which who asks meanwhile needs. Any answer will do: they come in order.
        if client.mig_state().is_err_and(|error| is_late(&error)) {
            continue;
        }
        drop(client);
        let Some(shared) = shared.upgrade() else { return };
        let mut log = shared.lock();
        if !log.may_run || log.active.is_some() {
            log.stopping = false;
            return;
        }
        match shared.stop_server(&mut log) {
            Err(error) if is_late(&error) => {}
            stopped => {
                log.stopping = false;
                let device = &shared.id;
                match stopped {
                    Err(error) if is_unanswered(&error) => {
                        let error = error_chain(&error);
                        tracing::warn!(%device, error, "its DMA log could not be stopped");
                    }
                    _ => tracing::info!(%device, "its server has answered, and logs no DMA any more"),
                }
                return;
            }
        }
    }
}

impl DirtySource for ServerLog {
    fn name(&self) -> String {
        format!("device {}", self.0.id)
    }

    fn coverage(&self) -> Coverage {
        // Whoever mapped the guest's RAM for the device did so elsewhere: nothing is known of what it writes.
        if self.0.dma.knows_ram() { Coverage::All } else { Coverage::Nothing(UnknownRam.to_string()) }
    }

    fn start(&self) -> Result<(), MemoryError> {
        let mut log = self.0.lock();
        if log.active.is_some() {
            return Err(self.0.failed("starting a log that already runs", "it was started before".into()));
        }
        self.0.start(&mut log).map_err(|error| self.0.failed("starting", error))
    }

    fn report(&self, into: &mut Bitmap) -> Result<(), MemoryError> {
        self.0.report(&self.0.lock(), into).map_err(|(doing, error)| self.0.failed(doing, error))
    }

    fn covers(&self, offset: RamOffset) -> bool {
        self.0.dma.reaches(offset)
    }

    fn stop(&self) -> Result<(), MemoryError> {
        self.0.stop(&mut self.0.lock()).map_err(|error| self.0.failed("stopping", error))
    }
}

impl DirtyLog for ServerLog {
    fn granule(&self) -> Granule {
        self.0.lock().active.as_ref().map_or(Granule::PAGE, |active| active.granule)
    }
}

/// What the failure of a trial says of the log. `None`: nothing, as the server has not answered, or this side could not ask.
fn verdict(cause: &(dyn Error + 'static)) -> Option<Tried> {
    match client_error(cause) {
        Some(ClientError::Refused { errno: Some(errno), .. }) if is_passing(*errno) => Some(Tried::FailsNow),
        Some(
            ClientError::Refused { .. }
            | ClientError::Protocol { .. }
            | ClientError::Limit { .. }
            | ClientError::NotNegotiated(_),
        ) => Some(Tried::Fails),
        Some(_) => None,
        None => (!cause.is::<MemoryError>()).then_some(Tried::Fails),
    }
}

/// Whether a request may have been done though it failed.
fn is_unanswered(error: &ClientError) -> bool {
    matches!(
        error,
        ClientError::Timeout { .. }
            | ClientError::OutOfTime { .. }
            | ClientError::ConnectionLost { .. }
            | ClientError::Io { .. }
    )
}

fn errno(cause: &(dyn Error + 'static)) -> Option<Errno> {
    client_error(cause).and_then(ClientError::errno)
}

fn client_error<'e>(cause: &'e (dyn Error + 'static)) -> Option<&'e ClientError> {
    cause.downcast_ref()
}

fn wire_range(range: &Range<Iova>) -> IovaRange {
    IovaRange { iova: range.start().0, len: range.len() }
}
