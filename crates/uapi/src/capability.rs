//! Answers of the kernel that end in a chain of capabilities, `struct vfio_info_cap_header`.
//!
//! The kernel is asked twice: with the bare structure, whose answer says how much there is, and with room for it.
//! Offsets are believed only so far: an answer may come from a driver of any quality.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater};

use crate::error::UapiError;

/// Most bytes that an answer may have. A region of thousands of mappable parts is far below.
const ANSWER_MAX: usize = 64 << 10;
/// Bytes of `struct vfio_info_cap_header`.
const HEADER: u32 = 8;
/// Most questions for one answer.
const ATTEMPTS: u32 = 4;
/// Words of the largest answer.
const WORDS_MAX: usize = ANSWER_MAX / 8;

const _: () = assert!(cfg!(target_endian = "little"), "fields are put into words of this byte order");

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

/// Answer of the kernel: `argsz` bytes.
#[derive(Debug)]
pub(crate) struct InfoAnswer {
    bytes: Vec<u8>,
}

impl InfoAnswer {
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

/// Asks with a structure of `size` bytes and, where the kernel says that there is more, again with room for it.
pub(crate) fn ask(
    size: usize,
    doing: &'static str,
    mut ioctl: impl FnMut(&mut Buffer) -> Result<(), Errno>,
) -> Result<InfoAnswer, UapiError> {
    let mut room = size;
    // What a device has may grow between two questions, but not for ever.
    for _ in 0..ATTEMPTS {
        let argsz = u32::try_from(room).map_err(|_| UapiError::BadCapability("the question is too long"))?;
        let mut buffer = Buffer::new(argsz);
        ioctl(&mut buffer).map_err(|source| UapiError::System { doing, source })?;
        let len = low(buffer.words[0]);
        if len > ANSWER_MAX {
            return Err(UapiError::BadCapability("the answer is longer than any sensible one"));
        }
        if len > room {
            // The kernel left out what did not fit, and does not say which part.
            room = len;
            continue;
        }
        let bytes = buffer.words.iter().flat_map(|word| word.to_ne_bytes()).take(len.max(size)).collect();
        return Ok(InfoAnswer::new(bytes));
    }
    Err(UapiError::BadCapability("the answer grows each time it is asked for"))
}

/// The first four bytes of a little-endian word, as a length.
fn low(word: u64) -> usize {
    usize::try_from(word & u64::from(u32::MAX)).unwrap_or(usize::MAX)
}

/// A capability in an [`InfoAnswer`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct InfoCapability {
    pub(crate) id: u16,
    /// Offset of the capability's header.
    pub(crate) at: u64,
    /// Offset of the next one's header, or of the answer's end.
    end: u64,
}

impl InfoCapability {
    /// Where element `index` of `size` bytes is, of an array that begins `first` bytes into the capability.
    pub(crate) fn element(&self, first: u64, index: u64, size: u64) -> Result<u64, UapiError> {
        let at = index.checked_mul(size).and_then(|into| (self.at + first).checked_add(into));
        let inside = at.filter(|at| at.checked_add(size).is_some_and(|end| end <= self.end));
        inside.ok_or(UapiError::BadCapability("an array is longer than its capability"))
    }
}

/// Walks the capabilities. The kernel puts them one after the other behind the structure: a chain that goes back, or out
/// of the answer, ends in an error.
pub(crate) struct Chain<'a> {
    answer: &'a InfoAnswer,
    next: u32,
    /// Least offset of the next header.
    earliest: u32,
}

impl<'a> Chain<'a> {
    /// `first` is the offset of the first header behind a structure of `size` bytes.
    pub(crate) fn new(answer: &'a InfoAnswer, size: u32, first: u32) -> Result<Self, UapiError> {
        if first == 0 {
            return Err(UapiError::BadCapability("there are capabilities, and no first one"));
        }
        Ok(Self { answer, next: first, earliest: size })
    }

    fn step(&mut self) -> Result<InfoCapability, UapiError> {
        let at = self.next;
        if at < self.earliest || !at.is_multiple_of(4) {
            return Err(UapiError::BadCapability("the chain of capabilities goes back, or astray"));
        }
        self.earliest = at.saturating_add(HEADER);
        let at = u64::from(at);
        // The header is {u16 id, u16 version, u32 next}.
        let [low, high, ..] = self.answer.u32(at)?.to_ne_bytes();
        self.next = self.answer.u32(at + 4)?;
        let end = if self.next == 0 { self.answer.bytes.len() as u64 } else { u64::from(self.next) };
        Ok(InfoCapability { id: u16::from_ne_bytes([low, high]), at, end })
    }
}

impl Iterator for Chain<'_> {
    type Item = Result<InfoCapability, UapiError>;

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
mod tests {
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
    fn an_answer_that_grows_is_asked_for_again_and_not_for_ever() {
        let mut growing = 32_u32;
        let mut asked = 0;
        let mut grow = |by: u32, until: u32| {
            ask(32, "testing", |buffer| {
                asked += 1;
                growing = (growing + by).min(until);
                buffer.put_u32(0, growing);
                Ok(())
            })
            .map(|answer| answer.bytes.len())
        };
        assert_eq!(grow(16, 64).ok(), Some(64));
        assert!(matches!(grow(16, 1 << 15), Err(UapiError::BadCapability(_))));
        assert_eq!(asked, 3 + ATTEMPTS);
    }

    fn chain(words: &[u32], first: u32) -> Result<Vec<u16>, UapiError> {
        let answer = InfoAnswer::new(words.iter().flat_map(|word| word.to_ne_bytes()).collect());
        Chain::new(&answer, 8, first)?.map(|step| step.map(|found| found.id)).collect()
    }

    #[test]
    fn chains_that_loop_or_lead_out_end() {
        assert_eq!(chain(&[0, 0, 1, 16, 2, 0], 8).unwrap(), [1, 2]);
        for (words, first) in [
            (vec![0, 0, 1, 8], 8),
            (vec![0, 0, 1, 16, 2, 8], 8),
            (vec![0, 0, 1, 12, 2, 0], 8),
            (vec![0, 0, 1, 18, 2, 0, 0], 8),
            (vec![0, 0, 1, 400], 8),
            (vec![0, 0, 1], 8),
            (vec![0, 0, 1, 0], 4),
            (vec![0, 0, 1, 0], 0),
            (vec![1, 0], u32::MAX),
        ] {
            assert!(matches!(chain(&words, first), Err(UapiError::BadCapability(_))), "{words:?}");
        }
    }

    proptest::proptest! {
        /// Whatever the words are, the walk ends after no more steps than there are headers.
        #[test]
        fn no_chain_is_walked_for_ever(words in proptest::collection::vec(0_u32..64, 0..24), first in 0_u32..128) {
            let answer = InfoAnswer::new(words.iter().flat_map(|word| word.to_ne_bytes()).collect());
            if let Ok(chain) = Chain::new(&answer, 8, first) {
                proptest::prop_assert!(chain.count() <= words.len() / 2 + 1);
            }
        }
    }
}
