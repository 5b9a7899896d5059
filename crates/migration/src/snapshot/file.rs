//! Frames into a file and out of it.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use vfio_migration_wire::{Bulk, Crc, FrameHeader, HEADER_LEN, Message, WireError, encode, encode_bulk};

use super::SnapshotError;
#[cfg(any(test, feature = "fault-injection"))]
use crate::held_file;
use crate::regular_file::AtomicFile;

/// The first bytes of every snapshot, before the layout's number.
pub(super) const MAGIC: [u8; 7] = *b"VFIOSNP";
/// The layout that this program writes and reads.
pub(super) const VERSION: u8 = 1;
/// The first bytes of the trailer.
pub(super) const END: [u8; 8] = *b"VFIOSEND";
/// Bytes before the first frame.
pub(super) const HEAD_LEN: u64 = 8;
/// Bytes of a BLAKE3 digest.
pub(super) const DIGEST_LEN: u64 = 32;
/// The trailer: its magic, the length of the whole file, and the digest of everything before the digest.
pub(super) const TRAILER_LEN: u64 = 8 + 8 + DIGEST_LEN;

/// A snapshot being written. Dropping it before it is whole removes it.
#[derive(Debug)]
pub(super) struct Writer {
    out: BufWriter<AtomicFile>,
    path: PathBuf,
    hasher: blake3::Hasher,
    written: u64,
    sequence: u64,
}

impl Writer {
    /// Begins the snapshot that is to be `file`, at `path`.
    pub(super) fn new(file: AtomicFile, path: &Path) -> Result<Self, SnapshotError> {
        let mut writer = Self {
            out: BufWriter::with_capacity(1 << 20, file),
            path: path.into(),
            hasher: blake3::Hasher::new(),
            written: 0,
            sequence: 0,
        };
        writer.bytes(&MAGIC)?;
        writer.bytes(&[VERSION])?;
        Ok(writer)
    }

    pub(super) fn message(&mut self, message: &Message) -> Result<(), SnapshotError> {
        let frame = encode(message, self.sequence).map_err(|source| self.unsound(source))?;
        self.sequence += 1;
        self.bytes(&frame)
    }

    pub(super) fn bulk(&mut self, bulk: &Bulk<'_>, body: &[u8]) -> Result<(), SnapshotError> {
        let frame = encode_bulk(bulk, self.sequence).map_err(|source| self.unsound(source))?;
        self.sequence += 1;
        let [head, bytes] = frame.parts();
        self.bytes(head)?;
        self.bytes(bytes)?;
        self.bytes(body)
    }

    /// Ends the file and gives it its name: from here it outlives this process and the host's power.
    pub(super) fn finish(&mut self) -> Result<(u64, [u8; 32]), SnapshotError> {
        let len = self.written + TRAILER_LEN;
        self.bytes(&END)?;
        self.bytes(&len.to_le_bytes())?;
        let digest = *self.hasher.finalize().as_bytes();
        self.bytes(&digest)?;
        self.out.flush().map_err(failed("writing", &self.path))?;
        self.out.get_mut().finish()?;
        Ok((len, digest))
    }

    /// The file stays: what it replaced is gone for good.
    pub(super) fn keep(&mut self) {
        self.out.get_mut().keep();
    }

    /// Takes the file away again, also once it has its name, and puts back what it replaced.
    pub(super) fn discard(&mut self) {
        self.out.get_mut().discard();
    }

    fn bytes(&mut self, bytes: &[u8]) -> Result<(), SnapshotError> {
        #[cfg(any(test, feature = "fault-injection"))]
        held_file::wait(&self.path);
        self.hasher.update(bytes);
        self.written += bytes.len() as u64;
        self.out.write_all(bytes).map_err(failed("writing", &self.path))
    }

    fn unsound(&self, source: WireError) -> SnapshotError {
        SnapshotError::Frame { frame: self.sequence, source }
    }
}

/// The frames of a file whose digest has been checked, one after another.
#[derive(Debug)]
pub(super) struct Frames {
    file: BufReader<File>,
    path: PathBuf,
    left: u64,
    sequence: u64,
    payload: Vec<u8>,
    pub(super) body: Vec<u8>,
}

impl Frames {
    /// From the first frame on, `bytes` of them in all.
    pub(super) fn new(file: File, path: &Path, bytes: u64) -> Result<Self, SnapshotError> {
        let mut file = BufReader::with_capacity(64 << 10, file);
        file.seek(SeekFrom::Start(HEAD_LEN)).map_err(failed("reading", path))?;
        let (payload, body) = (Vec::new(), Vec::new());
        Ok(Self { file, path: path.into(), left: bytes, sequence: 0, payload, body })
    }

    /// The next header and payload; `None` at the end.
    pub(super) fn next(&mut self) -> Result<Option<(FrameHeader, &[u8])>, SnapshotError> {
        if self.left == 0 {
            return Ok(None);
        }
        let mut head = [0; HEADER_LEN];
        self.take(HEADER_LEN as u64)?;
        self.file.read_exact(&mut head).map_err(failed("reading", &self.path))?;
        let header = FrameHeader::parse(&head, self.sequence).map_err(|source| self.unsound(source))?;
        self.sequence += 1;
        let len = header.payload_len();
        self.take(len as u64)?;
        self.payload.resize(len, 0);
        self.file.read_exact(&mut self.payload).map_err(failed("reading", &self.path))?;
        Ok(Some((header, &self.payload)))
    }

    /// Reads the body of a frame of pages, and compares it with its checksum.
    pub(super) fn read_body(&mut self, len: u64, crc: Option<u32>) -> Result<(), SnapshotError> {
        self.take(len)?;
        // At most 1 MiB, by the codec.
        self.body.resize(usize::try_from(len).unwrap_or(0), 0);
        self.file.read_exact(&mut self.body).map_err(failed("reading", &self.path))?;
        let Some(crc) = crc else {
            return Err(SnapshotError::Content("pages came without their checksum".into()));
        };
        let mut found = Crc::new();
        found.update(&self.body);
        found.check_body(crc).map_err(|source| self.unsound(source))
    }

    pub(super) fn unsound(&self, source: WireError) -> SnapshotError {
        SnapshotError::Frame { frame: self.sequence.saturating_sub(1), source }
    }

    fn take(&mut self, bytes: u64) -> Result<(), SnapshotError> {
        self.left = self.left.checked_sub(bytes).ok_or_else(|| {
            SnapshotError::Length(format!("it ends inside frame {}", self.sequence.saturating_sub(1)))
        })?;
        Ok(())
    }
}

pub(super) fn failed<'a>(
    doing: &'static str,
    path: &'a Path,
) -> impl Fn(std::io::Error) -> SnapshotError + 'a {
    move |source| SnapshotError::File { doing, path: path.into(), source }
}
