//! What a side's TLS connections are made with.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::ServerName;
use rustls::server::NoServerSessionStorage;
use rustls::sign::SingleCertAndKey;
use rustls::version::TLS13;
use rustls::{ClientConfig, ServerConfig};

use crate::tls::authorities::Authorities;
use crate::tls::crl::revocations;
use crate::tls::error::TlsError;
use crate::tls::files::{OwnCertificate, own_certificate};
use crate::tls::identity::{PeerIdentity, Pin};
use crate::tls::layout::TlsRole;
use crate::tls::own::check_own;
use crate::tls::trust::Trust;
use crate::uri::Uri;

/// The protocol inside (ALPN): whatever else is served over TLS with the same certificates is not taken for it.
pub const ALPN: &[u8] = b"vfio-migrate/1";

/// Certificates of a directory, and whom to trust beyond what its CA says.
///
/// The files are read anew for a connection if they have changed, so that certificates may be replaced while a destination waits.
#[derive(Clone, Debug)]
pub struct TlsDirectory {
    /// The directory, in the layout of QEMU and libvirt: `ca-cert.pem`, `server-cert.pem`, `server-key.pem`, `client-cert.pem`,
    /// `client-key.pem`, and `ca-crl.pem` if there is one. A destination needs the server's files, a source the client's.
    pub path: PathBuf,
    /// Keys of peers. Not empty: only these are trusted, and no CA is asked, nor a host's name.
    pub pins: BTreeSet<Pin>,
    /// The name that the destination's certificate must have; `None`: the host that is connected to.
    pub server_name: Option<String>,
}

impl TlsDirectory {
    /// The certificates of `path`, with trust in its CA.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), pins: BTreeSet::new(), server_name: None }
    }

    /// What to prove, and whom to trust. Where that is a CA, our own certificate is one that those take who trust the same.
    fn load(&self, role: TlsRole) -> Result<(OwnCertificate, Trust), TlsError> {
        let own = own_certificate(&self.path, role)?;
        if !self.pins.is_empty() {
            return Ok((own, Trust::Pins(Arc::new(self.pins.clone()))));
        }
        let revoked = Arc::new(revocations(&self.path)?);
        let trust = Trust::Authorities(Arc::new(Authorities::of(&self.path)?), revoked);
        check_own(&self.path, role, &own, &trust)?;
        Ok((own, trust))
    }

    /// Judges the files that a connection of `role` needs, as it is judged itself when one is made.
    ///
    /// # Errors
    /// What is wrong with which file.
    pub fn check(&self, role: TlsRole) -> Result<PeerIdentity, TlsError> {
        self.load(role).map(|(own, _)| own.identity)
    }
}

/// What a destination learns of a source from its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Proof {
    /// Nothing.
    Nothing,
    /// That it has a certain key. The names beside it are its own word.
    Key,
    /// Its key, and names for which somebody vouches who is trusted.
    Name,
}

/// How the connections of one side are secured. There is no default: plain text is what one has to write.
#[derive(Clone, Debug)]
pub enum Security {
    /// Not at all: whoever is on the way reads and changes what is sent.
    PlainText,
    /// TLS 1.3 with certificates of a directory.
    Directory(TlsDirectory),
    /// TLS 1.3 with a configuration of the VMM's own for a source: versions, verification and certificates are its affair.
    /// [`ALPN`] is what a destination expects in it.
    Client(Arc<ClientConfig>),
    /// The same for a destination.
    Server(Arc<ServerConfig>),
    /// The stream that is handed over is secured already, and this is what its peer has proved to whoever handed it over.
    Vouched(PeerIdentity),
}

impl Security {
    /// Whether connections other than those over unix sockets begin with a TLS handshake.
    pub fn is_tls(&self) -> bool {
        match self {
            Self::Directory(_) | Self::Client(_) | Self::Server(_) => true,
            Self::PlainText | Self::Vouched(_) => false,
        }
    }

    /// Whether a destination that asks for no certificate is none of ours. What a VMM's own configuration is for, it knows.
    pub(crate) fn has_to_be_asked(&self) -> bool {
        matches!(self, Self::Directory(_))
    }

    /// Whether a CA vouches for the names of peers.
    pub(crate) fn proves_names(&self) -> bool {
        matches!(self, Self::Directory(directory) if directory.pins.is_empty())
    }

    /// What a source proves over a connection that is secured so.
    pub(crate) fn proof(&self) -> Proof {
        match self {
            Self::PlainText => Proof::Nothing,
            Self::Directory(directory) if !directory.pins.is_empty() => Proof::Key,
            // Of a configuration of the VMM's own, its verifier.
            Self::Directory(_) | Self::Client(_) | Self::Server(_) | Self::Vouched(_) => Proof::Name,
        }
    }

    /// The same over a unix socket, which stays as it is.
    pub(crate) fn proof_over_unix(&self) -> Proof {
        if matches!(self, Self::Vouched(_)) { Proof::Name } else { Proof::Nothing }
    }

    /// Says that connections at `uri` go as they are, if they do.
    pub(crate) fn warn_of_plain_text(&self, uri: &Uri) {
        if matches!(self, Self::PlainText) {
            tracing::warn!("{uri} is in plain text: whoever is on the way reads and changes the guest");
        }
    }

    /// What a source's next connection is made with; `None`: plain text.
    pub(crate) fn client(&self) -> Result<Option<Arc<ClientConfig>>, TlsError> {
        match self {
            Self::PlainText | Self::Vouched(_) => Ok(None),
            Self::Directory(directory) => client(directory).map(Some),
            Self::Client(config) => Ok(Some(Arc::clone(config))),
            Self::Server(_) => {
                Err(TlsError::Setup("a destination's configuration was given to a source".into()))
            }
        }
    }

    /// What a destination's next connection is taken with; `None`: plain text.
    pub(crate) fn server(&self) -> Result<Option<Arc<ServerConfig>>, TlsError> {
        match self {
            Self::PlainText | Self::Vouched(_) => Ok(None),
            Self::Directory(directory) => server(directory).map(Some),
            Self::Server(config) => Ok(Some(Arc::clone(config))),
            Self::Client(_) => {
                Err(TlsError::Setup("a source's configuration was given to a destination".into()))
            }
        }
    }

    /// The name that a destination at `host` must prove.
    pub(crate) fn server_name(&self, host: &str) -> Result<ServerName<'static>, TlsError> {
        let name = match self {
            Self::Directory(TlsDirectory { server_name: Some(name), .. }) => name.as_str(),
            // Nobody looks at it: the key is what counts.
            Self::Directory(TlsDirectory { pins, .. }) if !pins.is_empty() => "pinned.invalid",
            _ => host,
        };
        ServerName::try_from(name.to_owned()).map_err(|_| TlsError::NoName(name.to_owned()))
    }
}

/// What our own certificate of `role` in `directory` says, if its files can be used.
///
/// # Errors
/// What is wrong with which file.
pub fn own_identity(directory: &Path, role: TlsRole) -> Result<PeerIdentity, TlsError> {
    own_certificate(directory, role).map(|own| own.identity)
}

fn client(directory: &TlsDirectory) -> Result<Arc<ClientConfig>, TlsError> {
    let (own, trust) = directory.load(TlsRole::Client)?;
    let mut config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&TLS13])
        .map_err(TlsError::of)?
        .dangerous()
        .with_custom_certificate_verifier(trust.server_verifier()?)
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(own.key)));
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    // One certificate is served at an address, and whoever listens on the way need not know for whom it is.
    config.enable_sni = false;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}

fn server(directory: &TlsDirectory) -> Result<Arc<ServerConfig>, TlsError> {
    let (own, trust) = directory.load(TlsRole::Server)?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&TLS13])
        .map_err(TlsError::of)?
        .with_client_cert_verifier(trust.client_verifier()?)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(own.key)));
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}
