//! Our own certificate, judged as its peers will judge it: what they would refuse is told here, by file, before anybody is asked.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use rustls::pki_types::{ServerName, UnixTime};
use rustls::{CertificateError, Error};

use crate::tls::certificate::{host_names, no_host};
use crate::tls::error::TlsError;
use crate::tls::files::OwnCertificate;
use crate::tls::layout::{CRL_FILE, TlsRole};
use crate::tls::own_refusal::OwnRefusal;
use crate::tls::remedy::TlsRemedy;
use crate::tls::trust::Trust;

/// Refuses a certificate of `role` that none takes who trusts the CAs of the same `directory`.
pub(crate) fn check_own(
    directory: &Path,
    role: TlsRole,
    own: &OwnCertificate,
    trust: &Trust,
) -> Result<(), TlsError> {
    let content = |what: String| TlsError::Content {
        path: directory.join(role.certificate_file()),
        what,
        remedy: TlsRemedy::NewCertificates,
    };
    let Some((leaf, intermediates)) = own.key.cert.split_first() else {
        return Err(content("holds no certificate in PEM".into()));
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now = UnixTime::since_unix_epoch(now);
    let judged = match role {
        TlsRole::Client => trust.client_verifier()?.verify_client_cert(leaf, intermediates, now).map(drop),
        TlsRole::Server => {
            let names = host_names(leaf);
            // Without a name it may have flaws that are worse. A name is looked at last.
            let nobody =
                ServerName::try_from("nobody.invalid").map_err(|_| TlsError::NoName(String::new()))?;
            let name = names.first().unwrap_or(&nobody);
            trust.server_verifier()?.verify_server_cert(leaf, intermediates, name, &[], now).map(drop)
        }
    };
    judged.map_err(|error| match error {
        Error::InvalidCertificate(CertificateError::Revoked) => {
            content(format!("is revoked, by {CRL_FILE}: get a new one from the CA"))
        }
        Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => content(no_host(leaf)),
        error => match (by_way(&error), content(TlsError::of_own(&error))) {
            (true, TlsError::Content { path, what, .. }) => {
                TlsError::Content { path, what, remedy: TlsRemedy::NewChain }
            }
            (_, told) => told,
        },
    })
}

/// Whether a CA between is what is wrong.
fn by_way(error: &Error) -> bool {
    let Error::InvalidCertificate(CertificateError::Other(other)) = error else { return false };
    matches!(other.0.downcast_ref(), Some(OwnRefusal::Between(_)))
}
