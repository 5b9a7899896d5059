//! What certificates of a folder say.

use std::path::Path;

use vfio_migration::{
    CA_FILE, CRL_FILE, PeerIdentity, Pin, TlsDirectory, TlsError, TlsRemedy, TlsRole, TlsWarning,
    own_identity,
};
use vfio_migration_types::printable;

use crate::exit::CliError;
use crate::verbs::tls::report::{
    CertificateInfo, PinInfo, RevocationListInfo, TlsFileInfo, TlsPinReport, TlsPurpose, TlsShowReport,
};

/// What a file is for, for people.
fn purpose_text(purpose: TlsPurpose) -> &'static str {
    match purpose {
        TlsPurpose::Authorities => "the CA that is trusted",
        TlsPurpose::Revocations => "revoked",
        TlsPurpose::Server => "where a guest arrives",
        TlsPurpose::Client => "where one leaves",
    }
}

/// What a folder has, and whether all of it can be used.
pub(super) fn show(dir: &Path, pins: &[Pin]) -> TlsShowReport {
    let examined = TlsDirectory { pins: pins.iter().copied().collect(), ..TlsDirectory::new(dir) }.examine();
    let file = |file: &str, purpose, found: Result<Vec<CertificateInfo>, &TlsError>| {
        let (certificates, error) = match found {
            Ok(found) => (found, None),
            Err(error) => (Vec::new(), Some(error.to_string())),
        };
        // The others are said of the certificates.
        let ours =
            |warning: &&TlsWarning| warning.remedy == TlsRemedy::NewChain && warning.file == dir.join(file);
        let warnings = examined.warnings.iter().filter(ours).map(|warning| warning.text.clone()).collect();
        TlsFileInfo { file: file.to_owned(), purpose, error, warnings, certificates }
    };
    let authorities = examined.authorities.as_ref().map(|found| {
        let found = found.as_ref().map(|found| found.iter().map(CertificateInfo::from).collect());
        file(CA_FILE, TlsPurpose::Authorities, found)
    });
    let own = |role: TlsRole, own: &Option<Result<PeerIdentity, TlsError>>| {
        let found = own.as_ref().map(|own| own.as_ref().map(|own| vec![CertificateInfo::from(own)]));
        file(&role.certificate_file(), role.into(), found.unwrap_or_else(|| Ok(Vec::new())))
    };
    let mut files: Vec<_> = authorities.into_iter().collect();
    files.push(own(TlsRole::Server, &examined.server));
    files.push(own(TlsRole::Client, &examined.client));
    let revocation_lists = match &examined.lists {
        Some(Ok(lists)) => lists.iter().map(RevocationListInfo::from).collect(),
        Some(Err(error)) => {
            files.push(file(CRL_FILE, TlsPurpose::Revocations, Err(error)));
            Vec::new()
        }
        // Without a CA it cannot be judged, and that is told.
        None => Vec::new(),
    };
    let usable = files.iter().all(|file| file.error.is_none());
    TlsShowReport { directory: dir.display().to_string(), usable, files, revocation_lists }
}

/// The report, for people.
pub(super) fn show_text(report: &TlsShowReport) -> String {
    let mut text = String::new();
    for TlsFileInfo { file, purpose, error, warnings, certificates } in &report.files {
        if error.is_none() && certificates.is_empty() {
            text.push_str(&format!("{file}: not there: for guests that go the other way alone\n"));
        }
        if let Some(error) = error {
            text.push_str(&format!("{file}: cannot be used: {}\n", printable(error)));
        }
        for certificate in certificates {
            match &certificate.problem {
                Some(why) => text.push_str(&format!("{file}: left out: {}\n", printable(why))),
                None => {
                    let what = purpose_text(*purpose);
                    text.push_str(&format!("{file}: {what}: {}\n", certificate_text(certificate)));
                }
            }
            text.push_str(&format!("    {}\n", certificate.pin));
        }
        for warning in warnings {
            text.push_str(&format!("{file}: {}\n", printable(warning)));
        }
    }
    for RevocationListInfo { issuer, revoked, next_update, expires_soon } in &report.revocation_lists {
        let what = purpose_text(TlsPurpose::Revocations);
        let number =
            if *revoked == 1 { "1 certificate".to_owned() } else { format!("{revoked} certificates") };
        let soon = if *expires_soon { ": get a new one" } else { "" };
        text.push_str(&format!(
            "{CRL_FILE}: {what} by {}: {number}, until {next_update}{soon}\n",
            printable(issuer)
        ));
    }
    text
}

fn certificate_text(certificate: &CertificateInfo) -> String {
    let CertificateInfo { names, not_after, days_left, expires_soon, .. } = certificate;
    let names: Vec<_> = names.iter().map(|name| printable(name)).collect();
    let names = if names.is_empty() { "nobody".to_owned() } else { names.join(", ") };
    let soon = if *expires_soon { ": make a new one" } else { "" };
    format!("{names}, until {not_after} ({days_left} days{soon})")
}

/// The pins of a folder's keys.
pub(super) fn pins(dir: &Path) -> Result<TlsPinReport, CliError> {
    let (mut keys, mut failed) = (Vec::new(), None);
    for role in [TlsRole::Server, TlsRole::Client] {
        match own_identity(dir, role) {
            Ok(own) => keys.push(PinInfo { purpose: role.into(), pin: own.pin.to_string() }),
            Err(error) => failed = Some(error),
        }
    }
    match failed {
        // A host that only sends, or only receives, has files for that alone.
        Some(error) if keys.is_empty() => Err(CliError::caused("there is no key to pin", &error)),
        _ => Ok(TlsPinReport { keys }),
    }
}

/// The report, for people.
pub(super) fn pins_text(report: &TlsPinReport) -> String {
    report.keys.iter().map(|key| format!("{}  {}\n", key.pin, purpose_text(key.purpose))).collect()
}
