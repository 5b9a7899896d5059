//! Devices that do not answer, and an operator who cancels: while the guest runs the cancel does not wait for them, while it is
//! paused the one is named that is waited for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vfio_migration::{
    Aborted, Control, Destination, DeviceControl, DeviceFileError, IncomingControl, IncomingError, Machine,
    MigrateError, PendingRollback, Rehearse, SaveDeviceOptions, SaveError, SaveOptions, Source,
    SourceOptions, Uri, save, save_device,
};
use vfio_migration_types::{MigrationState as State, Phase};

use crate::toy::*;

/// The second in which a cancel ends, and what a busy host adds to it.
const WITHIN: Duration = Duration::from_secs(3);
/// Every limit that a wait has of its own.
const FAR: Duration = Duration::from_secs(60);

fn plan() -> Plan {
    let small = FakeDeviceKind { pieces: 30, ..FakeDeviceKind::default() };
    Plan { pages: 64, hot: 8, devices: vec![small.clone(), small], ..Plan::default() }
}

fn patient() -> SourceOptions {
    let mut options = tls_source();
    options.peer_timeout = FAR;
    options.downtime_limit = FAR;
    options
}

/// An attempt against a destination that takes it in, and what became of it.
struct Attempt {
    error: MigrateError,
    there: IncomingError,
    /// From the cancel to the source's end, and to the destination's.
    took: Duration,
    destination_took: Duration,
    control: Control,
}

impl Attempt {
    /// Runs one that is cancelled when a device `hangs`; `after` is called when it was.
    fn cancelled(
        toy: &Arc<Toy>,
        there: &Arc<Toy>,
        rehearse: Option<Rehearse>,
        hangs: impl Fn() -> bool + Send,
        after: impl FnOnce(&Control, &IncomingControl) + Send,
    ) -> Self {
        let cancel = |control: &Control, _: &IncomingControl| control.cancel();
        Self::given_up(toy, there, rehearse, hangs, cancel, |control, receiving, _, _| {
            after(control, receiving)
        })
    }

    /// The same, given up as `cancel` says; `after` also gets the address, and whether the source has ended.
    fn given_up(
        toy: &Arc<Toy>,
        there: &Arc<Toy>,
        rehearse: Option<Rehearse>,
        hangs: impl Fn() -> bool + Send,
        cancel: impl FnOnce(&Control, &IncomingControl) + Send,
        after: impl FnOnce(&Control, &IncomingControl, &Uri, &AtomicBool) + Send,
    ) -> Self {
        let source_ended = AtomicBool::new(false);
        let mut incoming = tls_destination();
        incoming.peer_timeout = FAR;
        let mut destination = Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), incoming).unwrap();
        let (to, receiving) = (destination.local().clone(), destination.control());
        let built = Arc::clone(there);
        let source = Source::new(toy.clone(), patient());
        let control = source.control();
        std::thread::scope(|scope| {
            let arriving = scope.spawn(move || {
                let there = destination.accept(|_| Ok(built as Arc<dyn Machine>)).unwrap_err();
                (there, Instant::now())
            });
            let cancelling = scope.spawn(|| {
                wait_for("the device to hang", hangs);
                let at = Instant::now();
                cancel(&control, &receiving);
                after(&control, &receiving, &to, &source_ended);
                at
            });
            let ended = match rehearse {
                None => source.migrate_to(&to, |_| {}).map(drop),
                Some(how) => source.rehearse_to(&to, how, |_| {}).map(drop),
            };
            let ended_at = Instant::now();
            source_ended.store(true, Ordering::Release);
            let at = cancelling.join().unwrap();
            let (there, destination_at) = arriving.join().unwrap();
            let (took, destination_took) = (ended_at - at, destination_at - at);
            let error = ended.unwrap_err();
            Self { error, there, took, destination_took, control: control.clone() }
        })
    }

    fn aborted(&self) -> &Aborted {
        let MigrateError::Aborted(aborted) = &self.error else { panic!("{:?}", self.error) };
        assert!(aborted.cancelled && aborted.restored, "{aborted:?}");
        aborted
    }
}

fn undone() -> PendingRollback {
    PendingRollback::Ended { restored: true, failures: Vec::new() }
}

#[test]
fn a_device_that_does_not_answer_while_the_guest_runs() {
    let arc = |from, to| Some((from, to));
    let cases = [
        (FakeFault::BeginPrecopy, arc(State::Running, State::PreCopy), "RUNNING to PRE_COPY"),
        (FakeFault::ReadPrecopy, None, "a read of its state"),
        (FakeFault::Progress, None, "how much state it has left"),
    ];
    for rehearse in [None, Some(Rehearse::Precopy)] {
        for (fault, arc, says) in cases {
            let (toy, there) = (Toy::booted(&plan()), Toy::new(&plan()));
            toy.device(1).hang_at(fault);
            let attempt = Attempt::cancelled(&toy, &there, rehearse, || toy.device(1).hangs(), |_, _| {});
            let aborted = attempt.aborted();
            assert!(
                attempt.took < WITHIN && attempt.destination_took < WITHIN,
                "{fault:?}: {:?}",
                attempt.took
            );
            let [late] = &aborted.left_undone[..] else { panic!("{fault:?}: {aborted:?}") };
            assert_eq!((late.device.as_deref(), late.arc), (Some("toy1"), arc));
            assert!(!aborted.to_string().contains("as it was before"), "{aborted}");
            assert!(late.text.contains("toy1 has not answered") && late.text.contains(says), "{late}");
            assert!(attempt.there.to_string().contains("cancelled"), "{}", attempt.there);
            // The guest goes on; what is left is told for as long as it is.
            assert!(toy.runs() && aborted.stood == Duration::ZERO);
            let PendingRollback::UnderWay(awaited) = attempt.control.pending_rollback() else {
                panic!("nothing is left to be undone")
            };
            assert!(awaited.iter().any(|answer| answer.who() == "toy1"), "{awaited:?}");
            toy.device(1).let_go();
            let ended = undone();
            wait_for("the rollback", || attempt.control.pending_rollback() == ended);
            toy.prove_restored();
        }
    }
}

/// The way back itself: the device hangs as its session is ended.
#[test]
fn a_device_that_does_not_go_back() {
    for (rehearse, dir) in [(None, Some(tempfile::tempdir().unwrap())), (Some(Rehearse::Precopy), None)] {
        let (toy, there) = (Toy::booted(&plan()), Toy::new(&plan()));
        let mut options = patient();
        options.pause_before_switchover = true;
        options.state_dir = dir.as_ref().map(|dir| dir.path().to_owned());
        toy.device(0).hang_at(FakeFault::EndSaving);
        let source = Source::new(toy.clone(), options.clone());
        let control = source.control();
        let mut destination =
            Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), tls_destination()).unwrap();
        let to = destination.local().clone();
        std::thread::scope(|scope| {
            let arriving = scope.spawn(|| destination.accept(|_| Ok(there as Arc<dyn Machine>)).map(drop));
            let cancelling = scope.spawn(|| {
                wait_for("the end of pre-copy", || control.progress().waiting || toy.device(0).hangs());
                control.cancel();
                Instant::now()
            });
            let ended = match rehearse {
                None => source.migrate_to(&to, |_| {}).map(drop),
                Some(how) => source.rehearse_to(&to, how, |_| {}).map(drop),
            };
            let took = cancelling.join().unwrap().elapsed();
            assert!(took < WITHIN, "{took:?}");
            let error = ended.unwrap_err();
            let MigrateError::Aborted(aborted) = &error else { panic!("{error:?}") };
            assert!(aborted.cancelled && aborted.restored, "{aborted:?}");
            assert_eq!(aborted.left_undone[0].arc, Some((State::PreCopy, State::Running)), "{aborted:?}");
            arriving.join().unwrap().unwrap_err();
        });
        assert!(matches!(control.pending_rollback(), PendingRollback::UnderWay(_)));
        if dir.is_some() {
            // The VM's journal is held by what is left to be undone.
            let again = Source::new(toy.clone(), options).migrate_to(&to, |_| {}).unwrap_err();
            assert!(matches!(&again, MigrateError::NotBegun(why) if why.phase == Phase::Plan), "{again}");
        }
        toy.device(0).let_go();
        wait_for("the rollback", || control.pending_rollback() == undone());
        toy.prove_restored();
        if let Some(dir) = dir {
            let owned = vfio_migration::ownership_at(dir.path(), VM).unwrap();
            assert!(matches!(owned, vfio_migration::VmOwnership::Ours(_)), "{owned:?}");
        }
    }
}

/// A guest that is paused waits for its device, and whoever looks is told for which.
#[test]
fn a_device_that_does_not_answer_while_the_guest_is_paused() {
    let cases = [
        (FakeFault::GoP2p, "PRE_COPY to PRE_COPY_P2P"),
        (FakeFault::GoStopCopy, "PRE_COPY_P2P to STOP_COPY"),
        (FakeFault::ReadStopCopy, "a read of its state"),
    ];
    for (rehearse, (fault, says)) in
        [(None, cases[0]), (None, cases[1]), (Some(Rehearse::Switchover), cases[2])]
    {
        let (toy, there) = (Toy::booted(&plan()), Toy::new(&plan()));
        toy.device(1).hang_at(fault);
        let paused_for = Duration::from_millis(1000);
        let attempt = Attempt::cancelled(
            &toy,
            &there,
            rehearse,
            || toy.device(1).hangs(),
            |control, _| {
                let begun = Instant::now();
                let named = || {
                    let progress = control.progress();
                    let says = progress.awaited.iter().any(|answer| answer.to_string().contains(says));
                    progress.cancelling && progress.paused && says
                };
                wait_for("the device to be named", named);
                assert!(begun.elapsed() < WITHIN, "{:?}", begun.elapsed());
                wait_for("time to pass", || begun.elapsed() > paused_for);
                assert!(!toy.runs(), "the guest went on beside a device on its way");
                toy.device(1).let_go();
            },
        );
        let aborted = attempt.aborted();
        assert!(aborted.left_undone.is_empty(), "{aborted:?}");
        assert!(aborted.stood >= paused_for && aborted.stood < FAR, "{:?}", aborted.stood);
        assert_eq!(attempt.control.pending_rollback(), PendingRollback::None);
        assert!(attempt.there.to_string().contains("cancelled"), "{}", attempt.there);
        toy.prove_restored();
    }
}

/// A destination whose device does not answer holds nobody up but itself: neither side's operator, nor the source's storage locks.
#[test]
fn a_device_of_the_destination_that_does_not_answer() {
    let cases = [
        (FakeFault::BeginResuming, "RUNNING to RESUMING"),
        (FakeFault::Write, "a write of its state"),
        (FakeFault::Finish, "RESUMING to STOP"),
    ];
    for by_source in [true, false] {
        for (fault, says) in cases {
            let (toy, there) = (Toy::booted(&plan()), Toy::new(&plan()));
            there.device(1).hang_at(fault);
            let attempt = Attempt::given_up(
                &toy,
                &there,
                None,
                || there.device(1).hangs(),
                |control, receiving| if by_source { control.cancel() } else { receiving.cancel() },
                |_, receiving, to, source_ended| {
                    wait_for("the source to end", || source_ended.load(Ordering::Acquire));
                    toy.prove_restored();
                    let named = || {
                        let progress = receiving.progress().expect("it is still under way");
                        let says = progress.awaited.iter().any(|answer| answer.to_string().contains(says));
                        progress.cancelling && says
                    };
                    wait_for("the device to be named", named);
                    let other = Source::new(Toy::booted(&plan()), patient());
                    let error = other.migrate_to(to, |_| {}).unwrap_err().to_string();
                    let why = format!("still being undone; toy1 has not answered {says}");
                    assert!(error.contains(&why), "{error}");
                    there.device(1).let_go();
                },
            );
            assert!(attempt.took < WITHIN, "{fault:?}: {:?}", attempt.took);
            let MigrateError::Aborted(aborted) = &attempt.error else { panic!("{:?}", attempt.error) };
            assert!(aborted.restored && aborted.left_undone.is_empty(), "{aborted:?}");
            assert!(aborted.locks_lost.is_empty() && aborted.cause.is_cancelled(), "{aborted:?}");
            assert!(attempt.there.to_string().contains("cancelled"), "{}", attempt.there);
            assert_eq!(there.device(1).at(), State::Running, "it was not reset");
        }
    }
}

/// Into a file it is the same, and none is left; of a device alone no guest waits, whatever state it is in.
#[test]
fn a_device_that_does_not_answer_while_it_is_saved() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let toy = Toy::booted(&plan());
    toy.device(1).hang_at(FakeFault::ReadPrecopy);
    let source = Source::new(toy.clone(), patient().for_saving());
    let control = source.control();
    std::thread::scope(|scope| {
        let cancelling = scope.spawn(|| {
            wait_for("the device to hang", || toy.device(1).hangs());
            control.cancel();
            Instant::now()
        });
        let error = save(source, &path, SaveOptions::default(), |_| {}).unwrap_err();
        let took = cancelling.join().unwrap().elapsed();
        assert!(took < WITHIN, "{took:?}");
        let SaveError::Session(MigrateError::Aborted(aborted)) = &error else { panic!("{error:?}") };
        assert_eq!(aborted.left_undone[0].device.as_deref(), Some("toy1"), "{aborted:?}");
    });
    toy.device(1).let_go();
    wait_for("the rollback", || control.pending_rollback() == undone());
    toy.prove_restored();
    for fault in [FakeFault::BeginPrecopy, FakeFault::GoStopCopy, FakeFault::ReadStopCopy] {
        let toy = Toy::booted(&plan());
        let device = toy.devices()[0].device.clone();
        toy.device(0).hang_at(fault);
        let control = DeviceControl::default();
        std::thread::scope(|scope| {
            let cancelling = scope.spawn(|| {
                wait_for("the device to hang", || toy.device(0).hangs());
                control.cancel();
                Instant::now()
            });
            let error = save_device(&device, &path, SaveDeviceOptions::default(), &control).unwrap_err();
            let took = cancelling.join().unwrap().elapsed();
            assert!(took < WITHIN, "{fault:?}: {took:?}");
            let DeviceFileError::Cancelled(fate) = &error else { panic!("{fault:?}: {error:?}") };
            assert_eq!(fate.now, None, "{fault:?}");
        });
        toy.device(0).let_go();
        wait_for("the device to run again", || toy.device(0).at() == State::Running);
    }
    wait_for("the files to be gone", || std::fs::read_dir(dir.path()).unwrap().next().is_none());
}
