//! Keys and certificates in a directory, in the layout that QEMU and libvirt use for migration.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

use crate::changeable::refuse_changeable;
use crate::regular_file::open_regular;
use crate::tls::certificate::{CertificateFlaw, flaw_of_validity, readable};
use crate::tls::error::TlsError;
use crate::tls::identity::PeerIdentity;
use crate::tls::layout::{CA_FILE, TlsRole};
use crate::tls::remedy::TlsRemedy;

/// Longest file that is read: a bundle of CAs is far shorter.
const LONGEST: u64 = 1 << 20;
/// Most certificates in one file.
const MOST_CERTIFICATES: usize = 64;
/// The same of one that lists what a CA has issued.
const MOST_ISSUED: usize = 1024;

/// A certificate with its private key.
pub(crate) struct OwnCertificate {
    pub(crate) key: CertifiedKey,
    pub(crate) identity: PeerIdentity,
}

/// The certificate and key of `role` in `directory`.
pub(crate) fn own_certificate(directory: &Path, role: TlsRole) -> Result<OwnCertificate, TlsError> {
    let path = directory.join(role.certificate_file());
    let chain = certificates(&path)?;
    let flawed = |flaw: CertificateFlaw| flawed(&path, &flaw);
    let leaf = chain.first().ok_or_else(|| no_certificate(&path))?;
    let parsed = readable(leaf, TlsError::of_own).map_err(flawed)?;
    let (validity, is_ca) = (flaw_of_validity(&parsed, SystemTime::now()), parsed.is_ca());
    let identity = PeerIdentity::of(leaf).map_err(|_| flawed(CertificateFlaw::Unreadable))?;
    let key_path = directory.join(role.key_file());
    let key = private_key(&key_path)?;
    // By reference: what is given away is not wiped.
    let signing =
        any_supported_type(&key).map_err(|_| content(&key_path, "holds no private key of a kind that this build uses (ECDSA with P-256, P-384 or P-521, Ed25519, RSA of 2048 bits or more)"))?;
    let key = CertifiedKey::new(chain, signing);
    match key.keys_match() {
        Ok(()) | Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::Unknown)) => {}
        Err(_) if is_ca => {
            return Err(content(
                &path,
                "has the certificate of a CA first: the host's own comes first, and behind it the CAs between",
            ));
        }
        Err(_) => return Err(TlsError::KeyMismatch { key: key_path, certificate: path }),
    }
    if let Some(flaw) = validity {
        return Err(flawed(flaw));
    }
    Ok(OwnCertificate { key, identity })
}

/// All certificates of a file, at least one.
pub(crate) fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    at_most(MOST_CERTIFICATES, path)
}

fn at_most(most: usize, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let text = read(path)?;
    let mut all = Vec::new();
    for found in CertificateDer::pem_slice_iter(&text).take(most + 1) {
        let number = all.len() + 1;
        let cut = |_| {
            content(
                path,
                &format!(
                    "is no whole PEM: what follows on {} certificates in it is cut off or damaged",
                    number - 1
                ),
            )
        };
        all.push(found.map_err(cut)?);
    }
    match all.len() {
        0 => Err(no_certificate(path)),
        found if found > most => Err(content(path, &format!("holds more than {most} certificates"))),
        _ => Ok(all),
    }
}

/// What a file of a private key holds, if nobody may read or change it who is not meant to.
///
/// # Errors
/// It cannot be read, or others may read or change it.
pub fn private_key_file(path: &Path) -> Result<Zeroizing<Vec<u8>>, TlsError> {
    let file = open(path)?;
    let found = file.metadata().map_err(not_read(path))?;
    // First: a key has a mode that is told.
    if is_loose(found.mode(), found.uid(), found.gid(), &Us::now()) {
        return Err(TlsError::LooseKey { path: path.into(), mode: found.mode() & 0o7777 });
    }
    contents(path, file)
}

fn private_key(path: &Path) -> Result<Zeroizing<PrivateKeyDer<'static>>, TlsError> {
    let key = PrivateKeyDer::from_pem_slice(&private_key_file(path)?).map(Zeroizing::new);
    key.map_err(|_| content(path, "holds no private key in PEM (one with a passphrase cannot be used)"))
}

fn no_certificate(path: &Path) -> TlsError {
    content(path, "holds no certificate in PEM")
}

/// What is wrong with what a file holds, where another file mends it.
fn content(path: &Path, what: &str) -> TlsError {
    TlsError::Content { path: path.into(), what: what.to_owned(), remedy: TlsRemedy::of_content(path) }
}

/// The same of a certificate.
fn flawed(path: &Path, flaw: &CertificateFlaw) -> TlsError {
    let remedy = match flaw {
        CertificateFlaw::NotYet(_) => TlsRemedy::Clock,
        _ => TlsRemedy::of_content(path),
    };
    TlsError::Content { path: path.into(), what: flaw.to_string(), remedy }
}

/// Reads a regular file, whole: it may be a secret.
pub(crate) fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, TlsError> {
    contents(path, open(path)?)
}

fn open(path: &Path) -> Result<File, TlsError> {
    open_regular(path).map_err(|source| TlsError::Open(Arc::new(source)))
}

fn not_read(path: &Path) -> impl Fn(std::io::Error) -> TlsError {
    move |source| TlsError::File { path: path.into(), source: Arc::new(source) }
}

/// What a file holds that nobody may change who is not meant to.
fn contents(path: &Path, file: File) -> Result<Zeroizing<Vec<u8>>, TlsError> {
    refuse_changeable(path, &file).map_err(|source| TlsError::Open(Arc::new(source)))?;
    // In one piece: what a growing vector leaves behind is not wiped.
    let length = file.metadata().map_err(not_read(path))?.len();
    let room = usize::try_from(length.min(LONGEST)).unwrap_or(0) + 1;
    let mut bytes = Zeroizing::new(Vec::with_capacity(room));
    file.take(LONGEST + 1).read_to_end(&mut bytes).map_err(not_read(path))?;
    if bytes.len() as u64 > LONGEST {
        return Err(content(path, &format!("is longer than {LONGEST} bytes")));
    }
    Ok(bytes)
}

/// Whether others than those whom its owner meant may read or change a key: anybody but the owner; where another user than we are
/// lends it to a group of ours, or root to that of a service (as libvirt's is for QEMU), anybody beyond that.
fn is_loose(mode: u32, owner: u32, group: u32, us: &Us) -> bool {
    const ROOT: u32 = 0;
    let to_us = owner != us.user && us.groups.contains(&group);
    let lent = to_us || (owner == ROOT && us.user == ROOT && group != ROOT);
    let allowed = if lent { 0o740 } else { 0o700 };
    mode & 0o777 & !allowed != 0
}

/// Who we are to the files of others.
struct Us {
    user: u32,
    groups: Vec<u32>,
}

impl Us {
    fn now() -> Self {
        let mut groups = vec![rustix::process::getegid().as_raw()];
        // Without them fewer files are taken.
        groups.extend(rustix::process::getgroups().unwrap_or_default().iter().map(|group| group.as_raw()));
        Self { user: rustix::process::geteuid().as_raw(), groups }
    }
}

/// A certificate as its CA names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IssuedCertificate {
    /// For whom it is.
    pub identity: PeerIdentity,
    /// Its serial number, as its DER has it.
    pub serial: Vec<u8>,
    /// Name of its CA, in DER.
    pub issuer: Vec<u8>,
    /// Its own name, in DER: of a CA's certificate, what those of it have as their issuer.
    pub subject: Vec<u8>,
}

/// What a file of certificates in PEM has. Nobody has looked at their signatures.
///
/// # Errors
/// What is wrong with the file.
pub fn issued_certificates(path: &Path) -> Result<Vec<IssuedCertificate>, TlsError> {
    let unreadable = || content(path, "holds a certificate that cannot be read");
    let issued = |der: &CertificateDer<'_>| {
        let (_, parsed) = X509Certificate::from_der(der).map_err(|_| unreadable())?;
        Ok(IssuedCertificate {
            identity: PeerIdentity::of(der).map_err(|_| unreadable())?,
            serial: parsed.raw_serial().to_vec(),
            issuer: parsed.issuer().as_raw().to_vec(),
            subject: parsed.subject().as_raw().to_vec(),
        })
    };
    at_most(MOST_ISSUED, path)?.iter().map(issued).collect()
}

/// The path of a file of the layout, for an error or a listing.
pub(crate) fn ca_path(directory: &Path) -> PathBuf {
    directory.join(CA_FILE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_its_owners_or_lent_to_a_group_of_ours_by_another() {
        let (root, we, own, further, foreign) = (0, 1000, 1000, 27, 65534);
        let us = Us { user: we, groups: vec![own, further] };
        for (mode, owner, group, loose) in [
            (0o100600, we, own, false),
            (0o100400, we, own, false),
            (0o100640, we, own, true),
            (0o100604, we, own, true),
            (0o100620, we, own, true),
            (0o100640, root, own, false),
            (0o100640, root, further, false),
            (0o100640, root, foreign, true),
            (0o100640, root, 0, true),
            (0o100640, 65534, foreign, true),
            (0o100600, root, foreign, false),
            (0o100660, root, own, true),
            (0o100644, root, own, true),
            (0o100602, root, own, true),
        ] {
            assert_eq!(is_loose(mode, owner, group, &us), loose, "{mode:o} of {owner}:{group}");
        }
        // As root, what a package has laid out for its service.
        let us = Us { user: root, groups: vec![0] };
        for (mode, owner, group, loose) in [
            (0o100640, root, further, false),
            (0o100440, root, further, false),
            (0o100640, root, 0, true),
            (0o100660, root, further, true),
            (0o100644, root, further, true),
            (0o100640, we, own, true),
            (0o100640, we, 0, false),
        ] {
            assert_eq!(is_loose(mode, owner, group, &us), loose, "root: {mode:o} of {owner}:{group}");
        }
    }
}
