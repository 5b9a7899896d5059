//! What a connection costs that is refused in its handshake, at both ends.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use vfio_migration::rustls::crypto::aws_lc_rs::default_provider;
use vfio_migration::rustls::pki_types::ServerName;
use vfio_migration::rustls::{ClientConfig, ClientConnection, StreamOwned};
use vfio_migration::{ALPN, Destination, Machine, NotBuilt, Uri};

use crate::toy::pki::{Ca, HOST, Host, own_host};
use crate::toy::secure::{client_config, roots};
use crate::toy::tls_destination;
use crate::{cpu, text};

/// Connections of a round.
const MANY: u32 = 500;
const ROUNDS: usize = 5;

/// What strangers do.
const KINDS: [(&str, &str); 4] = [
    ("none", "no certificate"),
    ("other", "another CA, refuses ours"),
    ("plain", "plain text"),
    ("silent", "nothing, and gone"),
];

/// Prints what each kind costs.
pub(crate) fn report() {
    let (own, other) = (own_host(), Ca::new().host(&Host::named(HOST)));
    println!("{:28}{:>30}{:>30}", "", "destination, us CPU", "stranger, us CPU");
    for (kind, name) in KINDS {
        let certificates = if kind == "other" { other.path() } else { own };
        let rounds: Vec<_> = (0..ROUNDS).map(|_| round(kind, certificates)).collect();
        let of = |each: fn(&(Duration, Duration)) -> Duration| {
            let mut all: Vec<f64> = rounds.iter().map(|round| each(round).as_secs_f64() * 1e6).collect();
            all.sort_by(f64::total_cmp);
            text([all[0], all[all.len() / 2], all[all.len() - 1]])
        };
        println!("{name:28}{:>30}{:>30}", of(|round| round.0), of(|round| round.1));
    }
}

/// Processor time of the destination and of the stranger, for each connection.
fn round(kind: &str, certificates: &Path) -> (Duration, Duration) {
    let mut destination =
        Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), tls_destination()).unwrap();
    let control = destination.control();
    let Uri::Tcp { port, .. } = destination.local().clone() else { unreachable!() };
    std::thread::scope(|scope| {
        let waiting = scope.spawn(move || {
            drop(destination.accept(|_| -> Result<Arc<dyn Machine>, NotBuilt> { unreachable!() }));
        });
        let program = std::env::current_exe().unwrap();
        let mut command = Command::new(program);
        command.args(["stranger", kind, &port.to_string()]).arg(certificates).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut told = child.stdout.take().unwrap();
        // Ready, and begins when it is told: what its start takes is not counted.
        told.read_exact(&mut [0; 1]).unwrap();
        let before = cpu();
        let mut its = String::new();
        told.read_to_string(&mut its).unwrap();
        let ours = cpu() - before;
        assert!(child.wait().unwrap().success());
        control.cancel();
        waiting.join().unwrap();
        (ours / MANY, Duration::from_nanos(its.trim().parse().unwrap()) / MANY)
    })
}

/// The process of a stranger, who connects again and again, each time until it is hung up on.
pub(crate) fn stranger(kind: &str, port: u16, certificates: &Path) {
    let config = match kind {
        "none" => {
            let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()));
            let builder = builder.with_safe_default_protocol_versions().unwrap();
            let mut config = builder.with_root_certificates(roots(certificates)).with_no_client_auth();
            config.alpn_protocols = vec![ALPN.to_vec()];
            config
        }
        _ => client_config(certificates),
    };
    let config = Arc::new(config);
    print!("!");
    std::io::stdout().flush().unwrap();
    let before = cpu();
    for _ in 0..MANY {
        let mut socket = TcpStream::connect(("127.0.0.1", port)).unwrap();
        match kind {
            "plain" => {
                let _ = socket.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n");
                let _ = socket.read_to_end(&mut Vec::new());
            }
            "silent" => {}
            _ => {
                let name = ServerName::try_from(HOST).unwrap();
                let connection = ClientConnection::new(config.clone(), name).unwrap();
                let _ = StreamOwned::new(connection, socket).read_to_end(&mut Vec::new());
            }
        }
    }
    print!("{}", (cpu() - before).as_nanos());
}
