//! P3 to P5: the reader. Pages go straight to their place in RAM, device state to its device's queue, sections to the
//! heap until they are loaded; messages go to the engine, in their place in the stream.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, OnceLock};

use vfio_migration_engine::DestinationEvent;
use vfio_migration_types::{Failure, Phase, Side, error_chain};
use vfio_migration_wire::{Bulk, Frame, Message, RamDigests, limits};

use crate::channel::error::ChannelError;
use crate::channel::link::Link;
use crate::channel::reader::Reader;
use crate::device_state::receive::{DeviceReceiver, Mark, Written};
use crate::machine::Section;
use crate::ram::receive::{PageReceiver, PagesError};
use crate::session::events::Events;
use crate::session::fail::InPhase;
use crate::session::lock::lock;

/// Receivers of bulk, once the machine is there and its devices are resuming.
#[derive(Debug)]
pub(super) struct Sink {
    pub(super) ram: PageReceiver,
    pub(super) devices: Vec<Arc<DeviceReceiver>>,
    pub(super) sections: Mutex<Vec<Section>>,
    pub(super) written: Arc<Written>,
}

/// Counts of the reader.
#[derive(Debug, Default)]
pub(super) struct Received {
    pub(super) section_bytes: AtomicU64,
    pub(super) iteration: AtomicU64,
    /// The guest is paused at the source.
    pub(super) stopped: AtomicBool,
    /// FINAL_END has come: nothing may follow that is loaded.
    pub(super) complete: AtomicBool,
    /// The feature `RAM_CRC` is in force.
    pub(super) ram_crc: AtomicBool,
    /// RAM_DIGESTS, for the worker that asked.
    pub(super) digests: DigestAnswers,
}

/// The way of RAM_DIGESTS from the reader to the worker that asked for it.
#[derive(Debug, Default)]
pub(super) struct DigestAnswers(Mutex<Option<SyncSender<RamDigests>>>);

impl DigestAnswers {
    /// Opens it: from now on answers are expected, one at a time.
    pub(super) fn open(&self) -> Receiver<RamDigests> {
        let (sender, receiver) = sync_channel(1);
        *lock(&self.0) = Some(sender);
        receiver
    }

    /// Hands an answer over. `false`: nobody has asked. An answer that is late is dropped.
    pub(super) fn give(&self, answer: RamDigests) -> bool {
        match &*lock(&self.0) {
            Some(sender) => !matches!(sender.try_send(answer), Err(TrySendError::Full(_))),
            None => false,
        }
    }
}

/// The reader's thread: until the connection ends, or something comes that must not.
pub(super) fn read_loop(
    mut reader: Reader,
    link: &Link,
    events: &Events<DestinationEvent>,
    sink: &OnceLock<Sink>,
    received: &Received,
) {
    let why = loop {
        match step(&mut reader, events, sink, received) {
            Ok(()) => {}
            Err(ReadError::Failed(failure)) => {
                // The rest of the stream is of no use. The link is lost only when the source, having learnt why, has
                // hung up: what is sent to it until then arrives.
                let why = failure.text.clone();
                events.send(DestinationEvent::Damaged(failure));
                reader.drain();
                events.send(DestinationEvent::LinkLost(why));
                return;
            }
            Err(ReadError::Link(error)) => {
                break link.write_error().unwrap_or_else(|| error_chain(&error));
            }
        }
    };
    events.send(DestinationEvent::LinkLost(why));
    // Nobody reads any more: whoever is writing need not wait.
    link.shutdown();
}

enum ReadError {
    Link(ChannelError),
    Failed(Failure),
}

impl From<Failure> for ReadError {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl From<ChannelError> for ReadError {
    fn from(error: ChannelError) -> Self {
        match error {
            ChannelError::Closed
            | ChannelError::Cut { .. }
            | ChannelError::System { .. }
            | ChannelError::Tls(_)
            | ChannelError::Unended(_) => Self::Link(error),
            other => Self::Failed(other.in_phase(Side::Destination, Phase::Iterate)),
        }
    }
}

impl From<PagesError> for ReadError {
    fn from(error: PagesError) -> Self {
        match error {
            PagesError::Channel(error) => error.into(),
            PagesError::Memory(error) => Self::Failed(error.in_phase(Side::Destination, Phase::Iterate)),
            other => Self::Failed(Failure::new(Side::Destination, Phase::Iterate, error_chain(&other))),
        }
    }
}

fn step(
    reader: &mut Reader,
    events: &Events<DestinationEvent>,
    sink: &OnceLock<Sink>,
    received: &Received,
) -> Result<(), ReadError> {
    let early =
        || Failure::new(Side::Destination, Phase::Hello, "bulk data came before this side was ready for it");
    let bulk = match reader.next()? {
        Frame::Message(message) => return control(message, events, sink, received),
        Frame::Bulk(bulk) => bulk,
        other => {
            return Err(Failure::new(
                Side::Destination,
                Phase::Iterate,
                format!("a frame of no known kind: {other:?}"),
            )
            .into());
        }
    };
    if received.complete.load(Ordering::Relaxed) {
        return Err(Failure::new(Side::Destination, Phase::Ready, "bulk data came after FINAL_END").into());
    }
    let sink = sink.get().ok_or_else(early)?;
    match bulk {
        Bulk::Pages { first, count, crc } => {
            let due = received.stopped.load(Ordering::Relaxed) || received.ram_crc.load(Ordering::Acquire);
            if due && crc.is_none() {
                let text = format!("{count} pages from page {first} came without the checksum that is due");
                return Err(Failure::new(Side::Destination, Phase::Iterate, text).into());
            }
            sink.ram.data(reader, first, count, crc)?;
        }
        Bulk::ZeroPages { first, count } => sink.ram.zeros(first, count)?,
        Bulk::DeviceData { device, sequence, offset, bytes } => {
            receiver(sink, device)?.data(
                sequence,
                offset,
                bytes,
                received.stopped.load(Ordering::Relaxed),
            )?;
        }
        Bulk::DeviceEnd(end) => {
            after_final(received, "the end of a device's state")?;
            receiver(sink, end.device)?.end(end.total)?;
        }
        Bulk::Section { name, version, bytes } => {
            after_final(received, "machine state")?;
            let mut sections = lock(&sink.sections);
            let all =
                received.section_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed) + bytes.len() as u64;
            if sections.len() >= limits::SECTIONS as usize || all > limits::SECTIONS_BYTES {
                return Err(Failure::new(
                    Side::Destination,
                    Phase::Final,
                    "more machine state came than any machine has",
                )
                .into());
            }
            if sections.iter().any(|section| section.name == name) {
                return Err(Failure::new(
                    Side::Destination,
                    Phase::Final,
                    format!("the section '{name}' came twice"),
                )
                .into());
            }
            sections.push(Section { name: name.to_owned(), version, bytes: bytes.to_vec() });
        }
        other => {
            return Err(Failure::new(
                Side::Destination,
                Phase::Iterate,
                format!("bulk of no known kind: {other:?}"),
            )
            .into());
        }
    }
    Ok(())
}

/// A message goes to the engine first, then through the queues that it must wait for.
fn control(
    message: Message,
    events: &Events<DestinationEvent>,
    sink: &OnceLock<Sink>,
    received: &Received,
) -> Result<(), ReadError> {
    match message {
        Message::InitialSent { device, generation } => {
            events.send(DestinationEvent::Peer(message));
            let sink = sink.get().ok_or_else(|| {
                Failure::new(Side::Destination, Phase::Setup, "initial bytes were announced too early")
            })?;
            receiver(sink, device)?.initial(generation)?;
        }
        Message::EndIteration { iteration } => {
            events.send(DestinationEvent::Peer(message));
            received.iteration.store(iteration.into(), Ordering::Relaxed);
            let sink = sink.get().ok_or_else(|| {
                Failure::new(Side::Destination, Phase::Setup, "an iteration ended too early")
            })?;
            if sink.devices.is_empty() {
                events.send(DestinationEvent::Applied(sink.written.applied(iteration)));
            }
            let mark = Mark::new(iteration, sink.devices.len());
            for device in &sink.devices {
                device.mark(&mark)?;
            }
        }
        Message::Final(_) => {
            received.stopped.store(true, Ordering::Relaxed);
            events.send(DestinationEvent::Peer(message));
        }
        Message::FinalEnd(_) => {
            received.complete.store(true, Ordering::Relaxed);
            events.send(DestinationEvent::Peer(message));
        }
        Message::Credit { .. } => {}
        Message::RamDigests(digests) => {
            if !received.digests.give(digests) {
                let text = "the source said RAM_DIGESTS, which nobody asked for: protocol error";
                return Err(Failure::new(Side::Destination, Phase::Ready, text).into());
            }
        }
        other => events.send(DestinationEvent::Peer(other)),
    }
    Ok(())
}

/// `what` can only be whole once the guest is paused and every device stopped.
fn after_final(received: &Received, what: &str) -> Result<(), Failure> {
    if received.stopped.load(Ordering::Relaxed) {
        return Ok(());
    }
    Err(Failure::new(Side::Destination, Phase::Iterate, format!("{what} came before FINAL: protocol error")))
}

fn receiver(sink: &Sink, device: u16) -> Result<&DeviceReceiver, Failure> {
    let receiver = sink.devices.get(usize::from(device));
    receiver.map(AsRef::as_ref).ok_or_else(|| {
        let text = format!("state came for device number {device}, of {}", sink.devices.len());
        Failure::new(Side::Destination, Phase::Iterate, text)
    })
}
