//! Making a private CA, and certificates of hosts.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};
use vfio_migration::{AtomicFile, CA_FILE, TlsRole};
use vfio_migration_types::{quote, rfc3339};

use crate::exit::{CliError, Exit};
use crate::words::read_capped;

/// The file of the CA's private key.
const CA_KEY_FILE: &str = "ca-key.pem";
/// Longest file of a CA that is read, in bytes.
const LONGEST: usize = 64 << 10;
const DAY: Duration = Duration::from_secs(24 * 3600);

/// Makes a CA in `dir`, and says what to do with it.
pub(super) fn authority(dir: &Path, days: u32) -> Result<String, CliError> {
    make_folder(dir)?;
    let (certificate, key) = (dir.join(CA_FILE), dir.join(CA_KEY_FILE));
    // Both first: a CA whose key was replaced can vouch for nobody.
    let files = (create(&key, false)?, create(&certificate, false)?);
    let pair = KeyPair::generate().map_err(failed)?;
    let mut params = valid_for(CertificateParams::default(), days);
    // Two CAs of one name are told apart by nobody who reads an error.
    let name = format!("vfio-migrate CA {}", &uuid::Uuid::new_v4().simple().to_string()[..8]);
    params.distinguished_name = named(&name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let made = params.self_signed(&pair).map_err(failed)?;
    write(files.0, &pair.serialize_pem())?;
    write(files.1, &made.pem())?;
    Ok(format!(
        "{name} is in {}\n{} vouches for every host: it stays here, and is not copied\n",
        dir.display(),
        key.display()
    ))
}

/// Makes what the host `name` needs into `dir`, by the CA in `ca`.
pub(super) fn host(
    name: &str,
    also: &[String],
    ca: &Path,
    dir: &Path,
    days: u32,
    force: bool,
) -> Result<String, CliError> {
    let text = |path: &Path| {
        let bytes = read_capped(path, LONGEST)?;
        String::from_utf8(bytes).map_err(|_| CliError::failed(format!("{} is no PEM", path.display())))
    };
    let ca_pem = text(&ca.join(CA_FILE))?;
    let unusable = |error| CliError::caused(&format!("{} has no CA that can be used", ca.display()), &error);
    let key = KeyPair::from_pem(&text(&ca.join(CA_KEY_FILE))?).map_err(unusable)?;
    let issuer = Issuer::from_ca_cert_pem(&ca_pem, key).map_err(unusable)?;
    let names: Vec<String> =
        std::iter::once(name).chain(also.iter().map(String::as_str)).map(str::to_owned).collect();
    if let Some(bad) = names.iter().find(|name| !is_host_name(name)) {
        return Err(CliError::new(
            Exit::Usage,
            format!("{} is no name of a host, and no address", quote(bad)),
        ));
    }
    make_folder(dir)?;
    let mut files = vec![(create(&dir.join(CA_FILE), force)?, ca_pem)];
    for (role, purpose) in [
        (TlsRole::Server, ExtendedKeyUsagePurpose::ServerAuth),
        (TlsRole::Client, ExtendedKeyUsagePurpose::ClientAuth),
    ] {
        let pair = KeyPair::generate().map_err(failed)?;
        let mut params = valid_for(CertificateParams::new(names.clone()).map_err(failed)?, days);
        params.distinguished_name = named(name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![purpose];
        params.use_authority_key_identifier_extension = true;
        let made = params.signed_by(&pair, &issuer).map_err(failed)?;
        files.push((create(&dir.join(role.key_file()), force)?, pair.serialize_pem()));
        files.push((create(&dir.join(role.certificate_file()), force)?, made.pem()));
    }
    for (file, text) in files {
        write(file, &text)?;
    }
    let shown = dir.display();
    Ok(format!(
        "what {name} needs is in {shown}: copy it there, readable by its owner alone, for --tls-creds\n"
    ))
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
    let date = |time: SystemTime| {
        // YYYY-MM-DD and more.
        let text = rfc3339(time);
        let number =
            |range: std::ops::Range<usize>| text.get(range).and_then(|digits| digits.parse::<u16>().ok());
        let (year, month, day) = (number(0..4), number(5..7), number(8..10));
        let small = |number: Option<u16>| number.and_then(|number| u8::try_from(number).ok()).unwrap_or(1);
        date_time_ymd(i32::from(year.unwrap_or(1970)), small(month), small(day))
    };
    params.not_before = date(now - DAY);
    // The last day ends with it.
    params.not_after = date(now + DAY * (days + 1));
    params
}

fn make_folder(dir: &Path) -> Result<(), CliError> {
    use std::os::unix::fs::DirBuilderExt;
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true).mode(0o700);
    builder
        .create(dir)
        .map_err(|error| CliError::caused(&format!("{} cannot be made", dir.display()), &error))
}

fn create(path: &Path, replace: bool) -> Result<AtomicFile, CliError> {
    AtomicFile::create(path, replace).map_err(|error| CliError::caused("no certificates are made", &error))
}

fn write(mut file: AtomicFile, text: &str) -> Result<(), CliError> {
    let unwritten = |error: std::io::Error| CliError::caused("a file cannot be written", &error);
    file.write_all(text.as_bytes()).map_err(unwritten)?;
    file.finish().map_err(|error| CliError::caused("a file cannot be written", &error))
}

#[expect(clippy::needless_pass_by_value, reason = "the shape that map_err wants")]
fn failed(error: rcgen::Error) -> CliError {
    CliError::caused("no certificate can be made", &error)
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
