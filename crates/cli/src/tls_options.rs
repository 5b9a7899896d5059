//! How connections over TCP are secured: the options of `vm`, `check`, `migrate`, `rehearse` and `incoming`, and what they come to. Plain text
//! is what one has to ask for.

use std::collections::BTreeSet;
use std::path::PathBuf;

use clap::Args;
use vfio_migration::{Pin, Security, TlsDirectory, Uri, needs_security};

use crate::exit::{CliError, Exit};

/// What the certificates' folder holds, for help texts.
pub(crate) const LAYOUT: &str = "Connections over TCP are secured by TLS 1.3 with --tls-creds DIR, and both sides prove who they are. DIR is laid out as \
QEMU and libvirt have it: ca-cert.pem; server-cert.pem and server-key.pem where a guest arrives; client-cert.pem and client-key.pem where one \
leaves. `vfio-migrate tls` makes them. Without DIR nothing goes over TCP, unless --insecure-plaintext asks for it. Unix sockets are not encrypted: the kernel says who is at their other end.";

/// Class of the refusal of a session over TCP for which nobody has said how it is secured.
pub(crate) const TLS_REQUIRED: &str = "TlsRequired";

/// Options of a process that opens connections, or takes them.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct TlsOptions {
    /// Folder of certificates and keys, with which connections over TCP are secured. Without it none is made or taken.
    #[arg(long, value_name = "DIR")]
    pub(crate) tls_creds: Option<PathBuf>,
    /// With --tls-creds: trust peers by this public key, whatever their certificates say, and no CA. As `tls pin` prints it. May be
    /// given more than once.
    #[arg(long = "tls-pin", value_name = "PIN", requires = "tls_creds")]
    pub(crate) tls_pins: Vec<Pin>,
    /// Let connections over TCP go in plain text: whoever is on the way reads and changes the guest.
    #[arg(long, conflicts_with = "tls_creds")]
    pub(crate) insecure_plaintext: bool,
}

impl TlsOptions {
    /// How these connections are secured, if that was said: unix sockets need nothing.
    pub(crate) fn security(&self) -> Option<Security> {
        match &self.tls_creds {
            Some(path) => Some(Security::Directory(TlsDirectory {
                pins: self.tls_pins.iter().copied().collect(),
                ..TlsDirectory::new(path)
            })),
            None => self.insecure_plaintext.then_some(Security::PlainText),
        }
    }
}

/// Refuses to go to `uri`, or to wait there, where nobody has said how that is secured.
pub(crate) fn check_chosen(uri: &Uri, security: Option<&Security>) -> Result<(), CliError> {
    if security.is_some() || !needs_security(uri) {
        return Ok(());
    }
    let text = format!(
        "{uri} is no unix socket, and nothing goes there in plain text unasked: give --tls-creds DIR (`vfio-migrate tls` makes the \
         folder), or ask for plain text with --insecure-plaintext; a `vm` is started with either"
    );
    Err(CliError::new(Exit::Usage, text).of_class(TLS_REQUIRED))
}

/// What one session asks for beyond what its process was started with.
#[derive(Debug)]
pub(crate) struct AskedSecurity<'a> {
    pub(crate) creds: Option<&'a PathBuf>,
    pub(crate) hostname: Option<&'a String>,
    pub(crate) pins: &'a [Pin],
    pub(crate) insecure_plaintext: bool,
}

impl AskedSecurity<'_> {
    /// How the session's connection is secured, in a process that was started with `process`.
    pub(crate) fn over(&self, process: Option<Security>) -> Result<Option<Security>, CliError> {
        let usage = |text: &str| Err(CliError::new(Exit::Usage, text));
        let named = self.hostname.is_some() || !self.pins.is_empty();
        if self.insecure_plaintext {
            if self.creds.is_some() || named {
                return usage("--insecure-plaintext and TLS exclude each other");
            }
            return Ok(Some(Security::PlainText));
        }
        if let Some(path) = self.creds.filter(|path| !path.is_absolute()) {
            return usage(&format!("tls-creds: {} is no absolute path", path.display()));
        }
        // Keys that were pinned stay so: another folder is no leave to trust whoever its CA vouches for.
        let pins = match &process {
            Some(Security::Directory(directory)) => directory.pins.clone(),
            _ => BTreeSet::new(),
        };
        let own =
            self.creds.map(|path| Security::Directory(TlsDirectory { pins, ..TlsDirectory::new(path) }));
        match own.or(process) {
            Some(Security::Directory(mut directory)) => {
                directory.server_name = self.hostname.cloned();
                if !self.pins.is_empty() {
                    directory.pins = self.pins.iter().copied().collect();
                }
                Ok(Some(Security::Directory(directory)))
            }
            _ if named => usage("a name or a key to expect needs TLS: --tls-creds DIR, here or of the `vm`"),
            other => Ok(other),
        }
    }
}

/// A folder, by a path that means the same to a process elsewhere.
pub(crate) fn absolute(text: &str) -> Result<PathBuf, String> {
    std::path::absolute(text).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked<'a>() -> AskedSecurity<'a> {
        AskedSecurity { creds: None, hostname: None, pins: &[], insecure_plaintext: false }
    }

    #[test]
    fn a_session_takes_what_its_process_has_or_asks_for_its_own() {
        let process = || Some(Security::Directory(TlsDirectory::new("/etc/pki/a")));
        let (other, name) = (PathBuf::from("/etc/pki/b"), "host-b".to_owned());
        let path = |security: Result<Option<Security>, CliError>| match security {
            Ok(Some(Security::Directory(directory))) => {
                (directory.path, directory.server_name, directory.pins.len())
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(path(asked().over(process())), ("/etc/pki/a".into(), None, 0));
        let pins = [Pin::of_key(b"a key")];
        let more = AskedSecurity { hostname: Some(&name), pins: &pins, ..asked() };
        assert_eq!(path(more.over(process())), ("/etc/pki/a".into(), Some(name.clone()), 1));
        let own = AskedSecurity { creds: Some(&other), ..asked() };
        let plain = || Some(Security::PlainText);
        for process in [None, plain()] {
            assert_eq!(path(own.over(process)), (other.clone(), None, 0));
        }
        let pinned = TlsDirectory { pins: [Pin::of_key(b"b")].into(), ..TlsDirectory::new("/etc/pki/a") };
        assert_eq!(path(own.over(Some(Security::Directory(pinned)))), (other.clone(), None, 1));
        assert!(matches!(asked().over(plain()), Ok(Some(Security::PlainText))));
        assert!(matches!(asked().over(None), Ok(None)));
        let aloud = AskedSecurity { insecure_plaintext: true, ..asked() };
        for process in [None, process()] {
            assert!(matches!(aloud.over(process), Ok(Some(Security::PlainText))));
        }
        let relative = PathBuf::from("pki");
        for refused in [
            AskedSecurity { creds: Some(&other), insecure_plaintext: true, ..asked() },
            AskedSecurity { creds: Some(&relative), ..asked() },
            AskedSecurity { hostname: Some(&name), ..asked() },
        ] {
            refused.over(plain()).unwrap_err();
            refused.over(None).unwrap_err();
        }
    }
    #[test]
    fn plain_text_is_what_one_has_to_ask_for() {
        let (tcp, unix): (Uri, Uri) = ("tcp:127.0.0.1:1".parse().unwrap(), "unix:/run/b".parse().unwrap());
        let silent = TlsOptions::default();
        let refused = check_chosen(&tcp, silent.security().as_ref()).unwrap_err();
        assert_eq!((refused.exit, refused.report().error.class.as_str()), (Exit::Usage, TLS_REQUIRED));
        assert!(["--tls-creds DIR", "--insecure-plaintext"].iter().all(|way| refused.text.contains(way)));
        check_chosen(&unix, silent.security().as_ref()).unwrap();
        for said in [
            TlsOptions { tls_creds: Some("/etc/pki/a".into()), ..TlsOptions::default() },
            TlsOptions { insecure_plaintext: true, ..TlsOptions::default() },
        ] {
            check_chosen(&tcp, said.security().as_ref()).unwrap();
        }
    }
}
