//! Taking certificates of a CA back, by its revocation list.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rcgen::{CertificateRevocationListParams, KeyIdMethod, RevokedCertParams, SerialNumber, date_time_ymd};
use vfio_migration::{CA_FILE, CRL_FILE, former_revocation_lists, issued_certificates};
use vfio_migration_types::quote;

use crate::exit::CliError;
use crate::verbs::tls::authority::{Authority, DAY, NewFile, date, issued_file, not_made};
use crate::verbs::tls::report::TlsMadeReport;

/// Adds the certificates of `host` and of files to the revocation list of the CA in `ca`, and writes it anew. Gives a report of it, and
/// what is to be said of it.
pub(super) fn revoke(
    host: Option<&str>,
    files: &[PathBuf],
    ca: &Path,
    days: u32,
) -> Result<(TlsMadeReport, String), CliError> {
    let failed = |error: vfio_migration::TlsError| CliError::caused("nothing is revoked", &error);
    let authority = Authority::open(ca)?;
    if let Some(why) = &authority.problem_with_lists {
        let text = format!(
            "nothing is revoked: {}: {why}; have its certificate made anew with cRLSign, by the same key and name, and copied to every \
             host",
            ca.join(CA_FILE).display()
        );
        return Err(CliError::failed(text));
    }
    let own = issued_certificates(&ca.join(CA_FILE)).map_err(failed)?;
    let own = own.first().ok_or_else(|| CliError::failed("nothing is revoked: there is no CA"))?;
    let name = own.identity.to_string();
    let now = SystemTime::now();
    let mut revoked = BTreeMap::new();
    for list in former_revocation_lists(ca).map_err(failed)? {
        if list.is_of(&own.subject) {
            revoked.extend(list.revoked.into_iter().map(|entry| (entry.serial, entry.revoked_at)));
        }
    }
    let noted = host.map(|host| noted(ca, host)).transpose()?;
    for path in noted.iter().chain(files) {
        for certificate in issued_certificates(path).map_err(failed)? {
            if certificate.issuer != own.subject {
                let text = format!("nothing is revoked: {} is not of {name}", path.display());
                return Err(CliError::failed(text));
            }
            revoked.entry(certificate.serial).or_insert(now);
        }
    }
    let at = |time| {
        let (year, month, day) = date(time);
        date_time_ymd(year, month, day)
    };
    let list = CertificateRevocationListParams {
        this_update: at(now),
        // The last day ends with it.
        next_update: at(now + DAY * (days + 1)),
        // Greater than that of any list before.
        crl_number: SerialNumber::from(now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()),
        issuing_distribution_point: None,
        revoked_certs: revoked
            .iter()
            .map(|(serial, since)| RevokedCertParams {
                serial_number: SerialNumber::from_slice(serial),
                revocation_time: at(*since),
                reason_code: None,
                invalidity_date: None,
            })
            .collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    let pem = list.signed_by(&authority.issuer).and_then(|list| list.pem()).map_err(not_made)?;
    let files = vec![NewFile::create(ca, CRL_FILE, true)?.write(&pem)?];
    let path = ca.join(CRL_FILE);
    let text = format!(
        "{name} has revoked {} certificates: {}\ncopy it beside ca-cert.pem on every host: it counts for the next connection\n",
        revoked.len(),
        path.display()
    );
    let report =
        TlsMadeReport { revoked: Some(revoked.len() as u64), ..TlsMadeReport::new(&name, ca, files) };
    Ok((report, text))
}

/// The file in which the CA has noted the certificates of `host`.
fn noted(ca: &Path, host: &str) -> Result<PathBuf, CliError> {
    // A name is that of a file there, and no way out of the folder.
    let path = issued_file(ca, host);
    if host.contains('/') || !path.exists() {
        return Err(CliError::failed(format!(
            "nothing is revoked: the CA in {} has made no certificates for {}; name the file of one by --cert",
            ca.display(),
            quote(host)
        )));
    }
    Ok(path)
}
