//! Whether a destination has asked its source for a certificate. The TLS library takes one that does not, and does not tell.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustls::client::ResolvesClientCert;
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, SignatureScheme};

/// Whether the destination of one connection has asked.
#[derive(Clone, Debug, Default)]
pub(crate) struct Asked(Arc<AtomicBool>);

impl Asked {
    /// What it will be known by, and what the connection, and no other, is to be made with.
    pub(crate) fn watch(config: &ClientConfig) -> (Self, Arc<ClientConfig>) {
        let asked = Self::default();
        let mut config = config.clone();
        let resolver = Arc::clone(&config.client_auth_cert_resolver);
        config.client_auth_cert_resolver = Arc::new(Watched { resolver, asked: asked.clone() });
        (asked, Arc::new(config))
    }

    /// Whether it has. Before the end of the handshake it may be about to.
    pub(crate) fn has_come(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Gives the certificate, and notes that it was asked for.
#[derive(Debug)]
struct Watched {
    resolver: Arc<dyn ResolvesClientCert>,
    asked: Asked,
}

impl ResolvesClientCert for Watched {
    fn resolve(&self, issuers: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.asked.0.store(true, Ordering::Relaxed);
        self.resolver.resolve(issuers, schemes)
    }

    fn only_raw_public_keys(&self) -> bool {
        self.resolver.only_raw_public_keys()
    }

    fn has_certs(&self) -> bool {
        self.resolver.has_certs()
    }
}
