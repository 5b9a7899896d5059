//! The CAs that a directory trusts, and which of them vouch for anybody at a certain time. TLS libraries look at a CA's name and key
//! alone, and take whatever lies in the file.

use std::path::Path;
use std::time::SystemTime;

use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, TrustAnchor};
use vfio_migration_types::rfc3339;
use x509_parser::prelude::{FromDer, X509Certificate, X509Version};

use crate::tls::certificate::{CertificateFlaw, flaw_as_ca, path_length, subject};
use crate::tls::crl::{NO_LISTS, may_sign_lists};
use crate::tls::error::TlsError;
use crate::tls::files::{ca_path, certificates};
use crate::tls::identity::{PeerIdentity, system_time};
use crate::tls::name_constraints::name_constraints;
use crate::tls::remedy::TlsRemedy;

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
    flaw: Option<CertificateFlaw>,
    /// How many CAs may be below it.
    path_length: Option<u32>,
    /// Which names those may have whom it vouches for, in words.
    name_constraints: Option<String>,
    signs_lists: bool,
    anchor: TrustAnchor<'static>,
}

impl TrustedAuthority {
    /// Why it vouches for nobody at this time, in a sentence; `None`: it does vouch.
    pub fn problem(&self, at: SystemTime) -> Option<String> {
        let name = &self.name;
        match &self.flaw {
            Some(CertificateFlaw::NoCa) => {
                return Some(format!(
                    "{name} is no CA: its certificate has no basicConstraints with CA:TRUE (the key of one host is trusted by --tls-pin)"
                ));
            }
            Some(flaw) => return Some(format!("{name} {flaw}")),
            None => {}
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

    /// What a certificate says; the error goes on behind it.
    fn of(der: &CertificateDer<'_>) -> Result<Self, String> {
        let unreadable = || CertificateFlaw::Unreadable.to_string();
        let (_, parsed) = X509Certificate::from_der(der).map_err(|_| unreadable())?;
        let name = subject(&parsed);
        let mut roots = RootCertStore::empty();
        let added = roots.add(der.clone().into_owned());
        added.map_err(|error| format!("({name}) {}", TlsError::of_own(&error)))?;
        let version = (parsed.version() != X509Version::V3)
            .then(|| CertificateFlaw::Version(parsed.version().0.saturating_add(1)));
        Ok(Self {
            identity: PeerIdentity::of(der).map_err(|_| unreadable())?,
            not_before: system_time(parsed.validity().not_before),
            name,
            subject: parsed.subject().as_raw().to_vec(),
            flaw: version.or_else(|| flaw_as_ca(&parsed)),
            path_length: path_length(&parsed),
            name_constraints: name_constraints(&parsed),
            signs_lists: may_sign_lists(&parsed),
            anchor: roots.roots.pop().ok_or_else(unreadable)?,
        })
    }
}

/// The CAs that a directory trusts.
#[derive(Clone, Debug)]
pub(crate) struct Authorities(Vec<TrustedAuthority>);

impl Authorities {
    /// Those of `directory`, of whom at least one vouches now.
    pub(crate) fn of(directory: &Path) -> Result<Self, TlsError> {
        let path = ca_path(directory);
        let wrong = |what, remedy| TlsError::Content { path: path.clone(), what, remedy };
        let found = certificates(&path)?.into_iter().enumerate().map(|(n, der)| {
            let told =
                |what| format!("holds a certificate, number {} in it, that {what}", n.saturating_add(1));
            TrustedAuthority::of(&der).map_err(|what| wrong(told(what), TlsRemedy::AuthorityFile))
        });
        let all = Self(found.collect::<Result<_, _>>()?);
        match all.none_at(SystemTime::now()) {
            Some(why) => {
                // Where one is to come, time mends it: of this clock, or of the world.
                let to_come = all.0.iter().any(|ca| ca.flaw.is_none() && ca.not_before > SystemTime::now());
                let remedy = if to_come { TlsRemedy::Clock } else { TlsRemedy::NewAuthority };
                Err(wrong(format!("holds no CA that can be used: {why}"), remedy))
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

    /// Whether a CA of this name, in DER, vouches at this time.
    pub(crate) fn has(&self, name: &[u8], at: SystemTime) -> bool {
        self.named(name).any(|ca| ca.problem(at).is_none())
    }

    /// What is wrong at this time with the CAs of these names.
    pub(crate) fn problem_of<'a>(
        &self,
        names: impl IntoIterator<Item = &'a [u8]>,
        at: SystemTime,
    ) -> Option<String> {
        names.into_iter().flat_map(|name| self.named(name)).find_map(|ca| ca.problem(at))
    }

    /// How many CAs those of this name allow below them at this time, and the name in words; `None`: any number.
    pub(crate) fn path_length_of(&self, name: &[u8], at: SystemTime) -> Option<(&str, u32)> {
        let lengths = self.named(name).filter(|ca| ca.problem(at).is_none());
        let lengths: Option<Vec<_>> =
            lengths.map(|ca| ca.path_length.map(|length| (ca.name.as_str(), length))).collect();
        lengths?.into_iter().max_by_key(|(_, length)| *length)
    }

    /// Which names the CAs of these names may give, by their names in words.
    pub(crate) fn name_constraints<'a>(
        &self,
        names: impl IntoIterator<Item = &'a [u8]>,
    ) -> impl Iterator<Item = (String, String)> {
        let named = names.into_iter().flat_map(|name| self.named(name));
        let constraints = named.filter_map(|ca| Some((ca.name.clone(), ca.name_constraints.clone()?)));
        constraints.collect::<Vec<_>>().into_iter()
    }

    fn named<'a>(&'a self, name: &[u8]) -> impl Iterator<Item = &'a TrustedAuthority> {
        self.0.iter().filter(move |ca| ca.subject == name)
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
