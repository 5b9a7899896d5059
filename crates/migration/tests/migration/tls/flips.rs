//! One bit of what is on the wire is another, in every frame of every phase: the migration fails, or the same guest arrives. Another guest
//! never does.

use std::collections::{BTreeMap, VecDeque};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vfio_migration::{Destination, Machine, MigrateError, Security, Source, Uri};
use vfio_migration_types::{Side, error_chain};
use vfio_migration_wire::{Frame, FrameHeader, FrameType, HEADER_LEN, Message, PREAMBLE};

use super::hosts::*;
use crate::toy::pki::{Ca, Host};
use crate::toy::*;

/// What passes is cut into records of TLS, or into the frames of plain text.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Units {
    Records,
    Frames,
}

/// A unit that is told from others: the direction, and of a record its number, of a frame its type (0: the preamble) and whether the guest was
/// paused by then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Unit {
    to_destination: bool,
    number: usize,
    paused: bool,
}

/// Where a bit is flipped: in the first such unit, in this part of it (header, payload, body), at this byte of the part.
#[derive(Clone, Copy, Debug)]
struct Flip {
    unit: Unit,
    part: usize,
    at: usize,
}

/// The lengths of a unit's parts.
type Parts = Vec<usize>;

/// Somebody on the way of a migration. Connections after the first pass as they are.
struct Wire {
    at: Uri,
    /// What has passed, each unit the first time.
    seen: Arc<Mutex<BTreeMap<Unit, Parts>>>,
    flipped: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        let Uri::Tcp { host, port } = &self.at else { return };
        drop(TcpStream::connect((host.as_str(), *port)));
    }
}

fn wire(to: &Uri, units: Units, flip: Option<Flip>) -> Wire {
    let Uri::Tcp { host, port } = to.clone() else { panic!("{to}") };
    let listener = TcpListener::bind((HOST, 0)).unwrap();
    let at = Uri::Tcp { host: HOST.into(), port: listener.local_addr().unwrap().port() };
    let wire = Wire { at, seen: Arc::default(), flipped: Arc::default(), ended: Arc::default() };
    let (seen, flipped, ended) = (wire.seen.clone(), wire.flipped.clone(), wire.ended.clone());
    std::thread::spawn(move || {
        for connection in 0.. {
            let Ok((source, _)) = listener.accept() else { return };
            if ended.load(Ordering::Relaxed) {
                return;
            }
            let Ok(destination) = TcpStream::connect((host.as_str(), port)) else { continue };
            // The source says when its guest is paused, and the other direction is told.
            let paused = Arc::new(AtomicBool::new(false));
            for to_destination in [true, false] {
                let (source, destination) = (source.try_clone().unwrap(), destination.try_clone().unwrap());
                let (from, to) = if to_destination { (source, destination) } else { (destination, source) };
                let (seen, flipped, paused) = (seen.clone(), flipped.clone(), paused.clone());
                std::thread::spawn(move || {
                    let mut way = Way { from: &from, units, to_destination, passed: 0, paused: &paused };
                    while let Some((unit, mut bytes, parts)) = way.next() {
                        if connection == 0 {
                            seen.lock()
                                .unwrap()
                                .entry(unit)
                                .or_insert_with(|| parts.iter().map(|part| part.len()).collect());
                        }
                        let due = flip.filter(|flip| connection == 0 && flip.unit == unit);
                        if let Some(flip) = due
                            && let Some(part) = parts.get(flip.part)
                            && !flipped.swap(true, Ordering::Relaxed)
                        {
                            bytes[part.start + flip.at % part.len()] ^= 0x10;
                        }
                        if (&to).write_all(&bytes).is_err() {
                            break;
                        }
                    }
                    let _ = to.shutdown(Shutdown::Write);
                    let _ = from.shutdown(Shutdown::Read);
                });
            }
        }
    });
    wire
}

/// One direction of a connection.
struct Way<'a> {
    from: &'a TcpStream,
    units: Units,
    to_destination: bool,
    passed: usize,
    paused: &'a AtomicBool,
}

impl Way<'_> {
    fn read(&mut self, bytes: &mut Vec<u8>, len: usize) -> Option<Range<usize>> {
        let start = bytes.len();
        bytes.resize(start + len, 0);
        self.from.read_exact(&mut bytes[start..]).ok()?;
        Some(start..start + len)
    }

    fn next(&mut self) -> Option<(Unit, Vec<u8>, Vec<Range<usize>>)> {
        let mut bytes = Vec::new();
        let (number, parts) = match self.units {
            Units::Records => {
                let head = self.read(&mut bytes, 5)?;
                let len = usize::from(u16::from_be_bytes([bytes[3], bytes[4]]));
                (self.passed, vec![head, self.read(&mut bytes, len)?])
            }
            Units::Frames if self.passed == 0 => (0, vec![self.read(&mut bytes, PREAMBLE.len())?]),
            Units::Frames => {
                let head = self.read(&mut bytes, HEADER_LEN)?;
                let header =
                    FrameHeader::parse(&bytes[..HEADER_LEN].try_into().unwrap(), self.passed as u64 - 1)
                        .unwrap();
                let payload = self.read(&mut bytes, header.payload_len())?;
                let side = if self.to_destination { Side::Source } else { Side::Destination };
                let body = match Frame::decode(&header, &bytes[payload.clone()], side).unwrap() {
                    Frame::Message(Message::Final(_)) => {
                        self.paused.store(true, Ordering::Relaxed);
                        0
                    }
                    Frame::Bulk(bulk) => usize::try_from(bulk.body_len()).unwrap(),
                    _ => 0,
                };
                let body = self.read(&mut bytes, body)?;
                let parts = [head, payload, body].into_iter().filter(|part| !part.is_empty());
                (usize::from(header.number()), parts.collect())
            }
        };
        self.passed += 1;
        let paused = self.units == Units::Frames && self.paused.load(Ordering::Relaxed);
        Some((Unit { to_destination: self.to_destination, number, paused }, bytes, parts))
    }
}

/// How a sweep secures both sides.
struct Setting {
    units: Units,
    source: Security,
    destination: Security,
}

/// One migration with a flipped bit. Says whether it failed, and what passed; the guest is whole on the right side, whatever became of it.
fn migrate(setting: &Setting, flip: Option<Flip>) -> (Option<String>, Wire) {
    let mut options = destination_options(setting.destination.clone());
    options.peer_timeout = Duration::from_secs(3);
    let mut destination = Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), options).unwrap();
    let wire = wire(destination.local(), setting.units, flip);
    let (toy, machine) = (Toy::booted(&plan()), Toy::new(&plan()));
    let mut options = source_options(setting.source.clone());
    options.peer_timeout = Duration::from_secs(3);
    let source = Source::new(toy.clone(), options);
    let built = machine.clone();
    let (left, arrived) = std::thread::scope(|scope| {
        let control = destination.control();
        let arriving = scope.spawn(move || {
            let arrived = destination.accept(|_| Ok::<Arc<dyn Machine>, _>(built));
            // A COMMIT or its answer may have been damaged.
            let _ = destination.answer_queries(Duration::from_secs(60));
            arrived
        });
        let left = source.migrate_to(&wire.at, |_| {});
        control.cancel();
        (left, arriving.join().unwrap())
    });
    match (left, arrived) {
        (Ok(_), Ok(_)) => {
            prove_moved(&toy, &machine);
            machine.prove_running();
            (None, wire)
        }
        (Err(error @ MigrateError::Unresolved { .. }), arrived) => panic!("{flip:?}: {error}\n{arrived:?}"),
        (Err(error), Err(_)) => {
            toy.prove_running();
            assert!(!machine.runs(), "{flip:?}: it runs on both sides");
            (Some(error_chain(&error)), wire)
        }
        (left, arrived) => panic!("{flip:?}: {left:?}\n{arrived:?}"),
    }
}

/// Migrates once for each flip, a few at a time. Gives the flips that were there in time, and those that went unnoticed, each with the
/// number of units that came behind it the same way: one migration has more of them than another.
fn sweep(setting: &Setting, flips: Vec<Flip>) -> (Vec<Flip>, Vec<(Flip, usize)>) {
    let left = Mutex::new(VecDeque::from(flips));
    let (done, unnoticed) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                loop {
                    let next = left.lock().unwrap().pop_front();
                    let Some(flip) = next else { return };
                    let (failed, wire) = migrate(setting, Some(flip));
                    if wire.flipped.load(Ordering::Relaxed) {
                        done.lock().unwrap().push(flip);
                        if failed.is_none() {
                            let seen = wire.seen.lock().unwrap();
                            let behind = seen.keys().filter(|unit| {
                                unit.to_destination == flip.unit.to_destination
                                    && unit.number > flip.unit.number
                            });
                            unnoticed.lock().unwrap().push((flip, behind.count()));
                        }
                    }
                }
            });
        }
    });
    (done.into_inner().unwrap(), unnoticed.into_inner().unwrap())
}

/// The units of a migration that nobody touches.
fn untouched(setting: &Setting) -> BTreeMap<Unit, Parts> {
    let (failed, wire) = migrate(setting, None);
    assert_eq!(failed, None);
    wire.seen.lock().unwrap().clone()
}

#[test]
fn a_flipped_bit_of_any_record_makes_no_other_guest() {
    let ca = Ca::new();
    let (here, there) = (ca.host(&Host::named("a")), ca.host(&Host::named(HOST)));
    let (source, destination) = (secure(here.path()), secure(there.path()));
    let setting = Setting { units: Units::Records, source, destination };
    let seen: Vec<_> = untouched(&setting).into_iter().collect();
    // All of the handshake and the beginning, then as many as there is time for.
    let step = seen.len().div_ceil(60);
    let chosen = seen.iter().enumerate().filter(|(index, (unit, _))| unit.number < 12 || index % step == 0);
    let flips = chosen.map(|(index, (unit, parts))| {
        // Type, length, and where what is sealed begins, goes on and ends.
        let (part, at) = [(0, 0), (1, 0), (1, parts[1] / 2), (1, parts[1] - 1), (0, 4)][index % 5];
        Flip { unit: *unit, part, at }
    });
    let (done, unnoticed) = sweep(&setting, flips.collect());
    assert!(done.len() > 40, "only {} were flipped", done.len());
    // What comes behind the end of a migration may be anything.
    let early: Vec<_> =
        unnoticed.iter().filter(|(flip, behind)| *behind >= 3 && flip.unit.number >= 2).collect();
    assert!(early.is_empty(), "unnoticed: {early:?}");
}

#[test]
fn a_flipped_bit_of_any_frame_makes_no_other_guest() {
    let plain = || Security::PlainText;
    let setting = Setting { units: Units::Frames, source: plain(), destination: plain() };
    let seen = untouched(&setting);
    let flips: Vec<Flip> = seen
        .iter()
        .enumerate()
        .flat_map(|(index, (unit, parts))| {
            (0..parts.len()).map(move |part| Flip { unit: *unit, part, at: index * 7 + part })
        })
        .collect();
    // Every type that this machine's migration has, and pages and device data in both of their phases.
    let name = |number: usize| {
        FrameType::all().find(|kind| usize::from(kind.number) == number).map(|kind| kind.name)
    };
    let names: Vec<_> = seen.keys().filter_map(|unit| Some((name(unit.number)?, unit.paused))).collect();
    for needed in [
        ("HELLO", false),
        ("OFFER", false),
        ("ACCEPT", false),
        ("BEGIN", false),
        ("BEGUN", false),
        ("CREDIT", false),
        ("PAGES", false),
        ("PAGES", true),
        ("DEVICE_DATA", false),
        ("DEVICE_DATA", true),
        ("END_ITERATION", false),
        ("APPLIED", false),
        ("FINAL", true),
        ("SECTION", true),
        ("DEVICE_END", true),
        ("LOCKS_FREE", true),
        ("FINAL_END", true),
        ("READY", true),
        ("COMMIT", true),
        ("RUNNING", true),
    ] {
        assert!(names.contains(&needed), "{needed:?} is not in {names:?}");
    }
    let count = flips.len();
    let (done, unnoticed) = sweep(&setting, flips);
    // A ping comes when it is quiet, and not always.
    assert!(done.len() + 8 > count, "only {} of {count} were flipped", done.len());
    // The answer to COMMIT is asked for again.
    let other: Vec<_> =
        unnoticed.iter().filter(|(flip, _)| name(flip.unit.number) != Some("RUNNING")).collect();
    assert!(other.is_empty(), "unnoticed: {other:?}");
}
