//! What makes a certificate one that nobody takes, whoever has issued it, in words that go on behind its name.

use std::time::SystemTime;

use rustls::client::verify_server_name;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::ParsedCertificate;
use vfio_migration_types::{printable, quote, rfc3339};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate, X509Version};
use x509_parser::public_key::PublicKey;

use crate::tls::identity::{address, system_time};
use crate::tls::layout::TlsRole;

/// Most names of which an error tells.
const MOST_NAMED: usize = 8;
/// Fewest bits of an RSA key whose signatures are taken.
const LEAST_RSA_BITS: usize = 2048;
/// Extensions that the TLS library judges, where they are critical too.
const KNOWN: [&str; 6] = ["2.5.29.15", "2.5.29.17", "2.5.29.19", "2.5.29.30", "2.5.29.31", "2.5.29.37"];
/// Signatures by MD5 and SHA-1, with RSA and ECDSA.
const WEAK: [&str; 3] = ["1.2.840.113549.1.1.4", "1.2.840.113549.1.1.5", "1.2.840.10045.4.1"];

/// What is wrong with a certificate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CertificateFlaw {
    #[error("is no certificate of X.509, or a broken one")]
    Unreadable,
    #[error(
        "is of X.509 version {0}, and has to be of version 3, with extensions (`openssl x509 -req -extfile FILE`)"
    )]
    Version(u32),
    #[error("has a critical extension that is not known here ({0}): have it made without")]
    CriticalExtension(String),
    #[error("expired at {}: make a new one", rfc3339(*.0))]
    Ended(SystemTime),
    #[error("is not valid before {}: is this host's clock right?", rfc3339(*.0))]
    NotYet(SystemTime),
    #[error("is no CA's (basicConstraints without CA:TRUE)")]
    NoCa,
    #[error("may sign no certificates: its key usage has no keyCertSign")]
    NoCertificates,
    #[error("has an RSA key of {0} bits, and one of {LEAST_RSA_BITS} or more is needed")]
    ShortKey(usize),
    #[error("is signed with SHA-1 or MD5: have it made with SHA-256 or more")]
    WeakSignature,
    #[error("is not made for this purpose: its extended key usage has no {0}")]
    Purpose(&'static str),
    #[error("allows {allowed} CAs below it, and there are {found} (its path length)")]
    PathLength { allowed: u32, found: usize },
    #[error("may not sign, as TLS 1.3 has to: its key usage has no digitalSignature")]
    NoSignatures,
    #[error(
        "is revoked, by this side's ca-crl.pem: its CA has to make it a new one, and it new ones for its hosts"
    )]
    Revoked,
    #[error("{0}")]
    Library(String),
}

/// What a certificate says, if the TLS library can read it too; `told` puts into words what it has against it else.
pub(crate) fn readable<'a>(
    der: &'a CertificateDer<'_>,
    told: impl FnOnce(&rustls::Error) -> String,
) -> Result<X509Certificate<'a>, CertificateFlaw> {
    let Ok((_, parsed)) = X509Certificate::from_der(der) else { return Err(CertificateFlaw::Unreadable) };
    if parsed.version() != X509Version::V3 {
        return Err(CertificateFlaw::Version(parsed.version().0.saturating_add(1)));
    }
    match ParsedCertificate::try_from(der) {
        Ok(_) => Ok(parsed),
        Err(error) => {
            let unknown = parsed.extensions().iter().filter(|extension| extension.critical);
            let mut unknown = unknown
                .map(|extension| extension.oid.to_id_string())
                .filter(|oid| !KNOWN.contains(&oid.as_str()));
            Err(match unknown.next() {
                Some(oid) => CertificateFlaw::CriticalExtension(oid),
                None => CertificateFlaw::Library(told(&error)),
            })
        }
    }
}

/// What is wrong with its validity at this time.
pub(crate) fn flaw_of_validity(parsed: &X509Certificate<'_>, at: SystemTime) -> Option<CertificateFlaw> {
    let not_before = system_time(parsed.validity().not_before);
    let not_after = system_time(parsed.validity().not_after);
    if at < not_before {
        return Some(CertificateFlaw::NotYet(not_before));
    }
    (at > not_after).then_some(CertificateFlaw::Ended(not_after))
}

/// What makes it the certificate of no CA, whenever.
pub(crate) fn flaw_as_ca(parsed: &X509Certificate<'_>) -> Option<CertificateFlaw> {
    if !matches!(parsed.basic_constraints(), Ok(Some(constraints)) if constraints.value.ca) {
        return Some(CertificateFlaw::NoCa);
    }
    match parsed.key_usage() {
        Ok(None) => {}
        Ok(Some(usage)) if usage.value.key_cert_sign() => {}
        _ => return Some(CertificateFlaw::NoCertificates),
    }
    match parsed.public_key().parsed() {
        // In whole bytes, which is near enough to tell 1024 from 2048.
        Ok(PublicKey::RSA(key)) if key.key_size() < LEAST_RSA_BITS => {
            Some(CertificateFlaw::ShortKey(key.key_size()))
        }
        _ => None,
    }
}

/// What keeps it from being shown in a handshake, beyond what the TLS library looks at.
pub(crate) fn flaw_as_leaf(parsed: &X509Certificate<'_>) -> Option<CertificateFlaw> {
    match parsed.key_usage() {
        Ok(None) => None,
        Ok(Some(usage)) if usage.value.digital_signature() => None,
        _ => Some(CertificateFlaw::NoSignatures),
    }
}

/// Why it, or those that it issues, are not for this role.
pub(crate) fn flaw_of_purpose(parsed: &X509Certificate<'_>, role: TlsRole) -> Option<CertificateFlaw> {
    let purposes = parsed.extended_key_usage().ok().flatten()?.value;
    let (fits, name) = match role {
        TlsRole::Server => (purposes.server_auth, "serverAuth"),
        TlsRole::Client => (purposes.client_auth, "clientAuth"),
    };
    (!fits).then_some(CertificateFlaw::Purpose(name))
}

/// Whether it is signed in a way that nobody takes any more.
pub(crate) fn flaw_of_signature(parsed: &X509Certificate<'_>) -> Option<CertificateFlaw> {
    let oid = parsed.signature_algorithm.algorithm.to_id_string();
    WEAK.contains(&oid.as_str()).then_some(CertificateFlaw::WeakSignature)
}

/// How many CAs may be between it, which is one, and a host.
pub(crate) fn path_length(parsed: &X509Certificate<'_>) -> Option<u32> {
    parsed.basic_constraints().ok().flatten().and_then(|constraints| constraints.value.path_len_constraint)
}

/// Its subject, printable.
pub(crate) fn subject(parsed: &X509Certificate<'_>) -> String {
    let subject = parsed.subject();
    let text = if subject.as_raw().len() > 2 { subject.to_string() } else { "without a name".into() };
    printable(&text).into_owned()
}

/// Names under which a source could ask for the host of this certificate: for a wildcard, one that it stands for.
pub(crate) fn host_names(der: &CertificateDer<'_>) -> Vec<ServerName<'static>> {
    let (Ok((_, parsed)), Ok(judge)) = (X509Certificate::from_der(der), ParsedCertificate::try_from(der))
    else {
        return Vec::new();
    };
    let named = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => {
            let asked =
                name.strip_prefix("*.").map_or_else(|| (*name).to_owned(), |rest| format!("host.{rest}"));
            ServerName::try_from(asked).ok().filter(|asked| matches!(asked, ServerName::DnsName(_)))
        }
        GeneralName::IPAddress(bytes) => address(bytes).map(ServerName::from),
        _ => None,
    };
    let alternatives = parsed.subject_alternative_name().ok().flatten();
    let names = alternatives.iter().flat_map(|names| &names.value.general_names).filter_map(named);
    names.filter(|name| verify_server_name(&judge, name).is_ok()).collect()
}

/// Why a source could ask for no host of this certificate.
pub(crate) fn no_host(der: &CertificateDer<'_>) -> String {
    let shown = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => format!("DNS {}", quote(name)),
        GeneralName::IPAddress(bytes) => format!("an IP address of {} bytes", bytes.len()),
        GeneralName::URI(uri) => format!("URI {}", quote(uri)),
        GeneralName::RFC822Name(mail) => format!("email {}", quote(mail)),
        GeneralName::DirectoryName(_) => "a directory name".to_owned(),
        _ => "a name of another kind".to_owned(),
    };
    let parsed = X509Certificate::from_der(der).ok().map(|(_, parsed)| parsed);
    let alternatives = parsed.as_ref().and_then(|parsed| parsed.subject_alternative_name().ok().flatten());
    let names: Vec<_> = alternatives
        .iter()
        .flat_map(|names| &names.value.general_names)
        .take(MOST_NAMED)
        .map(shown)
        .collect();
    let has =
        if names.is_empty() { "it has none".to_owned() } else { format!("its own has {}", names.join(", ")) };
    format!(
        "names no host that a source could ask for: it needs a subjectAltName with a name or address that sources connect to, and \
         {has} (a common name is not looked at)"
    )
}
