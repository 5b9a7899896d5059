//! The lines of a client, each with the descriptors that were passed with it (SCM_RIGHTS of unix(7)).

use std::io::{Error, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::io::retry_on_intr;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};

/// Longest line, in bytes: a client that sends more is refused and dropped.
pub(super) const LINE_MAX: usize = 64 << 10;
/// Most bytes that are read at once.
const CHUNK: usize = 4 << 10;
/// Most descriptors that are taken in with a line: one is asked for, and a second is one too many.
const DESCRIPTORS_MAX: usize = 2;

/// A line of a client.
#[derive(Debug, Default)]
pub(super) struct Line {
    /// With its end, if it has one.
    pub(super) bytes: Vec<u8>,
    pub(super) passed: Passed,
}

impl Line {
    /// Whether it has its end: of another nothing more is to come, or far too much.
    pub(super) fn is_whole(&self) -> bool {
        self.bytes.last() == Some(&b'\n')
    }
}

/// The descriptors that were passed with a line. They are closed when this is dropped.
#[derive(Debug, Default)]
pub(super) struct Passed {
    pub(super) descriptors: Vec<OwnedFd>,
    /// More were passed, and the system, or this process, did not take them in.
    pub(super) lost: bool,
}

impl Passed {
    fn add(&mut self, more: Self) {
        self.lost |= more.lost;
        for descriptor in more.descriptors {
            if self.descriptors.len() < DESCRIPTORS_MAX {
                self.descriptors.push(descriptor);
            } else {
                self.lost = true;
            }
        }
    }
}

/// What comes from a client.
#[derive(Debug)]
pub(super) struct Lines {
    stream: UnixStream,
    /// Read, and not given out as a line yet.
    read: Vec<u8>,
    /// What was passed with it, and where in it a message ended that passed something.
    passed: Vec<(usize, Passed)>,
}

impl Lines {
    pub(super) fn of(stream: UnixStream) -> Self {
        Self { stream, read: Vec::new(), passed: Vec::new() }
    }

    /// The next line, or what there is of one at the end of all, or at [`LINE_MAX`]; empty when there is nothing more.
    pub(super) fn next(&mut self) -> Result<Line, Error> {
        loop {
            let end = self.read.iter().take(LINE_MAX).position(|byte| *byte == b'\n');
            if let Some(end) = end {
                return Ok(self.take(end + 1));
            }
            if self.read.len() >= LINE_MAX || !self.fill()? {
                return Ok(self.take(self.read.len().min(LINE_MAX)));
            }
        }
    }

    fn take(&mut self, len: usize) -> Line {
        let rest = self.read.split_off(len);
        let mut line = Line { bytes: std::mem::replace(&mut self.read, rest), ..Line::default() };
        for (end, passed) in std::mem::take(&mut self.passed) {
            // A descriptor goes with the line that its message ends with, or has a part of at its end.
            match end.checked_sub(len) {
                None | Some(0) => line.passed.add(passed),
                Some(end) => self.passed.push((end, passed)),
            }
        }
        line
    }

    /// Reads more, while no line is whole; false at the end. The kernel gives no bytes after those of a message that passes
    /// something in the same read.
    fn fill(&mut self) -> Result<bool, Error> {
        let mut bytes = [0; CHUNK];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = retry_on_intr(|| {
            let mut into = [IoSliceMut::new(&mut bytes)];
            recvmsg(&self.stream, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC)
        })?;
        let mut passed = Passed { lost: received.flags.contains(ReturnFlags::CTRUNC), ..Passed::default() };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                passed.descriptors.extend(descriptors);
            }
        }
        let bytes = bytes.get(..received.bytes).unwrap_or_default();
        self.read.extend_from_slice(bytes);
        let end = self.read.len();
        match self.passed.last_mut() {
            _ if passed.descriptors.is_empty() && !passed.lost => {}
            // Of one line, however many messages it comes in, no more is kept than of one.
            Some((last, before)) if !bytes.contains(&b'\n') => {
                *last = end;
                before.add(passed);
            }
            _ => self.passed.push((end, passed)),
        }
        Ok(!bytes.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, Write};
    use std::os::fd::{AsFd, BorrowedFd};

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

    use super::*;

    fn send(to: &UnixStream, text: &str, descriptors: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
        sendmsg(to, &[IoSlice::new(text.as_bytes())], &mut control, SendFlags::empty()).unwrap();
    }

    fn next(lines: &mut Lines) -> (String, usize, bool) {
        let line = lines.next().unwrap();
        let text = String::from_utf8(line.bytes).unwrap();
        (text, line.passed.descriptors.len(), line.passed.lost)
    }

    #[test]
    fn a_descriptor_goes_with_the_line_that_its_message_ends_with() {
        let (mut here, there) = UnixStream::pair().unwrap();
        let some = here.try_clone().unwrap();
        let one = [some.as_fd()];
        here.write_all(b"a\n").unwrap();
        send(&here, "b\n", &one);
        send(&here, "c", &one);
        here.write_all(b"c\nd").unwrap();
        send(&here, "d\n", &one);
        send(&here, "e\nf\n", &one);
        send(&here, "g\nh", &one);
        here.write_all(b"\n").unwrap();
        drop((here, some));
        let mut lines = Lines::of(there);
        for (text, passed) in
            [("a", 0), ("b", 1), ("cc", 1), ("dd", 1), ("e", 0), ("f", 1), ("g", 0), ("h", 1)]
        {
            assert_eq!(next(&mut lines), (format!("{text}\n"), passed, false));
        }
        assert_eq!(next(&mut lines), (String::new(), 0, false));
    }

    #[test]
    fn of_many_descriptors_two_are_kept_and_the_next_line_has_its_own() {
        let (here, there) = UnixStream::pair().unwrap();
        let some = here.try_clone().unwrap();
        send(&here, "at once\n", &[some.as_fd(); 8]);
        for _ in 0..20 {
            send(&here, "x", &[some.as_fd(); 2]);
        }
        send(&here, "\n", &[some.as_fd()]);
        send(&here, "one\n", &[some.as_fd()]);
        let mut lines = Lines::of(there);
        assert_eq!(next(&mut lines), ("at once\n".into(), 2, true));
        assert_eq!(next(&mut lines), ("x".repeat(20) + "\n", 2, true));
        assert_eq!(next(&mut lines), ("one\n".into(), 1, false));
    }

    #[test]
    fn a_line_without_end_is_given_out_at_its_limit() {
        let (mut here, there) = UnixStream::pair().unwrap();
        let writing = std::thread::spawn(move || here.write_all(&vec![b'x'; LINE_MAX + 1]).unwrap());
        let mut lines = Lines::of(there);
        let line = lines.next().unwrap();
        assert_eq!((line.bytes.len(), line.is_whole()), (LINE_MAX, false));
        writing.join().unwrap();
        assert_eq!(next(&mut lines).0, "x");
        assert!(lines.next().unwrap().bytes.is_empty());
    }
}
