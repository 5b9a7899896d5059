//! Connections of tests as they are by default: over TLS, between hosts that trust each other.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};

use rustix::event::{PollFd, PollFlags, poll};
use vfio_migration::rustls::crypto::aws_lc_rs::sign::any_supported_type;
use vfio_migration::rustls::pki_types::pem::PemObject;
use vfio_migration::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use vfio_migration::rustls::server::WebPkiClientVerifier;
use vfio_migration::rustls::sign::{CertifiedKey, SingleCertAndKey};
use vfio_migration::rustls::{
    ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig, ServerConnection, StreamOwned,
};
use vfio_migration::{
    ALPN, CA_FILE, DestinationOptions, Security, SourceOptions, TlsDirectory, TlsRole, Uri,
};
use vfio_migration_types::Side;
use vfio_migration_wire::{Frame, FrameHeader, HEADER_LEN, Message, PREAMBLE, encode};

pub use super::pki::HOST;
use super::pki::own_host;
use super::proxy::{self, Cut, Proxy};

/// With certificates of a directory; whatever is connected to, it must be [`HOST`].
pub fn secure(directory: &Path) -> Security {
    Security::Directory(TlsDirectory { server_name: Some(HOST.into()), ..TlsDirectory::new(directory) })
}

/// Options of a source whose connections over TCP are over TLS.
pub fn tls_source() -> SourceOptions {
    let mut options = SourceOptions::default();
    options.security = Some(secure(own_host()));
    options
}

/// Options of a destination that such a source reaches.
pub fn tls_destination() -> DestinationOptions {
    let mut options = DestinationOptions::default();
    options.security = Some(secure(own_host()));
    options
}

/// Options of a source that asks for plain text: for tests that are about that.
pub fn plain_source() -> SourceOptions {
    let mut options = SourceOptions::default();
    options.security = Some(Security::PlainText);
    options
}

/// The same of a destination.
pub fn plain_destination() -> DestinationOptions {
    let mut options = DestinationOptions::default();
    options.security = Some(Security::PlainText);
    options
}

/// Starts a proxy that knows frames: TLS ends at it, on both sides.
pub fn tls_proxy(to: &Uri, cut: Cut) -> Proxy {
    proxy::start_between(to, cut, |socket, peer, cut| tls_end(socket, peer, !cut))
}

/// The connection of a source by hand.
pub fn tls_stream(socket: TcpStream) -> StreamOwned<ClientConnection, TcpStream> {
    StreamOwned::new(client(), socket)
}

fn client() -> ClientConnection {
    ClientConnection::new(Arc::new(client_config(own_host())), ServerName::try_from(HOST).unwrap()).unwrap()
}

/// What is inside a TLS connection over `socket`, at whose other end is `peer`. `polite`: our end of it is told, as it must be.
fn tls_end(socket: TcpStream, peer: Side, polite: bool) -> OwnedFd {
    let connection: Connection = match peer {
        Side::Source => ServerConnection::new(Arc::new(server_config(own_host()))).unwrap().into(),
        Side::Destination => client().into(),
    };
    let (inside, plain) = UnixStream::pair().unwrap();
    std::thread::spawn(move || {
        let _ = pass(&socket, connection, &plain, polite);
        // Whoever reads may still read what was sent.
        let _ = (socket.shutdown(std::net::Shutdown::Write), plain.shutdown(std::net::Shutdown::Write));
    });
    inside.into()
}

/// Passes bytes between the two ends of one connection, until both ways have ended or one of them fails.
fn pass(
    mut wire: &TcpStream,
    mut tls: Connection,
    mut plain: &UnixStream,
    polite: bool,
) -> std::io::Result<()> {
    wire.set_nonblocking(true)?;
    plain.set_nonblocking(true)?;
    let (mut wire_ended, mut plain_ended) = (false, false);
    // What goes on to a destination is what a source says.
    let mut beginning = Beginning { is_past: matches!(tls, Connection::Server(_)), ..Beginning::default() };
    let mut opened = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    while !(wire_ended && plain_ended && opened.is_empty() && !tls.wants_write()) {
        let want = |flags: PollFlags, wanted: bool| if wanted { flags } else { PollFlags::empty() };
        let of_wire =
            want(PollFlags::IN, !wire_ended && opened.is_empty()) | want(PollFlags::OUT, tls.wants_write());
        let reads_plain = !plain_ended && !tls.is_handshaking() && !tls.wants_write();
        let of_plain = want(PollFlags::IN, reads_plain) | want(PollFlags::OUT, !opened.is_empty());
        let mut polled = [(wire.as_fd(), of_wire), (plain.as_fd(), of_plain)];
        // An end that nothing is wanted of would be ready for ever.
        let mut polled: Vec<_> = polled
            .iter_mut()
            .filter(|(_, flags)| !flags.is_empty())
            .map(|(fd, flags)| PollFd::from_borrowed_fd(*fd, *flags))
            .collect();
        poll(&mut polled, None)?;
        if tls.wants_write() {
            later(tls.write_tls(&mut wire))?;
        }
        if of_wire.contains(PollFlags::IN)
            && let Some(read) = later(tls.read_tls(&mut wire))?
        {
            let state = tls.process_new_packets().map_err(std::io::Error::other);
            if state.is_err() {
                // The peer is told why.
                let _ = tls.write_tls(&mut wire);
            }
            state?;
            loop {
                match tls.reader().read(&mut buffer) {
                    Ok(0) => wire_ended = true,
                    Ok(read) => {
                        opened.extend_from_slice(&buffer[..read]);
                        continue;
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    // It was cut, and so are we.
                    Err(error) => return Err(error),
                }
                break;
            }
            wire_ended |= read == 0;
        }
        if !opened.is_empty()
            && let Some(written) = later(plain.write(&opened))?
        {
            opened.drain(..written);
        }
        if wire_ended && opened.is_empty() {
            let _ = plain.shutdown(std::net::Shutdown::Write);
        }
        if reads_plain && let Some(read) = later(plain.read(&mut buffer))? {
            let sent = beginning.pass(&tls, &buffer[..read], read == 0);
            tls.writer().write_all(&sent)?;
            if read == 0 {
                plain_ended = true;
                if !polite {
                    return Ok(());
                }
                tls.send_close_notify();
            }
        }
    }
    Ok(())
}

/// Keys of the sessions that end at a proxy, by their attempts: those of the proxy's own connections to the destination.
static SESSION_KEYS: Mutex<BTreeMap<[u8; 16], [u8; 32]>> = Mutex::new(BTreeMap::new());

/// The beginning of what a source says. Its proof that it was in a session is good on its own connection alone, and that one ends at the
/// proxy: which was in the session too, and says its own.
#[derive(Default)]
struct Beginning {
    held: Vec<u8>,
    is_past: bool,
}

impl Beginning {
    /// Takes what the source sends, and gives what is to be sent on over `tls`; `ended`: that was all.
    fn pass(&mut self, tls: &Connection, sent: &[u8], ended: bool) -> Vec<u8> {
        self.held.extend_from_slice(sent);
        if !self.is_past {
            self.is_past = self.look(tls).is_some() || ended;
        }
        if self.is_past { std::mem::take(&mut self.held) } else { Vec::new() }
    }

    /// Looks at the first frame; `None`: it has not come whole.
    fn look(&mut self, tls: &Connection) -> Option<()> {
        let begin = PREAMBLE.len() + HEADER_LEN;
        let head = self.held.get(PREAMBLE.len()..begin)?;
        let Ok(header) = FrameHeader::parse(head.try_into().unwrap(), 0) else { return Some(()) };
        let end = begin + header.payload_len();
        let payload = self.held.get(begin..end)?;
        let export =
            |label: &[u8], context: &[u8]| tls.export_keying_material([0; 32], label, Some(context)).unwrap();
        match Frame::decode(&header, payload, Side::Source) {
            Ok(Frame::Message(Message::Hello(hello))) => {
                let key = export(b"EXPERIMENTAL-vfio-migrate-session", &hello.attempt.0);
                SESSION_KEYS.lock().unwrap().insert(hello.attempt.0, key);
            }
            Ok(Frame::Message(Message::Query { vm, attempt, epoch, .. })) => {
                let key = SESSION_KEYS.lock().unwrap().get(&attempt.0).copied().unwrap_or_default();
                let connection = export(b"EXPERIMENTAL-vfio-migrate-connection", &[]);
                let proof = *blake3::keyed_hash(&key, &connection).as_bytes();
                let query = encode(&Message::Query { vm, attempt, epoch, proof }, 0).unwrap();
                self.held.splice(PREAMBLE.len()..end, query);
            }
            _ => {}
        }
        Some(())
    }
}

/// `None`: not now.
fn later<T>(done: std::io::Result<T>) -> std::io::Result<Option<T>> {
    match done {
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
        done => done.map(Some),
    }
}

pub fn chain(directory: &Path, role: TlsRole) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let certificates = CertificateDer::pem_file_iter(directory.join(role.certificate_file())).unwrap();
    (
        certificates.map(Result::unwrap).collect(),
        PrivateKeyDer::from_pem_file(directory.join(role.key_file())).unwrap(),
    )
}

/// What a directory has for `role`, shown as it is: nobody has looked at it.
fn shown(directory: &Path, role: TlsRole) -> Arc<SingleCertAndKey> {
    let (certificates, key) = chain(directory, role);
    let key = any_supported_type(&key).unwrap();
    Arc::new(SingleCertAndKey::from(CertifiedKey::new(certificates, key)))
}

pub fn roots(directory: &Path) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(directory.join(CA_FILE)).unwrap()).unwrap();
    roots
}

pub fn client_config(directory: &Path) -> ClientConfig {
    let builder = ClientConfig::builder().with_root_certificates(roots(directory));
    let mut config = builder.with_client_cert_resolver(shown(directory, TlsRole::Client));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config
}

pub fn server_config(directory: &Path) -> ServerConfig {
    let verifier = WebPkiClientVerifier::builder(Arc::new(roots(directory))).build().unwrap();
    let builder = ServerConfig::builder().with_client_cert_verifier(verifier);
    let mut config = builder.with_cert_resolver(shown(directory, TlsRole::Server));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config
}
