//! Who a certificate says that its holder is, and the pin of a public key.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256;
use serde::{Deserialize, Serialize};
use x509_parser::prelude::{ASN1Time, FromDer, GeneralName, X509Certificate};

use crate::tls::error::TlsError;

/// Most names that a certificate is asked for: what it has beyond them is nobody's name.
const MOST_NAMES: usize = 64;

/// The SHA-256 of a public key (SubjectPublicKeyInfo in DER): `sha256:` and 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Pin([u8; 32]);

/// Time before the end of a certificate's validity from which it is warned of: 30 days.
pub const EXPIRES_SOON: Duration = Duration::from_secs(30 * 24 * 3600);

/// What a peer has proved to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerIdentity {
    /// DNS names and IP addresses of its certificate; of a certificate without them, its common name.
    pub names: Vec<String>,
    /// Its public key.
    pub pin: Pin,
    /// End of its certificate's validity. In JSON: seconds since 1970.
    #[serde(with = "unix_seconds")]
    pub not_after: SystemTime,
}

impl PeerIdentity {
    /// Reads a certificate in DER, whose signature somebody else has looked at.
    pub(crate) fn of(der: &[u8]) -> Result<Self, TlsError> {
        let unreadable = || TlsError::Refused("the peer's certificate cannot be read".to_owned());
        let (_, parsed) = X509Certificate::from_der(der).map_err(|_| unreadable())?;
        let mut names = Vec::new();
        if let Ok(Some(alternatives)) = parsed.subject_alternative_name() {
            let known = alternatives.value.general_names.iter().filter_map(|name| match name {
                GeneralName::DNSName(name) => Some((*name).to_owned()),
                GeneralName::IPAddress(bytes) => address(bytes).map(|address| address.to_string()),
                _ => None,
            });
            names.extend(known.take(MOST_NAMES));
        }
        if names.is_empty() {
            let common = parsed.subject().iter_common_name().filter_map(|name| name.as_str().ok());
            names.extend(common.take(1).map(str::to_owned));
        }
        Ok(Self {
            names,
            pin: Pin::of_key(parsed.public_key().raw),
            not_after: system_time(parsed.validity().not_after),
        })
    }

    /// Whether its certificate's validity ends within [`EXPIRES_SOON`], or has ended.
    pub fn expires_soon(&self) -> bool {
        self.not_after < SystemTime::now() + EXPIRES_SOON
    }
}

/// A time of a certificate.
pub(crate) fn system_time(time: ASN1Time) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or(0))
}

/// A time as seconds since 1970.
mod unix_seconds {
    use std::time::{Duration, SystemTime};

    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(time: &SystemTime, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<SystemTime, D::Error> {
        let seconds = Duration::from_secs(u64::deserialize(from)?);
        SystemTime::UNIX_EPOCH.checked_add(seconds).ok_or_else(|| serde::de::Error::custom("no such time"))
    }
}

impl fmt::Display for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.names.first() {
            Some(name) => f.write_str(&vfio_migration_types::printable(name)),
            None => write!(f, "{}", self.pin),
        }
    }
}

/// An address as certificates have it.
pub(crate) fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}

impl Pin {
    /// The pin of a public key in DER (SubjectPublicKeyInfo).
    pub fn of_key(spki: &[u8]) -> Self {
        let mut pin = [0; 32];
        if let Some(suite) = TLS13_AES_128_GCM_SHA256.tls13() {
            let digest = suite.common.hash_provider.hash(spki);
            // SHA-256 has 32 bytes.
            pin.copy_from_slice(digest.as_ref());
        }
        Self(pin)
    }
}

impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl TryFrom<String> for Pin {
    type Error = NotAPin;

    fn try_from(text: String) -> Result<Self, NotAPin> {
        text.parse()
    }
}

impl From<Pin> for String {
    fn from(pin: Pin) -> Self {
        pin.to_string()
    }
}

/// A text that is no pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a pin is sha256: and 64 hexadecimal digits, as `vfio-migrate tls pin` prints it")]
pub struct NotAPin;

impl FromStr for Pin {
    type Err = NotAPin;

    fn from_str(text: &str) -> Result<Self, NotAPin> {
        let digits = text.strip_prefix("sha256:").ok_or(NotAPin)?;
        if digits.len() != 64 || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(NotAPin);
        }
        let mut pin = [0; 32];
        for (byte, pair) in pin.iter_mut().zip(digits.as_bytes().chunks_exact(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| NotAPin)?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| NotAPin)?;
        }
        Ok(Self(pin))
    }
}
