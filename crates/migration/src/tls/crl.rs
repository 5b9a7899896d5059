//! The certificates that a CA has taken back: its revocation lists, in the file that QEMU has for them.
//!
//! They are read and judged here and not by the TLS library, which takes none of X.509 version 1 and none without extensions, as
//! OpenSSL makes them unless it is told otherwise.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::CertificateError;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime};
use vfio_migration_types::{printable, rfc3339};
use x509_parser::prelude::{
    ASN1Time, CertificateRevocationList, FromDer, ParsedExtension, SubjectPublicKeyInfo, X509Certificate,
};

use crate::regular_file::FileError;
use crate::tls::error::TlsError;
use crate::tls::files::{ca_path, certificates, read};
use crate::tls::identity::EXPIRES_SOON;
use crate::tls::layout::{CA_FILE, CRL_FILE};
use crate::tls::remedy::TlsRemedy;
use crate::tls::signature::{Signed, signed};

/// Most lists in one file.
const MOST_LISTS: usize = 64;

/// What a CA says of certificates that it has taken back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RevocationList {
    /// The CA's name.
    pub issuer: String,
    /// The certificates that count no more.
    pub revoked: Vec<RevokedCertificate>,
    /// End of the list's validity: from then on nobody of this CA is taken.
    pub next_update: SystemTime,
    this_update: SystemTime,
    issuer_der: Vec<u8>,
    /// Public key of the CA, in DER: another of the same name has lists of its own.
    key: Vec<u8>,
    /// Serial numbers of [`revoked`](Self::revoked).
    serials: BTreeSet<Vec<u8>>,
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
        self.next_update < SystemTime::now() + EXPIRES_SOON
    }

    /// Whether the list is of the CA of this name, in DER, as its certificate has it.
    pub fn is_of(&self, subject: &[u8]) -> bool {
        self.issuer_der == subject
    }

    fn in_force(&self) -> Result<(), String> {
        if self.next_update < SystemTime::now() {
            return Err(format!(
                "expired at {}: get a new one from the CA (`vfio-migrate tls revoke`)",
                rfc3339(self.next_update)
            ));
        }
        Ok(())
    }

    /// Why the CA of this list does not stand by a certificate of its name, at this time.
    fn refusal(&self, certificate: &CertificateDer<'_>, at: SystemTime) -> Option<CertificateError> {
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        if !self.is_of(parsed.issuer().as_raw()) {
            return None;
        }
        let found = if self.serials.contains(parsed.raw_serial()) {
            CertificateError::Revoked
        } else if self.next_update <= at {
            let unix = |time: SystemTime| {
                UnixTime::since_unix_epoch(time.duration_since(UNIX_EPOCH).unwrap_or_default())
            };
            let next_update = unix(self.next_update);
            CertificateError::ExpiredRevocationListContext { time: unix(at), next_update }
        } else {
            return None;
        };
        let (_, key) = SubjectPublicKeyInfo::from_der(&self.key).ok()?;
        (signed(certificate, &key) != Signed::No).then_some(found)
    }
}

/// The lists of a directory, for whoever judges certificates.
#[derive(Clone, Debug, Default)]
pub(crate) struct Revocations {
    pub(crate) lists: Vec<RevocationList>,
}

impl Revocations {
    /// Why a CA does not stand by one of these certificates at this time, and by which: it has taken it back, or nobody knows whether it
    /// has.
    pub(crate) fn refusal<'a>(
        &self,
        certificates: impl IntoIterator<Item = &'a CertificateDer<'a>>,
        at: SystemTime,
    ) -> Option<(&'a CertificateDer<'a>, CertificateError)> {
        let of = |certificate| self.lists.iter().find_map(move |list| list.refusal(certificate, at));
        certificates.into_iter().find_map(|certificate| Some((certificate, of(certificate)?)))
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
    in_force.map_err(|what| TlsError::Content {
        path: directory.join(CRL_FILE),
        what,
        remedy: TlsRemedy::NewList,
    })?;
    Ok(found)
}

fn signed_lists(directory: &Path) -> Result<Revocations, TlsError> {
    let path = directory.join(CRL_FILE);
    let text = match read(&path) {
        Err(TlsError::Open(error)) if is_missing(&error) && path.symlink_metadata().is_err() => {
            return Ok(Revocations::default());
        }
        file => file?,
    };
    let wrong = |(what, remedy)| TlsError::Content { path: path.clone(), what, remedy };
    let content = |what: String| wrong((what, TlsRemedy::NewList));
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
    Ok(Revocations { lists: lists.map_err(wrong)? })
}

fn is_missing(error: &FileError) -> bool {
    matches!(error, FileError::System { source, .. } if source.kind() == ErrorKind::NotFound)
}

/// What a list says, or what is wrong with it, and what mends that.
fn checked(der: &[u8], authorities: &[CertificateDer<'_>]) -> Result<RevocationList, (String, TlsRemedy)> {
    let list = understood(der, authorities).map_err(|what| (what, TlsRemedy::NewList))?;
    if list.this_update > SystemTime::now() {
        let since = rfc3339(list.this_update);
        return Err((
            format!("is of {since}, which is to come: is this host's clock right?"),
            TlsRemedy::Clock,
        ));
    }
    Ok(list)
}

fn understood(der: &[u8], authorities: &[CertificateDer<'_>]) -> Result<RevocationList, String> {
    let unreadable = || "holds a revocation list that cannot be read".to_owned();
    let (after, list) = CertificateRevocationList::from_der(der).map_err(|_| unreadable())?;
    // It is written as one less; without it, it is 1.
    let version = list.version().map_or(1, |version| u64::from(version.0) + 1);
    if !after.is_empty() {
        return Err(unreadable());
    }
    if version > 2 {
        return Err(format!("holds a revocation list of version {version}, and there are 1 and 2 alone"));
    }
    let issuer = printable(&list.issuer().to_string()).into_owned();
    let named = authorities.iter().filter_map(|der| X509Certificate::from_der(der).ok().map(|(_, ca)| ca));
    let named: Vec<_> = named.filter(|ca| ca.subject().as_raw() == list.issuer().as_raw()).collect();
    if named.is_empty() {
        return Err(format!(
            "is a revocation list of {issuer}, which is no CA of {CA_FILE}: only for those that are in there lists are kept"
        ));
    }
    let by = |wanted| named.iter().find(|ca| signed(der, ca.public_key()) == wanted);
    let Some(ca) = by(Signed::Yes) else {
        return Err(match by(Signed::Unknown) {
            Some(_) => format!(
                "is signed by {issuer} in a way that this build does not take: have the list made with SHA-256 or more \
                 (`openssl ca -gencrl -md sha256`)"
            ),
            None => format!("is not signed by {issuer} of {CA_FILE}: get the list from the CA anew"),
        });
    };
    if !may_sign_lists(ca) {
        return Err(format!("is signed by {issuer}, which {NO_LISTS}"));
    }
    if let Some(kind) = foreign_kind(&list) {
        return Err(format!("holds {kind}: get a list from {issuer} that names all that it has revoked"));
    }
    let next_update = list.next_update().map(time).ok_or_else(|| {
        format!(
            "has no end of validity (nextUpdate), so that nobody would notice where new lists do not arrive any more: have \
             {issuer} make one that has (`openssl ca -gencrl -crldays 30`)"
        )
    })?;
    let revoked: Vec<_> = list
        .iter_revoked_certificates()
        .map(|entry| RevokedCertificate {
            serial: entry.raw_serial().to_vec(),
            revoked_at: time(entry.revocation_date),
        })
        .collect();
    let serials = revoked.iter().map(|entry| entry.serial.clone()).collect();
    let (issuer_der, key) = (list.issuer().as_raw().to_vec(), ca.public_key().raw.to_vec());
    let this_update = time(list.last_update());
    Ok(RevocationList { issuer, revoked, next_update, this_update, issuer_der, key, serials })
}

/// Why nobody takes a list of a CA that [may sign none](may_sign_lists), behind its name.
pub(crate) const NO_LISTS: &str = "may sign no revocation lists: its key usage has no cRLSign";

/// Whether a CA's certificate lets it sign revocation lists (RFC 5280, 6.3.3 f).
pub(crate) fn may_sign_lists(ca: &X509Certificate<'_>) -> bool {
    match ca.key_usage() {
        Ok(usage) => usage.is_none_or(|usage| usage.value.crl_sign()),
        Err(_) => false,
    }
}

/// What a list is that does not name, by serial number, all of its CA's certificates that count no more; `None`: it does.
fn foreign_kind(list: &CertificateRevocationList<'_>) -> Option<String> {
    for extension in list.extensions() {
        let oid = extension.oid.to_id_string();
        match (oid.as_str(), extension.parsed_extension()) {
            // RFC 5280, 5.2.4.
            ("2.5.29.27", _) => return Some("changes to another revocation list (a delta CRL)".into()),
            // RFC 5280, 5.2.5. Of those that leave something out, what they name counts no more all the same.
            (_, ParsedExtension::IssuingDistributionPoint(scope)) => {
                if scope.indirect_crl {
                    return Some("a revocation list for several CAs (an indirect CRL)".into());
                }
                if scope.only_contains_attribute_certs {
                    return Some("a revocation list of attribute certificates".into());
                }
            }
            // The list's number, and its signer's key.
            ("2.5.29.20" | "2.5.29.35", _) => {}
            _ if extension.critical => {
                return Some(format!(
                    "a revocation list with a critical extension that is not known here ({oid})"
                ));
            }
            _ => {}
        }
    }
    // RFC 5280, 5.3.3.
    let of_another = |entry: &x509_parser::revocation_list::RevokedCertificate<'_>| {
        entry.extensions().iter().any(|extension| extension.oid.to_id_string() == "2.5.29.29")
    };
    list.iter_revoked_certificates()
        .any(of_another)
        .then(|| "a revocation list with certificates of another CA (an indirect CRL)".to_owned())
}

fn time(time: ASN1Time) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, KeyUsagePurpose, SigningKey};

    use super::*;

    /// ecdsa-with-SHA256, and the same with SHA-1, as `AlgorithmIdentifier`s.
    const SHA256: &[u8] = &[0x30, 10, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2];
    const SHA1: &[u8] = &[0x30, 9, 6, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 1];
    const SEQUENCE: u8 = 0x30;
    const INTEGER: u8 = 2;

    fn der(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
        let content = parts.concat();
        let length = u16::try_from(content.len()).unwrap().to_be_bytes();
        [&[tag, 0x82], &length[..], &content].concat()
    }

    fn time(year: u8) -> Vec<u8> {
        [&[0x17, 13], format!("{year:02}0101000000Z").as_bytes()].concat()
    }

    fn extension(id: u8, critical: bool, value: &[u8]) -> Vec<u8> {
        let critical: &[u8] = if critical { &[1, 1, 0xff] } else { &[] };
        der(SEQUENCE, &[&[6, 3, 0x55, 0x1d, id], critical, &der(4, &[value])])
    }

    struct Ca {
        key: KeyPair,
        certificate: CertificateDer<'static>,
    }

    impl Ca {
        fn new(usages: &[KeyUsagePurpose]) -> Self {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::new([]).unwrap();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = usages.to_vec();
            let certificate = params.self_signed(&key).unwrap().der().clone();
            Self { key, certificate }
        }

        /// A list of which serial number 7 is; `fields` are between its validity and its signature.
        fn list(&self, version: &[u8], algorithm: &[u8], validity: &[u8], fields: &[Vec<u8>]) -> Vec<u8> {
            let (_, parsed) = X509Certificate::from_der(&self.certificate).unwrap();
            let fields = fields.concat();
            let content = der(SEQUENCE, &[version, algorithm, parsed.subject().as_raw(), validity, &fields]);
            let signature = self.key.sign(&content).unwrap();
            der(SEQUENCE, &[&content, algorithm, &der(3, &[&[0], &signature])])
        }

        fn judged(&self, list: &[u8]) -> Result<RevocationList, String> {
            checked(list, std::slice::from_ref(&self.certificate)).map_err(|(what, _)| what)
        }
    }

    fn entry(extensions: &[u8]) -> Vec<u8> {
        let extensions: &[u8] = if extensions.is_empty() { &[] } else { &der(SEQUENCE, &[extensions]) };
        der(SEQUENCE, &[&der(SEQUENCE, &[&[INTEGER, 1, 7], &time(20), extensions])])
    }

    /// Extensions of a list.
    fn with(extensions: &[Vec<u8>]) -> Vec<Vec<u8>> {
        vec![entry(&[]), der(0xa0, &[&der(SEQUENCE, &[&extensions.concat()])])]
    }

    #[test]
    fn lists_are_taken_as_cas_make_them_and_others_are_refused_in_words() {
        let ca = Ca::new(&[]);
        let (v2, validity) = (&[INTEGER, 1, 1][..], [time(20), time(49)].concat());
        let number = || extension(20, false, &[INTEGER, 1, 5]);
        let scope = |flag: u8| extension(28, true, &[SEQUENCE, 3, 0x80 | flag, 1, 0xff]);
        let of_another = extension(29, true, &[SEQUENCE, 0]);
        for (case, version, algorithm, validity, fields, refused) in [
            ("version 1", &[][..], SHA256, &validity, vec![entry(&[])], None),
            ("version 2", v2, SHA256, &validity, vec![entry(&[])], None),
            ("with a number", v2, SHA256, &validity, with(&[number()]), None),
            ("with something more", v2, SHA256, &validity, with(&[extension(99, false, &[5, 0])]), None),
            ("for hosts alone", v2, SHA256, &validity, with(&[scope(1)]), None),
            (
                "version 3",
                &[INTEGER, 1, 2][..],
                SHA256,
                &validity,
                vec![entry(&[])],
                Some("a revocation list of version 3, and there are 1 and 2"),
            ),
            ("no end", v2, SHA256, &time(20), vec![entry(&[])], Some("has no end of validity (nextUpdate)")),
            (
                "to come",
                v2,
                SHA256,
                &[time(48), time(49)].concat(),
                vec![entry(&[])],
                Some("which is to come"),
            ),
            ("SHA-1", v2, SHA1, &validity, vec![entry(&[])], Some("in a way that this build does not take")),
            ("delta", v2, SHA256, &validity, with(&[extension(27, true, &[2, 1, 1])]), Some("a delta CRL")),
            ("indirect", v2, SHA256, &validity, with(&[scope(4)]), Some("an indirect CRL")),
            ("of attributes", v2, SHA256, &validity, with(&[scope(5)]), Some("of attribute certificates")),
            ("of another", v2, SHA256, &validity, vec![entry(&of_another)], Some("an indirect CRL")),
            (
                "critical",
                v2,
                SHA256,
                &validity,
                with(&[extension(99, true, &[5, 0])]),
                Some("a critical extension that is not known here (2.5.29.99)"),
            ),
        ] {
            let judged = ca.judged(&ca.list(version, algorithm, validity, &fields));
            match (judged, refused) {
                (Ok(list), None) => {
                    assert_eq!(list.revoked.len(), 1, "{case}");
                    assert_eq!(list.revoked.first().unwrap().serial, [7], "{case}");
                }
                (Err(text), Some(says)) if text.contains(says) => {}
                (judged, _) => panic!("{case}: {judged:?}"),
            }
        }
        let mut broken = ca.list(&[], SHA256, &validity, &[entry(&[])]);
        *broken.last_mut().unwrap() ^= 1;
        assert!(ca.judged(&broken).unwrap_err().contains("is not signed by"));
    }

    #[test]
    fn who_may_sign_lists_is_in_the_certificate_of_the_ca() {
        let validity = [time(20), time(49)].concat();
        for (usages, taken) in [
            (&[][..], true),
            (&[KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign], true),
            (&[KeyUsagePurpose::KeyCertSign], false),
        ] {
            let ca = Ca::new(usages);
            let judged = ca.judged(&ca.list(&[], SHA256, &validity, &[entry(&[])]));
            assert_eq!(judged.is_ok(), taken, "{usages:?}: {judged:?}");
            if let Err(text) = judged {
                assert!(text.contains("its key usage has no cRLSign"), "{text}");
            }
        }
    }

    /// A CA that has a new key under its old name has lists of its own.
    #[test]
    fn a_list_is_of_one_key() {
        let (old, new) = (Ca::new(&[]), Ca::new(&[]));
        let list = old.judged(&old.list(&[], SHA256, &[time(20), time(21)].concat(), &[entry(&[])])).unwrap();
        let issued = |ca: &Ca, serial: u64| {
            let mut params = CertificateParams::new(["host".to_owned()]).unwrap();
            params.serial_number = Some(serial.into());
            let (_, parsed) = X509Certificate::from_der(&ca.certificate).unwrap();
            let issuer = rcgen::Issuer::from_ca_cert_der(&ca.certificate, &ca.key).unwrap();
            assert!(list.is_of(parsed.subject().as_raw()));
            params.signed_by(&KeyPair::generate().unwrap(), &issuer).unwrap().der().clone()
        };
        let at = |year: u64| UNIX_EPOCH + Duration::from_secs((year - 1970) * 31_557_600);
        for (ca, serial, at, refused) in [
            (&old, 7, at(2020), Some("Revoked")),
            (&old, 8, at(2020), None),
            (&old, 8, at(2022), Some("ExpiredRevocationList")),
            (&new, 7, at(2020), None),
            (&new, 8, at(2022), None),
        ] {
            let found = list.refusal(&issued(ca, serial), at).map(|found| format!("{found:?}"));
            match (&found, refused) {
                (None, None) => {}
                (Some(found), Some(says)) if found.starts_with(says) => {}
                _ => panic!("{serial} {at:?}: {found:?}"),
            }
        }
    }
}
