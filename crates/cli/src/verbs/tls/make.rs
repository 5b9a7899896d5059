//! Making a private CA, and certificates of hosts.

use std::fs::OpenOptions;
use std::io::Write;
use std::net::Ipv4Addr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
    date_time_ymd,
};
use vfio_migration::{CA_FILE, CRL_FILE, TlsDirectory, TlsRole};
use vfio_migration_types::{quote, rfc3339};
use zeroize::Zeroizing;

use crate::exit::{CliError, Exit};
use crate::verbs::tls::authority::{
    Authority, CA_KEY_FILE, DAY, NewFile, crl_pem, date, make_folder, not_made, note_issued,
};
use crate::verbs::tls::report::TlsMadeReport;

/// Makes a CA in `dir`. Gives a report of it, and what is to be said of it.
pub(super) fn authority(dir: &Path, days: u32) -> Result<(TlsMadeReport, String), CliError> {
    make_folder(dir)?;
    // Both first: a CA whose key was replaced can vouch for nobody.
    let (key_file, certificate_file) =
        (NewFile::of_new_ca(dir, CA_KEY_FILE)?, NewFile::of_new_ca(dir, CA_FILE)?);
    let pair = KeyPair::generate().map_err(not_made)?;
    let mut params = valid_for(CertificateParams::default(), days);
    // Two CAs of one name are told apart by nobody who reads an error.
    let name = format!("vfio-migrate CA {}", &uuid::Uuid::new_v4().simple().to_string()[..8]);
    params.distinguished_name = named(&name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let made = params.self_signed(&pair).map_err(not_made)?;
    let files =
        vec![key_file.write(&Zeroizing::new(pair.serialize_pem()))?, certificate_file.write(&made.pem())?];
    let text = format!(
        "{name} is in {}\n{} vouches for every host: it stays here, and is not copied\n",
        dir.display(),
        dir.join(CA_KEY_FILE).display()
    );
    Ok((TlsMadeReport::new(&name, dir, files), text))
}

/// Makes what the host `name` needs into `dir`, by the CA in `ca`. Gives a report of it, and what is to be said of it.
pub(super) fn host(
    name: &str,
    also: &[String],
    ca: &Path,
    dir: &Path,
    days: u32,
    force: bool,
) -> Result<(TlsMadeReport, String), CliError> {
    let authority = Authority::open(ca)?;
    let names: Vec<String> =
        std::iter::once(name).chain(also.iter().map(String::as_str)).map(str::to_owned).collect();
    if let Some(bad) = names.iter().find(|name| !is_host_name(name)) {
        return Err(CliError::new(
            Exit::Usage,
            format!("{} is no name of a host, and no address", quote(bad)),
        ));
    }
    let list = crl_pem(ca)?;
    make_folder(dir)?;
    let mut files = vec![(NewFile::create(dir, CA_FILE, force)?, Zeroizing::new(authority.pem.clone()))];
    if let Some(list) = list {
        files.push((NewFile::create(dir, CRL_FILE, force)?, Zeroizing::new(list)));
    }
    let ca_end = authority.not_after.duration_since(UNIX_EPOCH).unwrap_or_default();
    let ca_end = date_time_ymd(1970, 1, 1) + ca_end;
    if valid_for(CertificateParams::default(), days).not_after > ca_end {
        let end = rfc3339(authority.not_after);
        tracing::warn!(
            "the certificates end at {end}, with their CA, which has no {days} days left: make a new CA in time (`vfio-migrate tls init`)"
        );
    }
    let mut issued = String::new();
    for (role, purpose) in [
        (TlsRole::Server, ExtendedKeyUsagePurpose::ServerAuth),
        (TlsRole::Client, ExtendedKeyUsagePurpose::ClientAuth),
    ] {
        let pair = KeyPair::generate().map_err(not_made)?;
        let mut params = valid_for(CertificateParams::new(names.clone()).map_err(not_made)?, days);
        params.distinguished_name = named(name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![purpose];
        params.use_authority_key_identifier_extension = true;
        // Nobody takes it longer than its CA.
        params.not_after = params.not_after.min(ca_end);
        let made = params.signed_by(&pair, &authority.issuer).map_err(not_made)?.pem();
        issued.push_str(&made);
        let (key, certificate) = (role.key_file(), role.certificate_file());
        files.push((NewFile::create(dir, &key, force)?, Zeroizing::new(pair.serialize_pem())));
        files.push((NewFile::create(dir, &certificate, force)?, Zeroizing::new(made)));
    }
    refuse_unusable(name, dir, &files)?;
    // First: what a CA does not know of it cannot take back.
    note_issued(ca, name, &issued)?;
    let written: Result<Vec<String>, CliError> =
        files.into_iter().map(|(file, text)| file.write(&text)).collect();
    let text = format!(
        "what {name} needs is in {}: copy it there, readable by its owner alone, for --tls-creds\n",
        dir.display()
    );
    Ok((TlsMadeReport::new(name, dir, written?), text))
}

/// Refuses certificates that no peer would take, of a CA that may not name this host.
fn refuse_unusable(name: &str, dir: &Path, files: &[(NewFile, Zeroizing<String>)]) -> Result<(), CliError> {
    let failed = |error: std::io::Error| CliError::caused("the certificates cannot be tried", &error);
    // Beside what they are to be: as safe from others as that.
    let tried = tempfile::tempdir_in(dir).map_err(failed)?;
    for (file, text) in files {
        let mut to = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(tried.path().join(file.name()))
            .map_err(failed)?;
        to.write_all(text.as_bytes()).map_err(failed)?;
    }
    let examined = TlsDirectory::new(tried.path()).examine();
    let refused = [examined.server, examined.client].into_iter().flatten().find_map(Result::err);
    let Some(error) = refused else { return Ok(()) };
    let (here, there) = (tried.path().display().to_string(), dir.display().to_string());
    let why = error.to_string().replace(&here, &there);
    Err(CliError::failed(format!("no certificates are made for {name}, which no peer would take: {why}")))
}

/// Makes what `hosts` of one machine need to trust each other for a while, each a folder of its name in `dir`. It is to be thrown away
/// with `dir`: the CA can vouch for no other.
pub(crate) fn throw_away(dir: &Path, hosts: &[&str]) -> Result<(), CliError> {
    // Longer than there is a warning that they expire.
    const DAYS: u32 = 60;
    let ca = dir.join("ca");
    authority(&ca, DAYS)?;
    for name in hosts {
        host(name, &[Ipv4Addr::LOCALHOST.to_string()], &ca, &dir.join(name), DAYS, false)?;
    }
    let key = ca.join(CA_KEY_FILE);
    std::fs::remove_file(&key)
        .map_err(|error| CliError::caused(&format!("{} cannot be removed", key.display()), &error))
}

/// Whether a certificate can name it: an address, or labels of letters, digits and hyphens.
fn is_host_name(name: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.parse::<std::net::IpAddr>().is_ok() || (name.len() <= 253 && name.split('.').all(label))
}

fn named(name: &str) -> rcgen::DistinguishedName {
    let mut distinguished = rcgen::DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

/// From the day before, since clocks differ, for `days` days.
fn valid_for(mut params: CertificateParams, days: u32) -> CertificateParams {
    let now = SystemTime::now();
    let at = |(year, month, day)| date_time_ymd(year, month, day);
    params.not_before = at(date(now - DAY));
    // The last day ends with it.
    params.not_after = at(date(now + DAY * (days + 1)));
    params
}

#[cfg(test)]
mod tests {
    use super::is_host_name;

    #[test]
    fn names_are_those_that_a_certificate_can_have() {
        for good in ["a", "host-b", "host-b.example.org", "10.0.0.1", "::1", "fd00::2", "7.example"] {
            assert!(is_host_name(good), "{good}");
        }
        let long = "a".repeat(64);
        for bad in ["", ".", "a..b", "-a", "a-", "a b", "é", "*.example.org", "a_b", "host:1", "a/b", &long]
        {
            assert!(!is_host_name(bad), "{bad}");
        }
    }
}
