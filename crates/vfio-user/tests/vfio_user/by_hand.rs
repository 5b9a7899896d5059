//! Messages written and read by hand, by servers and clients that keep no rules.
#![expect(unreachable_pub, reason = "only the files of this program reach it")]

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use vfio_user_peer::Errno;
use vfio_user_peer::codec::{Command, Header, Kind, VersionCapabilities, VersionPayload};

use crate::rig::Served;

/// The next message; `None` once the other end has closed.
pub fn read_message(stream: &mut UnixStream) -> Option<(Header, Vec<u8>)> {
    let mut raw = [0; 16];
    stream.read_exact(&mut raw).ok()?;
    let header = Header::decode(&raw).unwrap();
    let mut body = vec![0; header.body_len()];
    stream.read_exact(&mut body).ok()?;
    Some((header, body))
}

/// A message with `header`'s id and command.
pub fn message(header: Header, kind: Kind, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(16 + body.len()).unwrap();
    let mut out = Header { size, kind, ..header }.encode().to_vec();
    out.extend_from_slice(body);
    out
}

/// Answers the version, without an extension or a twin socket.
pub fn answer_version(stream: &mut UnixStream) {
    let (header, _) = read_message(stream).unwrap();
    let mut body = Vec::new();
    let capabilities = VersionCapabilities { max_msg_fds: 4, ..VersionCapabilities::default() };
    VersionPayload { major: 0, minor: 1, capabilities }.encode(&mut body);
    stream.write_all(&message(header, Kind::Reply, &body)).unwrap();
}

/// A client that sends what it is told.
pub struct Raw(pub UnixStream);

impl Raw {
    pub fn connect(served: &Served) -> Self {
        let stream = UnixStream::connect(&served.path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        Self(stream)
    }

    pub fn negotiated(served: &Served) -> Self {
        let capabilities = VersionCapabilities { max_msg_fds: 1, ..VersionCapabilities::default() };
        Self::announcing(served, capabilities).0
    }

    /// With what the server answers to these capabilities.
    pub fn announcing(served: &Served, capabilities: VersionCapabilities) -> (Self, VersionPayload) {
        let mut raw = Self::connect(served);
        let mut body = Vec::new();
        VersionPayload { major: 0, minor: 2, capabilities }.encode(&mut body);
        let (kind, body) = raw.ask(Command::VERSION, &body);
        assert_eq!(kind, Kind::Reply);
        (raw, VersionPayload::decode(&body).unwrap())
    }

    pub fn send(&mut self, command: Command, body: &[u8], no_reply: bool) {
        let size = u32::try_from(16 + body.len()).unwrap();
        let header = Header { id: 5, command, size, kind: Kind::Command { no_reply } };
        self.0.write_all(&header.encode()).unwrap();
        self.0.write_all(body).unwrap();
    }

    pub fn receive(&mut self) -> (Kind, Vec<u8>) {
        let mut raw = [0; 16];
        self.0.read_exact(&mut raw).unwrap();
        let header = Header::decode(&raw).unwrap();
        assert_eq!(header.id, 5);
        let mut body = vec![0; header.body_len()];
        self.0.read_exact(&mut body).unwrap();
        (header.kind, body)
    }

    pub fn ask(&mut self, command: Command, body: &[u8]) -> (Kind, Vec<u8>) {
        self.send(command, body, false);
        self.receive()
    }

    pub fn refused(&mut self, command: Command, body: &[u8]) -> Errno {
        match self.ask(command, body) {
            (Kind::Error(errno), body) => {
                assert!(body.is_empty(), "a refusal with a payload");
                Errno::from_raw_os_error(i32::try_from(errno).unwrap())
            }
            other => panic!("{command} was not refused: {other:?}"),
        }
    }

    /// The reply to a request that goes with `fds`, and how many descriptors came with it.
    pub fn ask_with_fds(
        &mut self,
        command: Command,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> (Kind, Vec<u8>, usize) {
        let size = u32::try_from(16 + body.len()).unwrap();
        let header = Header { id: 5, command, size, kind: Kind::Command { no_reply: false } }.encode();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)));
        sendmsg(&self.0, &[IoSlice::new(&header), IoSlice::new(body)], &mut control, SendFlags::empty())
            .unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut raw = [0; 16];
        let got = recvmsg(&self.0, &mut [IoSliceMut::new(&mut raw)], &mut control, RecvFlags::WAITALL);
        assert_eq!(got.unwrap().bytes, 16);
        let came = control
            .drain()
            .map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => fds.count(),
                _ => 0,
            })
            .sum();
        let header = Header::decode(&raw).unwrap();
        let mut body = vec![0; header.body_len()];
        self.0.read_exact(&mut body).unwrap();
        (header.kind, body, came)
    }

    /// Whether the stream is in step: a good request gets its good answer.
    pub fn in_step(&mut self) {
        let (kind, body) = self.ask(Command::DEVICE_GET_INFO, &words(&[16, 0, 0, 0]));
        assert_eq!((kind, body.len()), (Kind::Reply, 16));
    }

    pub fn ended(mut self) -> bool {
        matches!(self.0.read(&mut [0; 64]), Ok(0) | Err(_))
    }
}

pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}
