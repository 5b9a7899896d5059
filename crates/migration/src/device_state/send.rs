//! The way of one device's state into the stream: during the pre-copy within limits, in STOP_COPY to its end.
//!
//! One thread sends one device; all devices and the RAM share the link, frame by frame.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vfio_migration_device::{Capabilities, Chunk, Device, Position, PrecopyProgress, SavingSession};
use vfio_migration_engine::DeviceProgress;
use vfio_migration_types::{DeviceId, Failure, MigrationFlags, Phase, Side};
use vfio_migration_wire::{Bulk, DeviceEnd, DeviceTotal, Message, limits};

use crate::channel::credit::Credit;
use crate::channel::limiter::{Limiter, SendContext};
use crate::session::fail::InPhase;
use crate::session::work_error::WorkError;

/// Longest pre-copy pass over a device that cannot say how much it has.
const BLIND_PASS: Duration = Duration::from_secs(1);

/// Totals that one device has moved so far, for whoever looks from outside.
#[derive(Debug, Default)]
pub(crate) struct DeviceCounters {
    pub(crate) precopy: AtomicU64,
    pub(crate) stopcopy: AtomicU64,
}

impl DeviceCounters {
    /// Bytes that it has given in all.
    pub(crate) fn moved(&self) -> u64 {
        self.precopy.load(Ordering::Relaxed).saturating_add(self.stopcopy.load(Ordering::Relaxed))
    }
}

/// One device at the source: its session, and how far its stream is.
#[derive(Debug)]
pub(crate) struct DeviceSender {
    pub(crate) index: u16,
    pub(crate) id: DeviceId,
    pub(crate) device: Arc<dyn Device>,
    pub(crate) capabilities: Capabilities,
    pub(crate) session: Option<Box<dyn SavingSession>>,
    pub(crate) credit: Arc<Credit>,
    pub(crate) counters: Arc<DeviceCounters>,
    sequence: u64,
    offset: u64,
    hasher: blake3::Hasher,
    generation: u32,
    initial_sent: bool,
    last: Option<PrecopyProgress>,
    end: Option<DeviceTotal>,
    buffer: Vec<u8>,
}

impl DeviceSender {
    pub(crate) fn new(
        index: u16,
        device: Arc<dyn Device>,
        capabilities: Capabilities,
        credit: Arc<Credit>,
        counters: Arc<DeviceCounters>,
    ) -> Self {
        let chunk = capabilities.chunk.clamp(4096, limits::DEVICE_DATA);
        Self {
            index,
            id: device.id().clone(),
            device,
            capabilities,
            session: None,
            credit,
            counters,
            sequence: 0,
            offset: 0,
            hasher: blake3::Hasher::new(),
            generation: 0,
            initial_sent: false,
            last: None,
            end: None,
            buffer: vec![0; chunk],
        }
    }

    /// The device's migration flags.
    pub(crate) fn flags(&self) -> MigrationFlags {
        self.capabilities.flags
    }

    /// The device's progress. Asks it, while a pre-copy session is open; notices a REINIT.
    pub(crate) fn progress(&mut self, phase: Phase) -> Result<DeviceProgress, WorkError> {
        self.ask(phase)?;
        let stop_copy = if self.capabilities.data_size {
            self.device.stop_copy_size().map_err(|error| error.in_phase(Side::Source, phase))?
        } else {
            None
        };
        Ok(DeviceProgress {
            initial_left: self.last.map(|last| last.initial_bytes),
            dirty_left: self.last.map(|last| last.dirty_bytes),
            stop_copy,
            generation: self.generation,
            // A device without pre-copy has no initial bytes: there is nothing to wait for.
            initial_sent: self.initial_sent || !self.capabilities.flags.pre_copy,
        })
    }

    /// One pre-copy pass: what the device has now, initial bytes first. What it changes meanwhile is for the next pass.
    pub(crate) fn precopy_pass(&mut self, context: SendContext<'_>) -> Result<(), WorkError> {
        let phase = Phase::Iterate;
        if self.session.is_none() {
            return Ok(());
        }
        self.ask(phase)?;
        let mut left = self.last.map(|last| last.initial_bytes.saturating_add(last.dirty_bytes));
        let begun = Instant::now();
        loop {
            self.announce_initial(context, phase)?;
            let enough = match left {
                Some(left) => left == 0,
                None => begun.elapsed() > BLIND_PASS,
            };
            if enough {
                return Ok(());
            }
            match self.piece(context, phase, Some(context.limiter))? {
                Chunk::Data(read) => {
                    self.counters.precopy.fetch_add(read as u64, Ordering::Relaxed);
                    left = left.map(|left| left.saturating_sub(read as u64));
                    if !self.initial_sent && self.capabilities.precopy_info {
                        self.ask(phase)?;
                    }
                }
                Chunk::NothingNow | Chunk::End => {
                    // What a device without progress calls "nothing" for the first time ends its initial data.
                    if !self.capabilities.precopy_info {
                        self.last = None;
                        self.send_initial(context, phase)?;
                    } else {
                        self.ask(phase)?;
                        self.announce_initial(context, phase)?;
                    }
                    return Ok(());
                }
            }
        }
    }

    /// Sends the rest of the state, to its end, with the device stopped in STOP_COPY.
    pub(crate) fn drain(&mut self, context: SendContext<'_>) -> Result<(), WorkError> {
        let phase = Phase::Final;
        if self.end.is_some() {
            return Ok(());
        }
        loop {
            match self.piece(context, phase, None)? {
                Chunk::Data(read) => {
                    self.counters.stopcopy.fetch_add(read as u64, Ordering::Relaxed);
                }
                Chunk::End => break,
                Chunk::NothingNow => {
                    let text = "the device says in STOP_COPY that more state may come later";
                    return Err(Failure::new(Side::Source, phase, text).of_device(&self.id).into());
                }
            }
        }
        let total = DeviceTotal { bytes: self.offset, digest: *self.hasher.finalize().as_bytes() };
        let end = Bulk::DeviceEnd(DeviceEnd { device: self.index, total });
        context.link.send_bulk(&end).map_err(|error| WorkError::sending(error, Side::Source, phase))?;
        self.end = Some(total);
        Ok(())
    }

    /// The total that was sent, once [`drain`](Self::drain) has.
    pub(crate) fn total(&self) -> Option<DeviceTotal> {
        self.end
    }

    /// Reads a piece and sends it.
    fn piece(
        &mut self,
        context: SendContext<'_>,
        phase: Phase,
        cap: Option<&Limiter>,
    ) -> Result<Chunk, WorkError> {
        context.interrupt.check()?;
        let Some(session) = &mut self.session else {
            return Err(Failure::new(Side::Source, phase, "the device has no saving session")
                .of_device(&self.id)
                .into());
        };
        let most = self.buffer.len() as u64;
        let most = cap.map_or(most, |cap| cap.frame_size(most));
        let Some(most) = self.credit.take(most, context.patience, context.interrupt)? else {
            let text = format!(
                "the destination grants device {} no credit: it has taken none of its state for {:?}",
                self.id, context.patience
            );
            let mut failure = Failure::new(Side::Source, phase, text).of_device(&self.id);
            failure.remedy = "see why the device does not load there: its server's or driver's log".into();
            return Err(failure.into());
        };
        // What was granted fits a buffer, by the line above.
        let room = self.buffer.get_mut(..usize::try_from(most).unwrap_or(0)).unwrap_or_default();
        let read = session.read(room);
        let used = match &read {
            Ok(Chunk::Data(used)) => (*used).min(room.len()),
            _ => 0,
        };
        self.credit.grant(most - used as u64);
        let read = read.map_err(|error| error.in_phase(Side::Source, phase))?;
        if used == 0 {
            return Ok(if matches!(read, Chunk::Data(_)) { Chunk::NothingNow } else { read });
        }
        let bytes = room.get(..used).unwrap_or_default();
        self.hasher.update(bytes);
        if let Some(cap) = cap {
            cap.take(used as u64, context.interrupt)?;
        }
        let piece =
            Bulk::DeviceData { device: self.index, sequence: self.sequence, offset: self.offset, bytes };
        context.link.send_bulk(&piece).map_err(|error| WorkError::sending(error, Side::Source, phase))?;
        self.sequence += 1;
        self.offset += used as u64;
        Ok(Chunk::Data(used))
    }

    /// Asks a device in pre-copy how much it has; notices a REINIT, which voids what was acknowledged.
    fn ask(&mut self, phase: Phase) -> Result<(), WorkError> {
        let Some(session) = self.session.as_mut().filter(|session| session.position() != Position::StopCopy)
        else {
            return Ok(());
        };
        if !self.capabilities.precopy_info {
            return Ok(());
        }
        self.last = session.progress().map_err(|error| error.in_phase(Side::Source, phase))?;
        // Initial bytes that come back after they were all sent are new ones, flagged or not.
        let again =
            self.last.is_some_and(|last| last.reinit || (self.initial_sent && last.initial_bytes > 0));
        if again && self.initial_sent {
            self.generation = self.generation.saturating_add(1);
            self.initial_sent = false;
        }
        Ok(())
    }

    fn announce_initial(&mut self, context: SendContext<'_>, phase: Phase) -> Result<(), WorkError> {
        if !self.initial_sent && self.last.is_some_and(|last| last.initial_bytes == 0) {
            self.send_initial(context, phase)?;
        }
        Ok(())
    }

    fn send_initial(&mut self, context: SendContext<'_>, phase: Phase) -> Result<(), WorkError> {
        if !self.initial_sent {
            let message = Message::InitialSent { device: self.index, generation: self.generation };
            context.link.send(&message).map_err(|error| WorkError::sending(error, Side::Source, phase))?;
            self.initial_sent = true;
        }
        Ok(())
    }
}
