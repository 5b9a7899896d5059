//! What mends a folder of certificates, as a command where one does.

use std::path::Path;

use vfio_migration::TlsRemedy;

/// What to do, for the operator of this host.
pub(crate) fn fix(remedy: &TlsRemedy, dir: &Path) -> String {
    let (shown, user) = (dir.display(), rustix::process::geteuid().as_raw());
    match remedy {
        TlsRemedy::NewAuthority => {
            "vfio-migrate tls init NEW-CA, and for every host vfio-migrate tls host NAME --ca NEW-CA".into()
        }
        TlsRemedy::RemoveAuthority => format!("leave it out of {}", dir.join("ca-cert.pem").display()),
        TlsRemedy::AuthorityFile => format!("copy the ca-cert.pem of the CA, or of another host, to {shown}"),
        TlsRemedy::NewCertificates => "vfio-migrate tls host NAME --force".into(),
        TlsRemedy::NewChain => {
            "get the host's certificate anew from its CA, and behind it in its file those of the CAs between"
                .into()
        }
        TlsRemedy::NewList => "vfio-migrate tls revoke --ca ca, and copy its ca-crl.pem here".into(),
        TlsRemedy::OwnerAlone(path) => format!("chmod 600 {}", path.display()),
        TlsRemedy::NotByOthers(path) => format!("chmod o-w {}", path.display()),
        TlsRemedy::Owner(path) => format!("chown {user} {}", path.display()),
        TlsRemedy::Readable(path) => {
            format!("chown {user} {}, in folders that user {user} may enter", path.display())
        }
        TlsRemedy::Folder(folder) => {
            format!(
                "vfio-migrate tls host NAME, where the CA is, and copy what that makes to {}",
                folder.display()
            )
        }
        TlsRemedy::Replace(path) => format!("put a file in the place of {}", path.display()),
        TlsRemedy::Clock => "set this host's clock right".into(),
    }
}
