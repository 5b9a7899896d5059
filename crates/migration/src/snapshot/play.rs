//! The player: sends a destination what a file holds, as a source would.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::Duration;

use vfio_migration_types::{Failure, PAGE_SIZE, Phase, Side, error_chain};
use vfio_migration_wire::{
    Accept, Bulk, Commit, FEATURE_RAM_CRC, FEATURE_VERIFY, Frame, Hello, Message, RamDigests, Ready, VERSIONS,
};

use super::SnapshotError;
use super::check::Checked;
use super::file::Frames;
use crate::channel::credit::Credit;
use crate::channel::error::ChannelError;
use crate::channel::link::Link;
use crate::channel::reader::Reader;
use crate::session::interrupt::Interrupt;
use crate::session::threads::{no_thread, spawn};

/// Longest time that a device may take none of its state.
const PATIENCE: Duration = Duration::from_secs(240);

/// The reason why the destination did not receive all. It reports to its caller itself, unless the file is the reason:
/// then we do.
enum Unplayed {
    File(SnapshotError),
    Ended,
}

impl From<SnapshotError> for Unplayed {
    fn from(error: SnapshotError) -> Self {
        Self::File(error)
    }
}

impl From<ChannelError> for Unplayed {
    fn from(error: ChannelError) -> Self {
        tracing::debug!(error = %error_chain(&error), "the destination of a snapshot ended the session");
        Self::Ended
    }
}

/// Sends all of a checked file.
pub(super) fn play(link: &Arc<Link>, frames: Frames, checked: &Checked, credits: &[Credit]) {
    let reader = Reader::new(link, Side::Destination);
    std::thread::scope(|scope| {
        let (answers, answered) = std::sync::mpsc::channel();
        let interrupt = Interrupt::default();
        let heard = interrupt.clone();
        if let Err(error) = spawn(scope, "reader", move || read_loop(reader, credits, &answers, &heard)) {
            let failure = no_thread(Side::Source, Phase::Hello, "reader", &error);
            let _ = link.send(&Message::Abort(failure));
            return link.shutdown_write();
        }
        let player = Player { link, frames, checked, credits, answered, interrupt };
        if let Err(Unplayed::File(error)) = player.play() {
            let _ =
                link.send(&Message::Abort(Failure::new(Side::Source, Phase::Iterate, error_chain(&error))));
        }
        // The destination has decided by itself, or reads our last message and then the end.
        link.shutdown_write();
    });
}

/// Hears the destination until it hangs up.
fn read_loop(mut reader: Reader, credits: &[Credit], answers: &Sender<Message>, interrupt: &Interrupt) {
    while let Ok(frame) = reader.next() {
        match frame {
            Frame::Message(Message::Credit { device, bytes }) => {
                if let Some(credit) = credits.get(usize::from(device)) {
                    credit.grant(bytes);
                }
            }
            Frame::Message(message) => {
                if matches!(message, Message::Abort(_) | Message::Refuse(_) | Message::Declined(_)) {
                    interrupt.raise();
                }
                // The player has ended: nobody needs to know any more.
                let _ = answers.send(message);
            }
            _ => break,
        }
    }
    interrupt.raise();
}

struct Player<'a> {
    link: &'a Link,
    frames: Frames,
    checked: &'a Checked,
    credits: &'a [Credit],
    answered: Receiver<Message>,
    interrupt: Interrupt,
}

impl Player<'_> {
    fn play(mut self) -> Result<(), Unplayed> {
        let mut begun = false;
        loop {
            let Some((header, payload)) = self.frames.next()? else {
                return Err(SnapshotError::Length("it became shorter".into()).into());
            };
            let frame = Frame::decode(&header, payload, Side::Source)
                .map_err(|source| SnapshotError::Frame { frame: header.sequence(), source })?;
            match frame {
                Frame::Message(Message::Hello(hello)) => self.hello(hello)?,
                Frame::Message(message @ Message::Offer(_)) => {
                    self.link.send(&message)?;
                    let accepted = self.wait(|answer| matches!(answer, Message::Accept(_)))?;
                    let Message::Accept(Accept { lease, .. }) = accepted else { return Err(Unplayed::Ended) };
                    self.link.send(&Message::Begin { lease: lease.id })?;
                    self.wait(|answer| matches!(answer, Message::Begun))?;
                }
                Frame::Message(message @ Message::EndIteration { .. }) => {
                    begun = true;
                    self.link.send(&message)?;
                }
                Frame::Message(Message::FinalEnd(totals)) => {
                    self.link.send(&Message::LocksFree)?;
                    self.link.send(&Message::FinalEnd(totals))?;
                    return self.commit();
                }
                Frame::Message(message) => {
                    if matches!(message, Message::Final(_)) && !begun {
                        return Err(SnapshotError::Content("no iteration comes before its end".into()).into());
                    }
                    self.link.send(&message)?;
                }
                Frame::Bulk(Bulk::Pages { first, count, crc }) => {
                    self.frames.read_body(u64::from(count) * PAGE_SIZE, crc)?;
                    self.link.send_page_copy(first, &self.frames.body)?;
                }
                Frame::Bulk(bulk) => {
                    if let Bulk::DeviceData { device, bytes, .. } = bulk {
                        take(self.credits, device, bytes.len() as u64, &self.interrupt)?;
                    }
                    self.link.send_bulk(&bulk)?;
                }
                _ => return Err(SnapshotError::Content("a frame of no known kind".into()).into()),
            }
        }
    }

    fn hello(&self, hello: Hello) -> Result<(), Unplayed> {
        let verify = if self.checked.totals.ram_digest.is_some() { FEATURE_VERIFY } else { 0 };
        let features = FEATURE_RAM_CRC | verify;
        self.link.send(&Message::Hello(Hello { versions: VERSIONS, features, ..hello }))?;
        self.wait(|answer| matches!(answer, Message::HelloReply(_))).map(drop)
    }

    /// Compares what was loaded with what was saved; if they agree, it is the destination's.
    fn commit(&self) -> Result<(), Unplayed> {
        let Message::Ready(ready) = self.wait(|answer| matches!(answer, Message::Ready(_)))? else {
            return Err(Unplayed::Ended);
        };
        let totals = &self.checked.totals;
        let Ready { ram_pages, ram_digest, sections, devices, .. } = ready;
        if (ram_pages, ram_digest, sections, &devices)
            != (totals.ram_pages, totals.ram_digest, totals.sections, &totals.devices)
        {
            let what = "what was loaded is not what was saved".to_owned();
            return Err(SnapshotError::Content(what).into());
        }
        let Hello { epoch, attempt, .. } = self.checked.hello;
        self.link.send(&Message::Commit(Commit { epoch: epoch.next(), attempt }))?;
        self.wait(|answer| matches!(answer, Message::Running(_))).map(drop)
    }

    /// Waits for an answer; what it reports of its own progress is of no use here.
    fn wait(&self, wanted: impl Fn(&Message) -> bool) -> Result<Message, Unplayed> {
        loop {
            // The sender goes when the destination hangs up.
            let answer = self.answered.recv().map_err(|_| Unplayed::Ended)?;
            if wanted(&answer) {
                return Ok(answer);
            }
            if let Message::DigestRam { first, count } = answer {
                // There is no RAM here: the file has each page in many places, or in none.
                let none = RamDigests { first, count, ..RamDigests::default() };
                self.link.send(&Message::RamDigests(none))?;
                continue;
            }
            if !matches!(answer, Message::InitialLoaded { .. } | Message::Applied(_)) {
                tracing::debug!(?answer, "the destination of a snapshot gives up");
                return Err(Unplayed::Ended);
            }
        }
    }
}

fn take(credits: &[Credit], device: u16, bytes: u64, interrupt: &Interrupt) -> Result<(), Unplayed> {
    let Some(credit) = credits.get(usize::from(device)) else { return Err(Unplayed::Ended) };
    let mut left = bytes;
    while left > 0 {
        match credit.take(left, PATIENCE, interrupt) {
            Ok(Some(granted)) => left -= granted.min(left),
            Ok(None) => {
                let text = format!("device {device} takes none of its state");
                return Err(SnapshotError::Content(text).into());
            }
            Err(_) => return Err(Unplayed::Ended),
        }
    }
    Ok(())
}
