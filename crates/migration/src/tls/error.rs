//! The reasons why a connection is not secure, each with what to do.

use std::path::PathBuf;
use std::sync::Arc;

use rustls::{AlertDescription, CertificateError};
use vfio_migration_types::{quote, rfc3339};

use crate::regular_file::FileError;
use crate::tls::library_texts::{alert_name, chain, in_words, incompatible, invalid_message};
use crate::tls::own_refusal::OwnRefusal;
use crate::tls::remedy::TlsRemedy;

/// The reason why a connection is not made, or not gone on with, for its security's sake.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file of keys or certificates cannot be opened.
    #[error("{}", vfio_migration_types::error_chain(.0.as_ref()))]
    Open(Arc<FileError>),
    /// A file of keys or certificates cannot be read.
    #[error("{} cannot be read: {source}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What its reading gave.
        source: Arc<std::io::Error>,
    },
    /// A file holds something else than what it is named for, or too much of it.
    #[error("{} {what}", .path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, as the sentence goes on.
        what: String,
        /// What mends it.
        remedy: TlsRemedy,
    },
    /// Others than its owner may read or change a private key.
    #[error("{} may be read or changed by others than its owner (mode {mode:04o}): chmod 600 it", .path.display())]
    LooseKey {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A private key that is not its certificate's.
    #[error("{} is not the key of {}", .key.display(), .certificate.display())]
    KeyMismatch {
        /// The key's file.
        key: PathBuf,
        /// The certificate's file.
        certificate: PathBuf,
    },
    /// There is no name for the destination to prove.
    #[error(
        "{}: name the destination as its certificate does (--tls-hostname)",
        if .0.is_empty() { "nothing says who the destination is".to_owned() } else { format!("{} is no name that a certificate could prove", quote(.0)) }
    )]
    NoName(String),
    /// The configuration cannot be used.
    #[error("TLS cannot be set up: {0}")]
    Setup(String),
    /// The peer's certificate is refused here.
    #[error("{0}")]
    Refused(String),
    /// The peer has refused this side.
    #[error("the peer refused this side: {0}")]
    RefusedByPeer(String),
    /// What the peer says is no TLS 1.3, or not ours.
    #[error("the peer does not speak TLS 1.3 as it must: {0}")]
    Protocol(String),
    /// The connection ended without the peer having closed it, as anybody on the way can bring about.
    #[error("no close_notify came")]
    Truncated,
    /// A record is not as it was sent, by accident or because somebody on the way changed it.
    #[error("what was received was damaged on the way: it does not decrypt")]
    Damaged,
    /// The destination takes whoever comes.
    #[error(
        "the peer takes a guest from anybody: it asks for no certificate, as a destination that is set up for TLS does (a `vm` with \
         --tls-creds, or what stands before it)"
    )]
    NotAsked,
    /// The peer speaks the protocol without TLS.
    #[error(
        "the peer speaks in plain text, and this side takes TLS alone: it needs --tls-creds DIR there too"
    )]
    PlainText,
    /// The peer hung up in the handshake.
    #[error("the peer ended the connection instead of a TLS handshake: is it plain text there?")]
    NoHandshake,
    /// The peer hung up after the handshake, and before its first word.
    #[error("the peer ended the connection after the TLS handshake: its log says why")]
    HungUp,
    /// The handshake did not end in time.
    #[error("the peer did not end the TLS handshake within {}: is it plain text there?", rounded(*.0))]
    Late(std::time::Duration),
}

impl TlsError {
    /// What mends a file of this side, if that is what is wrong.
    pub fn remedy(&self) -> Option<TlsRemedy> {
        match self {
            Self::Open(error) => Some(TlsRemedy::of_file(error)),
            Self::File { path, .. } => Some(TlsRemedy::Replace(path.clone())),
            Self::Content { remedy, .. } => Some(remedy.clone()),
            Self::LooseKey { path, .. } => Some(TlsRemedy::OwnerAlone(path.clone())),
            Self::KeyMismatch { .. } => Some(TlsRemedy::NewCertificates),
            Self::NoName(_)
            | Self::Setup(_)
            | Self::Refused(_)
            | Self::RefusedByPeer(_)
            | Self::Protocol(_)
            | Self::Truncated
            | Self::Damaged
            | Self::NotAsked
            | Self::PlainText
            | Self::NoHandshake
            | Self::HungUp
            | Self::Late(_) => None,
        }
    }

    /// The peer does not name our protocol.
    pub(crate) fn other_protocol() -> Self {
        Self::Protocol("it speaks another protocol inside than vfio-migrate/1 (ALPN)".to_owned())
    }

    /// Whether the peer may be one that speaks in plain text, and says nothing before it has heard as much.
    pub(crate) fn hints_at_plain_text(&self) -> bool {
        matches!(self, Self::NoHandshake | Self::PlainText | Self::Late(_))
    }

    /// What is wrong with our own certificate, as peers would find it; the sentence goes on behind its file.
    pub(crate) fn of_own(error: &rustls::Error) -> String {
        use CertificateError as C;
        match error {
            rustls::Error::InvalidCertificate(refused) => match refused {
                C::UnknownIssuer | C::BadSignature => {
                    "is not of a CA of ca-cert.pem beside it: nobody who trusts that takes it".to_owned()
                }
                C::InvalidPurpose | C::InvalidPurposeContext { .. } => {
                    "is not made for this purpose: its extended key usage must have serverAuth in server-cert.pem, clientAuth in \
                     client-cert.pem (are the two files exchanged?)"
                        .to_owned()
                }
                refused => {
                    let text = certificate(refused);
                    let own = text.strip_prefix("the peer's certificate ");
                    own.map_or_else(|| format!("cannot be used: {text}"), str::to_owned)
                }
            },
            other => format!("cannot be used ({})", in_words(other)),
        }
    }

    /// Tells what rustls found.
    pub(crate) fn of(error: rustls::Error) -> Self {
        use rustls::Error as E;
        match error {
            E::InvalidCertificate(refused) => Self::Refused(certificate(&refused)),
            E::NoCertificatesPresented => Self::Refused("the peer showed no certificate".to_owned()),
            E::AlertReceived(alert) => Self::RefusedByPeer(by_alert(alert)),
            E::NoApplicationProtocol => Self::other_protocol(),
            E::InvalidCertRevocationList(why) => Self::Refused(format!(
                "the peer's certificate cannot be judged: the revocation list of its CA cannot be used ({})",
                in_words(why)
            )),
            E::DecryptError => Self::Damaged,
            E::General(text) => Self::Setup(text),
            E::FailedToGetCurrentTime => Self::Setup("the system does not tell the time".to_owned()),
            E::FailedToGetRandomBytes => Self::Setup("the system gives no random bytes".to_owned()),
            E::InvalidMessage(found) => Self::Protocol(invalid_message(&found)),
            E::PeerIncompatible(found) => Self::Protocol(incompatible(&found)),
            E::PeerMisbehaved(found) => {
                Self::Protocol(format!("it breaks a rule of TLS ({})", in_words(found)))
            }
            E::InappropriateMessage { .. } | E::InappropriateHandshakeMessage { .. } => {
                Self::Protocol("it sent a message of TLS where another has to come".to_owned())
            }
            E::PeerSentOversizedRecord => {
                Self::Protocol("it sent a record that is longer than TLS allows".to_owned())
            }
            E::Other(found) => Self::Protocol(format!("the TLS library refuses it ({found})")),
            other => Self::Protocol(in_words(other)),
        }
    }
}

/// What is wrong with the peer's certificate.
fn certificate(error: &CertificateError) -> String {
    use CertificateError as C;
    let time = |at: &rustls::pki_types::UnixTime| {
        rfc3339(std::time::UNIX_EPOCH + std::time::Duration::from_secs(at.as_secs()))
    };
    match error {
        C::Expired => "the peer's certificate has expired: make it a new one".to_owned(),
        C::ExpiredContext { not_after, .. } => {
            format!("the peer's certificate expired at {}: make it a new one", time(not_after))
        }
        C::NotValidYet => "the peer's certificate is not valid yet: are the clocks of both hosts right?".to_owned(),
        C::NotValidYetContext { not_before, .. } => format!(
            "the peer's certificate is not valid before {}: are the clocks of both hosts right?",
            time(not_before)
        ),
        C::UnknownIssuer => "the peer's certificate is not of a CA that is trusted here: both hosts need the same ca-cert.pem".to_owned(),
        C::BadSignature => "the peer's certificate is not of a CA that is trusted here, though of one of that name: both \
                            hosts need the same ca-cert.pem"
            .to_owned(),
        C::NotValidForName => "the peer's certificate is another host's".to_owned(),
        C::NotValidForNameContext { expected, presented } => {
            let named: Vec<String> = presented.iter().take(8).map(|name| quote(bare(name))).collect();
            let expected = quote(&expected.to_str());
            if named.is_empty() {
                return format!(
                    "the peer's certificate names no host: it needs a subjectAltName with {expected} (a common name is not looked at)"
                );
            }
            let named = named.join(", ");
            format!("the peer's certificate is not {expected}'s: it names {named} (--tls-hostname, if that is the right host)")
        }
        C::InvalidPurpose | C::InvalidPurposeContext { .. } => {
            "the peer's certificate is not made for this purpose: its extended key usage must have serverAuth at a destination, clientAuth at a source".to_owned()
        }
        C::Revoked => "the peer's certificate is revoked, by this side's ca-crl.pem: its CA has to make it a new one".to_owned(),
        C::ExpiredRevocationList => "the revocation list of the peer's CA, ca-crl.pem of this side, has expired: get a new one".to_owned(),
        C::ExpiredRevocationListContext { next_update, .. } => format!(
            "the revocation list of the peer's CA, ca-crl.pem of this side, expired at {}: get a new one",
            time(next_update)
        ),
        C::BadEncoding => "the peer's certificate is not encoded as X.509 asks".to_owned(),
        C::UnhandledCriticalExtension => {
            "the peer's certificate has a critical extension that is not known here: make one without".to_owned()
        }
        C::UnknownRevocationStatus => {
            "the peer's certificate cannot be judged: no list of ca-crl.pem of this side says whether it is revoked".to_owned()
        }
        C::UnsupportedSignatureAlgorithmContext { .. }
        | C::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => {
            "the peer's certificate is signed in a way that this build does not take: have it made with ECDSA or RSA, and SHA-256 or more"
                .to_owned()
        }
        C::InvalidOcspResponse => "the peer's certificate comes with an OCSP response that is not right".to_owned(),
        C::ApplicationVerificationFailure => "the peer's certificate is refused by rules of this side".to_owned(),
        C::Other(other) => match other.0.downcast_ref::<OwnRefusal>() {
            Some(own) => own.to_string(),
            None => format!("the peer's certificate {}", chain(other)),
        },
        other => format!("the peer's certificate is refused ({})", in_words(other)),
    }
}

/// What was left of a limit when it began to count, without what had passed by then.
fn rounded(limit: std::time::Duration) -> String {
    let tenths = limit.as_millis().saturating_add(50) / 100;
    if tenths.is_multiple_of(10) {
        format!("{} s", tenths / 10)
    } else {
        format!("{}.{} s", tenths / 10, tenths % 10)
    }
}

/// A name of a certificate without the words that rustls puts around it: `DnsName("a")`, `IpAddress(1.2.3.4)`.
fn bare(presented: &str) -> &str {
    let inner = presented.split_once('(').map_or(presented, |(_, inner)| inner);
    inner.trim_end_matches(')').trim_matches('"')
}

/// What the peer says it has against us, by the one byte in which TLS says it.
fn by_alert(alert: AlertDescription) -> String {
    use AlertDescription as A;
    match alert {
        A::CertificateExpired => {
            "our certificate is not valid by its clock: make a new one, or set the clocks right".to_owned()
        }
        A::UnknownCA => {
            "it does not trust the CA of our certificate: both hosts need the same ca-cert.pem, and a ca-crl.pem that has not expired, \
             if any"
                .to_owned()
        }
        A::CertificateRequired => "it wants a certificate and we have shown none".to_owned(),
        A::CertificateRevoked => "our certificate is revoked: its CA has to make a new one".to_owned(),
        A::BadCertificate | A::CertificateUnknown | A::UnsupportedCertificate => {
            "it does not take our certificate: its log says why".to_owned()
        }
        A::AccessDenied => "our certificate is not among those that may come".to_owned(),
        A::ProtocolVersion => "it does not speak TLS 1.3".to_owned(),
        A::HandshakeFailure | A::InsufficientSecurity => {
            format!("it knows no cipher suite of ours: it may not speak TLS 1.3 ({})", alert_name(alert))
        }
        A::NoApplicationProtocol => "it serves something else than migrations at this address".to_owned(),
        // RFC 8446: a signature that is not right; with rustls also one under our certificate.
        A::DecryptError => "it cannot verify a signature of ours: its CA has the name of ours and another key (both hosts need the same \
                            ca-cert.pem), or what reached it was damaged on the way"
            .to_owned(),
        A::BadRecordMac | A::DecodeError | A::RecordOverflow => {
            format!("what reached it was damaged on the way ({})", alert_name(alert))
        }
        other => alert_name(other),
    }
}

#[cfg(test)]
mod tests {
    use rustls::crypto::KeyExchangeAlgorithm;
    use rustls::{
        CertRevocationListError, EncryptedClientHelloError, Error, InconsistentKeys, InvalidMessage,
        OtherError, PeerIncompatible, PeerMisbehaved,
    };

    use super::*;

    /// What webpki finds is an error of a type that is not ours to name.
    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Named(&'static str);

    #[test]
    fn what_a_peer_can_bring_about_is_told_in_words() {
        let chain =
            |name| Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(Named(name)))));
        let mut told = Vec::new();
        for (found, says) in [
            (chain("EndEntityUsedAsCa"), "is issued by a certificate that is no CA's"),
            (chain("CaUsedAsEndEntity"), "is a CA's own"),
            (chain("SomethingNew"), "is refused (something new)"),
            (chain("TrailingData(Certificate)"), "is refused (trailing data certificate)"),
            (InvalidMessage::HandshakePayloadTooLarge.into(), "longer than any that is taken here"),
            (
                InvalidMessage::TrailingData("ServerHelloPayload").into(),
                "bytes behind its end (server hello payload)",
            ),
            (InvalidMessage::MissingData("u8").into(), "ends too early (u8)"),
            (
                InvalidMessage::UnexpectedMessage("CertificateVerify").into(),
                "(unexpected message certificate verify)",
            ),
            (InvalidMessage::DuplicateExtension(43).into(), "(duplicate extension 43)"),
            (
                InvalidMessage::UnsupportedKeyExchangeAlgorithm(KeyExchangeAlgorithm::ECDHE).into(),
                "(unsupported key exchange algorithm ECDHE)",
            ),
            (InvalidMessage::InvalidCcs.into(), "(invalid change_cipher_spec)"),
            (InvalidMessage::IllegalEmptyList("CipherSuites").into(), "(illegal empty list cipher suites)"),
            (PeerIncompatible::SignatureAlgorithmsExtensionRequired.into(), "which signatures it takes"),
            (PeerIncompatible::Tls13RequiredForQuic.into(), "(TLS 1.3 required for QUIC)"),
            (PeerIncompatible::ServerRejectedEncryptedClientHello(Some(vec![])).into(), "encrypted greeting"),
            (PeerMisbehaved::TooManyKeyUpdateRequests.into(), "(too many key update requests)"),
            (
                PeerMisbehaved::AttemptedDowngradeToTls12WhenTls13IsSupported.into(),
                "(attempted downgrade to TLS 1.2 when TLS 1.3 is supported)",
            ),
            (PeerMisbehaved::MissingPskModesExtension.into(), "(missing PSK modes extension)"),
            (Error::HandshakeNotComplete, "handshake not complete"),
            (Error::BadMaxFragmentSize, "bad max fragment size"),
            (Error::EncryptError, "encrypt error"),
            (InconsistentKeys::KeyMismatch.into(), "inconsistent keys key mismatch"),
            (EncryptedClientHelloError::SniRequired.into(), "sni required"),
            (CertRevocationListError::UnsupportedDeltaCrl.into(), "(unsupported delta CRL)"),
            (
                CertRevocationListError::UnsupportedSignatureAlgorithmContext {
                    signature_algorithm_id: vec![1, 2, 3],
                    supported_algorithms: vec![],
                }
                .into(),
                "(unsupported signature algorithm context)",
            ),
            (
                CertRevocationListError::Other(OtherError(Arc::new(Named("BadDer")))).into(),
                "cannot be used (",
            ),
            (Error::PeerSentOversizedRecord, "longer than TLS allows"),
            (CertificateError::UnhandledCriticalExtension.into(), "critical extension"),
            (Error::AlertReceived(AlertDescription::HandshakeFailure), "(TLS alert handshake_failure)"),
            (Error::AlertReceived(AlertDescription::BadRecordMac), "(TLS alert bad_record_mac)"),
            (Error::AlertReceived(AlertDescription::UnexpectedMessage), "TLS alert unexpected_message"),
            (Error::AlertReceived(AlertDescription::UnknownPSKIdentity), "TLS alert unknown_psk_identity"),
            (Error::AlertReceived(AlertDescription::Unknown(200)), "TLS alert 200"),
        ] {
            let name = format!("{found:?}");
            let text = TlsError::of(found).to_string();
            assert!(text.contains(says), "{name}: {text}");
            told.push((name, text));
        }
        for (name, text) in told {
            // No name of the library's (X.509 begins its own with a small letter), and nothing as it writes its values down.
            let is_raw = |word: &str| {
                let letters: Vec<char> = word.chars().collect();
                letters.first().is_some_and(|first| first.is_uppercase())
                    && letters.windows(2).any(|pair| pair[0].is_lowercase() && pair[1].is_uppercase())
            };
            let raw = text.split(|c: char| !c.is_ascii_alphabetic()).any(is_raw);
            assert!(!raw && !text.contains(['{', '[']), "{name}: {text}");
        }
    }
}
