//! Rehearsals, probes, refusals and maps over real sockets: after each, both sides are as they were.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::toy::{self, FakeDeviceKind, Plan, Toy, tls_destination, tls_source};
use vfio_migration::{
    Basis, Destination, DestinationOptions, Expectation, IncomingError, Machine, MigrateError, Rehearsal,
    Rehearse, Source, SourceOptions, probe,
};
use vfio_migration_compat::{Allow, DeviceMap, Policy, Severity, Verdict};
use vfio_migration_types::{DeviceId, Epoch, MigrationState, VmId};

fn slow() -> SourceOptions {
    let mut options = tls_source();
    // Shared machines stall: the limit has tests of its own.
    options.downtime_limit = Duration::from_secs(10);
    options
}

struct Rehearsed {
    source: Result<Rehearsal, MigrateError>,
    destination: IncomingError,
    machine: Arc<Toy>,
}

/// Rehearses `source` to a new toy of `plan`.
fn rehearse(
    source: &Arc<Toy>,
    plan: &Plan,
    how: Rehearse,
    options: SourceOptions,
    mut incoming: DestinationOptions,
) -> Rehearsed {
    // A source that never came is seen by its error, not by a test that hangs.
    incoming.accept_timeout = Some(Duration::from_secs(30));
    let mut destination = Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), incoming).unwrap();
    let to = destination.local().clone();
    let machine = Toy::new(plan);
    let built: Arc<dyn Machine> = machine.clone();
    std::thread::scope(|scope| {
        let arriving = scope.spawn(move || destination.accept(|_| Ok(built)).unwrap_err());
        let source = Source::new(source.clone(), options).rehearse_to(&to, how, |_| {});
        Rehearsed { source, destination: arriving.join().unwrap(), machine }
    })
}

/// The guest runs as before, nothing is logged, and the destination's machine is as it was built.
fn no_trace(source: &Toy, destination: &Toy) {
    source.prove_restored();
    destination.prove_standing();
    assert!(!destination.locked.load(Ordering::Relaxed), "the destination took the storage lock");
    let device = destination.device(0);
    assert!(device.log_is_off() && device.at() == MigrationState::Running, "{}", device.at());
}

#[test]
fn a_rehearsal_leaves_no_trace() {
    let plan = Plan::default();
    let source = Toy::booted(&plan);
    for how in [Rehearse::Ask, Rehearse::Precopy, Rehearse::Switchover] {
        let touched = source.journal.lock().unwrap().len();
        let both = rehearse(&source, &plan, how, slow(), tls_destination());
        let found = both.source.unwrap();
        let IncomingError::Rehearsed(here) = both.destination else { panic!("{:?}", both.destination) };
        assert!(here.refused.is_empty() && here.cause.is_none(), "{here}");
        assert_eq!((found.obstacle.clone(), found.left_undone.clone()), (None, None), "{found:?}");
        assert_eq!(found.report.verdict, Verdict::Live, "{:?}", found.report);
        no_trace(&source, &both.machine);
        let paused = source.journal.lock().unwrap()[touched..].iter().any(|step| step == "pause");
        assert_eq!(paused, how == Rehearse::Switchover, "{how:?}");
    }
}

#[test]
fn a_rehearsal_goes_over_a_descriptor_that_was_handed_over() {
    let plan = Plan::default();
    let (here, there) = std::os::unix::net::UnixStream::pair().unwrap();
    let uri = vfio_migration::Uri::Fd(std::os::fd::AsRawFd::as_raw_fd(&there));
    let (source, machine) = (Toy::booted(&plan), Toy::new(&plan));
    let built: Arc<dyn Machine> = machine.clone();
    let mut incoming = Destination::listen(&uri, tls_destination()).unwrap();
    std::thread::scope(|scope| {
        let arriving = scope.spawn(move || incoming.accept(|_| Ok(built)).unwrap_err());
        let rehearsal =
            Source::new(source.clone(), slow()).rehearse_over(here.into(), Rehearse::Switchover, |_| {});
        assert_eq!(rehearsal.unwrap().report.verdict, Verdict::Live);
        assert!(matches!(arriving.join().unwrap(), IncomingError::Rehearsed(_)));
    });
    no_trace(&source, &machine);
}

#[test]
fn what_is_measured_is_told_from_what_is_not() {
    let plan = Plan::default();
    let source = Toy::booted(&plan);
    let ask = rehearse(&source, &plan, Rehearse::Ask, slow(), tls_destination());
    let asked = ask.source.unwrap();
    assert_eq!((asked.predicted_downtime, asked.parts.len(), asked.bytes.ram), (None, 0, 0));

    let pre = rehearse(&source, &plan, Rehearse::Precopy, slow(), tls_destination());
    let found = pre.source.unwrap();
    let basis = |name: &str| found.parts.iter().find(|part| part.name == name).map(|part| part.basis);
    assert_eq!(basis("ram"), Some(Basis::Measured));
    assert_eq!((basis("quiesce"), basis("start")), (Some(Basis::Unknown), Some(Basis::Unknown)));
    assert!(found.rates.wire.is_some() && found.rates.load.is_some() && found.bytes.ram > 0, "{found:?}");

    let stood = rehearse(&source, &plan, Rehearse::Switchover, slow(), tls_destination());
    let found = stood.source.unwrap();
    let names: Vec<&str> = found.parts.iter().map(|part| part.name.as_str()).collect();
    assert_eq!(names, ["quiesce", "final", "load", "round-trips", "start"]);
    assert!(found.parts[..4].iter().all(|part| part.basis == Basis::Measured));
    source.prove_running();
}

#[test]
fn a_rehearsal_is_in_no_journal() {
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = (dir.path().join("here"), dir.path().join("there"));
    let plan = Plan::default();
    let source = Toy::booted(&plan);
    let (mut options, mut incoming) = (slow(), tls_destination());
    options.state_dir = Some(here.clone());
    incoming.state_dir = Some(there.clone());
    rehearse(&source, &plan, Rehearse::Switchover, options, incoming).source.unwrap();
    assert!(!here.exists() && !there.exists(), "a rehearsal wrote into a state directory");
}

#[test]
fn a_rehearsal_can_be_cancelled() {
    let plan = Plan::default();
    let source = Toy::booted(&plan);
    let mut destination =
        Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), tls_destination()).unwrap();
    let to = destination.local().clone();
    let machine = Toy::new(&plan);
    let built: Arc<dyn Machine> = machine.clone();
    std::thread::scope(|scope| {
        let arriving = scope.spawn(move || destination.accept(|_| Ok(built)).unwrap_err());
        let session = Source::new(source.clone(), slow());
        let control = session.control();
        let result = session.rehearse_to(&to, Rehearse::Precopy, |progress| {
            if progress.iteration > 0 {
                control.cancel();
            }
        });
        let Err(MigrateError::Aborted(aborted)) = result else { panic!("{result:?}") };
        assert!(aborted.cancelled && aborted.restored, "{aborted}");
        assert!(matches!(arriving.join().unwrap(), IncomingError::Rehearsed(_)));
    });
    no_trace(&source, &machine);
}

#[test]
fn a_policy_of_either_side_is_heard_by_both() {
    let plan = Plan::default();
    let strict = Policy { max_state_size: Some(1000), ..Policy::default() };
    for here in [true, false] {
        let source = Toy::booted(&plan);
        let (mut options, mut incoming) = (slow(), tls_destination());
        if here {
            options.policy = strict.clone();
        } else {
            incoming.policy = strict.clone();
        }
        // What the source's own policy forbids of its own devices is refused before anybody is asked, unless that is all that is
        // wanted.
        let how = if here { Rehearse::Ask } else { Rehearse::Precopy };
        let both = rehearse(&source, &plan, how, options, incoming);
        let Err(MigrateError::Refused(ours)) = &both.source else { panic!("{:?}", both.source) };
        let IncomingError::Rehearsed(theirs) = &both.destination else { panic!("{:?}", both.destination) };
        assert!(ours.iter().any(|reason| reason.code == "policy-state-size"), "{ours:?}");
        assert_eq!(*ours, theirs.refused, "both users hear the same");
        assert_eq!(source.journal.lock().unwrap().len(), 0, "the guest was touched");
        source.prove_running();
    }
}

#[test]
fn what_a_policy_allows_is_a_warning() {
    let plan = Plan { devices: vec![FakeDeviceKind::default()], ..Plan::default() };
    let other =
        Plan { devices: vec![FakeDeviceKind { vectors: 9, ..FakeDeviceKind::default() }], ..Plan::default() };
    let source = Toy::booted(&plan);
    let refused = rehearse(&source, &other, Rehearse::Ask, slow(), tls_destination()).source.unwrap_err();
    let report = refused.report().expect("it is a refusal");
    assert_eq!((report.verdict, report.reasons[0].code.as_str()), (Verdict::No, "device-irqs"), "{report:?}");

    let allow = Allow { code: "device-irqs".into(), reason: Some("tried".into()), ..Allow::default() };
    let policy = Policy { allow: vec![allow], ..Policy::default() };
    let (mut options, mut incoming) = (slow(), tls_destination());
    options.policy = policy.clone();
    incoming.policy = policy;
    let found = rehearse(&source, &other, Rehearse::Ask, options, incoming).source.unwrap();
    assert_eq!(found.report.verdict, Verdict::LiveWithWarning);
    assert_eq!(found.report.reasons[0].severity, Severity::Warning);
}

#[test]
fn devices_may_have_other_names() {
    let named = |name: &str| Plan {
        devices: vec![FakeDeviceKind { name: Some(name.into()), ..FakeDeviceKind::default() }],
        ..Plan::default()
    };
    let source = Toy::booted(&named("net0"));
    let id = |name: &str| DeviceId::new(name).unwrap();
    let mut options = slow();
    options.device_map = DeviceMap::from_iter([(id("net0"), id("nic7"))]);
    options.verify = true;
    let both = toy::migrate(&source, &named("nic7"), "tcp:127.0.0.1:0", options, tls_destination());
    let (completed, _, destination) = both.unwrap();
    assert_eq!(completed.report.map.get("net0").map(String::as_str), Some("nic7"));
    toy::prove_moved(&source, &destination);

    let source = Toy::booted(&named("net0"));
    let both = toy::migrate(&source, &named("nic7"), "tcp:127.0.0.1:0", slow(), tls_destination());
    let Err(MigrateError::Refused(reasons)) = &both.source else { panic!("{:?}", both.source) };
    assert!(reasons.iter().any(|reason| reason.code == "device-missing"), "{reasons:?}");
}

#[test]
fn a_manifest_alone_can_ask() {
    let plan = Plan::default();
    let paper = Toy::new(&plan);
    for (other, verdict) in
        [(plan.clone(), Verdict::Live), (Plan { pages: 1024, ..plan.clone() }, Verdict::No)]
    {
        let incoming = tls_destination();
        let mut destination = Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), incoming).unwrap();
        let to = destination.local().clone();
        let built: Arc<dyn Machine> = Toy::new(&other);
        let arriving = std::thread::spawn(move || destination.accept(|_| Ok(built)).unwrap_err());
        let report = probe(paper.manifest().unwrap(), Some(paper.id()), &to, slow(), |_| {}).unwrap();
        assert_eq!(report.verdict, verdict, "{report:?}");
        let there = arriving.join().unwrap();
        assert!(matches!(there, IncomingError::Rehearsed(_)), "{there:?}");
    }
}

/// Of who names no VM nothing is expected of it, and everything else is.
#[test]
fn a_question_without_a_vm_is_answered_for_the_rest() {
    let plan = Plan::default();
    let paper = Toy::new(&plan);
    let expectation = Expectation {
        vm: Some(VmId([9; 16])),
        min_epoch: Epoch(7),
        max_memory: Some(1 << 30),
        ..Expectation::default()
    };
    let small = Expectation { max_memory: Some(4096), ..expectation.clone() };
    for (expected, vm, code) in [
        (&expectation, None, None),
        (&expectation, Some(paper.id()), Some("other-vm")),
        (&expectation, Some(VmId([9; 16])), Some("old-epoch")),
        (&small, None, Some("too-large")),
    ] {
        let mut incoming = tls_destination();
        incoming.expect = expected.clone().into();
        let mut destination = Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), incoming).unwrap();
        let (to, control) = (destination.local().clone(), destination.control());
        let built: Arc<dyn Machine> = Toy::new(&plan);
        let arriving = std::thread::spawn(move || destination.accept(|_| Ok(built)).unwrap_err());
        let report = probe(paper.manifest().unwrap(), vm, &to, slow(), |_| {}).unwrap();
        let codes: Vec<_> = report.reasons.iter().map(|reason| reason.code.as_str()).collect();
        assert_eq!(codes, Vec::from_iter(code), "{vm:?}");
        // Who brings what is not expected does not end the wait.
        control.cancel();
        arriving.join().unwrap();
    }
}

#[test]
fn a_machine_that_changes_under_way_stays() {
    let plan = Plan::default();
    let source = Toy::booted(&plan);
    let toy = source.clone();
    let mut options = slow();
    options.pause_before_switchover = true;
    let mut destination =
        Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), tls_destination()).unwrap();
    let to = destination.local().clone();
    let built: Arc<dyn Machine> = Toy::new(&plan);
    std::thread::scope(|scope| {
        let arriving = scope.spawn(move || destination.accept(|_| Ok(built)).unwrap_err());
        let session = Source::new(source.clone(), options);
        let control = session.control();
        let error = session
            .migrate_to(&to, |progress| {
                if progress.waiting {
                    toy.device(0).become_another();
                    control.continue_switchover();
                }
            })
            .unwrap_err();
        assert!(error.to_string().contains("is not what was offered any more"), "{error}");
        assert!(matches!(arriving.join().unwrap(), IncomingError::Aborted(_)));
    });
    assert!(
        !source.journal.lock().unwrap().iter().any(|step| step == "pause"),
        "it cost the guest something"
    );
    source.prove_running();
}

/// Config space, BARs and interrupts are in no device's own stream: a VMM that hands over a device without its function is told,
/// by each way of asking, at either side, before anything begins.
#[test]
fn a_function_that_would_stay_behind_is_a_reason() {
    let (whole, bare) = (Plan::default(), Plan { functions: false, ..Plan::default() });
    for (from, to) in [(&bare, &bare), (&whole, &bare), (&bare, &whole)] {
        let source = Toy::booted(from);
        let ask = rehearse(&source, to, Rehearse::Ask, slow(), tls_destination());
        let moved = toy::migrate(&source, to, "tcp:127.0.0.1:0", slow(), tls_destination()).source;
        for error in [ask.source.unwrap_err(), moved.unwrap_err()] {
            assert!(matches!(error, MigrateError::Refused(_)), "{error:?}");
            let report = error.report().unwrap();
            let codes: Vec<&str> = report.reasons.iter().map(|reason| reason.code.as_str()).collect();
            assert!(codes.iter().all(|code| *code == "pci-left-behind") && !codes.is_empty(), "{codes:?}");
            assert_eq!(report.verdict, Verdict::No);
        }
        source.prove_running();
    }
    // A VMM that saves its functions among its own state says so.
    let allow = Allow { code: "pci-left-behind".into(), ..Allow::default() };
    let (mut options, mut incoming) = (slow(), tls_destination());
    options.policy.allow.push(allow);
    incoming.policy = options.policy.clone();
    let source = Toy::booted(&bare);
    let (completed, _, destination) =
        toy::migrate(&source, &bare, "tcp:127.0.0.1:0", options, incoming).unwrap();
    toy::prove_moved(&source, &destination);
    assert_eq!(completed.report.verdict, Verdict::LiveWithWarning);
    // One that has no registers and no interrupts has no function to leave behind.
    let devices = vec![FakeDeviceKind { vectors: 0, ..FakeDeviceKind::default() }];
    let none = Plan { devices, functions: false, ..Plan::default() };
    let (completed, ..) =
        toy::migrate(&Toy::booted(&none), &none, "tcp:127.0.0.1:0", slow(), tls_destination()).unwrap();
    assert_eq!(completed.report.verdict, Verdict::Live);
}
