//! The log of a vfio-user device's DMA writes: the server's own, for what it maps, and ours, for what it asks us to write.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vfio_migration_memory::{DirtySource, MemoryError};
use vfio_migration_types::{Bitmap, DeviceId, Gpa, Granule, Iova, PAGE_SIZE, RamOffset, Range};
use vfio_user_peer::{Client, Feature, FeatureOp, IovaRange};

use super::dma::GuestDma;
use crate::contract::DirtyLog;

/// The log of one device: the server's own and [`GuestDma`]'s, reported as one.
#[derive(Debug)]
pub(super) struct ServerLog {
    id: DeviceId,
    client: Arc<Client>,
    dma: Arc<GuestDma>,
    active: Mutex<Option<Active>>,
}

#[derive(Debug)]
struct Active {
    /// As mapped: libvfio-user reports one mapping at a time.
    ranges: Vec<Range<Iova>>,
    granule: Granule,
}

impl ServerLog {
    pub(super) fn new(id: DeviceId, client: Arc<Client>, dma: Arc<GuestDma>) -> Self {
        Self { id, client, dma, active: Mutex::default() }
    }

    /// A START, REPORT, STOP trial: START can succeed where REPORT is not supported.
    pub(super) fn trial(&self) -> bool {
        if self.dma.serves_all() {
            return true;
        }
        let mut scratch = Bitmap::new(self.dma.ram().size(), Granule::PAGE);
        let ranges = self.dma.shared_ram();
        // With nothing mapped there is nothing to report on: the probe is all there is to go by.
        if ranges.is_empty() {
            return self.client.probe_feature(Feature::DMA_LOGGING_START, FeatureOp::Set).unwrap_or(false);
        }
        let reported = self.start().and_then(|()| self.report(&mut scratch));
        let stopped = self.stop();
        reported
            .and(stopped)
            .inspect_err(|error| tracing::info!(device = %self.id, %error, "no DMA log"))
            .is_ok()
    }

    fn start_server(
        &self,
        ranges: &[Range<Iova>],
    ) -> Result<Granule, Box<dyn std::error::Error + Send + Sync>> {
        if ranges.is_empty() {
            // An empty list would mean "log everything", the opposite.
            return Ok(Granule::PAGE);
        }
        let wire: Vec<IovaRange> = ranges.iter().map(wire_range).collect();
        let chosen = self.client.dma_logging_start(PAGE_SIZE, &wire)?;
        let granule = Granule::new(chosen).ok().filter(|granule| {
            // Bits must fall on whole stretches of each mapping.
            ranges.iter().all(|range| range.start().0.is_multiple_of(granule.bytes()))
        });
        match granule {
            Some(granule) => Ok(granule),
            None => {
                self.client.dma_logging_stop()?;
                Err(format!("the server logs in pages of {chosen} bytes, which do not fit guest RAM").into())
            }
        }
    }

    fn failed(
        &self,
        doing: &str,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> MemoryError {
        MemoryError::DirtyLog {
            source_name: DirtySource::name(self),
            doing: doing.into(),
            source: source.into(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Active>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DirtySource for ServerLog {
    fn name(&self) -> String {
        format!("device {}", self.id)
    }

    fn start(&self) -> Result<(), MemoryError> {
        let mut active = self.lock();
        if active.is_some() {
            return Err(self.failed("starting a log that already runs", "it was started before"));
        }
        self.dma.writes.start()?;
        let ranges = self.dma.shared_ram();
        match self.start_server(&ranges) {
            Ok(granule) => {
                *active = Some(Active { ranges, granule });
                Ok(())
            }
            Err(error) => {
                // The cause is what matters; the write log stops in any case.
                let _ = self.dma.writes.stop();
                Err(self.failed("starting", error))
            }
        }
    }

    fn report(&self, into: &mut Bitmap) -> Result<(), MemoryError> {
        let active = self.lock();
        let Some(Active { ranges, granule }) = active.as_ref() else {
            return Err(self.failed("reporting", "it was not started"));
        };
        // What the server wrote by message before it reported that it has stopped may still wait in the other socket.
        self.client.dma_settled().map_err(|error| self.failed("waiting for writes under way", error))?;
        self.dma.writes.report(into)?;
        for range in ranges {
            let pages = granule.count(range.len());
            let mut words = vec![0; usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX)];
            self.client
                .dma_logging_report(wire_range(range), granule.bytes(), &mut words)
                .map_err(|error| self.failed("reporting", error))?;
            // Mapped guest RAM lies in one region of it, or it would not have been logged.
            let start = self.dma.ram().offset_of(Gpa(range.start().0), range.len());
            let start = start.ok_or_else(|| self.failed("reporting", "guest RAM has moved"))?;
            into.or_scaled(start.0, &words, *granule);
        }
        Ok(())
    }

    fn covers(&self, offset: RamOffset) -> bool {
        self.dma.reaches(offset)
    }

    fn stop(&self) -> Result<(), MemoryError> {
        let Some(active) = self.lock().take() else { return Ok(()) };
        let ours = self.dma.writes.stop();
        if !active.ranges.is_empty() {
            self.client.dma_logging_stop().map_err(|error| self.failed("stopping", error))?;
        }
        ours
    }
}

impl DirtyLog for ServerLog {
    fn granule(&self) -> Granule {
        self.lock().as_ref().map_or(Granule::PAGE, |active| active.granule)
    }
}

fn wire_range(range: &Range<Iova>) -> IovaRange {
    IovaRange { iova: range.start().0, len: range.len() }
}
