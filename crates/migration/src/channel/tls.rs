//! A connection over TLS 1.3. What is encrypted, and with what, is [`tls`](crate::tls)'s; here are the bytes.
//!
//! Reader and writers share the state of the connection under one lock, which nobody holds while the socket is waited for. Whoever
//! has it sends what the socket takes at once straight from where rustls has encrypted it to: of what is sent, one copy is made to be
//! encrypted, since a guest's memory may change meanwhile, and one by rustls, which encrypts it there.

use std::io::{BufRead, ErrorKind, IoSlice, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, TryLockError};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::Shutdown;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection};
use vfio_migration_memory::Pieces;
use vfio_migration_wire::PREAMBLE;

use crate::channel::transport::{Socket, Transport, TransportError};
use crate::session::lock::lock;
use crate::tls::asked::Asked;
use crate::tls::config::ALPN;
use crate::tls::error::TlsError;
use crate::tls::identity::PeerIdentity;
use crate::tls::security::{ConnectionSecurity, SecurityKind};

/// Plain text that is encrypted at once.
const STEP: usize = 256 << 10;
/// Encrypted bytes that are received at once; and of somebody who has proved nothing yet, of whom there may be many.
const RECEIVE: usize = 256 << 10;
const RECEIVE_OF_STRANGER: usize = 4 << 10;

/// A socket with TLS over it.
#[derive(Debug)]
pub(crate) struct Tls {
    socket: Socket,
    state: Mutex<State>,
    /// What is to be encrypted, of [`STEP`] bytes once something was. Locked before `state`, and by whoever writes until all of it is
    /// sent: no more than that waits to be.
    plain: Mutex<Vec<u8>>,
}

#[derive(Debug)]
struct State {
    connection: Connection,
    /// Received and not yet taken by `connection` are those from `at` to `filled`.
    received: Vec<u8>,
    at: usize,
    filled: usize,
    /// The peer has sent something.
    heard: bool,
    /// The socket has ended.
    ended: bool,
    /// We have said our last word, by close_notify. What still comes is not looked at: rustls could not answer what is wrong with it
    /// by an alert, and takes an attempt for a defect of its caller.
    closed: bool,
    failed: Option<TlsError>,
    /// Known of a destination that has to ask for our certificate.
    asked: Option<Asked>,
}

/// What can be had of a connection without receiving more.
enum Ready {
    Bytes(usize),
    End,
    Nothing,
}

impl Tls {
    /// Connects to a peer that has to prove that it is `name`, and waits for its first word, within `limit`: only by that word is
    /// it known that it takes our certificate, and what is sent before would cut off its reason why not. One that `must_ask` for it,
    /// and does not, is refused.
    pub(crate) fn connect(
        socket: OwnedFd,
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
        must_ask: bool,
        limit: Duration,
    ) -> Result<Self, TransportError> {
        let (asked, watched) = Asked::watch(&config);
        let connection = ClientConnection::new(watched, name).map_err(TlsError::of)?;
        let tls = Self::new(socket, Connection::Client(connection), must_ask.then_some(asked));
        let until = Instant::now() + limit;
        while !tls.has_word() {
            tls.flush(true)?;
            if tls.step()? {
                continue;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(TlsError::Late(limit).into());
            }
            tls.socket.wait(PollFlags::IN, left);
        }
        Ok(tls)
    }

    /// Takes the connection of somebody who connected. The handshake goes on as the connection is read.
    pub(crate) fn accepted(socket: OwnedFd, config: Arc<ServerConfig>) -> Result<Self, TlsError> {
        let connection = ServerConnection::new(config).map_err(TlsError::of)?;
        Ok(Self::new(socket, Connection::Server(connection), None))
    }

    fn new(socket: OwnedFd, mut connection: Connection, asked: Option<Asked>) -> Self {
        // What may be encrypted at once is bounded by `STEP`.
        connection.set_buffer_limit(None);
        let state = State {
            connection,
            received: Vec::new(),
            at: 0,
            filled: 0,
            heard: false,
            ended: false,
            closed: false,
            failed: None,
            asked,
        };
        Self { socket: Socket::new(socket), state: Mutex::new(state), plain: Mutex::default() }
    }

    fn handshaking(&self) -> bool {
        lock(&self.state).connection.is_handshaking()
    }

    /// Whether something of the peer's can be read.
    fn has_word(&self) -> bool {
        lock(&self.state).connection.reader().fill_buf().is_ok_and(|bytes| !bytes.is_empty())
    }

    /// Takes what has arrived, without waiting; says whether anything had.
    fn step(&self) -> Result<bool, TransportError> {
        match self.receive(true) {
            Ok(()) => {}
            Err(TransportError::System(Errno::AGAIN)) => return Ok(false),
            Err(error) => return Err(error),
        }
        let taken = lock(&self.state).take();
        if let Err(error) = taken {
            self.say_why();
            return Err(error.into());
        }
        if lock(&self.state).ended && !self.has_word() {
            return Err(if self.handshaking() { TlsError::NoHandshake } else { TlsError::HungUp }.into());
        }
        Ok(true)
    }

    /// Receives some encrypted bytes.
    fn receive(&self, now: bool) -> Result<(), TransportError> {
        // One thread reads a connection, so nobody else's bytes can come between.
        let (mut buffer, most) = {
            let mut state = lock(&self.state);
            if state.ended {
                return Ok(());
            }
            let most = if state.connection.is_handshaking() { RECEIVE_OF_STRANGER } else { RECEIVE };
            (std::mem::take(&mut state.received), most)
        };
        // It stays as long as it is: what is made longer is filled with zeros, each time.
        if buffer.len() < most {
            buffer.resize(most, 0);
        }
        let into = buffer.get_mut(..most).unwrap_or_default();
        let read = if now { self.socket.read_now(into) } else { self.socket.read(into) };
        let mut state = lock(&self.state);
        state.received = buffer;
        state.at = 0;
        state.filled = *read.as_ref().unwrap_or(&0);
        state.heard |= state.filled > 0;
        state.ended = read? == 0;
        Ok(())
    }

    /// Gives `take` what has been decrypted, until it has taken something; receives until there is something.
    fn read_with(&self, now: bool, mut take: impl FnMut(&[u8]) -> usize) -> Result<usize, TransportError> {
        loop {
            let ready = lock(&self.state).ready(&mut take);
            match ready {
                Ok(Ready::Bytes(taken)) => return Ok(taken),
                Ok(Ready::End) => return Ok(0),
                Ok(Ready::Nothing) => {
                    // What the handshake has to say, or an answer to a change of keys. A peer that takes nothing any more may
                    // have said why before it hung up.
                    if let Err(error) = self.flush(false) {
                        tracing::debug!(%error, "nothing can be sent any more");
                    }
                    self.receive(now)?;
                }
                Err(error) => {
                    self.say_why();
                    return Err(error.into());
                }
            }
        }
    }

    /// Sends what `connection` has to say. `wait`: until it is sent; otherwise what can be sent at once.
    fn flush(&self, wait: bool) -> Result<(), TransportError> {
        loop {
            let all = lock(&self.state).send(&self.socket)?;
            if all || !wait {
                return Ok(());
            }
            // Nobody holds the lock meanwhile: what the peer says may have to be read before it takes more.
            self.socket.wait_ready(PollFlags::OUT)?;
        }
    }

    /// Tells the peer, by an alert, why its bytes are refused; if that can be done at once.
    fn say_why(&self) {
        let _ = self.flush(false);
    }

    /// Encrypts what `fill` puts there, and sends it whole. Returns what `fill` does: how much that was.
    fn write_with(&self, fill: impl FnOnce(&mut [u8]) -> usize) -> Result<usize, TransportError> {
        let mut plain = lock(&self.plain);
        if plain.is_empty() {
            plain.resize(STEP, 0);
        }
        let len = fill(&mut plain);
        {
            let mut state = lock(&self.state);
            if let Some(failed) = &state.failed {
                return Err(failed.clone().into());
            }
            let given = plain.get(..len).unwrap_or_default();
            let written = state.connection.writer().write_all(given);
            written.map_err(|error| TlsError::Setup(error.to_string()))?;
        }
        self.flush(true)?;
        Ok(len)
    }
}

impl State {
    /// Sends what the connection has to say, as far as `socket` takes it at once, straight from where it was encrypted to; says
    /// whether that is all.
    fn send(&mut self, socket: &Socket) -> Result<bool, Errno> {
        while self.connection.wants_write() {
            match self.connection.write_tls(&mut AtOnce(socket)) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO)),
            }
        }
        Ok(true)
    }

    /// Received and not yet taken by the connection.
    fn rest(&self) -> &[u8] {
        self.received.get(self.at..self.filled).unwrap_or_default()
    }

    /// Decrypts what has been received, as far as there is room for it.
    fn take(&mut self) -> Result<(), TlsError> {
        if let Some(failed) = &self.failed {
            return Err(failed.clone());
        }
        loop {
            if self.closed {
                self.at = self.filled;
            }
            let mut rest = self.received.get(self.at..self.filled).unwrap_or_default();
            if rest.is_empty() {
                if self.ended && self.connection.wants_read() {
                    // So that the reader hears of an end without a farewell.
                    let _ = self.connection.read_tls(&mut std::io::empty());
                }
                return Ok(());
            }
            let before = rest.len();
            // A whole preamble comes in one piece, and nothing of TLS begins like it.
            let plain = self.connection.is_handshaking() && rest.starts_with(&PREAMBLE[..PREAMBLE.len() - 1]);
            match self.connection.read_tls(&mut rest) {
                Ok(_) => self.at += before - rest.len(),
                // It has decrypted enough, which has to be read first.
                Err(_) => return Ok(()),
            }
            let done = self.connection.process_new_packets().map_err(TlsError::of).and_then(|io| {
                // A peer that leaves the protocol out is taken by TLS, and not by us.
                if self.connection.is_handshaking() {
                    Ok(io)
                } else if self.connection.alpn_protocol() != Some(ALPN) {
                    Err(TlsError::other_protocol())
                } else if self.asked.as_ref().is_some_and(|asked| !asked.has_come()) {
                    Err(TlsError::NotAsked)
                } else {
                    Ok(io)
                }
            });
            match done {
                Ok(io) if io.plaintext_bytes_to_read() > 0 => return Ok(()),
                Ok(_) => {}
                Err(error) => {
                    let error = if plain { TlsError::PlainText } else { error };
                    self.failed = Some(error.clone());
                    return Err(error);
                }
            }
        }
    }

    fn ready(&mut self, take: &mut impl FnMut(&[u8]) -> usize) -> Result<Ready, TlsError> {
        let mut taken = 0;
        loop {
            let (stepped, end) = {
                let mut reader = self.connection.reader();
                match reader.fill_buf() {
                    Ok([]) => (0, true),
                    Ok(bytes) => {
                        let stepped = take(bytes);
                        reader.consume(stepped);
                        (stepped, stepped == 0)
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => (0, false),
                    Err(_) if taken > 0 => return Ok(Ready::Bytes(taken)),
                    Err(_) => return Err(TlsError::Truncated),
                }
            };
            taken += stepped;
            if end {
                return Ok(if taken > 0 { Ready::Bytes(taken) } else { Ready::End });
            }
            if stepped == 0 {
                let before = self.at;
                let left = self.rest().len();
                if left == 0 && !self.ended {
                    return Ok(if taken > 0 { Ready::Bytes(taken) } else { Ready::Nothing });
                }
                match self.take() {
                    Err(error) if taken == 0 => return Err(error),
                    Err(_) => return Ok(Ready::Bytes(taken)),
                    Ok(()) if left == 0 || self.at == before => {
                        // The end is known now, or nothing more can be decrypted.
                        if left == 0 {
                            return self.after_end(taken);
                        }
                        return Ok(if taken > 0 { Ready::Bytes(taken) } else { Ready::Nothing });
                    }
                    Ok(()) => {}
                }
            }
        }
    }

    /// What there is once the socket has ended, and all that came has been taken.
    fn after_end(&mut self, taken: usize) -> Result<Ready, TlsError> {
        if taken > 0 {
            return Ok(Ready::Bytes(taken));
        }
        match self.connection.reader().fill_buf() {
            Ok([]) => Ok(Ready::End),
            _ => Err(TlsError::Truncated),
        }
    }
}

/// The socket for what it takes at once.
struct AtOnce<'a>(&'a Socket);

impl Write for AtOnce<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> std::io::Result<usize> {
        Ok(self.0.write_now(parts)?)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Transport for Tls {
    fn write(&self, parts: &[IoSlice<'_>]) -> Result<usize, TransportError> {
        self.write_with(|plain| {
            let mut done = 0;
            for part in parts {
                done += copy_to(part, plain, done);
            }
            done
        })
    }

    fn write_pieces(&self, head: &[u8], body: &Pieces<'_>) -> Result<usize, TransportError> {
        self.write_with(|plain| {
            let head = copy_to(head, plain, 0);
            head + body.copy_out(plain.get_mut(head..).unwrap_or_default())
        })
    }

    fn read(&self, into: &mut [u8]) -> Result<usize, TransportError> {
        let mut done = 0;
        self.read_with(false, |bytes| copy(bytes, into, &mut done))
    }

    fn read_now(&self, into: &mut [u8]) -> Result<usize, TransportError> {
        let mut done = 0;
        self.read_with(true, |bytes| copy(bytes, into, &mut done))
    }

    fn read_pieces(&self, into: &mut Pieces<'_>) -> Result<usize, TransportError> {
        self.read_with(false, |bytes| into.fill(bytes))
    }

    fn wait(&self, flags: PollFlags, limit: Duration) -> bool {
        let ready = flags.contains(PollFlags::IN) && {
            let mut state = lock(&self.state);
            !state.rest().is_empty() || state.connection.reader().fill_buf().is_ok()
        };
        ready || self.socket.wait(flags, limit)
    }

    fn shutdown(&self, how: Shutdown) {
        if how == Shutdown::Write {
            let mut state = lock(&self.state);
            if !state.connection.is_handshaking() {
                state.connection.send_close_notify();
                state.closed = true;
            }
        }
        if how != Shutdown::Read {
            // Whoever is inside a frame is not waited for: then the peer sees the stream cut, which it is.
            if !matches!(self.plain.try_lock(), Err(TryLockError::WouldBlock)) {
                let _ = self.flush(false);
            }
        }
        self.socket.shutdown(how);
    }

    fn is_proven(&self) -> bool {
        !self.handshaking()
    }

    fn has_heard(&self) -> bool {
        lock(&self.state).heard
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.fd()
    }

    fn peer(&self) -> String {
        self.socket.peer()
    }

    fn security(&self) -> ConnectionSecurity {
        let state = lock(&self.state);
        let cipher = state.connection.negotiated_cipher_suite().map(|suite| suite.suite());
        let leaf = state.connection.peer_certificates().and_then(<[_]>::first);
        let plain = matches!(state.failed, Some(TlsError::PlainText));
        ConnectionSecurity {
            kind: if plain { SecurityKind::PlainText } else { SecurityKind::Tls },
            cipher: cipher.and_then(|cipher| cipher.as_str()).map(str::to_owned),
            peer: leaf.and_then(|leaf| PeerIdentity::of(leaf).ok()),
            socket: Some(self.socket.kind()),
            unix_peer: None,
        }
    }

    fn export(&self, label: &[u8], context: &[u8]) -> Option<[u8; 32]> {
        lock(&self.state).connection.export_keying_material([0; 32], label, Some(context)).ok()
    }
}

fn copy(bytes: &[u8], into: &mut [u8], done: &mut usize) -> usize {
    let step = copy_to(bytes, into, *done);
    *done += step;
    step
}

/// Copies as many of `bytes` as there is room for from `at` on, and returns how many.
fn copy_to(bytes: &[u8], into: &mut [u8], at: usize) -> usize {
    let rest = into.get_mut(at..).unwrap_or_default();
    let step = rest.len().min(bytes.len());
    if let (Some(to), Some(from)) = (rest.get_mut(..step), bytes.get(..step)) {
        to.copy_from_slice(from);
    }
    step
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};

    use rcgen::{CertificateParams, KeyPair};
    use rustls::crypto::aws_lc_rs::default_provider;
    use rustls::pki_types::PrivateKeyDer;
    use rustls::{RootCertStore, StreamOwned};

    use super::*;

    #[test]
    fn what_the_peer_said_before_it_hung_up_is_heard_though_nothing_can_be_sent_to_it() {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(["host".to_owned()]).unwrap().self_signed(&key).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(certificate.der().clone()).unwrap();
        let provider = || Arc::new(default_provider());
        let client = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
        let mut client = client.unwrap().with_root_certificates(roots).with_no_client_auth();
        client.alpn_protocols = vec![ALPN.to_vec()];
        let private = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let server = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
        let server = server.unwrap().with_no_client_auth();
        let mut server = server.with_single_cert(vec![certificate.der().clone()], private).unwrap();
        server.alpn_protocols = vec![ALPN.to_vec()];
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let peer = std::thread::spawn(move || {
            let connection = ServerConnection::new(Arc::new(server)).unwrap();
            let mut stream = StreamOwned::new(connection, listener.accept().unwrap().0);
            stream.write_all(b"word").unwrap();
            stream.read_exact(&mut [0; 5]).unwrap();
            stream.write_all(b"why").unwrap();
            stream.flush().unwrap();
        });
        let name = ServerName::try_from("host").unwrap();
        let limit = Duration::from_secs(20);
        let tls = Tls::connect(stream.into(), Arc::new(client), name, false, limit).unwrap();
        tls.write(&[IoSlice::new(b"hello")]).unwrap();
        peer.join().unwrap();
        // Until the kernel has heard that nobody is there.
        while tls.write(&[IoSlice::new(b"ping")]).is_ok() {}
        let mut heard = Vec::new();
        while heard.len() < 7 {
            let mut some = [0; 16];
            let read = tls.read(&mut some).unwrap();
            assert_ne!(read, 0, "it ended after {heard:?}");
            heard.extend_from_slice(&some[..read]);
        }
        assert_eq!(heard, b"wordwhy");
    }
}
