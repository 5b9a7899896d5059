//! What mends a file of keys or certificates that cannot be used.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::regular_file::FileError;
use crate::tls::layout::{CA_FILE, CRL_FILE};

/// What mends what is wrong with a directory of certificates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TlsRemedy {
    /// A new CA, and certificates by it for all its hosts.
    NewAuthority,
    /// A file of the trusted CAs without those that do not count.
    RemoveAuthority,
    /// The file of the trusted CAs, as other hosts have it.
    AuthorityFile,
    /// New certificates of this host, by the CA.
    NewCertificates,
    /// A certificate of this host with the CAs between it and the trusted one, from whoever has them.
    NewChain,
    /// A new revocation list of the CA.
    NewList,
    /// A private key that its owner alone may read.
    OwnerAlone(PathBuf),
    /// A file or folder that not everybody may write to.
    NotByOthers(PathBuf),
    /// A file or folder of root, or of the user that this process runs as.
    Owner(PathBuf),
    /// A file that this process may read.
    Readable(PathBuf),
    /// The folder, which is not there.
    Folder(PathBuf),
    /// A file in the place of what is there.
    Replace(PathBuf),
    /// The right time.
    Clock,
}

impl TlsRemedy {
    /// What mends the content of a file, by its name.
    pub(crate) fn of_content(path: &Path) -> Self {
        match path.file_name().and_then(|name| name.to_str()) {
            Some(CA_FILE) => Self::AuthorityFile,
            Some(CRL_FILE) => Self::NewList,
            _ => Self::NewCertificates,
        }
    }

    /// What mends a file that cannot be opened.
    pub(crate) fn of_file(error: &FileError) -> Self {
        match error {
            FileError::Changeable { path, .. } => Self::NotByOthers(path.clone()),
            FileError::OfAnother { path, .. } => Self::Owner(path.clone()),
            FileError::System { path, source, .. } => match source.kind() {
                ErrorKind::PermissionDenied => Self::Readable(path.clone()),
                ErrorKind::NotFound | ErrorKind::NotADirectory => match path.parent() {
                    Some(folder) if !folder.as_os_str().is_empty() && !folder.is_dir() => {
                        Self::Folder(folder.into())
                    }
                    _ => Self::of_content(path),
                },
                _ => Self::Replace(path.clone()),
            },
            FileError::NotRegular { path, .. } => Self::Replace(path.clone()),
            FileError::Exists(path)
            | FileError::Dangling(path)
            | FileError::NoName(path)
            | FileError::ByDescriptor(path) => Self::Replace(path.clone()),
            // Of files that are written.
            FileError::SizeLimit { .. } => Self::NewCertificates,
            FileError::NoSpace { directory, .. } => Self::Folder(directory.clone()),
        }
    }
}
