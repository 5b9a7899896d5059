//! Answers of the kernel that end in a chain of capabilities, `struct vfio_info_cap_header`.
//!
//! The kernel is asked twice: with the bare structure, whose answer says how much there is, and with room for it.
//! Offsets are believed only so far: an answer may come from a driver of any quality.

use std::collections::BTreeSet;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater};

use crate::UapiError;

/// Most bytes that an answer may have. A region of thousands of mappable parts is far below.
const ANSWER_MAX: usize = 64 << 10;
/// Words of the largest answer.
const WORDS_MAX: usize = ANSWER_MAX / 8;

/// Room for an answer, aligned as the structures in it are.
pub(crate) struct Buffer {
    words: Box<[u64; WORDS_MAX]>,
}

impl Buffer {
    fn new(argsz: u32) -> Self {
        let mut buffer = Self { words: Box::new([0; WORDS_MAX]) };
        buffer.put_u32(0, argsz);
        buffer
    }

    /// Puts a field of the question at byte `at`, a multiple of four inside the buffer.
    pub(crate) fn put_u32(&mut self, at: usize, value: u32) {
        if let Some(word) = self.words.get_mut(at / 8) {
            let shift = (at % 8) * 8;
            *word = *word & !(u64::from(u32::MAX) << shift) | u64::from(value) << shift;
        }
    }

    /// # Safety
    /// The kernel writes at most as many bytes as the first word says, and never more than [`ANSWER_MAX`].
    pub(crate) unsafe fn ioctl<const OPCODE: Opcode>(&mut self, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        // SAFETY: the buffer is ours, of integers, and as large as the kernel may write by this function's contract.
        unsafe { rustix::ioctl::ioctl(fd, Updater::<OPCODE, [u64; WORDS_MAX]>::new(&mut *self.words)) }
    }
}

/// What the kernel answered: `argsz` bytes.
#[derive(Debug)]
pub(crate) struct Answer {
    bytes: Vec<u8>,
}

impl Answer {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        Self { bytes }
    }

    pub(crate) fn u32(&self, at: u64) -> Result<u32, UapiError> {
        self.piece(at).map(u32::from_ne_bytes)
    }

    pub(crate) fn u64(&self, at: u64) -> Result<u64, UapiError> {
        self.piece(at).map(u64::from_ne_bytes)
    }

    fn piece<const N: usize>(&self, at: u64) -> Result<[u8; N], UapiError> {
        let cut = UapiError::BadCapability("a field lies beyond the end of the answer");
        let Ok(at) = usize::try_from(at) else { return Err(cut) };
        let piece = at.checked_add(N).and_then(|end| self.bytes.get(at..end));
        piece.and_then(|piece| piece.try_into().ok()).ok_or(cut)
    }
}

/// Asks with a structure of `size` bytes and, where the kernel says that there is more, once more with room for it.
pub(crate) fn ask(
    size: usize,
    doing: &'static str,
    mut ioctl: impl FnMut(&mut Buffer) -> Result<(), Errno>,
) -> Result<Answer, UapiError> {
    let failed = |source| UapiError::System { doing, source };
    let first = u32::try_from(size).map_err(|_| UapiError::BadCapability("the question is too long"))?;
    let mut buffer = Buffer::new(first);
    ioctl(&mut buffer).map_err(failed)?;
    let mut len = low(buffer.words[0]);
    if len > size && len <= ANSWER_MAX {
        let room = u32::try_from(len).unwrap_or(first);
        buffer = Buffer::new(room);
        ioctl(&mut buffer).map_err(failed)?;
        // A device that changed its mind in between has said less than it has; what is there is still well formed.
        len = len.min(low(buffer.words[0]));
    }
    if len > ANSWER_MAX {
        return Err(UapiError::BadCapability("the answer is longer than any sensible one"));
    }
    let bytes: Vec<u8> =
        buffer.words.iter().flat_map(|word| word.to_ne_bytes()).take(len.max(size)).collect();
    Ok(Answer::new(bytes))
}

/// The first four bytes of a little-endian word, as a length.
fn low(word: u64) -> usize {
    usize::try_from(word & u64::from(u32::MAX)).unwrap_or(usize::MAX)
}

/// A capability in an [`Answer`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Capability {
    pub(crate) id: u16,
    /// Where its header begins.
    pub(crate) at: u64,
}

/// Walks the capabilities. A chain that loops or leads out of the answer ends in an error.
pub(crate) struct Chain<'a> {
    answer: &'a Answer,
    next: u32,
    seen: BTreeSet<u32>,
}

impl<'a> Chain<'a> {
    /// `first` is the offset of the first header; 0 for none.
    pub(crate) fn new(answer: &'a Answer, first: u32) -> Self {
        Self { answer, next: first, seen: BTreeSet::new() }
    }

    fn step(&mut self) -> Result<Capability, UapiError> {
        let at = u64::from(self.next);
        if !self.seen.insert(self.next) {
            return Err(UapiError::BadCapability("the chain of capabilities loops"));
        }
        // The header is {u16 id, u16 version, u32 next}.
        let [low, high, ..] = self.answer.u32(at)?.to_ne_bytes();
        self.next = self.answer.u32(at + 4)?;
        Ok(Capability { id: u16::from_ne_bytes([low, high]), at })
    }
}

impl Iterator for Chain<'_> {
    type Item = Result<Capability, UapiError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.next == 0 {
            return None;
        }
        let step = self.step();
        if step.is_err() {
            self.next = 0;
        }
        Some(step)
    }
}

#[cfg(test)]
mod test {
    use super::*;

    /// A kernel that answers with `bytes`, as far as there is room.
    fn kernel(bytes: &[u8]) -> impl FnMut(&mut Buffer) -> Result<(), Errno> {
        move |buffer| {
            let room = low(buffer.words[0]).min(bytes.len());
            for at in (0..room & !3).step_by(4) {
                buffer.put_u32(at, u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap()));
            }
            buffer.put_u32(0, u32::try_from(bytes.len()).unwrap());
            Ok(())
        }
    }

    #[test]
    fn asks_again_with_room_for_what_there_is() {
        let bytes: Vec<u8> = (0..200).collect();
        let answer = ask(32, "testing", kernel(&bytes)).unwrap();
        assert_eq!(answer.bytes.len(), 200);
        assert_eq!(answer.bytes[4..], bytes[4..]);
    }

    #[test]
    fn a_short_answer_is_taken_as_it_is() {
        assert_eq!(ask(32, "testing", kernel(&[0; 32])).unwrap().bytes.len(), 32);
        // An older kernel knows fewer fields: they read as zero.
        assert_eq!(ask(32, "testing", kernel(&[0; 16])).unwrap().bytes.len(), 32);
    }

    #[test]
    fn an_absurd_length_is_refused_before_anything_is_made_of_it() {
        let huge = |buffer: &mut Buffer| {
            buffer.put_u32(0, u32::MAX);
            Ok(())
        };
        assert!(matches!(ask(32, "testing", huge), Err(UapiError::BadCapability(_))));
    }

    #[test]
    fn chains_that_loop_or_lead_out_end() {
        let chain = |words: &[u32], first: u32| {
            let bytes = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            let answer = Answer::new(bytes);
            Chain::new(&answer, first).map(|step| step.map(|found| found.id)).collect::<Result<Vec<_>, _>>()
        };
        assert_eq!(chain(&[0, 0, 1, 16, 2, 0], 8).unwrap(), [1, 2]);
        assert_eq!(chain(&[], 0).unwrap(), []);
        for (words, first) in [
            (vec![0, 0, 1, 8], 8),
            (vec![0, 0, 1, 16, 2, 8], 8),
            (vec![0, 0, 1, 400], 8),
            (vec![0, 0, 1], 8),
            (vec![1, 0], u32::MAX),
        ] {
            assert!(matches!(chain(&words, first), Err(UapiError::BadCapability(_))), "{words:?}");
        }
    }
}
