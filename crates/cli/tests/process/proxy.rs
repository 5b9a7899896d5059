//! A proxy before a device's server, by which single messages are late or refused.

use std::collections::HashMap;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

/// Commands of the protocol.
pub(crate) const VERSION: u16 = 1;
pub(crate) const DMA_MAP: u16 = 2;
pub(crate) const GET_REGION_INFO: u16 = 5;
pub(crate) const SET_IRQS: u16 = 8;
pub(crate) const REGION_WRITE: u16 = 10;
pub(crate) const DEVICE_RESET: u16 = 13;
const DEVICE_FEATURE: u16 = 16;

/// Features of a device, as they are asked for: their number, and whether they are read or set.
pub(crate) const LOGGING_START: u32 = 6 | 1 << 17;
pub(crate) const LOGGING_STOP: u32 = 7 | 1 << 17;
pub(crate) const LOGGING_REPORT: u32 = 8 | 1 << 16;

/// The feature that a request asks for, if it does.
pub(crate) fn feature(command: u16, body: &[u8]) -> Option<u32> {
    let flags = body.get(4..8).filter(|_| command == DEVICE_FEATURE)?;
    Some(u32::from_le_bytes(flags.try_into().unwrap()))
}

/// Whether a request takes the device to STOP.
pub(crate) fn sets_stop(command: u16, body: &[u8]) -> bool {
    feature(command, body) == Some(2 | 1 << 17) && body.get(8..12) == Some(&1_u32.to_le_bytes())
}

/// What becomes of a request.
pub(crate) enum Act {
    Pass,
    /// Its answer, and all behind it, comes so much later.
    Late(Duration),
    /// It is answered with this errno, and does not reach the server.
    Refuse(u32),
}

/// Passes on what goes between who connects to `path` and the server at `to`. `act` says of each request, by its command and its
/// payload, what becomes of it.
pub(crate) fn start(path: &Path, to: &Path, act: impl Fn(u16, &[u8]) -> Act + Send + Sync + 'static) {
    let listener = UnixListener::bind(path).unwrap();
    let (to, act) = (to.to_owned(), Arc::new(act));
    std::thread::spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            let server = UnixStream::connect(&to).unwrap();
            let late = Arc::new(Mutex::new(HashMap::new()));
            let there = (client.try_clone().unwrap(), server.try_clone().unwrap(), act.clone(), late.clone());
            std::thread::spawn(move || {
                let (client, server, act, late) = there;
                while let Some(message) = Message::receive(&client) {
                    let act =
                        if message.is_command() { act(message.command(), message.body()) } else { Act::Pass };
                    match act {
                        Act::Refuse(errno) => message.refusal(errno).send(&client),
                        Act::Late(time) => {
                            late.lock().unwrap().insert(message.id(), time);
                            message.send(&server);
                        }
                        Act::Pass => message.send(&server),
                    }
                }
                let _ = server.shutdown(std::net::Shutdown::Both);
            });
            std::thread::spawn(move || {
                while let Some(message) = Message::receive(&server) {
                    let time = late.lock().unwrap().remove(&message.id()).filter(|_| !message.is_command());
                    // This is what being late is.
                    time.into_iter().for_each(std::thread::sleep);
                    message.send(&client);
                }
                let _ = client.shutdown(std::net::Shutdown::Both);
            });
        }
    });
}

const HEADER: usize = 16;

struct Message {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Message {
    fn receive(from: &UnixStream) -> Option<Self> {
        let mut message = Self { bytes: Vec::new(), fds: Vec::new() };
        message.fill(from, HEADER)?;
        let size = u32::from_le_bytes(message.bytes[4..8].try_into().unwrap());
        message.fill(from, size as usize)?;
        Some(message)
    }

    fn fill(&mut self, from: &UnixStream, size: usize) -> Option<()> {
        while self.bytes.len() < size {
            let at = self.bytes.len();
            self.bytes.resize(size, 0);
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let into = &mut [IoSliceMut::new(&mut self.bytes[at..])];
            let received = recvmsg(from, into, &mut control, RecvFlags::CMSG_CLOEXEC).ok()?;
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(fds) = message {
                    self.fds.extend(fds);
                }
            }
            self.bytes.truncate(at + received.bytes);
            (received.bytes > 0).then_some(())?;
        }
        Some(())
    }

    fn send(&self, to: &UnixStream) {
        let fds: Vec<_> = self.fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        }
        let mut sent = 0;
        while sent < self.bytes.len() {
            match sendmsg(to, &[IoSlice::new(&self.bytes[sent..])], &mut control, SendFlags::NOSIGNAL) {
                Ok(more) => sent += more,
                // Who is gone misses it.
                Err(_) => return,
            }
            control.clear();
        }
    }

    fn id(&self) -> u16 {
        u16::from_le_bytes(self.bytes[..2].try_into().unwrap())
    }

    fn command(&self) -> u16 {
        u16::from_le_bytes(self.bytes[2..4].try_into().unwrap())
    }

    fn is_command(&self) -> bool {
        self.bytes[8] & 0xf == 0
    }

    fn body(&self) -> &[u8] {
        &self.bytes[HEADER..]
    }

    /// The answer of a server that refuses it.
    fn refusal(&self, errno: u32) -> Self {
        let mut bytes = self.bytes[..HEADER].to_vec();
        bytes[4..8].copy_from_slice(&16u32.to_le_bytes());
        bytes[8..12].copy_from_slice(&0x21u32.to_le_bytes());
        bytes[12..].copy_from_slice(&errno.to_le_bytes());
        Self { bytes, fds: Vec::new() }
    }
}
