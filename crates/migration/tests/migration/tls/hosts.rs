//! Two hosts, and what passes between them over TLS.

use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use vfio_migration::rustls::pki_types::pem::PemObject;
use vfio_migration::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use vfio_migration::rustls::server::WebPkiClientVerifier;
use vfio_migration::rustls::{ClientConfig, RootCertStore, ServerConfig};
use vfio_migration::{
    ALPN, CA_FILE, Destination, DestinationOptions, IncomingControl, Machine, Security, Source,
    SourceOptions, TlsDirectory, TlsRole, Uri,
};
use vfio_migration_types::error_chain;

use crate::toy::*;

pub(crate) const HOST: &str = "127.0.0.1";

pub(crate) fn plan() -> Plan {
    Plan { pages: 64, hot: 8, ..Plan::default() }
}

/// With certificates of a directory; a connection that was handed over leads to [`HOST`].
pub(crate) fn secure(directory: &Path) -> Security {
    Security::Directory(TlsDirectory { server_name: Some(HOST.into()), ..TlsDirectory::new(directory) })
}

pub(crate) fn source_options(security: Security) -> SourceOptions {
    let mut options = SourceOptions::default();
    options.security = security;
    options.connect_timeout = Duration::from_secs(5);
    options.downtime_limit = Duration::from_secs(10);
    options
}

pub(crate) fn destination_options(security: Security) -> DestinationOptions {
    let mut options = DestinationOptions::default();
    options.security = security;
    options.peer_timeout = Duration::from_secs(5);
    options
}

/// Migrates between two hosts, over `route`.
pub(crate) fn attempt(
    source: Security,
    destination: Security,
    route: impl FnOnce(&Uri) -> Uri,
) -> (Arc<Toy>, Both) {
    let toy = Toy::booted(&plan());
    let both = migrate_by(
        &toy,
        &plan(),
        "tcp:127.0.0.1:0",
        source_options(source),
        destination_options(destination),
        |_, to| route(to),
        |_| {},
    );
    (toy, both)
}

pub(crate) fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((HOST, 0)).unwrap();
    let here = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (here, listener.accept().unwrap().0)
}

/// What both sides say of an attempt over one connection, which must fail with the guest going on.
pub(crate) fn refused(source: Security, destination: Security) -> (String, String) {
    let (here, there) = tcp_pair();
    let toy = Toy::booted(&plan());
    std::thread::scope(|scope| {
        let arriving = scope.spawn(move || {
            let mut place = Destination::over(there.into(), destination_options(destination))?;
            place.accept(|_| Ok::<Arc<dyn Machine>, _>(Toy::new(&plan())))
        });
        let left = Source::new(toy.clone(), source_options(source)).migrate_over(here.into(), |_| {});
        let arrived = arriving.join().unwrap();
        toy.prove_running();
        (error_chain(&left.expect_err("it migrated")), error_chain(&arrived.expect_err("it arrived")))
    })
}

/// Ends a destination's wait, however a test ends.
pub(crate) struct Waiting(pub(crate) IncomingControl);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

pub(crate) fn chain(
    directory: &Path,
    role: TlsRole,
) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let certificate = CertificateDer::from_pem_file(directory.join(role.certificate_file())).unwrap();
    (vec![certificate], PrivateKeyDer::from_pem_file(directory.join(role.key_file())).unwrap())
}

pub(crate) fn roots(directory: &Path) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(directory.join(CA_FILE)).unwrap()).unwrap();
    roots
}

pub(crate) fn client_config(directory: &Path) -> ClientConfig {
    let (certificates, key) = chain(directory, TlsRole::Client);
    let builder = ClientConfig::builder().with_root_certificates(roots(directory));
    let mut config = builder.with_client_auth_cert(certificates, key).unwrap();
    config.alpn_protocols = vec![ALPN.to_vec()];
    config
}

pub(crate) fn server_config(directory: &Path) -> ServerConfig {
    let (certificates, key) = chain(directory, TlsRole::Server);
    let verifier = WebPkiClientVerifier::builder(Arc::new(roots(directory))).build().unwrap();
    let builder = ServerConfig::builder().with_client_cert_verifier(verifier);
    let mut config = builder.with_single_cert(certificates, key).unwrap();
    config.alpn_protocols = vec![ALPN.to_vec()];
    config
}
