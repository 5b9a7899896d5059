//! The CAs that a directory trusts, and which of them vouch for anybody at a certain time. TLS libraries look at a CA's name and key
//! alone, and take whatever lies in the file.

use std::path::Path;
use std::time::SystemTime;

use rustls::RootCertStore;
use rustls::pki_types::TrustAnchor;
use vfio_migration_types::{printable, rfc3339};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::tls::crl::{NO_LISTS, may_sign_lists};
use crate::tls::error::TlsError;
use crate::tls::files::{ca_path, certificates};
use crate::tls::identity::{PeerIdentity, system_time};

/// Most CAs of which an error says what is wrong with them.
const MOST_NAMED: usize = 4;

/// A certificate of [`CA_FILE`](crate::CA_FILE).
#[derive(Clone, Debug)]
pub struct TrustedAuthority {
    /// What it says of itself.
    pub identity: PeerIdentity,
    /// Beginning of its validity.
    pub not_before: SystemTime,
    /// Its name, printable.
    name: String,
    /// The same in DER: what certificates of this CA have as their issuer.
    subject: Vec<u8>,
    /// Why it is no CA at all.
    flaw: Option<&'static str>,
    signs_lists: bool,
    anchor: TrustAnchor<'static>,
}

impl TrustedAuthority {
    /// Why it vouches for nobody at this time, in a sentence; `None`: it does vouch.
    pub fn problem(&self, at: SystemTime) -> Option<String> {
        let name = &self.name;
        if let Some(flaw) = self.flaw {
            return Some(format!("{name} {flaw}"));
        }
        if at < self.not_before {
            let since = rfc3339(self.not_before);
            return Some(format!("the CA {name} is not valid before {since}: is this host's clock right?"));
        }
        (at > self.identity.not_after).then(|| {
            let end = rfc3339(self.identity.not_after);
            format!(
                "the CA {name} ended at {end}: make a new one (`vfio-migrate tls init`), and certificates by it"
            )
        })
    }

    /// Its name, as its certificate has it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Why nobody takes a revocation list of it, in a sentence; `None`: it may sign some.
    pub fn problem_with_lists(&self) -> Option<String> {
        (!self.signs_lists).then(|| format!("the CA {} {NO_LISTS}", self.name))
    }

    /// Whether it is named as the issuer of this certificate, in DER.
    pub(crate) fn is_issuer_of(&self, certificate: &[u8]) -> bool {
        X509Certificate::from_der(certificate)
            .is_ok_and(|(_, parsed)| parsed.issuer().as_raw() == self.subject)
    }

    fn of(der: &[u8]) -> Option<Self> {
        let (_, parsed) = X509Certificate::from_der(der).ok()?;
        let mut roots = RootCertStore::empty();
        roots.add(der.to_vec().into()).ok()?;
        let subject = parsed.subject();
        let name = if subject.as_raw().len() > 2 { subject.to_string() } else { "without a name".into() };
        Some(Self {
            identity: PeerIdentity::of(der).ok()?,
            not_before: system_time(parsed.validity().not_before),
            name: printable(&name).into_owned(),
            subject: subject.as_raw().to_vec(),
            flaw: flaw(&parsed),
            signs_lists: may_sign_lists(&parsed),
            anchor: roots.roots.pop()?,
        })
    }
}

/// What makes a certificate no CA's, behind its name.
fn flaw(certificate: &X509Certificate<'_>) -> Option<&'static str> {
    let is_ca = matches!(certificate.basic_constraints(), Ok(Some(constraints)) if constraints.value.ca);
    if !is_ca {
        return Some(
            "is no CA: its certificate has no basicConstraints with CA:TRUE (the key of one host is trusted by --tls-pin)",
        );
    }
    match certificate.key_usage() {
        Ok(None) => None,
        Ok(Some(usage)) if usage.value.key_cert_sign() => None,
        _ => Some("may sign no certificates: its key usage has no keyCertSign"),
    }
}

/// The CAs that a directory trusts.
#[derive(Clone, Debug)]
pub(crate) struct Authorities(Vec<TrustedAuthority>);

impl Authorities {
    /// Those of `directory`, of whom at least one vouches now.
    pub(crate) fn of(directory: &Path) -> Result<Self, TlsError> {
        let path = ca_path(directory);
        let found: Option<Vec<_>> =
            certificates(&path)?.iter().map(|der| TrustedAuthority::of(der)).collect();
        let Some(found) = found else {
            let what = "holds a certificate that cannot be a CA's".into();
            return Err(TlsError::Content { path, what });
        };
        let all = Self(found);
        match all.none_at(SystemTime::now()) {
            Some(why) => {
                Err(TlsError::Content { path, what: format!("holds no CA that can be used: {why}") })
            }
            None => Ok(all),
        }
    }

    /// Why none of them vouches for anybody at this time; `None`: one does.
    pub(crate) fn none_at(&self, at: SystemTime) -> Option<String> {
        let problems: Option<Vec<String>> = self.0.iter().map(|ca| ca.problem(at)).collect();
        problems.map(|problems| {
            let named: Vec<_> = problems.into_iter().take(MOST_NAMED).collect();
            named.join("; ")
        })
    }

    /// Which of them vouch at this time.
    pub(crate) fn in_force(&self, at: SystemTime) -> Vec<bool> {
        self.0.iter().map(|ca| ca.problem(at).is_none()).collect()
    }

    /// The roots of those who vouch at this time.
    pub(crate) fn roots(&self, at: SystemTime) -> RootCertStore {
        let vouching = self.0.iter().filter(|ca| ca.problem(at).is_none());
        RootCertStore { roots: vouching.map(|ca| ca.anchor.clone()).collect() }
    }

    /// What is wrong at this time with the CAs that one of these certificates, in DER, names as its issuer.
    pub(crate) fn problem_of_issuer<'a>(
        &self,
        certificates: impl IntoIterator<Item = &'a [u8]>,
        at: SystemTime,
    ) -> Option<String> {
        let issuer = |der: &'a [u8]| self.0.iter().filter(move |ca| ca.is_issuer_of(der));
        certificates.into_iter().flat_map(issuer).find_map(|ca| ca.problem(at))
    }

    pub(crate) fn all(&self) -> &[TrustedAuthority] {
        &self.0
    }
}

/// The CAs of `directory`. Those with a [problem](TrustedAuthority::problem) are left out when a peer is judged.
///
/// # Errors
/// What is wrong with its [`CA_FILE`](crate::CA_FILE): none of them can be used, among the rest.
pub fn trusted_authorities(directory: &Path) -> Result<Vec<TrustedAuthority>, TlsError> {
    Authorities::of(directory).map(|found| found.0)
}
