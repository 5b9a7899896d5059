//! What securing a connection costs: `cargo bench -p vfio-migration --bench tls`.
//!
//! The same guest moves over loopback in plain text, in plain text with its checksums, and over TLS, in turns; the bytes that were moved
//! are then sealed and opened alone, by the same library and cipher. Printed are medians of each, with the least and the most, and what
//! TLS adds beyond the sealing and opening.
//!
//! With `-- refused` alone, what a connection costs that is refused in its handshake: processor time of the destination, and of the stranger, who is
//! a process of its own.

#[path = "../../tests/migration/toy/mod.rs"]
mod toy;

mod strangers;

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use vfio_migration::rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384;
use vfio_migration::rustls::crypto::cipher::{
    AeadKey, InboundOpaqueMessage, Iv, OutboundPlainMessage, Tls13AeadAlgorithm,
};
use vfio_migration::rustls::{ContentType, ProtocolVersion, SupportedCipherSuite};
use vfio_migration::{DestinationOptions, SourceOptions};

use crate::toy::{Plan, Toy, migrate, plain_destination, plain_source, tls_destination, tls_source};

const GIB: u64 = 1 << 30;
/// Bytes of the guest's RAM.
const RAM: u64 = GIB;
const ROUNDS: usize = 5;

/// Options of both sides.
type Options = fn() -> (SourceOptions, DestinationOptions);

/// What one run took.
#[derive(Clone, Copy)]
struct Cost {
    wall: Duration,
    /// Of both sides, which are threads of this process.
    cpu: Duration,
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["stranger", kind, port, certificates, ..] => {
            strangers::stranger(kind, port.parse().unwrap(), Path::new(certificates))
        }
        ["refused", ..] => strangers::report(),
        _ => moves(),
    }
}

fn moves() {
    let plan = Plan { pages: RAM / 4096, hot: 1, devices: Vec::new(), ..Plan::default() };
    let ways: [(&str, Options); 3] = [
        ("plain text, --ram-crc off", || {
            let mut source = plain_source();
            source.ram_crc = Some(false);
            (source, plain_destination())
        }),
        ("plain text", || (plain_source(), plain_destination())),
        ("TLS", || (tls_source(), tls_destination())),
    ];
    let mut costs = vec![Vec::new(); ways.len() + 1];
    for round in 1..=ROUNDS {
        eprintln!("round {round} of {ROUNDS}");
        for ((_, options), costs) in ways.iter().zip(&mut costs) {
            costs.push(moved(&plan, *options));
        }
        costs[ways.len()].push(sealed_and_opened());
    }
    let names = ways.iter().map(|(name, _)| *name).chain(["sealing and opening alone"]);
    println!("{:28}{:>24}{:>28}", "", "GiB/s (least-most)", "CPU s/GiB (least-most)");
    let mut cpu = Vec::new();
    for (name, costs) in names.zip(&costs) {
        let rate = spread(costs, |cost| RAM as f64 / GIB as f64 / cost.wall.as_secs_f64());
        let used = spread(costs, |cost| cost.cpu.as_secs_f64() / (RAM as f64 / GIB as f64));
        println!("{name:28}{:>24}{:>28}", text(rate), text(used));
        cpu.push(used[1]);
    }
    println!("what TLS adds in CPU, against sealing and opening alone: {:.2}", (cpu[2] - cpu[0]) / cpu[3]);
}

/// Moves a guest whose RAM does not repeat itself.
fn moved(plan: &Plan, options: Options) -> Cost {
    let toy = Toy::booted(plan);
    toy.fill(0x9e37_79b9_7f4a_7c15);
    let (mut source, destination) = options();
    // This machine digests its RAM before it goes on.
    source.downtime_limit = Duration::from_secs(60);
    let (begun, cpu) = (Instant::now(), cpu());
    let both = migrate(&toy, plan, "tcp:127.0.0.1:0", source, destination);
    let cost = Cost { wall: begun.elapsed(), cpu: self::cpu() - cpu };
    let (completed, ..) = both.unwrap();
    assert!(completed.wire_bytes >= RAM, "it was not moved whole");
    cost
}

/// Seals and opens as many bytes, in records as long as TLS has them.
fn sealed_and_opened() -> Cost {
    let SupportedCipherSuite::Tls13(suite) = TLS13_AES_256_GCM_SHA384;
    let aead: &dyn Tls13AeadAlgorithm = suite.aead_alg;
    let mut seal = aead.encrypter(AeadKey::from([7; 32]), Iv::from([1; 12]));
    let mut open = aead.decrypter(AeadKey::from([7; 32]), Iv::from([1; 12]));
    let data: Vec<u8> = (0..16_384_u32).map(|n| n.wrapping_mul(0x9e37_79b9).to_le_bytes()[3]).collect();
    let (begun, cpu) = (Instant::now(), cpu());
    for sequence in 0..RAM / data.len() as u64 {
        let plain = OutboundPlainMessage {
            typ: ContentType::ApplicationData,
            version: ProtocolVersion::TLSv1_2,
            payload: data.as_slice().into(),
        };
        let mut sealed = seal.encrypt(plain, sequence).unwrap().payload.as_ref().to_vec();
        let sealed =
            InboundOpaqueMessage::new(ContentType::ApplicationData, ProtocolVersion::TLSv1_2, &mut sealed);
        assert_eq!(open.decrypt(sealed, sequence).unwrap().payload.len(), data.len());
    }
    Cost { wall: begun.elapsed(), cpu: self::cpu() - cpu }
}

fn cpu() -> Duration {
    clock_gettime(ClockId::ProcessCPUTime).try_into().unwrap()
}

/// The least, the median and the most.
fn spread(costs: &[Cost], of: impl Fn(&Cost) -> f64) -> [f64; 3] {
    let mut all: Vec<f64> = costs.iter().map(of).collect();
    all.sort_by(f64::total_cmp);
    [all[0], all[all.len() / 2], all[all.len() - 1]]
}

fn text([least, median, most]: [f64; 3]) -> String {
    format!("{median:.2} ({least:.2}-{most:.2})")
}
