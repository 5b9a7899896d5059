//! The way of one device's state out of the stream: a bounded queue, and a thread that writes from it into the device.
//!
//! The queue is bounded by credit: the source may send what was granted, and no more. So the reader never waits for a
//! device, and memory never grows beyond the window.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vfio_migration_device::ResumingSession;
use vfio_migration_engine::DestinationEvent;
use vfio_migration_types::{DeviceId, Failure, Phase, Side};
use vfio_migration_wire::{Applied, DeviceTotal, Message};

use crate::channel::link::Link;
use crate::session::fail::{InPhase, panicked};
use crate::session::interrupt::Interrupt;
use crate::session::lock::lock;
use crate::session::work_error::WorkError;

use crate::session::events::Events;

/// Time after which a waiter looks again whether it was interrupted.
const SLICE: Duration = Duration::from_millis(20);

/// Pieces are put together up to this size.
const MERGED: usize = 64 << 10;
/// Most items in one queue: credit bounds the bytes, this bounds everything else.
const MOST_ITEMS: usize = 1 << 16;

/// The end of an iteration, which every device's queue must pass.
#[derive(Debug)]
pub(crate) struct Mark {
    pub(crate) iteration: u32,
    left: AtomicUsize,
}

impl Mark {
    pub(crate) fn new(iteration: u32, queues: usize) -> Arc<Self> {
        Arc::new(Self { iteration, left: AtomicUsize::new(queues) })
    }

    /// One more queue has passed; returns whether it was the last.
    pub(crate) fn pass(&self) -> bool {
        self.left.fetch_sub(1, Ordering::AcqRel) == 1
    }
}

/// Totals that all devices have taken so far.
#[derive(Debug, Default)]
pub(crate) struct Written {
    pub(crate) bytes: AtomicU64,
    pub(crate) ns: AtomicU64,
}

impl Written {
    pub(crate) fn applied(&self, iteration: u32) -> Applied {
        Applied {
            iteration,
            device_bytes: self.bytes.load(Ordering::Relaxed),
            device_ns: self.ns.load(Ordering::Relaxed),
        }
    }
}

#[derive(Debug)]
enum Item {
    /// A piece of state, with whether the guest was paused when it came.
    Data(Vec<u8>, bool),
    Initial(u32),
    Mark(Arc<Mark>),
    End(DeviceTotal),
}

/// One device at the destination: its queue, between the reader and the device's own thread.
#[derive(Debug)]
pub(crate) struct DeviceReceiver {
    pub(crate) index: u16,
    pub(crate) id: DeviceId,
    /// Bytes written while the guest ran, and while it was paused.
    pub(crate) precopy: AtomicU64,
    pub(crate) stopcopy: AtomicU64,
    window: u64,
    inner: Mutex<Inner>,
    wake: Condvar,
}

#[derive(Debug)]
struct Inner {
    items: VecDeque<Item>,
    /// Bytes that the source may still send.
    credit: u64,
    sequence: u64,
    offset: u64,
    ended: bool,
    /// Nothing more is taken: the attempt is over, or the device has failed.
    closed: bool,
    outcome: Option<ReceiveOutcome>,
    /// The device's thread has ended.
    left: bool,
}

/// The outcome of a device's thread.
#[derive(Debug)]
pub(crate) enum ReceiveOutcome {
    /// All of the state was written, and is what the source sent.
    Complete(Box<dyn ResumingSession>, DeviceTotal),
    /// The session was given up before its end, by a failure or by an abort.
    GivenUp(Box<dyn ResumingSession>),
}

impl DeviceReceiver {
    pub(crate) fn new(index: u16, id: DeviceId, window: u64) -> Self {
        let window = window.max(64 << 10);
        let inner = Inner {
            items: VecDeque::new(),
            credit: window,
            sequence: 0,
            offset: 0,
            ended: false,
            closed: false,
            outcome: None,
            left: false,
        };
        Self {
            index,
            id,
            precopy: AtomicU64::new(0),
            stopcopy: AtomicU64::new(0),
            window,
            inner: Mutex::new(inner),
            wake: Condvar::new(),
        }
    }

    /// Takes a piece of state from the reader. Its place in the stream is checked here.
    pub(crate) fn data(
        &self,
        sequence: u64,
        offset: u64,
        bytes: &[u8],
        stopped: bool,
    ) -> Result<(), Failure> {
        let mut inner = lock(&self.inner);
        if inner.closed {
            return Ok(());
        }
        let wrong = if inner.ended {
            Some("more state came after its end".to_owned())
        } else if (sequence, offset) != (inner.sequence, inner.offset) {
            Some(format!(
                "piece {sequence} at byte {offset} came where piece {} at byte {} was due",
                inner.sequence, inner.offset
            ))
        } else if bytes.len() as u64 > inner.credit {
            Some(format!("{} bytes came where {} were granted", bytes.len(), inner.credit))
        } else {
            None
        };
        if let Some(wrong) = wrong {
            return Err(Failure::new(Side::Destination, Phase::Iterate, wrong).of_device(&self.id));
        }
        inner.credit -= bytes.len() as u64;
        inner.sequence += 1;
        inner.offset += bytes.len() as u64;
        // A device that hands out its state in crumbs costs an item per 64 KiB all the same.
        match inner.items.back_mut() {
            Some(Item::Data(last, then)) if last.len() + bytes.len() <= MERGED && *then == stopped => {
                last.extend_from_slice(bytes);
            }
            _ => self.push(&mut inner, Item::Data(bytes.to_vec(), stopped)),
        }
        Ok(())
    }

    /// Takes note that all initial bytes of `generation` lie in the queue.
    pub(crate) fn initial(&self, generation: u32) -> Result<(), Failure> {
        self.note(Item::Initial(generation))
    }

    /// Puts the end of an iteration into the queue.
    pub(crate) fn mark(&self, mark: &Arc<Mark>) -> Result<(), Failure> {
        self.note(Item::Mark(Arc::clone(mark)))
    }

    /// Takes the end mark.
    pub(crate) fn end(&self, total: DeviceTotal) -> Result<(), Failure> {
        let mut inner = lock(&self.inner);
        if std::mem::replace(&mut inner.ended, true) {
            return Err(
                Failure::new(Side::Destination, Phase::Final, "its state ended twice").of_device(&self.id)
            );
        }
        self.push(&mut inner, Item::End(total));
        Ok(())
    }

    /// Ends the device's thread at its next step.
    pub(crate) fn close(&self) {
        let mut inner = lock(&self.inner);
        inner.closed = true;
        inner.items.clear();
        self.wake.notify_all();
    }

    /// Waits until the whole state has been written.
    pub(crate) fn complete(
        &self,
        interrupt: &Interrupt,
    ) -> Result<(Box<dyn ResumingSession>, DeviceTotal), WorkError> {
        let mut inner = lock(&self.inner);
        loop {
            match inner.outcome.take() {
                Some(ReceiveOutcome::Complete(session, total)) => return Ok((session, total)),
                // Its thread has reported why; put back for the release.
                Some(given_up @ ReceiveOutcome::GivenUp(_)) => {
                    inner.outcome = Some(given_up);
                    return Err(WorkError::Interrupted);
                }
                None => {}
            }
            if !inner.ended {
                return Err(Failure::new(
                    Side::Destination,
                    Phase::Ready,
                    "the end mark of its state never came",
                )
                .of_device(&self.id)
                .into());
            }
            interrupt.check()?;
            inner = self.wake.wait_timeout(inner, SLICE).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits for the device's thread to end, and takes its session; `None` if that was taken already. The wait is as
    /// long as the device's own time limit, if a write is under way.
    pub(crate) fn take_session(&self) -> Option<Box<dyn ResumingSession>> {
        self.close();
        let mut inner = lock(&self.inner);
        while !inner.left {
            inner = self.wake.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        match inner.outcome.take() {
            Some(ReceiveOutcome::Complete(session, _) | ReceiveOutcome::GivenUp(session)) => Some(session),
            None => None,
        }
    }

    /// The device's thread: writes what comes until the end of the state, a failure, or the queue's close.
    pub(crate) fn write_to(
        &self,
        mut session: Box<dyn ResumingSession>,
        link: &Link,
        events: &Events<DestinationEvent>,
        written: &Written,
    ) {
        let mut hasher = blake3::Hasher::new();
        let mut total = 0;
        let mut owed = 0;
        let outcome = loop {
            let Some(item) = self.next() else { break ReceiveOutcome::GivenUp(session) };
            let step = match item {
                Item::Data(bytes, stopped) => {
                    let begun = Instant::now();
                    // What came while the guest ran may be written later: the phase is that of the data.
                    let phase = if stopped { Phase::Final } else { Phase::Iterate };
                    let result = catch_unwind(AssertUnwindSafe(|| session.write(&bytes)))
                        .map_err(|panic| panicked(Side::Destination, phase, panic.as_ref()))
                        .and_then(|written| {
                            written.map_err(|error| error.in_phase(Side::Destination, phase))
                        });
                    let ns = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
                    let len = bytes.len() as u64;
                    hasher.update(&bytes);
                    total += len;
                    owed += len;
                    written.ns.fetch_add(ns, Ordering::Relaxed);
                    written.bytes.fetch_add(len, Ordering::Relaxed);
                    let count = if stopped { &self.stopcopy } else { &self.precopy };
                    count.fetch_add(len, Ordering::Relaxed);
                    if owed >= self.window / 8 {
                        self.grant(owed, link);
                        owed = 0;
                    }
                    result
                }
                Item::Initial(generation) => {
                    events.send(DestinationEvent::InitialLoaded { device: self.index, generation });
                    Ok(())
                }
                Item::Mark(mark) => {
                    if mark.pass() {
                        events.send(DestinationEvent::Applied(written.applied(mark.iteration)));
                    }
                    Ok(())
                }
                Item::End(announced) => {
                    let found = DeviceTotal { bytes: total, digest: *hasher.finalize().as_bytes() };
                    if found == announced {
                        break ReceiveOutcome::Complete(session, found);
                    }
                    let text = if found.bytes == announced.bytes {
                        "its state differs from what the source read, by digest".to_owned()
                    } else {
                        format!("{} bytes of state arrived where {} were sent", found.bytes, announced.bytes)
                    };
                    let mut failure = Failure::new(Side::Destination, Phase::Ready, text).of_device(&self.id);
                    failure.remedy = "try again: its state was damaged between the two hosts".into();
                    Err(failure)
                }
            };
            if let Err(failure) = step {
                self.close();
                events.send(DestinationEvent::Damaged(failure));
                break ReceiveOutcome::GivenUp(session);
            }
        };
        let mut inner = lock(&self.inner);
        inner.outcome = Some(outcome);
        inner.left = true;
        self.wake.notify_all();
    }

    fn grant(&self, bytes: u64, link: &Link) {
        lock(&self.inner).credit += bytes;
        // A link that is gone needs no credit: its reader reports.
        let _ = link.send(&Message::Credit { device: self.index, bytes });
    }

    /// The first grant, once the device can take anything.
    pub(crate) fn open(&self, link: &Link) -> Result<(), WorkError> {
        let message = Message::Credit { device: self.index, bytes: self.window };
        link.send(&message).map_err(|error| WorkError::sending(error, Side::Destination, Phase::Setup))
    }

    fn next(&self) -> Option<Item> {
        let mut inner = lock(&self.inner);
        loop {
            if inner.closed {
                return None;
            }
            if let Some(item) = inner.items.pop_front() {
                return Some(item);
            }
            inner = self.wake.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn note(&self, item: Item) -> Result<(), Failure> {
        let mut inner = lock(&self.inner);
        if inner.items.len() >= MOST_ITEMS {
            let text = "more marks than any migration has lie in its queue";
            return Err(Failure::new(Side::Destination, Phase::Iterate, text).of_device(&self.id));
        }
        self.push(&mut inner, item);
        Ok(())
    }

    fn push(&self, inner: &mut Inner, item: Item) {
        if !inner.closed {
            inner.items.push_back(item);
            self.wake.notify_all();
        }
    }
}
