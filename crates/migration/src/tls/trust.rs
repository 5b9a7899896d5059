//! Which certificates of a peer are taken: those of a trusted CA, or those whose public key is pinned.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore,
    SignatureScheme,
};

use crate::tls::authorities::Authorities;
use crate::tls::chain::Chain;
use crate::tls::crl::Revocations;
use crate::tls::error::TlsError;
use crate::tls::identity::{PeerIdentity, Pin};
use crate::tls::layout::TlsRole;
use crate::tls::library_texts::in_words;
use crate::tls::own_refusal::OwnRefusal;

/// Whom a side trusts.
#[derive(Clone, Debug)]
pub(crate) enum Trust {
    /// Whoever has a certificate of one of these CAs that it has not taken back; a server's must name the host that was connected to.
    Authorities(Arc<Authorities>, Arc<Revocations>),
    /// Whoever has one of these keys, whatever its certificate says.
    Pins(Arc<BTreeSet<Pin>>),
}

impl Trust {
    /// Looks at the certificate of a destination.
    pub(crate) fn server_verifier(&self) -> Result<Arc<dyn ServerCertVerifier>, TlsError> {
        Ok(match self {
            Self::Authorities(authorities, revoked) => {
                Arc::new(AuthorityVerifier::new(authorities, revoked, TlsRole::Server, server_by_roots)?)
            }
            Self::Pins(pins) => Arc::new(PinVerifier::new(pins)),
        })
    }

    /// Looks at the certificate of a source, which has to show one.
    pub(crate) fn client_verifier(&self) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
        Ok(match self {
            Self::Authorities(authorities, revoked) => {
                Arc::new(AuthorityVerifier::new(authorities, revoked, TlsRole::Client, client_by_roots)?)
            }
            Self::Pins(pins) => Arc::new(PinVerifier::new(pins)),
        })
    }
}

fn server_by_roots(roots: RootCertStore) -> Result<Arc<dyn ServerCertVerifier>, TlsError> {
    let verifier =
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::new(default_provider())).build();
    verifier.map(|verifier| verifier as _).map_err(not_built)
}

fn client_by_roots(roots: RootCertStore) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::new(default_provider()))
        // Whom we trust is nothing that a stranger has to know.
        .clear_root_hint_subjects()
        .build()
        .map_err(not_built)
}

fn not_built(error: VerifierBuilderError) -> TlsError {
    TlsError::Setup(match error {
        VerifierBuilderError::NoRootAnchors => "no CA is trusted here".to_owned(),
        other => in_words(other),
    })
}

type ByRoots<V> = fn(RootCertStore) -> Result<Arc<V>, TlsError>;

/// Takes certificates of the CAs that vouch at the time of the handshake: one may end while a destination waits.
#[derive(Debug)]
struct AuthorityVerifier<V: ?Sized> {
    authorities: Arc<Authorities>,
    /// A CA without a list has taken nothing back.
    revoked: Arc<Revocations>,
    /// Whose certificates it takes.
    role: TlsRole,
    by_roots: ByRoots<V>,
    /// The CAs that vouched when this was made, and what judges by them.
    in_force: Vec<bool>,
    made: Arc<V>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl<V: ?Sized> AuthorityVerifier<V> {
    fn new(
        authorities: &Arc<Authorities>,
        revoked: &Arc<Revocations>,
        role: TlsRole,
        by_roots: ByRoots<V>,
    ) -> Result<Self, TlsError> {
        let now = SystemTime::now();
        Ok(Self {
            made: by_roots(authorities.roots(now))?,
            in_force: authorities.in_force(now),
            authorities: Arc::clone(authorities),
            revoked: Arc::clone(revoked),
            role,
            by_roots,
            algorithms: default_provider().signature_verification_algorithms,
        })
    }

    /// Has `verify` judge a peer's certificates by the CAs that vouch `now`.
    fn judge<T>(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        verify: impl FnOnce(&V, &[CertificateDer<'_>]) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let at = UNIX_EPOCH + Duration::from_secs(now.as_secs());
        if let Some(why) = self.authorities.none_at(at) {
            return Err(refused(OwnRefusal::NoAuthority(why)));
        }
        let made = if self.authorities.in_force(at) == self.in_force {
            Arc::clone(&self.made)
        } else {
            (self.by_roots)(self.authorities.roots(at)).map_err(|error| Error::General(error.to_string()))?
        };
        let chain = Chain { leaf, intermediates, authorities: &self.authorities };
        // Of the others it would take some that may not vouch.
        let judged = verify(&made, &chain.sound(at)).map_err(|error| match error {
            Error::InvalidCertificate(found) => match chain.explain(&found, self.role, at) {
                Some(why) => refused(why),
                None => match (&found, chain.problem_of_authority(at)) {
                    // The CA is one of ours, and vouches no more.
                    (CertificateError::UnknownIssuer | CertificateError::BadSignature, Some(why)) => {
                        refused(OwnRefusal::EndedAuthority(why))
                    }
                    _ => Error::InvalidCertificate(found),
                },
            },
            error => error,
        })?;
        if let Some(why) = chain.flaw_beyond(at) {
            return Err(refused(why));
        }
        // Last: whom nobody vouches for hears nothing of what was taken back. A list may expire while a destination waits.
        match self.revoked.refusal(std::iter::once(leaf).chain(intermediates), at) {
            Some((by, found @ CertificateError::Revoked)) => {
                Err(chain.revoked(by).map_or(Error::InvalidCertificate(found), refused))
            }
            Some((_, found)) => Err(Error::InvalidCertificate(found)),
            None => Ok(judged),
        }
    }
}

/// Takes certificates by their public key alone, while they are valid. That the peer has the key, the handshake's signature proves.
#[derive(Debug)]
struct PinVerifier {
    pins: Arc<BTreeSet<Pin>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl PinVerifier {
    fn new(pins: &Arc<BTreeSet<Pin>>) -> Self {
        Self { pins: Arc::clone(pins), algorithms: default_provider().signature_verification_algorithms }
    }

    fn check(&self, leaf: &CertificateDer<'_>, now: UnixTime) -> Result<(), Error> {
        let identity =
            PeerIdentity::of(leaf).map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
        if !self.pins.contains(&identity.pin) {
            return Err(refused(OwnRefusal::NotPinned(identity.pin.to_string())));
        }
        let now = UNIX_EPOCH + Duration::from_secs(now.as_secs());
        if now > identity.not_after {
            return Err(Error::InvalidCertificate(CertificateError::ExpiredContext {
                time: unix(now),
                not_after: unix(identity.not_after),
            }));
        }
        Ok(())
    }
}

fn unix(time: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(time.duration_since(UNIX_EPOCH).unwrap_or_default())
}

fn refused(error: OwnRefusal) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))
}

/// What both traits ask for in the same words.
macro_rules! handshake_signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            // TLS 1.2 is not offered, so nothing of it is ever verified.
            Err(Error::General("TLS 1.2 is not spoken".into()))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            leaf: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            verify_tls13_signature(message, leaf, signature, &self.algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.algorithms.supported_schemes()
        }
    };
}

impl ServerCertVerifier for AuthorityVerifier<dyn ServerCertVerifier> {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.judge(leaf, intermediates, now, |by, intermediates| {
            by.verify_server_cert(leaf, intermediates, name, ocsp, now)
        })
    }

    handshake_signatures!();
}

impl ClientCertVerifier for AuthorityVerifier<dyn ClientCertVerifier> {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.judge(leaf, intermediates, now, |by, intermediates| {
            by.verify_client_cert(leaf, intermediates, now)
        })
    }

    handshake_signatures!();
}

impl ServerCertVerifier for PinVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(leaf, now).map(|()| ServerCertVerified::assertion())
    }

    handshake_signatures!();
}

impl ClientCertVerifier for PinVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(leaf, now).map(|()| ClientCertVerified::assertion())
    }

    handshake_signatures!();
}
