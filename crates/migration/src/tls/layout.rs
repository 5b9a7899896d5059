//! The files of a directory of certificates, as QEMU and libvirt name them for migration.

/// The file of the certificates of the CAs that are trusted.
pub const CA_FILE: &str = "ca-cert.pem";
/// The file of the CAs' revocation lists, which need not be there.
pub const CRL_FILE: &str = "ca-crl.pem";

/// The end of a connection that a certificate is for: a listening destination is a server, a source a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsRole {
    /// A source.
    Client,
    /// A destination.
    Server,
}

impl TlsRole {
    fn word(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Server => "server",
        }
    }

    /// The certificate's file name.
    pub fn certificate_file(self) -> String {
        format!("{}-cert.pem", self.word())
    }

    /// The private key's file name.
    pub fn key_file(self) -> String {
        format!("{}-key.pem", self.word())
    }
}
