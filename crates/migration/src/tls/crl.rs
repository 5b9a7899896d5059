//! The certificates that a CA has taken back: its revocation lists, in the file that QEMU has for them.

use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer};
use vfio_migration_types::{printable, rfc3339};
use x509_parser::prelude::{ASN1Time, CertificateRevocationList, FromDer, X509Certificate};

use crate::regular_file::FileError;
use crate::tls::error::TlsError;
use crate::tls::files::{CA_FILE, ca_path, certificates, read};
use crate::tls::identity::EXPIRES_SOON;

/// The file of the CAs' revocation lists, which need not be there.
pub const CRL_FILE: &str = "ca-crl.pem";
/// Most lists in one file.
const MOST_LISTS: usize = 64;

/// What a CA says of certificates that it has taken back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RevocationList {
    /// The CA's name.
    pub issuer: String,
    /// The certificates that count no more.
    pub revoked: Vec<RevokedCertificate>,
    /// End of the list's validity: from then on nobody of this CA is taken; `None`: it has none.
    pub next_update: Option<SystemTime>,
    issuer_der: Vec<u8>,
}

/// One entry of a [`RevocationList`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RevokedCertificate {
    /// The certificate's serial number, as its DER has it.
    pub serial: Vec<u8>,
    /// When it was taken back.
    pub revoked_at: SystemTime,
}

impl RevocationList {
    /// Whether the list's validity ends within [`EXPIRES_SOON`], or has ended.
    pub fn expires_soon(&self) -> bool {
        self.next_update.is_some_and(|until| until < SystemTime::now() + EXPIRES_SOON)
    }

    /// Whether the list is of the CA of this name, in DER, as its certificate has it.
    pub fn is_of(&self, subject: &[u8]) -> bool {
        self.issuer_der == subject
    }

    fn in_force(&self) -> Result<(), String> {
        match self.next_update.filter(|until| *until < SystemTime::now()) {
            Some(until) => Err(format!(
                "expired at {}: get a new one from the CA (`vfio-migrate tls revoke`)",
                rfc3339(until)
            )),
            None => Ok(()),
        }
    }
}

/// The lists of a directory, for whoever judges certificates.
#[derive(Clone, Debug, Default)]
pub(crate) struct Revocations {
    pub(crate) lists: Vec<RevocationList>,
    pub(crate) ders: Vec<CertificateRevocationListDer<'static>>,
}

impl Revocations {
    /// Whether a CA has taken this certificate back.
    pub(crate) fn has(&self, certificate: &CertificateDer<'_>) -> bool {
        let Ok((_, parsed)) = X509Certificate::from_der(certificate) else { return false };
        let own = |list: &&RevocationList| list.is_of(parsed.issuer().as_raw());
        self.lists
            .iter()
            .filter(own)
            .any(|list| list.revoked.iter().any(|entry| entry.serial == parsed.raw_serial()))
    }
}

/// What the CAs that `directory` trusts have taken back; empty where it has no [`CRL_FILE`].
///
/// # Errors
/// What is wrong with the file: it cannot be read, its validity has ended, or it is not signed by one of the CAs.
pub fn revocation_lists(directory: &Path) -> Result<Vec<RevocationList>, TlsError> {
    revocations(directory).map(|found| found.lists)
}

/// The same, of lists whose validity may have ended: what a new list begins with.
///
/// # Errors
/// What is wrong with the file: it cannot be read, or it is not signed by one of the CAs.
pub fn former_revocation_lists(directory: &Path) -> Result<Vec<RevocationList>, TlsError> {
    signed_lists(directory).map(|found| found.lists)
}

/// The lists of `directory`, whose signatures and validity have been looked at.
pub(crate) fn revocations(directory: &Path) -> Result<Revocations, TlsError> {
    let found = signed_lists(directory)?;
    let in_force: Result<(), String> = found.lists.iter().try_for_each(RevocationList::in_force);
    in_force.map_err(|what| TlsError::Content { path: directory.join(CRL_FILE), what })?;
    Ok(found)
}

fn signed_lists(directory: &Path) -> Result<Revocations, TlsError> {
    let path = directory.join(CRL_FILE);
    let text = match read(&path) {
        Err(TlsError::Open(error)) if is_missing(&error) && path.symlink_metadata().is_err() => {
            return Ok(Revocations::default());
        }
        file => file?.bytes,
    };
    let content = |what: String| TlsError::Content { path: path.clone(), what };
    let ders: Result<Vec<_>, _> =
        CertificateRevocationListDer::pem_slice_iter(&text).take(MOST_LISTS + 1).collect();
    let ders = match ders {
        Ok(ders) if ders.len() > MOST_LISTS => {
            return Err(content(format!("holds more than {MOST_LISTS} revocation lists")));
        }
        Ok(ders) if !ders.is_empty() => ders,
        _ => return Err(content("holds no certificate revocation list in PEM".into())),
    };
    let authorities = certificates(&ca_path(directory))?;
    let lists: Result<Vec<_>, _> = ders.iter().map(|der| checked(der, &authorities)).collect();
    Ok(Revocations { lists: lists.map_err(content)?, ders })
}

fn is_missing(error: &FileError) -> bool {
    matches!(error, FileError::System { source, .. } if source.kind() == ErrorKind::NotFound)
}

/// What a list says, or what is wrong with it.
fn checked(der: &[u8], authorities: &[CertificateDer<'_>]) -> Result<RevocationList, String> {
    let (_, list) = CertificateRevocationList::from_der(der)
        .map_err(|_| "holds a revocation list that cannot be read".to_owned())?;
    let issuer = printable(&list.issuer().to_string()).into_owned();
    let named = authorities.iter().filter_map(|der| X509Certificate::from_der(der).ok().map(|(_, ca)| ca));
    let mut named = named.filter(|ca| ca.subject().as_raw() == list.issuer().as_raw()).peekable();
    if named.peek().is_none() {
        return Err(format!("is a revocation list of {issuer}, which is no CA of {CA_FILE}"));
    }
    if !named.any(|ca| list.verify_signature(ca.public_key()).is_ok()) {
        return Err(format!("is not signed by {issuer} of {CA_FILE}: get the list from the CA anew"));
    }
    if time(list.last_update()) > SystemTime::now() {
        let since = rfc3339(time(list.last_update()));
        return Err(format!("is of {since}, which is to come: is this host's clock right?"));
    }
    let next_update = list.next_update().map(time);
    let revoked = list.iter_revoked_certificates().map(|entry| RevokedCertificate {
        serial: entry.raw_serial().to_vec(),
        revoked_at: time(entry.revocation_date),
    });
    let (revoked, issuer_der) = (revoked.collect(), list.issuer().as_raw().to_vec());
    Ok(RevocationList { issuer, revoked, next_update, issuer_der })
}

fn time(time: ASN1Time) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or(0))
}
