//! Everything that can break: devices, wires, peers, disks. The guest always ends up somewhere, and exactly once.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::toy::proxy::{self, Cut};
use crate::toy::*;
use vfio_migration::{
    Destination, DestinationOptions, GuestOutcome, IncomingError, Machine, MigrateError, Side, Source,
    SourceOptions, Uri, read_journal, start_held,
};

pub(crate) fn options() -> SourceOptions {
    let mut options = tls_source();
    options.downtime_limit = Duration::from_secs(2);
    options.peer_timeout = Duration::from_secs(5);
    options
}

pub(crate) fn incoming() -> DestinationOptions {
    let mut options = tls_destination();
    options.peer_timeout = Duration::from_secs(5);
    options
}

/// Migrates to a toy that was made to fail.
fn into(source: &Arc<Toy>, machine: Arc<Toy>) -> Both {
    migrate_into(source, machine, "tcp:127.0.0.1:0", options(), incoming(), |_, to| to.clone(), |_| {})
}

pub(crate) fn small() -> Plan {
    Plan {
        pages: 256,
        hot: 16,
        devices: vec![FakeDeviceKind { pieces: 40, ..FakeDeviceKind::default() }; 2],
        ..Plan::default()
    }
}

#[test]
fn a_device_that_fails_at_the_source_is_named_and_the_guest_goes_on() {
    let plan = small();
    for fault in [
        FakeFault::BeginPrecopy,
        FakeFault::ReadPrecopy,
        FakeFault::GoP2p,
        FakeFault::GoStopCopy,
        FakeFault::ReadStopCopy,
    ] {
        let source = Toy::booted(&plan);
        source.device(1).fail_at(fault);
        let both = migrate(&source, &plan, "tcp:127.0.0.1:0", options(), incoming());
        let Err(MigrateError::Aborted(aborted)) = both.source else { panic!("{fault:?}: {:?}", both.source) };
        assert_eq!(aborted.cause.device.as_deref(), Some("toy1"), "{fault:?}: {aborted:?}");
        assert!(aborted.restored && aborted.reset.is_empty() && aborted.cause.errno.is_some(), "{aborted:?}");
        source.prove_restored();
        let Err(IncomingError::Aborted(theirs)) = both.destination else { panic!("{:?}", both.destination) };
        assert_eq!(theirs, aborted.cause, "{fault:?}: both sides return one error");
    }
}

#[test]
fn a_device_that_fails_at_the_destination_is_named_and_the_guest_goes_on() {
    let plan = small();
    for fault in [FakeFault::BeginResuming, FakeFault::Write, FakeFault::Finish] {
        let source = Toy::booted(&plan);
        let machine = Toy::new(&plan);
        machine.device(0).fail_at(fault);
        let Both { source: here, destination: there, machine } = into(&source, machine);
        let Err(MigrateError::Aborted(aborted)) = here else { panic!("{fault:?}: {here:?}") };
        assert_eq!(aborted.cause.device.as_deref(), Some("toy0"), "{fault:?}: {aborted:?}");
        assert_eq!(aborted.cause.side, Side::Destination, "{fault:?}: both sides have a toy0");
        assert!(aborted.to_string().contains("at the destination"), "{fault:?}: {aborted}");
        source.prove_restored();
        assert!(matches!(there, Err(IncomingError::Aborted(_))), "{fault:?}: {there:?}");
        let order = machine.journal.lock().unwrap().clone();
        for device in ["toy0 reset", "toy1 reset", "toy0 undo", "toy1 undo"] {
            assert!(order.iter().any(|line| line == device), "{fault:?}: {device} is missing in {order:?}");
        }
    }
}

#[test]
fn a_device_that_cannot_go_back_is_reset_and_named() {
    let plan = small();
    let source = Toy::booted(&plan);
    source.device(0).fail_at(FakeFault::BackToRunning);
    source.device(1).fail_at(FakeFault::ReadStopCopy);
    let both = migrate(&source, &plan, "tcp:127.0.0.1:0", options(), incoming());
    let Err(MigrateError::Aborted(aborted)) = both.source else { panic!("{:?}", both.source) };
    assert_eq!(aborted.reset.iter().map(|id| id.as_str()).collect::<Vec<_>>(), ["toy0"]);
    assert!(!aborted.is_as_before() && !aborted.to_string().contains("as it was before"), "{aborted}");
    source.prove_restored();
}

/// No device may reach for another's memory before that one answers: on the way back as on the way there.
#[test]
fn the_way_back_from_stop_copy_has_the_p2p_barrier() {
    let plan = small();
    let source = Toy::booted(&plan);
    source.device(1).fail_at(FakeFault::ReadStopCopy);
    let both = migrate(&source, &plan, "tcp:127.0.0.1:0", options(), incoming());
    assert!(matches!(both.source, Err(MigrateError::Aborted(_))), "{:?}", both.source);
    let order = source.journal.lock().unwrap().clone();
    let stopped = order.iter().rposition(|step| step.ends_with(" STOP_COPY")).expect("no device was stopped");
    let back = &order[stopped..];
    let at = |step: &str| back.iter().position(|noted| noted == step);
    for first in ["toy0 RUNNING_P2P", "toy1 RUNNING_P2P"] {
        for then in ["toy0 RUNNING", "toy1 RUNNING"] {
            assert!(at(first).is_some() && at(first) < at(then), "{first} before {then}: {back:?}");
        }
    }
    source.prove_restored();
}

/// The VMM says so; nothing that reads the device needs to find out.
#[test]
fn a_device_that_is_lost_while_ram_is_copied_ends_the_attempt() {
    let plan = Plan { devices: vec![FakeDeviceKind::default()], ..Plan::default() };
    let source = Toy::booted(&plan);
    let mut options = options();
    // Minutes for one pass over RAM.
    options.bandwidth = Some(32 << 10);
    let id = source.devices()[0].device.id().clone();
    let both = migrate_by(
        &source,
        &plan,
        "tcp:127.0.0.1:0",
        options,
        incoming(),
        |_, to| to.clone(),
        |control| {
            std::thread::spawn(move || {
                wait_for("RAM to be copied", || control.progress().bytes.ram > 0);
                control.device_lost(&id, "device toy0 was lost");
            });
        },
    );
    let Err(MigrateError::Aborted(aborted)) = both.source else { panic!("{:?}", both.source) };
    let cause = &aborted.cause;
    assert_eq!(
        (cause.side, cause.device.as_deref(), cause.text.as_str()),
        (Side::Source, Some("toy0"), "device toy0 was lost")
    );
    let Err(IncomingError::Aborted(theirs)) = both.destination else { panic!("{:?}", both.destination) };
    assert_eq!(theirs, aborted.cause, "both sides return one error, of one side");
    source.prove_restored();
}

/// The same at the destination, where nothing is left to be written to the device: its source waits for its operator.
#[test]
fn a_device_of_the_destination_that_is_lost_while_nothing_is_written_ends_the_attempt() {
    let plan = Plan { devices: vec![FakeDeviceKind::default()], ..Plan::default() };
    let source = Toy::booted(&plan);
    let mut options = options();
    options.pause_before_switchover = true;
    let id = source.devices()[0].device.id().clone();
    let receiver = OnceLock::new();
    let both = migrate_by(
        &source,
        &plan,
        "tcp:127.0.0.1:0",
        options,
        incoming(),
        |control, to| {
            assert!(!control.device_lost(&id, "device toy0 was lost"), "no session hears it");
            receiver.set(control.clone()).unwrap();
            to.clone()
        },
        |control| {
            let (id, receiver) = (id.clone(), receiver.get().unwrap().clone());
            std::thread::spawn(move || {
                wait_for("the wait for `continue`", || control.progress().waiting);
                assert!(receiver.device_lost(&id, "device toy0 was lost"), "the session hears it");
            });
        },
    );
    let Err(MigrateError::Aborted(aborted)) = both.source else { panic!("{:?}", both.source) };
    let cause = &aborted.cause;
    assert_eq!((cause.side, cause.device.as_deref()), (Side::Destination, Some("toy0")), "{cause}");
    assert!(cause.text == "device toy0 was lost" && cause.remedy.contains("driver's log"), "{cause}");
    assert!(aborted.restored && aborted.reset.is_empty(), "{aborted:?}");
    source.prove_restored();
    let Err(IncomingError::Aborted(theirs)) = both.destination else { panic!("{:?}", both.destination) };
    assert_eq!(theirs, *cause, "both sides return one error");
}

/// A guest that was never paused goes on beside a device that is gone; one that was paused is not resumed beside it.
#[test]
fn what_is_said_of_a_guest_whose_device_is_gone_is_so() {
    let plan = small();
    for (fault, paused) in [(FakeFault::ReadPrecopy, false), (FakeFault::ReadStopCopy, true)] {
        let source = Toy::booted(&plan);
        source.device(0).fail_resets();
        source.device(0).fail_at(FakeFault::BackToRunning);
        source.device(1).fail_resets();
        source.device(1).fail_at(fault);
        let both = migrate(&source, &plan, "tcp:127.0.0.1:0", options(), incoming());
        let Err(MigrateError::Aborted(aborted)) = both.source else { panic!("{:?}", both.source) };
        let said = aborted.to_string();
        if paused {
            assert!(!aborted.restored && said.contains("nor be reset"), "{said}");
            assert_eq!(said.matches("not resumed").count(), 1, "{said}");
            source.prove_standing();
        } else {
            assert!(aborted.restored && !said.contains("paused"), "{said}");
            let before = source.sequence.load(Ordering::Relaxed);
            wait_for("the guest to run", || source.sequence.load(Ordering::Relaxed) > before + 5);
        }
    }
}

#[test]
fn a_guest_that_cannot_be_started_is_held_and_owned() {
    let plan = small();
    let source = Toy::booted(&plan);
    let machine = Toy::new(&plan);
    machine.device(0).fail_at(FakeFault::BackToRunning);
    let both = into(&source, machine);
    let Err(IncomingError::OwnedNotStarted(held)) = both.destination else {
        panic!("{:?}", both.destination)
    };
    let completed = both.source.unwrap();
    assert_eq!(completed.guest, GuestOutcome::NotStarted(Box::new(held.cause.clone())));
    assert!(!completed.guest.is_success());
    assert_eq!(completed.downtime, None, "the guest does not run yet");
    assert_eq!(held.cause.device.as_deref(), Some("toy0"));
    source.prove_standing();
    both.machine.prove_standing();
    // It can be tried again: what fails still is named, and what stops failing starts, devices first.
    let again = held.start().unwrap_err();
    assert_eq!(
        (again.side, again.arc, &again.device),
        (Side::Destination, held.cause.arc, &held.cause.device)
    );
    both.machine.prove_standing();
    both.machine.device(0).fail_at(FakeFault::ReadPrecopy);
    held.start().unwrap();
    both.machine.prove_running();
    let order = both.machine.journal.lock().unwrap().clone();
    assert_eq!(order.last().map(String::as_str), Some("resume"), "after the devices: {order:?}");
}

#[test]
fn a_lost_storage_lock_is_named_and_the_guest_held() {
    let plan = small();
    let source = Toy::booted(&plan);
    let machine = Toy::new(&plan);
    machine.lock_fault.store(true, Ordering::Relaxed);
    source.lock_fault.store(true, Ordering::Relaxed);
    let both = into(&source, machine);
    let Err(MigrateError::Aborted(aborted)) = both.source else { panic!("{:?}", both.source) };
    assert!(both.destination.is_err() && !aborted.restored && aborted.locks_lost == ["/disk"], "{aborted:?}");
    source.prove_standing();
}

/// The destination fails after the source's locks were given away, and holds them a while longer.
#[test]
fn a_storage_lock_that_is_still_held_is_waited_for() {
    let plan = small();
    let source = Toy::booted(&plan);
    let machine = Toy::new(&plan);
    machine.device(0).fail_at(FakeFault::Finish);
    source.lock_fault.store(true, Ordering::Relaxed);
    let both = std::thread::scope(|scope| {
        scope.spawn(|| {
            wait_for("a second try", || source.lock_tries.load(Ordering::Relaxed) > 1);
            source.lock_fault.store(false, Ordering::Relaxed);
        });
        into(&source, machine)
    });
    let Err(MigrateError::Aborted(aborted)) = both.source else { panic!("{:?}", both.source) };
    assert!(both.destination.is_err() && aborted.restored && aborted.locks_lost.is_empty(), "{aborted:?}");
    source.prove_restored();
}

#[test]
fn a_device_that_cannot_even_be_reset_holds_the_guest_and_is_named() {
    let plan = small();
    let source = Toy::booted(&plan);
    source.device(0).fail_at(FakeFault::BackToRunning);
    source.device(0).fail_resets();
    source.device(1).fail_at(FakeFault::ReadStopCopy);
    let both = migrate(&source, &plan, "tcp:127.0.0.1:0", options(), incoming());
    let Err(MigrateError::Aborted(aborted)) = both.source else { panic!("{:?}", both.source) };
    assert!(!aborted.restored && aborted.reset.is_empty(), "{aborted:?}");
    assert!(aborted.cause.text.contains("device toy0"), "{aborted:?}");
    source.prove_standing();
    // Nor is it let go on beside a device that is stopped, until that one goes back after all.
    let again = start_held(&*source, Side::Source).unwrap_err();
    assert_eq!((again.device.as_deref(), again.side), (Some("toy0"), Side::Source), "{again}");
    source.prove_standing();
    source.device(0).fail_at(FakeFault::ReadPrecopy);
    start_held(&*source, Side::Source).unwrap();
    source.prove_running();
}

#[test]
fn a_guest_that_cannot_be_resumed_is_not_called_restored() {
    let plan = small();
    let source = Toy::booted(&plan);
    source.device(1).fail_at(FakeFault::ReadStopCopy);
    source.resume_faults.store(1, Ordering::Relaxed);
    let both = migrate(&source, &plan, "tcp:127.0.0.1:0", options(), incoming());
    let Err(MigrateError::Aborted(aborted)) = both.source else { panic!("{:?}", both.source) };
    assert!(!aborted.restored, "{aborted:?}");
    source.prove_standing();
}

#[test]
fn a_machine_is_told_that_its_pause_ended_though_its_guest_stood_before() {
    let plan = small();
    let source = Toy::booted(&plan);
    source.pause().unwrap();
    source.device(1).fail_at(FakeFault::ReadStopCopy);
    let both = migrate(&source, &plan, "tcp:127.0.0.1:0", options(), incoming());
    let Err(MigrateError::Aborted(aborted)) = both.source else { panic!("{:?}", both.source) };
    assert!(aborted.restored, "{aborted:?}");
    let journal = source.journal.lock().unwrap().clone();
    assert_eq!(journal.iter().filter(|line| *line == "stand").count(), 1, "{journal:?}");
    assert!(!journal.iter().any(|line| line == "resume"), "{journal:?}");
    source.prove_standing();
}

#[test]
fn a_machine_that_panics_costs_nothing_but_the_attempt() {
    let plan = small();
    let source = Toy::booted(&plan);
    source.save_panics.store(true, Ordering::Relaxed);
    let both = migrate(&source, &plan, "tcp:127.0.0.1:0", options(), incoming());
    let Err(MigrateError::Aborted(aborted)) = both.source else { panic!("{:?}", both.source) };
    assert!(aborted.restored && aborted.cause.text.contains("a panic in the VMM"), "{aborted:?}");
    source.prove_restored();
    assert!(matches!(both.destination, Err(IncomingError::Aborted(_))), "{:?}", both.destination);
}

/// Options of both sides, over TLS or in plain text.
pub(crate) fn both_options(plain: bool) -> (SourceOptions, DestinationOptions) {
    let (mut ours, mut theirs) = (options(), incoming());
    if plain {
        (ours.security, theirs.security) = (plain_source().security, plain_destination().security);
    }
    (ours, theirs)
}

#[test]
fn the_journal_keeps_a_vm_that_was_given_away_from_being_given_twice() {
    let plan = small();
    let dir = tempfile::tempdir().unwrap();
    let source = Toy::booted(&plan);
    let mut ours = options();
    ours.state_dir = Some(dir.path().to_owned());
    migrate(&source, &plan, "tcp:127.0.0.1:0", ours.clone(), incoming()).unwrap();
    let both = migrate(&source, &plan, "tcp:127.0.0.1:0", ours, incoming());
    let Err(MigrateError::NotBegun(failure)) = both.source else { panic!("{:?}", both.source) };
    assert!(failure.text.contains("given away"), "{failure}");
}

/// What a destination must not be trusted with: it answers with anything, at any time.
#[test]
fn a_peer_that_speaks_garbage_costs_nothing_but_the_attempt() {
    let plan = small();
    let huge = {
        let mut frame = vfio_migration_wire::PREAMBLE.to_vec();
        let mut header = [0xff; 32];
        header[..4].copy_from_slice(b"VMIG");
        frame.extend_from_slice(&header);
        frame
    };
    let answers: Vec<(&str, Vec<u8>)> = vec![
        ("nothing", vec![]),
        ("http", b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()),
        ("half a preamble", vfio_migration_wire::PREAMBLE[..4].to_vec()),
        ("a preamble alone", vfio_migration_wire::PREAMBLE.to_vec()),
        ("lengths without end", huge),
        ("noise", (0..100_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24).to_le_bytes()[0]).collect()),
    ];
    let securities = [plain_source().security, options().security];
    for (security, (name, answer)) in
        securities.iter().flat_map(|security| answers.iter().map(move |answer| (security, answer)))
    {
        let mut ours = options();
        ours.security.clone_from(security);
        let answer = answer.clone();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let source = Toy::booted(&plan);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let (mut peer, _) = listener.accept().unwrap();
                let _ = peer.write_all(&answer);
                let _ = peer.shutdown(std::net::Shutdown::Write);
                let _ = peer.read_to_end(&mut Vec::new());
            });
            let to = Uri::Tcp { host: "127.0.0.1".into(), port };
            let begun = Instant::now();
            let over_tls = ours.security.as_ref().unwrap().is_tls();
            let error = Source::new(source.clone(), ours).migrate_to(&to, |_| {}).unwrap_err();
            match error {
                MigrateError::Aborted(_) if !over_tls => {}
                MigrateError::NotBegun(_) if over_tls => {}
                error => panic!("{name}: {error:?}"),
            }
            assert!(begun.elapsed() < Duration::from_secs(3), "{name}");
        });
        source.prove_running();
        assert_eq!(source.journal.lock().unwrap().len(), 0, "{name}: the guest was touched");
    }
}

#[test]
fn a_peer_that_says_nothing_is_given_up() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = Uri::Tcp { host: "127.0.0.1".into(), port: listener.local_addr().unwrap().port() };
    let source = Toy::booted(&small());
    for plain in [true, false] {
        let (mut ours, _) = both_options(plain);
        ours.peer_timeout = Duration::from_millis(300);
        ours.connect_timeout = Duration::from_millis(300);
        let begun = Instant::now();
        let error = Source::new(source.clone(), ours).migrate_to(&to, |_| {}).unwrap_err();
        assert!(begun.elapsed() < Duration::from_secs(3));
        match error {
            MigrateError::Aborted(_) if plain => {}
            MigrateError::NotBegun(failure) if !plain => {
                assert!(failure.remedy.contains("--tls-creds"), "{failure}")
            }
            error => panic!("{error:?}"),
        }
        source.prove_running();
    }
}

#[test]
fn nobody_at_the_address_is_said_at_once() {
    let source = Toy::booted(&small());
    let dir = tempfile::tempdir().unwrap();
    for to in [format!("unix:{}/none", dir.path().display()), "tcp:127.0.0.1:1".into(), "fd:987".into()] {
        let error =
            Source::new(source.clone(), options()).migrate_to(&to.parse().unwrap(), |_| {}).unwrap_err();
        assert!(matches!(error, MigrateError::NotBegun(_)), "{to}: {error:?}");
    }
    source.prove_running();
}

#[test]
fn strangers_at_the_door_do_not_keep_a_migration_out() {
    for plain in [true, false] {
        let plan = small();
        let source = Toy::booted(&plan);
        let (ours, theirs) = both_options(plain);
        let both = migrate_by(
            &source,
            &plan,
            "tcp:127.0.0.1:0",
            ours,
            theirs,
            |_, to| {
                let Uri::Tcp { host, port } = to else { panic!() };
                for noise in
                    [&b"GET / HTTP/1.1\r\n\r\n"[..], b"", b"VFIOMIG\x01", b"\0\0\0\0\0\0\0\0\0\0\0\0"]
                {
                    let mut stranger = std::net::TcpStream::connect((host.as_str(), *port)).unwrap();
                    stranger.write_all(noise).unwrap();
                }
                to.clone()
            },
            |_| {},
        );
        both.unwrap();
    }
}

#[test]
fn a_destination_stops_waiting_when_told() {
    let mut theirs = incoming();
    theirs.accept_timeout = Some(Duration::from_millis(50));
    let mut destination = Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), theirs).unwrap();
    let error = destination
        .accept(|_| -> Result<Arc<dyn Machine>, vfio_migration::NotBuilt> { panic!("nobody came") })
        .unwrap_err();
    assert!(matches!(error, IncomingError::NotBegun(_)), "{error:?}");
    let mut destination = Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), incoming()).unwrap();
    destination.control().cancel();
    assert!(
        destination
            .accept(|_| -> Result<Arc<dyn Machine>, vfio_migration::NotBuilt> { panic!("nobody came") })
            .is_err()
    );
}

#[test]
fn an_observer_that_panics_costs_nothing_but_the_attempt() {
    let plan = small();
    let source = Toy::booted(&plan);
    let mut destination = Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), incoming()).unwrap();
    let to = destination.local().clone();
    let built = Toy::new(&plan);
    std::thread::scope(|scope| {
        let arriving = scope.spawn(move || destination.accept(|_| Ok(built as Arc<dyn Machine>)));
        let here = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            Source::new(source.clone(), options()).migrate_to(&to, |progress| {
                assert!(progress.iteration == 0, "as intended");
            })
        }));
        assert!(here.is_err());
        assert!(matches!(arriving.join().unwrap(), Err(IncomingError::Aborted(_))));
    });
    source.prove_restored();
}

/// A wire that takes nothing more, with a peer that lives: only the operator ends that.
#[test]
fn a_stalled_wire_does_not_hold_a_cancel_up() {
    let plan = Plan { pages: 16_384, ..small() };
    let source = Toy::booted(&plan);
    let mut wire = None;
    let cancelled = Arc::new(std::sync::Mutex::new(None));
    let at = cancelled.clone();
    let both = migrate_by(
        &source,
        &plan,
        "tcp:127.0.0.1:0",
        options(),
        incoming(),
        |_, to| {
            let proxy = proxy::start(to, Cut::StallToDestination(1 << 20));
            let at = proxy.at.clone();
            wire = Some(proxy);
            at
        },
        |control| {
            std::thread::spawn(move || {
                let mut last = (0, Instant::now());
                wait_for("the stall", || {
                    let sent = control.progress().bytes.ram;
                    if sent != last.0 {
                        last = (sent, Instant::now());
                    }
                    sent > 1 << 20 && last.1.elapsed() > Duration::from_millis(600)
                });
                *at.lock().unwrap() = Some(Instant::now());
                control.cancel();
            });
        },
    );
    let took = cancelled.lock().unwrap().unwrap().elapsed();
    let Err(MigrateError::Aborted(aborted)) = both.source else { panic!("{:?}", both.source) };
    assert!(aborted.cancelled && aborted.restored, "{aborted:?}");
    assert!(took < Duration::from_millis(2500), "{took:?}");
    source.prove_restored();
    assert!(matches!(both.destination, Err(IncomingError::Aborted(_))), "{:?}", both.destination);
}

/// A host that gave the guest away knows that its epoch is over: a copy of what it was must not be run there again.
#[test]
fn an_epoch_that_a_host_has_seen_end_is_not_taken_again() {
    let plan = small();
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let at = |dir: &tempfile::TempDir| {
        let mut incoming = incoming();
        incoming.state_dir = Some(dir.path().into());
        incoming
    };
    let from = |dir: &tempfile::TempDir| {
        let mut options = options();
        options.state_dir = Some(dir.path().into());
        options
    };
    let source = Toy::booted(&plan);
    let (completed, _, moved) = migrate(&source, &plan, "tcp:127.0.0.1:0", from(&here), at(&there)).unwrap();
    assert_eq!(completed.epoch.0, 1);
    // Each journal names the other side: where the guest went, and where it came from.
    let journal = read_journal(there.path(), source.id()).unwrap().unwrap();
    let came_from = journal.destination.unwrap().peer;
    assert!(came_from.starts_with("tcp:127.0.0.1:"), "{came_from}");
    let went_to = read_journal(here.path(), source.id()).unwrap().unwrap().source.unwrap().peer;
    assert_ne!(came_from, went_to);
    // A stale copy, of a host that knows nothing of the move.
    let copy = Toy::booted(&plan);
    let both = migrate(&copy, &plan, "tcp:127.0.0.1:0", options(), at(&here));
    let Err(MigrateError::Refused(reasons)) = &both.source else { panic!("{:?}", both.source) };
    assert!(reasons[0].code == "ownership" && reasons[0].text.contains("epoch 0"), "{reasons:?}");
    assert!(matches!(both.destination, Err(IncomingError::Refused(_))), "{:?}", both.destination);
    both.machine.prove_standing();
    moved.prove_running();
    // The guest itself comes back, under a later epoch.
    let (completed, ..) = migrate(&moved, &plan, "tcp:127.0.0.1:0", from(&there), at(&here)).unwrap();
    assert_eq!(completed.epoch.0, 2);
}
