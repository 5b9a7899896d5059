//! What the connections of a destination are taken with, as it is read anew when its files have changed: of one connection to the
//! next certificates may be replaced, and whoever connects again and again does not have them parsed each time.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use rustls::ServerConfig;

use crate::tls::config::Security;
use crate::tls::error::TlsError;
use crate::tls::layout::{CA_FILE, CRL_FILE, TlsRole};
use crate::tls::stamps::FileStamps;

/// Time after which files that could not be used are read again though they are the same.
const AGAIN: Duration = Duration::from_secs(1);

/// The configuration of a destination's connections.
#[derive(Debug)]
pub(crate) struct ServerConfigs {
    security: Security,
    /// What was read last, and could be used; `None`: plain text.
    latest: Option<Arc<ServerConfig>>,
    /// The files as they were just before they were read last; `None`: they had just been changed, and may be again unnoticed.
    read: Option<FileStamps>,
    /// When what was read last could not be used.
    failed: Option<Instant>,
}

impl ServerConfigs {
    /// # Errors
    /// What is wrong with which file.
    pub(crate) fn new(security: Security) -> Result<Self, TlsError> {
        let read = settled(&security, SystemTime::now());
        let latest = security.server()?;
        Ok(Self { security, latest, read, failed: None })
    }

    /// What the next connection is taken with; `None`: plain text.
    pub(crate) fn latest(&self) -> Option<Arc<ServerConfig>> {
        self.latest.clone()
    }

    /// Reads the files again if, by `now`, they may be others.
    ///
    /// # Errors
    /// They cannot be used. What was read before still is.
    pub(crate) fn refresh(&mut self, now: SystemTime) -> Result<(), TlsError> {
        let Some(files) = files(&self.security) else { return Ok(()) };
        let found = FileStamps::of(files.iter().map(PathBuf::as_path));
        let due = self.failed.is_some_and(|failed| failed.elapsed() >= AGAIN);
        if self.read.as_ref() == Some(&found) && !due {
            return Ok(());
        }
        self.read = found.are_settled(now).then_some(found);
        let read = self.security.server();
        self.failed = read.is_err().then(Instant::now);
        self.latest = read?;
        Ok(())
    }
}

fn settled(security: &Security, now: SystemTime) -> Option<FileStamps> {
    let stamps = FileStamps::of(files(security)?.iter().map(PathBuf::as_path));
    stamps.are_settled(now).then_some(stamps)
}

/// The files that are read, if any are.
fn files(security: &Security) -> Option<[PathBuf; 4]> {
    let Security::Directory(directory) = security else { return None };
    let role = TlsRole::Server;
    let names = [CA_FILE.to_owned(), CRL_FILE.to_owned(), role.certificate_file(), role.key_file()];
    Some(names.map(|name| directory.path.join(name)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

    use super::*;
    use crate::tls::config::TlsDirectory;

    /// Puts a certificate of its own CA there, whole.
    fn write(dir: &Path) {
        let (ca_key, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = params.self_signed(&ca_key).unwrap().pem();
        let issuer = Issuer::new(params, ca_key);
        let certificate =
            CertificateParams::new(["host".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
        let files =
            [(CA_FILE, ca), ("server-cert.pem", certificate.pem()), ("server-key.pem", key.serialize_pem())];
        for (name, text) in files {
            let new = dir.join("new");
            std::fs::write(&new, text).unwrap();
            std::fs::set_permissions(&new, PermissionsExt::from_mode(0o600)).unwrap();
            std::fs::rename(&new, dir.join(name)).unwrap();
        }
    }

    #[test]
    fn files_are_read_again_when_they_have_changed_and_only_then() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path());
        let mut configs = ServerConfigs::new(Security::Directory(TlsDirectory::new(dir.path()))).unwrap();
        let later = || SystemTime::now() + Duration::from_secs(10);
        configs.refresh(later()).unwrap();
        let first = configs.latest().unwrap();
        let is =
            |configs: &ServerConfigs, one: &Arc<ServerConfig>| Arc::ptr_eq(&configs.latest().unwrap(), one);
        for _ in 0..3 {
            configs.refresh(later()).unwrap();
            assert!(is(&configs, &first), "they were read again, and were the same");
        }
        write(dir.path());
        configs.refresh(later()).unwrap();
        let second = configs.latest().unwrap();
        assert!(!Arc::ptr_eq(&first, &second), "they were not read again");
        // A list that was not there; what cannot be used is told, and what was read before still is used.
        let list = dir.path().join(CRL_FILE);
        std::fs::write(&list, "no list").unwrap();
        assert!(configs.refresh(later()).unwrap_err().to_string().contains(CRL_FILE));
        assert!(is(&configs, &second));
        // Once, and again a second later, though nobody has touched them; at once when somebody has.
        configs.refresh(later()).unwrap();
        configs.failed = configs.failed.and_then(|failed| failed.checked_sub(AGAIN));
        configs.refresh(later()).unwrap_err();
        std::fs::remove_file(&list).unwrap();
        configs.refresh(later()).unwrap();
        assert!(!is(&configs, &second), "they can be used again");
    }

    #[test]
    fn what_was_changed_just_now_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path());
        let mut configs = ServerConfigs::new(Security::Directory(TlsDirectory::new(dir.path()))).unwrap();
        let first = configs.latest().unwrap();
        // Another change within the same tick would not show. A clock that was set back says nothing of when it was.
        for now in [SystemTime::now(), SystemTime::now() - Duration::from_secs(3600)] {
            configs.refresh(now).unwrap();
            assert!(!Arc::ptr_eq(&first, &configs.latest().unwrap()));
        }
    }
}
