//! What the TLS library finds wrong with a peer, in words. What has no sentence here is told by its name in the library, taken apart
//! into words.

use rustls::{AlertDescription, InvalidMessage, OtherError, PeerIncompatible};

/// Longest detail of a name that is told: the name of a message, a number.
const DETAIL: usize = 40;

/// A name of the library's as words: `TooManyKeyUpdateRequests` is "too many key update requests".
pub(crate) fn in_words(found: impl std::fmt::Debug) -> String {
    words_of(&format!("{found:?}"))
}

fn words_of(found: &str) -> String {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let (name, rest) = found.split_at(found.find(|c| !is_name(c)).unwrap_or(found.len()));
    let mut words = split(name);
    // Of one with a single detail that too; bytes and lists are nothing to read.
    let detail =
        rest.strip_prefix('(').and_then(|rest| rest.strip_suffix(')')).map(|rest| rest.trim_matches('"'));
    if let Some(detail) = detail.filter(|detail| detail.len() <= DETAIL && detail.chars().all(is_name)) {
        words.extend(split(detail));
    }
    words.join(" ")
}

/// The words of a name in camel case, as a sentence has them.
fn split(name: &str) -> Vec<String> {
    let letters: Vec<char> = name.chars().collect();
    let mut words: Vec<String> = Vec::new();
    for (at, letter) in letters.iter().enumerate() {
        let before = at.checked_sub(1).and_then(|before| letters.get(before)).copied().unwrap_or('_');
        let next_is_lower = letters.get(at + 1).is_some_and(char::is_ascii_lowercase);
        let begins =
            before == '_' || (letter.is_ascii_uppercase() && (!before.is_ascii_uppercase() || next_is_lower));
        match words.last_mut() {
            _ if *letter == '_' => {}
            Some(word) if !begins => word.push(*letter),
            _ => words.push(letter.to_string()),
        }
    }
    words.into_iter().map(spelled).collect()
}

fn spelled(word: String) -> String {
    match word.as_str() {
        "Tls12" => "TLS 1.2".to_owned(),
        "Tls13" => "TLS 1.3".to_owned(),
        "Ccs" => "change_cipher_spec".to_owned(),
        "Psk" | "Ech" | "Sct" | "Ems" | "Crl" | "Ocsp" | "Quic" | "Eku" | "Cn" | "Der" => {
            word.to_ascii_uppercase()
        }
        _ if word.len() > 1 && word.chars().all(|letter| letter.is_ascii_uppercase()) => word,
        _ => word.to_ascii_lowercase(),
    }
}

/// An alert by its name in RFC 8446, or its number.
pub(crate) fn alert_name(alert: AlertDescription) -> String {
    match alert {
        AlertDescription::Unknown(number) => format!("TLS alert {number}"),
        known => format!("TLS alert {}", split(&format!("{known:?}")).join("_").to_ascii_lowercase()),
    }
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
        M::TrailingData(what) => {
            format!("it sent a message with bytes behind its end ({})", words_of(what))
        }
        M::MissingData(what) => {
            format!("it sent a message that ends too early ({})", words_of(what))
        }
        M::MessageTooShort => "it sent a message that ends too early".to_owned(),
        other => format!("it sent a message that TLS does not have so ({})", in_words(other)),
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
        P::ServerRejectedEncryptedClientHello(_) => "it takes no encrypted greeting".to_owned(),
        other => format!("it lacks what is needed here ({})", in_words(other)),
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
        _ => return format!("is refused ({})", words_of(&name)),
    };
    text.to_owned()
}
