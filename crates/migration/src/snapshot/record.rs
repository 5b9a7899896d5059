//! The recorder: answers a source as a destination does, and writes what it receives into a file.

use std::sync::Arc;
use std::time::Instant;

use vfio_migration_compat::MachineManifest;
use vfio_migration_types::{Failure, GuestOutcome, Phase, Side, error_chain};
use vfio_migration_wire::{
    Accept, Applied, Bulk, DeviceTotal, FEATURE_RAM_CRC, Frame, HelloReply, Message, PROTOCOL_VERSION, Ready,
    Running,
};

use super::SnapshotError;
use super::estimate::StateLimits;
use super::file::Writer;
use crate::channel::error::ChannelError;
use crate::channel::link::Link;
use crate::channel::reader::Reader;
use crate::session::host::{boot_id, monotonic_ns};

/// Credit for each device: the socket itself is what holds a source back here.
const CREDIT: u64 = 1 << 62;

/// Totals of a recording that is whole.
#[derive(Clone, Debug)]
pub(super) struct Recorded {
    pub(super) bytes: u64,
    pub(super) digest: [u8; 32],
    pub(super) devices: Vec<DeviceTotal>,
    /// The source committed: the guest is in the file and nowhere else.
    pub(super) committed: bool,
}

/// The reason why nothing was recorded.
#[derive(Debug)]
pub(super) enum Unrecorded {
    /// The file could not be written.
    File(SnapshotError),
    /// The source ended the session, and reports why itself.
    Ended,
}

/// Records a session. With `commit` the guest's owner is the file afterwards; without, the source is sent back.
pub(super) fn record(
    link: &Arc<Link>,
    mut writer: Writer,
    limits: StateLimits,
    commit: bool,
) -> Result<Recorded, Unrecorded> {
    let mut reader = Reader::new(link, Side::Source);
    let recorded = listen(link, &mut reader, &mut writer, limits, commit);
    match &recorded {
        Ok(_) => writer.keep(),
        Err(Unrecorded::File(error)) => {
            writer.discard();
            let _ = link.send(&Message::Abort(Failure::new(
                Side::Destination,
                Phase::Iterate,
                error_chain(error),
            )));
        }
        Err(Unrecorded::Ended) => writer.discard(),
    }
    link.shutdown_write();
    reader.drain();
    recorded
}

impl From<SnapshotError> for Unrecorded {
    fn from(error: SnapshotError) -> Self {
        Self::File(error)
    }
}

impl From<ChannelError> for Unrecorded {
    fn from(error: ChannelError) -> Self {
        tracing::debug!(error = %error_chain(&error), "the session that was being recorded ended");
        Self::Ended
    }
}

fn listen(
    link: &Link,
    reader: &mut Reader,
    writer: &mut Writer,
    mut limits: StateLimits,
    commit: bool,
) -> Result<Recorded, Unrecorded> {
    let (mut device_bytes, mut device_ns) = (0, 0);
    let mut body = Vec::new();
    let mut done = None;
    loop {
        let frame = reader.next()?;
        let message = match frame {
            Frame::Message(message) => message,
            Frame::Bulk(Bulk::Pages { first, count, crc }) => {
                body.resize(count as usize * 4096, 0);
                reader.body_into(&mut body)?;
                writer.bulk(&Bulk::Pages { first, count, crc }, &body)?;
                continue;
            }
            Frame::Bulk(bulk) => {
                let begun = Instant::now();
                if let Bulk::DeviceData { device, bytes, .. } = bulk {
                    limits.take(device, bytes.len() as u64)?;
                }
                writer.bulk(&bulk, &[])?;
                if let Bulk::DeviceData { bytes, .. } = bulk {
                    device_bytes += bytes.len() as u64;
                    device_ns += u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX).max(1);
                }
                continue;
            }
            _ => return Err(SnapshotError::Content("a frame of no known kind came".into()).into()),
        };
        match &message {
            Message::Hello(hello) => {
                writer.message(&message)?;
                let features = hello.features | FEATURE_RAM_CRC;
                if features != hello.features {
                    let why = "pages without checksums cannot be saved".to_owned();
                    return Err(SnapshotError::Content(why).into());
                }
                link.send(&Message::HelloReply(HelloReply { version: PROTOCOL_VERSION, features }))?;
            }
            Message::Offer(offer) => {
                writer.message(&message)?;
                let known = MachineManifest::from_json(&offer.manifest).map_err(SnapshotError::from)?;
                // A file takes whatever the machine is.
                let manifest = offer.manifest.clone();
                link.send(&Message::Accept(Accept { manifest, ..Accept::default() }))?;
                for device in 0..known.devices.len() {
                    let device = u16::try_from(device).unwrap_or(u16::MAX);
                    link.send(&Message::Credit { device, bytes: CREDIT })?;
                }
            }
            Message::Begin { .. } => link.send(&Message::Begun)?,
            Message::InitialSent { device, generation } => {
                writer.message(&message)?;
                link.send(&Message::InitialLoaded { device: *device, generation: *generation })?;
            }
            Message::EndIteration { iteration } => {
                writer.message(&message)?;
                link.send(&Message::Applied(Applied { iteration: *iteration, device_bytes, device_ns }))?;
            }
            Message::Final(_) => writer.message(&message)?,
            Message::LocksFree => {}
            Message::FinalEnd(totals) => {
                writer.message(&message)?;
                // Under its own name before anybody receives that it is whole.
                let (bytes, digest) = writer.finish()?;
                let recorded = Recorded { bytes, digest, devices: totals.devices.clone(), committed: commit };
                if !commit {
                    link.send(&Message::Abort(Failure::new(
                        Side::Destination,
                        Phase::Final,
                        "the snapshot is whole",
                    )))?;
                    return Ok(recorded);
                }
                done = Some(recorded);
                link.send(&Message::Ready(Ready {
                    ram_pages: totals.ram_pages,
                    ram_digest: totals.ram_digest,
                    verify_ns: 0,
                    sections: totals.sections,
                    devices: totals.devices.clone(),
                    vectors: 0,
                }))?;
            }
            Message::Commit(commit) => {
                let Some(recorded) = done else {
                    return Err(SnapshotError::Content("COMMIT came too early".into()).into());
                };
                let (boot_id, at_ns) = (boot_id(), monotonic_ns());
                let answer = Running { epoch: commit.epoch, guest: GuestOutcome::Paused, boot_id, at_ns };
                // From COMMIT on the file is the guest: whatever becomes of the answer, it stays.
                if let Err(error) = link.send(&Message::Running(answer)) {
                    tracing::error!(error = %error_chain(&error), "the answer to COMMIT could not be sent");
                }
                return Ok(recorded);
            }
            Message::Abort(_) | Message::LimitsUnmet(_) => return Err(Unrecorded::Ended),
            other => return Err(SnapshotError::Content(format!("{other:?} came")).into()),
        }
    }
}
