//! Whole migrations of a toy machine: every transport, every kind of device, what arrives and what is left behind.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::toy::*;
use vfio_migration::{
    Control, Destination, IncomingError, InjectedFault, Machine, MigrateError, Source, SourceOptions, inject,
};
use vfio_migration_compat::{Reason, SessionCode};
use vfio_migration_types::{Epoch, GuestOutcome, MigrationFlags, PAGE_SIZE, PauseCause, Phase, RamOffset};

fn verified() -> SourceOptions {
    let mut options = tls_source();
    options.verify = true;
    options.downtime_limit = Duration::from_secs(2);
    options
}

fn moves_over(uri: &str, plan: &Plan) -> (vfio_migration::Completed, Arc<Toy>) {
    let source = Toy::booted(plan);
    source.prove_running();
    let (completed, arrived, destination) =
        migrate(&source, plan, uri, verified(), tls_destination()).unwrap();
    prove_moved(&source, &destination);
    destination.prove_running();
    assert!(completed.guest.runs() && arrived.report.guest.runs());
    assert_eq!(completed.ram_digest_match, Some(true));
    assert_eq!((completed.epoch, arrived.epoch), (Epoch(1), Epoch(1)));
    let downtime = completed.downtime.unwrap();
    assert!(completed.one_clock && downtime > Duration::ZERO && downtime < completed.total);
    assert_eq!(completed.bytes, arrived.report.bytes);
    (completed, destination)
}

#[test]
fn it_moves_over_tcp() {
    let (completed, destination) = moves_over("tcp:127.0.0.1:0", &Plan::default());
    assert_eq!(completed.transport, "tcp");
    assert!(completed.bytes.device_precopy > 0 && completed.bytes.device_stopcopy > 0);
    assert_eq!(completed.vectors, 2);
    let phases: Vec<Phase> = completed.phases.iter().map(|phase| phase.phase).collect();
    assert_eq!(phases, Phase::ALL.to_vec());
    // The order of P6 and P8: the interrupt controller, config space, routes, interrupts, RESUMING to STOP, P2P, vCPUs.
    let order = destination.journal.lock().unwrap().clone();
    let expected = [
        "toy0 RESUMING",
        "load",
        "toy0 config",
        "toy0 stage",
        "commit",
        "toy0 connect",
        "toy0 STOP",
        "toy0 RUNNING_P2P",
        "toy0 RUNNING",
        "resume",
    ];
    assert_eq!(order, expected);
}

#[test]
fn it_moves_over_ipv6_and_unix() {
    moves_over("tcp:[::1]:0", &Plan::default());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let (completed, _) = moves_over(&format!("unix:{}", path.display()), &Plan::default());
    assert_eq!(completed.transport, "unix");
    assert!(!path.exists(), "the socket file was left behind");
}

#[test]
fn it_moves_over_descriptors_that_were_handed_over() {
    let plan = Plan::default();
    let (here, there) = std::os::unix::net::UnixStream::pair().unwrap();
    let number = std::os::fd::AsRawFd::as_raw_fd(&there);
    let source = Toy::booted(&plan);
    let destination = Toy::new(&plan);
    let built = destination.clone();
    let mut incoming =
        vfio_migration::Destination::listen(&vfio_migration::Uri::Fd(number), tls_destination()).unwrap();
    std::thread::scope(|scope| {
        let arriving = scope.spawn(move || incoming.accept(|_| Ok(built as Arc<dyn Machine>)));
        let completed = Source::new(source.clone(), verified()).migrate_over(here.into(), |_| {}).unwrap();
        assert_eq!(completed.transport, "fd");
        arriving.join().unwrap().unwrap();
    });
    prove_moved(&source, &destination);
}

/// Paravirtual clocks are written into RAM when a machine is read out, with the guest paused: the last report comes after.
#[test]
fn what_reading_the_machine_out_writes_arrives() {
    let plan = Plan { devices: vec![], ..Plan::default() };
    let source = Toy::booted(&plan);
    let mut options = verified();
    // No digest is compared: a page that was left out would arrive as it was.
    options.verify = false;
    let both = migrate(&source, &plan, "tcp:127.0.0.1:0", options, tls_destination());
    let (_, _, destination) = both.unwrap();
    assert!(source.clock() > 0);
    assert_eq!(destination.clock(), source.clock());
}

#[test]
fn several_devices_of_every_kind_move_together() {
    let kind = |p2p, pre_copy, precopy_info| FakeDeviceKind {
        flags: MigrationFlags { p2p, pre_copy },
        precopy_info,
        ..FakeDeviceKind::default()
    };
    let devices = vec![kind(true, true, true), kind(true, false, false), kind(true, true, false)];
    let plan = Plan { devices, ..Plan::default() };
    let (completed, destination) = moves_over("tcp:127.0.0.1:0", &plan);
    assert_eq!(completed.vectors, 6);
    assert!(completed.devices[0].precopy > 0 && completed.devices[2].precopy > 0);
    assert_eq!(completed.devices[1].precopy, 0);
    // Both barriers: no device runs before all have reached RUNNING_P2P.
    let order = destination.journal.lock().unwrap().clone();
    let last_p2p = order.iter().rposition(|line| line.ends_with("RUNNING_P2P")).unwrap();
    let first_running = order.iter().position(|line| line.ends_with(" RUNNING")).unwrap();
    assert!(last_p2p < first_running, "{order:?}");
    assert_eq!(order.iter().filter(|line| *line == "commit").count(), 1);
}

/// The one reason for which a source refused, before it talked to anybody.
fn refused_alone(source: Result<vfio_migration::Completed, MigrateError>) -> Reason {
    let Err(MigrateError::Refused(reasons)) = source else { panic!("{source:?}") };
    let [reason] = reasons.try_into().unwrap();
    reason
}

#[test]
fn several_devices_without_p2p_are_refused_by_name() {
    let bare =
        FakeDeviceKind { flags: MigrationFlags { p2p: false, pre_copy: true }, ..FakeDeviceKind::default() };
    let plan = Plan { devices: vec![FakeDeviceKind::default(), bare], ..Plan::default() };
    let source = Toy::booted(&plan);
    let both = migrate(&source, &plan, "tcp:127.0.0.1:0", verified(), tls_destination());
    let reason = refused_alone(both.source);
    assert_eq!((&*reason.code, reason.device.as_deref()), ("p2p-missing", Some("toy1")));
    source.prove_running();
    let mut options = verified();
    options.no_peer_dma = true;
    migrate(&source, &plan, "tcp:127.0.0.1:0", options, tls_destination()).unwrap();
}

#[test]
fn a_device_without_a_dirty_log_is_refused_unless_allowed() {
    let plan = Plan {
        devices: vec![FakeDeviceKind { dirty_log: false, ..FakeDeviceKind::default() }],
        ..Plan::default()
    };
    let source = Toy::booted(&plan);
    let both = migrate(&source, &plan, "tcp:127.0.0.1:0", verified(), tls_destination());
    let reason = refused_alone(both.source);
    assert_eq!((&*reason.code, reason.device.as_deref()), ("dirty-none", Some("toy0")));
    let mut options = verified();
    options.allow_all_dirty = true;
    let (_, _, destination) = migrate(&source, &plan, "tcp:127.0.0.1:0", options, tls_destination()).unwrap();
    prove_moved(&source, &destination);
}

#[test]
fn another_layout_of_ram_is_refused_and_the_guest_never_notices() {
    let plan = Plan::default();
    let source = Toy::booted(&plan);
    let other = Plan { pages: 1024, ..Plan::default() };
    let both = migrate(&source, &other, "tcp:127.0.0.1:0", verified(), tls_destination());
    assert!(
        matches!(&both.source, Err(MigrateError::Refused(reasons)) if !reasons.is_empty()),
        "{:?}",
        both.source
    );
    assert!(matches!(both.destination, Err(IncomingError::Refused(_))));
    assert_eq!(source.journal.lock().unwrap().len(), 0, "the guest was touched");
    source.prove_running();
}

#[test]
fn a_builder_that_refuses_is_heard() {
    let source = Toy::booted(&Plan::default());
    let mut destination =
        vfio_migration::Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), tls_destination()).unwrap();
    let to = destination.local().clone();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let full = Reason::new(SessionCode::Machine, "this host is full");
            destination.accept(|_| Err::<Arc<dyn Machine>, _>(full.into())).unwrap_err()
        });
        let error = Source::new(source.clone(), verified()).migrate_to(&to, |_| {}).unwrap_err();
        assert!(error.to_string().contains("this host is full"), "{error}");
    });
    source.prove_running();
}

#[test]
fn a_paused_guest_arrives_paused() {
    let plan = Plan::default();
    let source = Toy::booted(&plan);
    source.pause().unwrap();
    let (completed, arrived, destination) =
        migrate(&source, &plan, "tcp:127.0.0.1:0", verified(), tls_destination()).unwrap();
    assert_eq!((completed.guest, completed.downtime), (GuestOutcome::Paused, None));
    assert_eq!(arrived.report.guest, GuestOutcome::Paused);
    prove_moved(&source, &destination);
    destination.prove_standing();
    assert_eq!(destination.journal.lock().unwrap().last().map(String::as_str), Some("stand"));
    destination.resume(true).unwrap();
    destination.prove_running();
}

#[test]
fn new_initial_bytes_are_loaded_before_the_switchover() {
    let plan = Plan::default();
    let source = Toy::booted(&plan);
    source.device(0).begin_anew();
    let (completed, _, destination) =
        migrate(&source, &plan, "tcp:127.0.0.1:0", verified(), tls_destination()).unwrap();
    prove_moved(&source, &destination);
    // The whole state was sent twice in pre-copy.
    assert!(completed.bytes.device_precopy > 2 * 300 * 512, "{completed:?}");
}

#[test]
fn cancelled_while_it_iterates_the_guest_goes_on() {
    let plan = Plan::default();
    let source = Toy::booted(&plan);
    let mut options = verified();
    options.bandwidth = Some(1 << 20);
    let cancelled = Arc::new(std::sync::Mutex::new(None));
    let at = cancelled.clone();
    let both = migrate_by(
        &source,
        &plan,
        "tcp:127.0.0.1:0",
        options,
        tls_destination(),
        |_, to| to.clone(),
        |control| {
            std::thread::spawn(move || {
                wait_for("some RAM to have been sent", || control.progress().bytes.ram > 200 << 10);
                *at.lock().unwrap() = Some(Instant::now());
                control.cancel();
                control.cancel();
            });
        },
    );
    let took = cancelled.lock().unwrap().unwrap().elapsed();
    let Err(MigrateError::Aborted(aborted)) = both.source else { panic!("{:?}", both.source) };
    assert!(aborted.cancelled && aborted.restored && aborted.reset.is_empty(), "{aborted:?}");
    assert!(took < Duration::from_secs(2), "{took:?}");
    source.prove_restored();
    let Err(IncomingError::Aborted(cause)) = both.destination else { panic!("{:?}", both.destination) };
    assert!(cause.text.contains("cancelled"), "{cause}");
    assert!(both.machine.journal.lock().unwrap().contains(&"toy0 reset".to_owned()));
}

/// Flips a bit of a page, in plain text or inside TLS, in a page that the guest does not write: it is not sent again.
fn flipped(plain: bool, ram_crc: Option<bool>, verify: bool) -> (Both, Arc<Toy>) {
    let plan = Plan { devices: vec![], ..Plan::default() };
    let source = Toy::booted(&plan);
    let mut options = verified();
    (options.ram_crc, options.verify) = (ram_crc, verify);
    let mut incoming = tls_destination();
    if plain {
        (options.security, incoming.security) = (plain_source().security, plain_destination().security);
    }
    let flip = proxy::Cut::FlipToDestination(100);
    let mut proxy: Option<proxy::Proxy> = None;
    let both = migrate_by(
        &source,
        &plan,
        "tcp:127.0.0.1:0",
        options,
        incoming,
        |_, to| {
            let on_the_way = if plain { proxy::start(to, flip) } else { tls_proxy(to, flip) };
            proxy.insert(on_the_way).at.clone()
        },
        |_| {},
    );
    (both, source)
}

#[test]
fn a_bit_that_flips_in_pre_copied_ram_is_seen_by_checksums_and_digests_alone() {
    // In plain text there are checksums unless they are declined; TLS, which is ended here by who flips, has its own.
    for (plain, ram_crc) in [(true, None), (true, Some(true)), (false, Some(true))] {
        let (both, source) = flipped(plain, ram_crc, false);
        let Err(MigrateError::Aborted(aborted)) = both.source else { panic!("{:?}", both.source) };
        assert!(aborted.restored && aborted.cause.text.contains("pages damaged"), "{aborted}");
        source.prove_restored();
    }
    let (both, source) = flipped(true, Some(false), true);
    let Err(MigrateError::Aborted(aborted)) = both.source else { panic!("{:?}", both.source) };
    assert!(aborted.cause.text.contains("digest"), "{aborted}");
    source.prove_restored();
    for (plain, ram_crc) in [(true, Some(false)), (false, None)] {
        let (both, source) = flipped(plain, ram_crc, false);
        let (.., destination) = both.unwrap();
        assert_ne!(Some(source.ram().digest().unwrap()), *destination.loaded_digest.lock().unwrap());
    }
}

#[test]
fn a_guest_arrives_paused_where_either_side_asks_for_it() {
    let plan = Plan::default();
    for (asked_here, asked_there) in [(true, false), (false, true)] {
        let source = Toy::booted(&plan);
        let (mut options, mut incoming) = (verified(), tls_destination());
        (options.suspend, incoming.suspend) = (asked_here, asked_there);
        let (completed, arrived, destination) =
            migrate(&source, &plan, "tcp:127.0.0.1:0", options, incoming).unwrap();
        assert_eq!((completed.guest, completed.downtime), (GuestOutcome::Paused, None));
        assert_eq!(arrived.report.guest, GuestOutcome::Paused);
        let cause = if asked_here { PauseCause::SourceAsked } else { PauseCause::DestinationAsked };
        assert_eq!((completed.paused, arrived.report.paused), (Some(cause), Some(cause)));
        prove_moved(&source, &destination);
        destination.prove_standing();
        destination.resume(true).unwrap();
        destination.prove_running();
    }
}

/// The source's guest is to arrive paused: where it does not leave, it runs on.
#[test]
fn a_guest_that_was_to_arrive_paused_and_does_not_leave_runs_on() {
    let slow = FakeDeviceKind { slow_stop: Duration::from_millis(600), ..FakeDeviceKind::default() };
    let plan = Plan { devices: vec![slow], ..Plan::default() };
    let source = Toy::booted(&plan);
    let mut options = tls_source();
    options.downtime_limit = Duration::from_millis(200);
    options.suspend = true;
    let both = migrate(&source, &plan, "tcp:127.0.0.1:0", options, tls_destination());
    let Err(MigrateError::Aborted(aborted)) = both.source else { panic!("{:?}", both.source) };
    assert!(aborted.restored, "{aborted}");
    source.prove_restored();
}

/// The word is heard only while the session waits for it, which it does not where the guest has just dirtied too much.
pub(crate) fn continue_until_heard(control: &Control) {
    wait_for("the switchover", || {
        control.continue_switchover();
        control.progress().phase > Phase::Iterate
    });
}

#[test]
fn it_waits_before_the_switchover_when_asked() {
    let plan = Plan::default();
    let source = Toy::booted(&plan);
    let mut options = verified();
    options.pause_before_switchover = true;
    let both = migrate_by(
        &source,
        &plan,
        "tcp:127.0.0.1:0",
        options,
        tls_destination(),
        |_, to| to.clone(),
        |control| {
            let source = source.clone();
            std::thread::spawn(move || {
                wait_for("the wait", || control.progress().waiting);
                source.prove_running();
                continue_until_heard(&control);
            });
        },
    );
    both.unwrap();
}

#[test]
fn above_the_downtime_limit_the_guest_goes_on_here() {
    let slow = FakeDeviceKind { slow_stop: Duration::from_millis(600), ..FakeDeviceKind::default() };
    let plan = Plan { devices: vec![slow], ..Plan::default() };
    let source = Toy::booted(&plan);
    let mut options = tls_source();
    options.downtime_limit = Duration::from_millis(200);
    let both = migrate(&source, &plan, "tcp:127.0.0.1:0", options, tls_destination());
    let Err(MigrateError::Aborted(aborted)) = both.source else { panic!("{:?}", both.source) };
    assert!(aborted.restored && aborted.cause.text.contains("limit"), "{aborted}");
    source.prove_restored();
    assert!(both.destination.is_err());
}

#[test]
fn the_bandwidth_cap_holds_while_the_guest_runs() {
    let plan = Plan::default();
    let source = Toy::booted(&plan);
    let mut options = verified();
    options.bandwidth = Some(8 << 20);
    let (completed, ..) = migrate(&source, &plan, "tcp:127.0.0.1:0", options, tls_destination()).unwrap();
    // Five megabytes of RAM at 8 MiB/s.
    assert!(completed.total > Duration::from_millis(450), "{completed:?}");
}

/// A migration with a fault injected where it belongs.
fn faulty(fault: impl Fn(std::ops::Range<RamOffset>) -> InjectedFault, verify: bool) -> (Both, Arc<Toy>) {
    let plan = Plan::default();
    let source = Toy::booted(&plan);
    let machine = Toy::new(&plan);
    let mut options = verified();
    options.verify = verify;
    // On a busy machine a whole migration may pass before the guest's thread writes once, and what was kept of a page, or
    // hidden, would still be what it holds. So the switchover waits until each hot page was written after its first copy.
    options.pause_before_switchover = true;
    // The guest's hot pages, and nothing else.
    let fault = fault(RamOffset(0)..RamOffset(64 * PAGE_SIZE));
    let (mut here, mut there): (Arc<dyn Machine>, Arc<dyn Machine>) = (source.clone(), machine.clone());
    match fault {
        InjectedFault::StalePages(_) => there = inject(there, fault),
        _ => here = inject(here, fault),
    }
    let mut destination =
        Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), tls_destination()).unwrap();
    let to = destination.local().clone();
    let (source_ended, destination_ended) = std::thread::scope(|scope| {
        let arriving = scope.spawn(move || destination.accept(|_| Ok(there)));
        let session = Source::new(here, options);
        let control = session.control();
        let written = &source.sequence;
        scope.spawn(move || {
            wait_for("the first copies to have been sent", || control.progress().waiting);
            let then = written.load(Ordering::Relaxed);
            wait_for("each hot page to be written again", || {
                written.load(Ordering::Relaxed) > then + plan.hot
            });
            continue_until_heard(&control);
        });
        (session.migrate_to(&to, |_| {}), arriving.join().unwrap())
    });
    (Both { source: source_ended, destination: destination_ended, machine }, source)
}

#[test]
fn the_digests_see_a_lost_page_and_a_stale_one() {
    type Kind = fn(std::ops::Range<RamOffset>) -> InjectedFault;
    let kinds: [(&str, Kind); 2] =
        [("a lost page", InjectedFault::HideDirtyPages), ("a stale page", InjectedFault::StalePages)];
    for (what, kind) in kinds {
        let (both, source) = faulty(kind, true);
        let Err(MigrateError::Aborted(aborted)) = both.source else { panic!("{what}: {:?}", both.source) };
        let text = &aborted.cause.text;
        assert!(text.contains("digest"), "{aborted}");
        source.prove_restored();
        // The page named is the first of those that were not the source's when nobody wrote any more. A guest that never
        // ran at the destination has changed nothing there.
        let page = usize::try_from(PAGE_SIZE).unwrap();
        let sent = source.saved_hot.lock().unwrap().clone();
        let mut got = vec![0; sent.len()];
        both.machine.ram().read(RamOffset(0), &mut got).unwrap();
        let first = sent.chunks(page).zip(got.chunks(page)).position(|(sent, got)| sent != got).unwrap();
        let at = first * page;
        let named = format!("at guest address {at:#x}, RAM offset {at:#x}, for these logs to report: ");
        assert!(text.contains(&named), "{named}: {text}");
        // Nobody's DMA is bounded here: any of the source's logs may have missed it.
        assert!(text.ends_with(": toy0, vcpu"), "{text}");
        // The same with the digests blind: only what is in RAM can tell.
        let (both, source) = faulty(kind, false);
        let (.., destination) = both.unwrap();
        let here = source.ram().digest().unwrap();
        assert_ne!(Some(here), *destination.loaded_digest.lock().unwrap(), "{what} broke nothing");
    }
}
