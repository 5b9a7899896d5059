//! A machine to and from a file: what comes back, and every way in which a file can be wrong.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::toy::*;
use vfio_migration::{
    Arrived, DestinationOptions, FileError, IncomingError, Machine, MigrateError, SaveError, SaveOptions,
    Saved, Snapshot, SnapshotError, Source, SourceOptions, VmOwnership, ownership_at, read_journal, save,
};
use vfio_migration_types::{Epoch, MigrationState, PAGE_SIZE, RamOffset, Side};
use vfio_migration_wire::{Bulk, Frame, FrameHeader, HEADER_LEN, encode, encode_bulk};

const TRAILER: usize = 48;

fn small() -> Plan {
    let devices = vec![FakeDeviceKind { pieces: 2, ..FakeDeviceKind::default() }];
    Plan { pages: 8, hot: 2, devices, ..Plan::default() }
}

fn saving(toy: &Arc<Toy>, path: &Path, state: Option<&Path>, how: SaveOptions) -> Result<Saved, SaveError> {
    let mut options = SourceOptions::default().for_saving();
    options.verify = true;
    options.state_dir = state.map(Into::into);
    save(Source::new(toy.clone(), options), path, how, |_| {})
}

fn restoring(path: &Path, toy: &Arc<Toy>, state: Option<&Path>) -> Result<Arrived, IncomingError> {
    let mut options = DestinationOptions::default();
    options.state_dir = state.map(Into::into);
    let built: Arc<dyn Machine> = toy.clone();
    Snapshot::open(path).unwrap().restore(options, |_| Ok(built))
}

fn files(dir: &Path) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}

#[test]
fn a_guest_goes_on_and_its_snapshot_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snapshot");
    // Little that changes, so that however often a loaded host sends it again, holes show in the file's length.
    let kind = FakeDeviceKind { pieces: 40, ..FakeDeviceKind::default() };
    let plan = Plan { hot: 8, devices: vec![kind; 2], ..Plan::default() };
    let toy = Toy::booted(&plan);
    toy.prove_running();
    let saved = saving(&toy, &path, None, SaveOptions::default()).unwrap();
    toy.prove_restored();
    assert_eq!(saved.bytes, path.metadata().unwrap().len());
    assert_eq!(files(dir.path()), 1, "a temporary file is left");
    let snapshot = Snapshot::open(&path).unwrap();
    assert_eq!((snapshot.vm(), snapshot.epoch(), snapshot.guest_ran()), (VM, Epoch(0), true));
    for device in snapshot.device_bytes() {
        assert!(device > 0);
    }
    let back = Toy::new(&plan);
    let arrived = restoring(&path, &back, None).unwrap();
    assert_eq!(arrived.epoch, Epoch(1));
    back.prove_running();
    // Each third page was never written: neither in the file nor in RAM.
    assert_eq!(back.ram().read_u64(RamOffset(PAGE_SIZE * 1000 + 8)).unwrap(), 0);
    assert_eq!(back.ram().read_u64(RamOffset(PAGE_SIZE * 1001 + 8)).unwrap(), 1002);
    assert!(saved.bytes < 2048 * PAGE_SIZE * 5 / 6, "holes are in the file");
}

/// What cannot move live for lack of a log goes into a file all the same: all of RAM is written while the guest is paused.
#[test]
fn a_guest_whose_device_logs_nothing_is_saved_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snapshot");
    let plan = Plan {
        devices: vec![FakeDeviceKind { dirty_log: false, ..FakeDeviceKind::default() }],
        ..Plan::default()
    };
    let toy = Toy::booted(&plan);
    toy.prove_running();
    let mut ending = SaveOptions::default();
    ending.stop = true;
    saving(&toy, &path, None, ending).unwrap();
    let back = Toy::new(&plan);
    restoring(&path, &back, None).unwrap();
    prove_moved(&toy, &back);
    // What would be unsound in a file too is refused as in a migration.
    let bare = FakeDeviceKind {
        flags: vfio_migration_types::MigrationFlags { p2p: false, pre_copy: true },
        ..FakeDeviceKind::default()
    };
    let plan = Plan { devices: vec![bare.clone(), bare], ..Plan::default() };
    let refused = saving(&Toy::booted(&plan), &dir.path().join("none"), None, SaveOptions::default());
    let Err(SaveError::Session(MigrateError::Refused(reasons))) = refused else { panic!("{refused:?}") };
    assert!(reasons.iter().all(|reason| reason.code == "p2p-missing") && reasons.len() == 2, "{reasons:?}");
    assert_eq!(files(dir.path()), 1);
}

#[test]
fn a_guest_ends_in_its_file_and_comes_back_once() {
    let dir = tempfile::tempdir().unwrap();
    let (path, state) = (dir.path().join("snapshot"), dir.path().join("state"));
    let toy = Toy::booted(&small());
    toy.prove_running();
    let mut how = SaveOptions::default();
    how.stop = true;
    let saved = saving(&toy, &path, Some(&state), how).unwrap();
    assert!(saved.completed.is_some());
    toy.prove_standing();
    // Who has nothing but the journal finds the guest.
    let journal = read_journal(&state, VM).unwrap().unwrap();
    assert_eq!(journal.source.unwrap().peer, format!("file:{}", path.display()));
    let VmOwnership::Elsewhere { peer, .. } = ownership_at(&state, VM).unwrap() else { panic!("given away") };
    assert!(peer.starts_with("file:/"), "{peer}");
    let back = Toy::new(&small());
    assert_eq!(restoring(&path, &back, Some(&state)).unwrap().epoch, Epoch(1));
    let journal = read_journal(&state, VM).unwrap().unwrap();
    assert_eq!(journal.destination.unwrap().peer, format!("file:{}", path.display()));
    prove_moved(&toy, &back);
    back.prove_running();
    // By the journal it is ours under a later epoch: the same file again would be a second guest.
    let again = Toy::new(&small());
    let error = restoring(&path, &again, Some(&state)).unwrap_err();
    assert!(matches!(&error, IncomingError::Refused(why) if why[0].code == "ownership"), "{error:?}");
    again.prove_standing();
    assert_eq!(again.device(0).at(), MigrationState::Running, "never touched");
}

#[test]
fn what_was_saved_before_it_moved_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (path, state) = (dir.path().join("snapshot"), dir.path().join("state"));
    let toy = Toy::booted(&small());
    saving(&toy, &path, Some(&state), SaveOptions::default()).unwrap();
    let mut options = tls_source();
    options.state_dir = Some(state.clone());
    migrate(&toy, &small(), "tcp:127.0.0.1:0", options, tls_destination()).unwrap();
    let error = restoring(&path, &Toy::new(&small()), Some(&state)).unwrap_err();
    assert!(error.to_string().contains("belongs to another host"), "{error}");
}

#[test]
fn another_layout_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snapshot");
    saving(&Toy::booted(&small()), &path, None, SaveOptions::default()).unwrap();
    for other in [
        Plan { pages: 16, ..small() },
        Plan { devices: vec![], ..small() },
        Plan { pages: 64, devices: vec![FakeDeviceKind::default(), FakeDeviceKind::default()], ..small() },
    ] {
        let error = restoring(&path, &Toy::new(&other), None).unwrap_err();
        assert!(matches!(error, IncomingError::Refused(_)), "{error:?}");
    }
}

#[test]
fn nothing_is_overwritten_and_a_failure_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snapshot");
    std::fs::write(&path, "precious").unwrap();
    let toy = Toy::booted(&small());
    let error = saving(&toy, &path, None, SaveOptions::default()).unwrap_err();
    assert!(matches!(error, SaveError::File(SnapshotError::Unfit(FileError::Exists(_)))), "{error:?}");
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    let mut how = SaveOptions::default();
    how.force = true;
    saving(&toy, &path, None, how).unwrap();
    Snapshot::open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    toy.save_panics.store(true, Ordering::Relaxed);
    let error = saving(&toy, &path, None, SaveOptions::default()).unwrap_err();
    assert!(matches!(error, SaveError::Session(_)), "{error:?}");
    assert_eq!(files(dir.path()), 0);
    toy.prove_restored();
}

/// Every byte flipped, as found and with the digest made to fit; every length; and bytes behind the end.
#[test]
fn no_damaged_file_passes() {
    let dir = tempfile::tempdir().unwrap();
    let (path, bad) = (dir.path().join("snapshot"), dir.path().join("bad"));
    // Every byte costs three readings of the whole file: two pages with a hole between them, in two regions, are enough.
    let kind = FakeDeviceKind { pieces: 2, dma_pages: 1, ..FakeDeviceKind::default() };
    let least = Plan { pages: 3, hot: 1, devices: vec![kind], ..Plan::default() };
    saving(&Toy::booted(&least), &path, None, SaveOptions::default()).unwrap();
    let sound = std::fs::read(&path).unwrap();
    let len = sound.len();
    std::fs::write(&bad, &sound).unwrap();
    // Changed in place: file systems that write out a file when it is replaced would do so at every byte.
    let file = std::fs::File::options().write(true).open(&bad).unwrap();
    let put = |bytes: &[u8], at: usize| file.write_all_at(bytes, at as u64).unwrap();
    let refuse = |what: &dyn Fn() -> String| assert!(Snapshot::open(&bad).is_err(), "{} passed", what());
    for at in 0..len {
        let mut bytes = sound.clone();
        bytes[at] ^= 1 << (at % 8);
        put(&bytes[at..=at], at);
        refuse(&|| format!("byte {at} flipped"));
        if at < len - 40 {
            seal(&mut bytes);
            put(&bytes[len - 40..], len - 40);
            refuse(&|| format!("byte {at} flipped and sealed"));
        }
        if at % 97 == 0 && at > 8 + TRAILER {
            let mut bytes = [&sound[..at], &[0; TRAILER]].concat();
            bytes[at..at + 8].copy_from_slice(b"VFIOSEND");
            seal(&mut bytes);
            put(&bytes, 0);
            file.set_len(bytes.len() as u64).unwrap();
            refuse(&|| format!("{at} bytes, sealed"));
            file.set_len(len as u64).unwrap();
        }
        put(&sound[at..], at);
        file.set_len(len as u64).unwrap();
    }
    Snapshot::open(&bad).expect("what was changed was put back");
    put(&[0], len);
    refuse(&|| "a byte too many".into());
    for at in (0..len).rev() {
        file.set_len(at as u64).unwrap();
        refuse(&|| format!("{at} bytes"));
    }
    // The control of all this: resealing alone is no damage.
    let mut bytes = sound;
    seal(&mut bytes);
    put(&bytes, 0);
    Snapshot::open(&bad).unwrap();
}

#[test]
fn swapped_device_streams_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snapshot");
    let kind = FakeDeviceKind { pieces: 2, ..FakeDeviceKind::default() };
    let plan = Plan { pages: 64, devices: vec![kind.clone(), kind], ..small() };
    saving(&Toy::booted(&plan), &path, None, SaveOptions::default()).unwrap();
    let sound = std::fs::read(&path).unwrap();
    for swap in [false, true] {
        let mut bytes = rewrite(&sound, swap);
        seal(&mut bytes);
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(Snapshot::open(&path).is_err(), swap);
    }
}

/// Makes length and digest fit again.
fn seal(bytes: &mut [u8]) {
    let len = bytes.len();
    bytes[len - 40..len - 32].copy_from_slice(&(len as u64).to_le_bytes());
    let digest = blake3::hash(&bytes[..len - 32]);
    bytes[len - 32..].copy_from_slice(digest.as_bytes());
}

/// Writes every frame anew, with the data of devices 0 and 1 exchanged if `swap`.
fn rewrite(sound: &[u8], swap: bool) -> Vec<u8> {
    let mut out = sound[..8].to_vec();
    let mut rest = &sound[8..sound.len() - TRAILER];
    let mut sequence = 0;
    while let Some((head, behind)) = rest.split_first_chunk::<HEADER_LEN>() {
        let header = FrameHeader::parse(head, sequence).unwrap();
        let (payload, behind) = behind.split_at(header.payload_len());
        let mut body: &[u8] = &[];
        rest = behind;
        match Frame::decode(&header, payload, Side::Source).unwrap() {
            Frame::Message(message) => out.extend(encode(&message, sequence).unwrap()),
            Frame::Bulk(mut bulk) => {
                (body, rest) = rest.split_at(usize::try_from(bulk.body_len()).unwrap());
                if let Bulk::DeviceData { device, .. } = &mut bulk {
                    *device ^= u16::from(swap);
                }
                let frame = encode_bulk(&bulk, sequence).unwrap();
                out.extend(frame.parts().concat());
            }
            other => panic!("{other:?}"),
        }
        out.extend(body);
        sequence += 1;
    }
    out.extend(&sound[sound.len() - TRAILER..]);
    out
}
