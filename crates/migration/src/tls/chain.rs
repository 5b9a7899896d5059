//! The way from a certificate to a CA that is trusted, by the certificates that come with it: judged before the TLS library is asked,
//! which does not look at all of it, and blames the first certificate for what is wrong with another.

use std::time::SystemTime;

use rustls::CertificateError;
use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::tls::authorities::Authorities;
use crate::tls::certificate::{
    CertificateFlaw, flaw_as_ca, flaw_as_leaf, flaw_of_purpose, flaw_of_signature, flaw_of_validity,
    path_length, readable, subject,
};
use crate::tls::layout::TlsRole;
use crate::tls::name_constraints::name_constraints;
use crate::tls::own_refusal::OwnRefusal;

/// Most CAs between a certificate and one that is trusted: the TLS library goes no farther.
const MOST_BETWEEN: usize = 6;

/// What is wrong with one that is to be a CA between others.
fn flaw_between(der: &CertificateDer<'_>, at: SystemTime) -> Option<CertificateFlaw> {
    match readable(der, |_| "is not encoded as X.509 asks".into()) {
        Ok(parsed) => flaw_as_ca(&parsed).or_else(|| flaw_of_validity(&parsed, at)),
        Err(flaw) => Some(flaw),
    }
}

/// A certificate with those that came with it.
#[derive(Clone, Copy)]
pub(crate) struct Chain<'a> {
    pub(crate) leaf: &'a CertificateDer<'a>,
    pub(crate) intermediates: &'a [CertificateDer<'a>],
    pub(crate) authorities: &'a Authorities,
}

impl<'a> Chain<'a> {
    /// Those that may vouch at this time.
    pub(crate) fn sound(&self, at: SystemTime) -> Vec<CertificateDer<'a>> {
        let sound = self.intermediates.iter().filter(|der| flaw_between(der, at).is_none());
        sound.cloned().collect()
    }

    /// The CAs between, from the one that has issued the certificate on, by their names; where several have one name, such as may
    /// vouch go first.
    pub(crate) fn between(&self, at: SystemTime) -> Vec<X509Certificate<'a>> {
        let parsed =
            |der: &'a CertificateDer<'a>| X509Certificate::from_der(der).ok().map(|(_, parsed)| parsed);
        let mut known: Vec<_> = self
            .intermediates
            .iter()
            .filter_map(|der| parsed(der).map(|parsed| (flaw_between(der, at).is_some(), parsed)))
            // One that has issued itself is on no way.
            .filter(|(_, parsed)| parsed.issuer().as_raw() != parsed.subject().as_raw())
            .collect();
        known.sort_by_key(|(flawed, _)| *flawed);
        let Some(leaf) = parsed(self.leaf) else { return Vec::new() };
        let mut issuer = leaf.tbs_certificate.issuer.as_raw();
        let mut way: Vec<X509Certificate<'a>> = Vec::new();
        while way.len() < MOST_BETWEEN && !self.authorities.has(issuer, at) {
            let next = known.iter().position(|(_, parsed)| parsed.subject().as_raw() == issuer);
            let Some(next) = next else { break };
            let (_, next) = known.remove(next);
            issuer = next.tbs_certificate.issuer.as_raw();
            way.push(next);
        }
        way
    }

    /// What the TLS library does not look at, of a certificate that it takes; the sentence goes on behind the certificate.
    pub(crate) fn flaw_beyond(&self, at: SystemTime) -> Option<OwnRefusal> {
        let (_, leaf) = X509Certificate::from_der(self.leaf).ok()?;
        if let Some(flaw) = flaw_as_leaf(&leaf) {
            return Some(OwnRefusal::Certificate(flaw.to_string()));
        }
        let way = self.between(at);
        let last = way.last().unwrap_or(&leaf);
        let (name, allowed) = self.authorities.path_length_of(last.issuer().as_raw(), at)?;
        let found = way.len();
        let too_many = usize::try_from(allowed).is_ok_and(|allowed| found > allowed);
        too_many.then(|| by_way_of(name, &CertificateFlaw::PathLength { allowed, found }))
    }

    /// What is wrong with a CA on the way, where the TLS library has found `error` with the certificate of `role`; the sentence goes on
    /// behind the certificate.
    pub(crate) fn explain(
        &self,
        error: &CertificateError,
        role: TlsRole,
        at: SystemTime,
    ) -> Option<OwnRefusal> {
        use CertificateError as C;
        let way = self.between(at);
        let first = |flaw: &dyn Fn(&X509Certificate<'a>) -> Option<CertificateFlaw>| {
            way.iter().find_map(|ca| flaw(ca).map(|flaw| by_way_of(&subject(ca), &flaw)))
        };
        match error {
            C::UnknownIssuer | C::BadSignature => {
                let der = |ca: &X509Certificate<'a>| CertificateDer::from(ca.as_raw().to_vec());
                first(&|ca| flaw_between(&der(ca), at))
            }
            C::InvalidPurpose | C::InvalidPurposeContext { .. } => {
                let (_, leaf) = X509Certificate::from_der(self.leaf).ok()?;
                if flaw_of_purpose(&leaf, role).is_some() {
                    return None;
                }
                first(&|ca| flaw_of_purpose(ca, role))
            }
            C::UnsupportedSignatureAlgorithmContext { .. }
            | C::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => {
                let (_, leaf) = X509Certificate::from_der(self.leaf).ok()?;
                if flaw_of_signature(&leaf).is_some() {
                    return None;
                }
                first(&flaw_of_signature)
            }
            C::Other(other) => match other.to_string().as_str() {
                "UnsupportedCriticalExtension" | "UnsupportedCertVersion" => {
                    readable(self.leaf, |_| String::new())
                        .err()
                        .map(|flaw| OwnRefusal::Certificate(flaw.to_string()))
                }
                "PathLenConstraintViolated" => way.iter().enumerate().find_map(|(found, ca)| {
                    let allowed = path_length(ca)?;
                    let too_many = usize::try_from(allowed).is_ok_and(|allowed| found > allowed);
                    let flaw = CertificateFlaw::PathLength { allowed, found };
                    too_many.then(|| by_way_of(&subject(ca), &flaw))
                }),
                "NameConstraintViolation" => {
                    let of_way = way.iter().filter_map(|ca| Some((subject(ca), name_constraints(ca)?)));
                    let of_roots = self.authorities.name_constraints(self.issuers(&way));
                    let all: Vec<_> = of_way
                        .chain(of_roots)
                        .map(|(ca, constraints)| format!("{ca}: {constraints}"))
                        .collect();
                    (!all.is_empty()).then(|| {
                        OwnRefusal::Certificate(format!(
                            "has a name that its CA may not give (name constraints of {})",
                            all.join("; ")
                        ))
                    })
                }
                _ => None,
            },
            _ => None,
        }
    }

    /// What is wrong at this time with a CA that is trusted, and named as an issuer on the way.
    pub(crate) fn problem_of_authority(&self, at: SystemTime) -> Option<String> {
        let way = self.between(at);
        self.authorities.problem_of(self.issuers(&way), at)
    }

    /// A certificate of these that is revoked is told as what it is: the host's own, or a CA's on its way.
    pub(crate) fn revoked(&self, certificate: &CertificateDer<'_>) -> Option<OwnRefusal> {
        let (_, ca) = X509Certificate::from_der(certificate).ok().filter(|_| certificate != self.leaf)?;
        Some(by_way_of(&subject(&ca), &CertificateFlaw::Revoked))
    }

    /// The names of all issuers on the way, in DER.
    fn issuers<'b>(&'b self, way: &'b [X509Certificate<'a>]) -> impl Iterator<Item = &'b [u8]> {
        let leaf =
            X509Certificate::from_der(self.leaf).ok().map(|(_, leaf)| leaf.tbs_certificate.issuer.as_raw());
        leaf.into_iter().chain(way.iter().map(|ca| ca.issuer().as_raw()))
    }
}

fn by_way_of(ca: &str, flaw: &CertificateFlaw) -> OwnRefusal {
    OwnRefusal::Between(format!("{ca}, which {flaw}"))
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
    use rustls::OtherError;

    use super::*;
    use crate::tls::layout::CA_FILE;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Named(&'static str);

    /// A CA's certificate of this name, self-signed or by `issuer`, and what issues by it.
    fn ca(
        name: &str,
        issuer: Option<&Issuer<'_, KeyPair>>,
    ) -> (rcgen::Certificate, Issuer<'static, KeyPair>) {
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let made = match issuer {
            Some(issuer) => params.signed_by(&key, issuer).unwrap(),
            None => params.self_signed(&key).unwrap(),
        };
        (made, Issuer::new(params, key))
    }

    #[test]
    fn a_ca_that_allows_so_many_below_it_is_held_to_that() {
        let dir = tempfile::tempdir().unwrap();
        // It allows one.
        let (root, by_root) = ca("root", None);
        std::fs::write(dir.path().join(CA_FILE), root.pem()).unwrap();
        let authorities = Authorities::of(dir.path()).unwrap();
        let (first, by_first) = ca("first", Some(&by_root));
        let (second, by_second) = ca("second", Some(&by_first));
        let (third, by_third) = ca("third", Some(&by_second));
        let intermediates = [first.der().clone(), second.der().clone(), third.der().clone()];
        let flaw = |by: &Issuer<'_, KeyPair>| {
            let params = CertificateParams::new(["host".to_owned()]).unwrap();
            let leaf = params.signed_by(&KeyPair::generate().unwrap(), by).unwrap();
            let chain = Chain { leaf: leaf.der(), intermediates: &intermediates, authorities: &authorities };
            chain.flaw_beyond(SystemTime::now()).map(|flaw| format!("{flaw:?}"))
        };
        assert_eq!((flaw(&by_root), flaw(&by_first)), (None, None));
        for (by, found) in [(by_second, "there are 2"), (by_third, "there are 3")] {
            let told = flaw(&by).unwrap();
            assert!(told.contains("root") && told.contains("allows 1 CAs") && told.contains(found), "{told}");
        }
    }

    /// What a stranger sends is judged before anybody has looked at a signature.
    #[test]
    fn no_certificate_of_a_stranger_brings_the_judge_down() {
        let dir = tempfile::tempdir().unwrap();
        let (root, by_root) = ca("root", None);
        std::fs::write(dir.path().join(CA_FILE), root.pem()).unwrap();
        let authorities = Authorities::of(dir.path()).unwrap();
        let (between, by_between) = ca("between", Some(&by_root));
        let params = CertificateParams::new(["host".to_owned()]).unwrap();
        let leaf = params.signed_by(&KeyPair::generate().unwrap(), &by_between).unwrap();
        let (leaf, between) = (leaf.der(), between.der());
        let errors = ["PathLenConstraintViolated", "NameConstraintViolation", "UnsupportedCertVersion"];
        let mut errors: Vec<_> =
            errors.map(|name| CertificateError::Other(OtherError(std::sync::Arc::new(Named(name))))).into();
        errors.extend([CertificateError::UnknownIssuer, CertificateError::InvalidPurpose]);
        let now = SystemTime::now();
        let judge = |leaf: &CertificateDer<'_>, between: &CertificateDer<'_>| {
            let intermediates = [between.clone(), between.clone()];
            let chain = Chain { leaf, intermediates: &intermediates, authorities: &authorities };
            for error in &errors {
                let _ = chain.explain(error, TlsRole::Client, now);
            }
            (chain.sound(now).len(), chain.flaw_beyond(now))
        };
        assert!(matches!(judge(leaf, between), (2, None)));
        for (whole, is_leaf) in [(leaf, true), (between, false)] {
            for at in 0..whole.len() {
                for value in [0, 0x01, 0x7f, 0x80, 0xff] {
                    let mut bytes = whole.to_vec();
                    *bytes.get_mut(at).unwrap() ^= value;
                    // Cut there, or changed there.
                    let changed = if value == 0 { bytes.get(..at).unwrap().to_vec() } else { bytes };
                    let changed = CertificateDer::from(changed);
                    if is_leaf {
                        judge(&changed, between)
                    } else {
                        judge(leaf, &changed)
                    };
                }
            }
        }
    }
}
