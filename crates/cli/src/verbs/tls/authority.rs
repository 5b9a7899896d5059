//! The CA in a folder: its key, and what it has issued.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{Issuer, KeyPair, PublicKeyData};
use vfio_migration::{
    AtomicFile, CA_FILE, CRL_FILE, FileError, Pin, TlsError, open_regular_to_append, private_key_file,
    refuse_changeable_folder, revocation_lists, trusted_authorities,
};
use vfio_migration_types::{error_chain, rfc3339};

use crate::exit::CliError;
use crate::words::{read_capped, read_capped_by_owner};

/// The file of the CA's private key.
pub(super) const CA_KEY_FILE: &str = "ca-key.pem";
/// The folder in which a CA notes the certificates that it has issued, in a file per host.
const ISSUED: &str = "issued";
/// Longest file of a CA that is read, in bytes.
const LONGEST: usize = 64 << 10;
const LONGEST_LIST: usize = 1 << 20;
pub(super) const DAY: Duration = Duration::from_secs(24 * 3600);

/// A CA that can issue.
pub(super) struct Authority {
    pub(super) pem: String,
    pub(super) issuer: Issuer<'static, KeyPair>,
    /// When it ends, and with it all that it has issued.
    pub(super) not_after: SystemTime,
    /// Why nobody takes a revocation list of it.
    pub(super) problem_with_lists: Option<String>,
}

impl Authority {
    /// The CA in `dir`: the first of its file, if it vouches for anybody now, and the key is its own.
    pub(super) fn open(dir: &Path) -> Result<Self, CliError> {
        let refused = |error| CliError::caused("there is no CA that can be used", &error);
        let unusable =
            |error| CliError::caused(&format!("{} has no CA that can be used", dir.display()), &error);
        let (path, key_path) = (dir.join(CA_FILE), dir.join(CA_KEY_FILE));
        let pem = String::from_utf8(read_capped_by_owner(&path, LONGEST)?).map_err(|_| no_pem(&path))?;
        let key = private_key_file(&key_path).map_err(refused)?;
        let key = str::from_utf8(&key).map_err(|_| no_pem(&key_path))?;
        let key = KeyPair::from_pem(key).map_err(unusable)?;
        let trusted = trusted_authorities(dir).map_err(refused)?;
        let ca = trusted.first().ok_or_else(|| no_pem(&path))?;
        if let Some(why) = ca.problem(SystemTime::now()) {
            let path = path.display();
            return Err(CliError::failed(format!("there is no CA that can be used: {path}: {why}")));
        }
        if Pin::of_key(&key.subject_public_key_info()) != ca.identity.pin {
            let (key, certificate) = (key_path, path);
            return Err(refused(TlsError::KeyMismatch { key, certificate }));
        }
        let (not_after, problem_with_lists) = (ca.identity.not_after, ca.problem_with_lists());
        let issuer = Issuer::from_ca_cert_pem(&pem, key).map_err(unusable)?;
        Ok(Self { pem, issuer, not_after, problem_with_lists })
    }
}

fn no_pem(path: &Path) -> CliError {
    CliError::failed(format!("{} is no PEM", path.display()))
}

/// The revocation list of the CA in `dir`, if it has revoked anything.
pub(super) fn crl_pem(dir: &Path) -> Result<Option<String>, CliError> {
    let path = dir.join(CRL_FILE);
    // One that cannot be used is not handed on.
    let lists =
        revocation_lists(dir).map_err(|error| CliError::caused("no certificates are made", &error))?;
    if lists.is_empty() {
        return Ok(None);
    }
    let bytes = read_capped(&path, LONGEST_LIST)?;
    String::from_utf8(bytes).map(Some).map_err(|_| no_pem(&path))
}

/// The file in which the CA of `dir` notes the certificates of `host`.
pub(super) fn issued_file(dir: &Path, host: &str) -> PathBuf {
    dir.join(ISSUED).join(format!("{host}.pem"))
}

/// Notes that the CA of `dir` has issued `certificates` to `host`.
pub(super) fn note_issued(dir: &Path, host: &str, certificates: &str) -> Result<(), CliError> {
    let path = issued_file(dir, host);
    make_folder(&dir.join(ISSUED))?;
    let mut file = open_regular_to_append(&path).map_err(|error| CliError::failed(error_chain(&error)))?;
    file.write_all(certificates.as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(|error| CliError::caused(&format!("{} cannot be written", path.display()), &error))
}

/// Year, month and day of a time, as [`rcgen::date_time_ymd`] takes them.
pub(super) fn date(time: SystemTime) -> (i32, u8, u8) {
    // YYYY-MM-DD and more.
    let text = rfc3339(time);
    let number =
        |range: std::ops::Range<usize>| text.get(range).and_then(|digits| digits.parse::<u16>().ok());
    let (year, month, day) = (number(0..4), number(5..7), number(8..10));
    let small = |number: Option<u16>| number.and_then(|number| u8::try_from(number).ok()).unwrap_or(1);
    (i32::from(year.unwrap_or(1970)), small(month), small(day))
}

pub(super) fn make_folder(dir: &Path) -> Result<(), CliError> {
    use std::os::unix::fs::DirBuilderExt;
    // Whoever may write there puts his own in the place of what is made.
    let unsafe_there = |error| CliError::caused("nothing is made", &error);
    refuse_changeable_folder(dir).map_err(unsafe_there)?;
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true).mode(0o700);
    builder
        .create(dir)
        .map_err(|error| CliError::caused(&format!("{} cannot be made", dir.display()), &error))
}

/// A file of the folder, to be written whole or not at all.
pub(super) struct NewFile {
    name: String,
    file: AtomicFile,
}

impl NewFile {
    pub(super) fn create(dir: &Path, name: &str, replace: bool) -> Result<Self, CliError> {
        let file = AtomicFile::create(&dir.join(name), replace)
            .map_err(|error| CliError::caused("no certificates are made", &error))?;
        Ok(Self { name: name.to_owned(), file })
    }

    /// One of a new CA, which replaces none.
    pub(super) fn of_new_ca(dir: &Path, name: &str) -> Result<Self, CliError> {
        match AtomicFile::create(&dir.join(name), false) {
            Ok(file) => Ok(Self { name: name.to_owned(), file }),
            Err(FileError::Exists(path)) => Err(CliError::failed(format!(
                "no CA is made: {} exists already: choose another folder, or remove it, if no host is to trust that CA any more",
                path.display()
            ))),
            Err(error) => Err(CliError::caused("no CA is made", &error)),
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Writes it, and gives its name.
    pub(super) fn write(mut self, text: &str) -> Result<String, CliError> {
        let unwritten = |error: std::io::Error| CliError::caused("a file cannot be written", &error);
        self.file.write_all(text.as_bytes()).map_err(unwritten)?;
        self.file.finish().map_err(|error| CliError::caused("a file cannot be written", &error))?;
        Ok(self.name)
    }
}

#[expect(clippy::needless_pass_by_value, reason = "the shape that map_err wants")]
pub(super) fn not_made(error: rcgen::Error) -> CliError {
    CliError::caused("no certificate can be made", &error)
}
