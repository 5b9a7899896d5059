//! P3 to P5: the reader. Pages go straight to their place in RAM, device state to its device's queue, sections to the
//! heap until they are loaded; messages go to the engine, in their place in the stream.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use vfio_migration_engine::DestinationEvent;
use vfio_migration_memory::GuestRam;
use vfio_migration_types::{PAGE_SIZE, Phase, RamOffset, Range};
use vfio_migration_wire::{Bulk, Frame, Message, PeerError, limits};

use crate::channel::link::{Link, LinkError, Reader};
use crate::control::lock;
use crate::machine::Section;
use crate::session::fail::{self, InPhase};
use crate::source::MOST_SECTIONS;

use crate::destination::session::Events;
use crate::device::receive::{DeviceQueue, Mark, Written};

/// Where bulk goes, once the machine is there and its devices are resuming.
#[derive(Debug)]
pub(super) struct Sink {
    pub(super) ram: Arc<GuestRam>,
    /// Pages are pinned for a kernel device: zero them where they are.
    pub(super) pinned: bool,
    pub(super) queues: Vec<Arc<DeviceQueue>>,
    pub(super) sections: Mutex<Vec<Section>>,
    pub(super) written: Arc<Written>,
}

/// Counts of the reader.
#[derive(Debug, Default)]
pub(super) struct Received {
    pub(super) ram_pages: AtomicU64,
    pub(super) ram_bytes: AtomicU64,
    pub(super) section_bytes: AtomicU64,
    pub(super) iteration: AtomicU64,
    /// The guest stands at the source.
    pub(super) stopped: AtomicBool,
    /// FINAL_END has come: nothing may follow that is loaded.
    pub(super) complete: AtomicBool,
    /// The feature `RAM_CRC` is in force.
    pub(super) ram_crc: AtomicBool,
}

/// The reader's thread: until the connection ends, or something comes that must not.
pub(super) fn hear(
    mut reader: Reader,
    link: &Link,
    events: &Events,
    sink: &OnceLock<Sink>,
    received: &Received,
) {
    let why = loop {
        match step(&mut reader, events, sink, received) {
            Ok(()) => {}
            Err(Heard::Failed(failure)) => {
                // The rest of the stream is of no use. The link is lost only when the source, having learnt why, has
                // hung up: what is said to it until then arrives.
                let why = failure.text.clone();
                events.tell(DestinationEvent::Damaged(failure));
                reader.drain();
                events.tell(DestinationEvent::LinkLost(why));
                return;
            }
            Err(Heard::Link(error)) => break link.write_error().unwrap_or_else(|| fail::sentence(&error)),
        }
    };
    events.tell(DestinationEvent::LinkLost(why));
    // Nobody reads any more: whoever is writing need not wait.
    link.shutdown();
}

enum Heard {
    Link(LinkError),
    Failed(PeerError),
}

impl From<PeerError> for Heard {
    fn from(failure: PeerError) -> Self {
        Self::Failed(failure)
    }
}

impl From<LinkError> for Heard {
    fn from(error: LinkError) -> Self {
        match error {
            LinkError::Closed | LinkError::Cut { .. } | LinkError::System { .. } => Self::Link(error),
            LinkError::Memory(
                ref memory @ (vfio_migration_memory::MemoryError::UnexpectedEof { .. }
                | vfio_migration_memory::MemoryError::System { .. }),
            ) => {
                tracing::debug!(%memory, "the link ended inside pages");
                Self::Link(error)
            }
            other => Self::Failed(fail::plain(Phase::Iterate, fail::sentence(&other))),
        }
    }
}

fn step(
    reader: &mut Reader,
    events: &Events,
    sink: &OnceLock<Sink>,
    received: &Received,
) -> Result<(), Heard> {
    let early = || fail::plain(Phase::Hello, "bulk data came before this side was ready for it");
    let bulk = match reader.next()? {
        Frame::Message(message) => return control(message, events, sink, received),
        Frame::Bulk(bulk) => bulk,
        other => {
            return Err(fail::plain(Phase::Iterate, format!("a frame of no known kind: {other:?}")).into());
        }
    };
    if received.complete.load(Ordering::Relaxed) {
        return Err(fail::plain(Phase::Ready, "bulk data came after FINAL_END").into());
    }
    let sink = sink.get().ok_or_else(early)?;
    match bulk {
        Bulk::Pages { first, count, crc } => {
            let due = received.stopped.load(Ordering::Relaxed) || received.ram_crc.load(Ordering::Acquire);
            if due && crc.is_none() {
                let text = format!("{count} pages from page {first} came without the checksum that is due");
                return Err(fail::plain(Phase::Iterate, text).into());
            }
            reader.body(&sink.ram, first, count, crc)?;
            received.ram_pages.fetch_add(count.into(), Ordering::Relaxed);
            received.ram_bytes.fetch_add(u64::from(count) * PAGE_SIZE, Ordering::Relaxed);
        }
        Bulk::ZeroPages { first, count } => {
            let end = first.checked_add(count).and_then(|end| end.checked_mul(PAGE_SIZE));
            if end.is_none_or(|end| end > sink.ram.size()) {
                let text = format!("{count} zero pages from page {first} lie outside of RAM");
                return Err(fail::plain(Phase::Iterate, text).into());
            }
            if let Ok(range) = Range::new(RamOffset(first * PAGE_SIZE), count * PAGE_SIZE) {
                let zeroed = if sink.pinned { sink.ram.zero_in_place(range) } else { sink.ram.zero(range) };
                zeroed.map_err(|error| error.in_phase(Phase::Iterate))?;
            }
            received.ram_pages.fetch_add(count, Ordering::Relaxed);
        }
        Bulk::DeviceData { device, sequence, offset, bytes } => {
            queue(sink, device)?.data(sequence, offset, bytes, received.stopped.load(Ordering::Relaxed))?;
        }
        Bulk::DeviceEnd(end) => queue(sink, end.device)?.end(end.total)?,
        Bulk::Section { name, version, bytes } => {
            let mut sections = lock(&sink.sections);
            let all =
                received.section_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed) + bytes.len() as u64;
            if sections.len() >= MOST_SECTIONS || all > limits::SECTIONS_BYTES {
                return Err(fail::plain(Phase::Final, "more machine state came than any machine has").into());
            }
            if sections.iter().any(|section| section.name == name) {
                return Err(fail::plain(Phase::Final, format!("the section '{name}' came twice")).into());
            }
            sections.push(Section { name: name.to_owned(), version, bytes: bytes.to_vec() });
        }
        other => return Err(fail::plain(Phase::Iterate, format!("bulk of no known kind: {other:?}")).into()),
    }
    Ok(())
}

/// A message goes to the engine first, then through the queues that it must wait for.
fn control(
    message: Message,
    events: &Events,
    sink: &OnceLock<Sink>,
    received: &Received,
) -> Result<(), Heard> {
    match message {
        Message::InitialSent { device, generation } => {
            events.tell(DestinationEvent::Peer(message));
            let sink = sink
                .get()
                .ok_or_else(|| fail::plain(Phase::Setup, "initial bytes were announced too early"))?;
            queue(sink, device)?.initial(generation)?;
        }
        Message::EndIteration { iteration } => {
            events.tell(DestinationEvent::Peer(message));
            received.iteration.store(iteration.into(), Ordering::Relaxed);
            let sink = sink.get().ok_or_else(|| fail::plain(Phase::Setup, "an iteration ended too early"))?;
            if sink.queues.is_empty() {
                events.tell(DestinationEvent::Applied(sink.written.applied(iteration)));
            }
            let mark = Mark::new(iteration, sink.queues.len());
            for queue in &sink.queues {
                queue.mark(&mark)?;
            }
        }
        Message::Final(_) => {
            received.stopped.store(true, Ordering::Relaxed);
            events.tell(DestinationEvent::Peer(message));
        }
        Message::FinalEnd(_) => {
            received.complete.store(true, Ordering::Relaxed);
            events.tell(DestinationEvent::Peer(message));
        }
        Message::Credit { .. } => {}
        other => events.tell(DestinationEvent::Peer(other)),
    }
    Ok(())
}

fn queue(sink: &Sink, device: u16) -> Result<&DeviceQueue, PeerError> {
    let queue = sink.queues.get(usize::from(device));
    queue.map(AsRef::as_ref).ok_or_else(|| {
        let text = format!("state came for device number {device}, of {}", sink.queues.len());
        fail::plain(Phase::Iterate, text)
    })
}
