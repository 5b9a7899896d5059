//! What the TLS library finds wrong with a peer, in words. What it has no words for here is told as it says it itself.

use rustls::{InvalidMessage, OtherError, PeerIncompatible};

/// As the library says it itself.
pub(crate) fn raw(found: impl std::fmt::Debug) -> String {
    format!("the TLS library says: {found:?}")
}

/// A message that is none of TLS, or none that has to be taken.
pub(crate) fn invalid_message(found: &InvalidMessage) -> String {
    use InvalidMessage as M;
    match found {
        M::HandshakePayloadTooLarge | M::CertificatePayloadTooLarge | M::MessageTooLarge => {
            "it announced a message that is longer than any that is taken here".to_owned()
        }
        M::InvalidContentType | M::UnknownProtocolVersion => "what it sent is no TLS".to_owned(),
        M::MissingKeyExchange => "it named no key exchange".to_owned(),
        M::NoSignatureSchemes => "it named no signatures that it takes".to_owned(),
        other => format!("it sent a message that TLS does not have so ({})", raw(other)),
    }
}

/// A peer that lacks what is needed here.
pub(crate) fn incompatible(found: &PeerIncompatible) -> String {
    use PeerIncompatible as P;
    match found {
        P::SignatureAlgorithmsExtensionRequired => "it did not say which signatures it takes".to_owned(),
        P::NoSignatureSchemesInCommon | P::NoCertificateRequestSignatureSchemesInCommon => {
            "it takes no signatures by the key of our certificate: make one of another kind (ECDSA with P-256 is what all have)".to_owned()
        }
        P::NoCipherSuitesInCommon => "it knows no cipher suite of ours".to_owned(),
        P::NoKxGroupsInCommon | P::NamedGroupsExtensionRequired | P::KeyShareExtensionRequired => {
            "it knows no key exchange of ours".to_owned()
        }
        P::SupportedVersionsExtensionRequired
        | P::ServerDoesNotSupportTls12Or13
        | P::ServerTlsVersionIsDisabledByOurConfig
        | P::Tls12NotOffered
        | P::Tls12NotOfferedOrEnabled => "it speaks an older version alone".to_owned(),
        P::IncorrectCertificateTypeExtension | P::UnsolicitedCertificateTypeExtension => {
            "it wants bare keys instead of certificates".to_owned()
        }
        other => format!("it lacks what is needed here ({})", raw(other)),
    }
}

/// What is wrong with a chain of certificates by the judgement of webpki, which has a name for it alone; it goes on behind "the peer's
/// certificate".
pub(crate) fn chain(found: &OtherError) -> String {
    let name = found.to_string();
    let text = match name.as_str() {
        "EndEntityUsedAsCa" => {
            "is issued by a certificate that is no CA's (basicConstraints without CA:TRUE)"
        }
        "CaUsedAsEndEntity" => "is a CA's own: a host needs one that a CA has issued to it",
        "PathLenConstraintViolated" => "is below more CAs than one of them allows (its path length)",
        "MaximumPathDepthExceeded" => "is below more CAs than are gone through here",
        "MaximumPathBuildCallsExceeded"
        | "MaximumSignatureChecksExceeded"
        | "MaximumNameConstraintComparisonsExceeded" => {
            "comes with a chain of CAs that takes too long to judge"
        }
        "NameConstraintViolation" => "has a name that its CA may not give (name constraints)",
        "IssuerNotCrlSigner" => {
            "cannot be judged: its CA may sign no revocation lists (its key usage has no cRLSign)"
        }
        "UnsupportedCertVersion" => "is not of X.509 version 3",
        "InvalidCertValidity" => "ends before it begins",
        "InvalidSerialNumber" => "has no serial number that X.509 allows",
        "UnsupportedCriticalExtension" => {
            "has a critical extension that is not known here: have it made without"
        }
        "EmptyEkuExtension" => "has an extended key usage that names no purpose",
        "BadDer"
        | "BadDerTime"
        | "ExtensionValueInvalid"
        | "MalformedExtensions"
        | "MalformedDnsIdentifier"
        | "MalformedNameConstraint" => "is not encoded as X.509 asks",
        _ => return format!("is refused (the TLS library says: {name})"),
    };
    text.to_owned()
}
