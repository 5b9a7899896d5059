//! Whether a file is a whole snapshot: found out before anything of it is given to anybody.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use vfio_migration_compat::MachineManifest;
use vfio_migration_types::{PAGE_SIZE, Side};
use vfio_migration_wire::{Bulk, DeviceTotal, FinalEnd, Frame, Hello, Message};

use super::SnapshotError;
use super::file::{DIGEST_LEN, END, HEAD_LEN, MAGIC, TRAILER_LEN, VERSION};
use super::file::{Frames, failed};
use crate::offer::digest_of_configuration;

/// Content of a sound file.
#[derive(Clone, Debug)]
pub(super) struct Checked {
    pub(super) hello: Hello,
    pub(super) manifest: MachineManifest,
    pub(super) totals: FinalEnd,
    pub(super) guest_ran: bool,
    /// Bytes of the frames, between header and trailer.
    pub(super) frames: u64,
    /// Of the whole file.
    pub(super) digest: [u8; 32],
}

/// Checks all of `file`: beginning, end, digest, then each frame and what they say together.
pub(super) fn check(file: &File, path: &Path) -> Result<Checked, SnapshotError> {
    let (frames, digest) = check_whole(file, path)?;
    let again = file.try_clone().map_err(failed("reading", path))?;
    let mut reader = Frames::new(again, path, frames)?;
    let mut content = Content::default();
    while let Some((header, payload)) = reader.next()? {
        let body = match Frame::decode(&header, payload, Side::Source) {
            Ok(Frame::Message(message)) => content.message(message).map(|()| None),
            Ok(Frame::Bulk(Bulk::Pages { first, count, crc })) => {
                content.pages(first, count.into()).map(|()| Some((u64::from(count) * PAGE_SIZE, crc)))
            }
            Ok(Frame::Bulk(bulk)) => content.bulk(&bulk).map(|()| None),
            Ok(_) => Err(wrong("it holds a frame of no known kind")),
            Err(source) => return Err(reader.unsound(source)),
        }?;
        if let Some((len, crc)) = body {
            reader.read_body(len, crc)?;
        }
    }
    content.finish(frames, digest)
}

/// Beginning, end and digest. Returns the bytes of frames, and the digest.
fn check_whole(mut file: &File, path: &Path) -> Result<(u64, [u8; 32]), SnapshotError> {
    let failed = || failed("reading", path);
    let metadata = file.metadata().map_err(failed())?;
    let len = metadata.len();
    file.seek(SeekFrom::Start(0)).map_err(failed())?;
    let mut head = [0; 8];
    if len < HEAD_LEN {
        return Err(SnapshotError::Magic);
    }
    file.read_exact(&mut head).map_err(failed())?;
    if head[..7] != MAGIC {
        return Err(SnapshotError::Magic);
    }
    if head[7] != VERSION {
        return Err(SnapshotError::Version(head[7]));
    }
    let Some(frames) = len.checked_sub(HEAD_LEN + TRAILER_LEN) else {
        return Err(SnapshotError::Length(format!("{len} bytes are too few")));
    };
    file.seek(SeekFrom::Start(HEAD_LEN + frames)).map_err(failed())?;
    let mut end = [0; 16];
    file.read_exact(&mut end).map_err(failed())?;
    if end[..8] != END || end[8..] != len.to_le_bytes() {
        return Err(SnapshotError::Length(format!("it does not end at byte {len} as a snapshot does")));
    }
    let mut announced = [0; 32];
    file.read_exact(&mut announced).map_err(failed())?;
    file.seek(SeekFrom::Start(0)).map_err(failed())?;
    let mut hasher = blake3::Hasher::new();
    let mut left = len - DIGEST_LEN;
    let mut piece = vec![0; 64 << 10];
    while left > 0 {
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(piece.len());
        let piece = piece.get_mut(..most).unwrap_or_default();
        file.read_exact(piece).map_err(failed())?;
        hasher.update(piece);
        left -= piece.len() as u64;
    }
    if hasher.finalize() == announced { Ok((frames, announced)) } else { Err(SnapshotError::Digest) }
}

#[derive(Debug, Default)]
struct Content {
    hello: Option<Hello>,
    manifest: Option<MachineManifest>,
    pages_in_all: u64,
    devices: Vec<DeviceStream>,
    guest_ran: Option<bool>,
    ram_pages: u64,
    sections: u32,
    totals: Option<FinalEnd>,
}

#[derive(Debug, Default)]
struct DeviceStream {
    sequence: u64,
    bytes: u64,
    hasher: blake3::Hasher,
    end: Option<DeviceTotal>,
}

impl Content {
    fn message(&mut self, message: Message) -> Result<(), SnapshotError> {
        if self.totals.is_some() {
            return Err(wrong("something follows its end"));
        }
        match message {
            Message::Hello(hello) if self.hello.is_none() => self.hello = Some(hello),
            Message::Offer(offer) if self.hello.is_some() && self.manifest.is_none() => {
                let manifest = MachineManifest::from_json(&offer.manifest)?;
                if digest_of_configuration(&offer.configuration) != offer.configuration_digest {
                    return Err(wrong("its configuration is not the one that its digest is of"));
                }
                self.devices.resize_with(manifest.devices.len(), DeviceStream::default);
                self.pages_in_all =
                    manifest.ram.iter().fold(0u64, |all, region| all.saturating_add(region.len)) / PAGE_SIZE;
                self.manifest = Some(manifest);
            }
            Message::InitialSent { device, .. } if self.open() => {
                self.device(device)?;
            }
            Message::EndIteration { .. } if self.open() && self.guest_ran.is_none() => {}
            Message::Final(last) if self.open() && self.guest_ran.is_none() => {
                self.guest_ran = Some(last.guest_ran);
            }
            Message::FinalEnd(totals) if self.guest_ran.is_some() => self.totals = Some(totals),
            _ => return Err(wrong("a message stands where it cannot")),
        }
        Ok(())
    }

    fn pages(&mut self, first: u64, count: u64) -> Result<(), SnapshotError> {
        if !self.open() {
            return Err(wrong("pages stand where they cannot"));
        }
        if first.checked_add(count).is_none_or(|end| end > self.pages_in_all) {
            return Err(wrong("it has pages outside of RAM"));
        }
        self.ram_pages = self.ram_pages.saturating_add(count);
        Ok(())
    }

    fn bulk(&mut self, bulk: &Bulk<'_>) -> Result<(), SnapshotError> {
        if !self.open() {
            return Err(wrong("state stands where it cannot"));
        }
        match *bulk {
            Bulk::ZeroPages { first, count } => self.pages(first, count)?,
            Bulk::DeviceData { device, sequence, offset, bytes } => {
                let stream = self.device(device)?;
                if (stream.sequence, stream.bytes, stream.end) != (sequence, offset, None) {
                    return Err(wrong(format!("pieces of device {device} are missing or out of order")));
                }
                stream.sequence += 1;
                stream.bytes += bytes.len() as u64;
                stream.hasher.update(bytes);
            }
            Bulk::DeviceEnd(end) => {
                let stream = self.device(end.device)?;
                let digest = *stream.hasher.finalize().as_bytes();
                let found = DeviceTotal { bytes: stream.bytes, digest };
                if stream.end.replace(found).is_some() || found != end.total {
                    return Err(wrong(format!("the state of device {} is not what was read", end.device)));
                }
            }
            Bulk::Section { .. } => self.sections = self.sections.saturating_add(1),
            _ => return Err(wrong("it holds state of no known kind")),
        }
        Ok(())
    }

    fn finish(self, frames: u64, digest: [u8; 32]) -> Result<Checked, SnapshotError> {
        let (Some(hello), Some(manifest), Some(guest_ran), Some(totals)) =
            (self.hello, self.manifest, self.guest_ran, self.totals)
        else {
            return Err(wrong("its frames end early"));
        };
        let devices: Option<Vec<_>> = self.devices.iter().map(|stream| stream.end).collect();
        if devices.as_ref() != Some(&totals.devices) {
            return Err(wrong("the devices' totals do not fit their state"));
        }
        if (self.ram_pages, self.sections) != (totals.ram_pages, totals.sections) {
            return Err(wrong("the totals do not fit the pages and sections"));
        }
        Ok(Checked { hello, manifest, totals, guest_ran, frames, digest })
    }

    fn open(&self) -> bool {
        self.manifest.is_some() && self.totals.is_none()
    }

    fn device(&mut self, index: u16) -> Result<&mut DeviceStream, SnapshotError> {
        let stream = self.devices.get_mut(usize::from(index));
        stream.ok_or_else(|| wrong(format!("it has state of device {index}, which its manifest has not")))
    }
}

fn wrong(text: impl Into<String>) -> SnapshotError {
    SnapshotError::Content(text.into())
}
