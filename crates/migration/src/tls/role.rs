//! The two ends of a connection, as certificates know them.

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
