//! What a session says of itself while it runs, and at its end, however it ends.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::toy::*;
use vfio_migration::{AttemptKind, Destination, Machine, MigrateError, Progress, Source, read_journal};
use vfio_migration_types::{Epoch, PAGE_SIZE, Phase};

/// Migrates `source` with a cap on the bandwidth, cancels it once `enough` was seen, and returns all that was seen at the
/// source, and the last that was seen at the destination.
fn cancelled_when(
    source: &Arc<Toy>,
    plan: &Plan,
    bandwidth: u64,
    state: Option<&Path>,
    enough: impl Fn(&Progress) -> bool,
) -> (Vec<Progress>, Progress) {
    let mut destination =
        Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), tls_destination()).unwrap();
    let (to, incoming) = (destination.local().clone(), destination.control());
    let machine = Toy::new(plan);
    let arriving =
        std::thread::spawn(move || destination.accept(|_| Ok(machine as Arc<dyn Machine>)).unwrap_err());
    let mut options = tls_source();
    options.bandwidth = Some(bandwidth);
    options.state_dir = state.map(Into::into);
    options.pause_before_switchover = true;
    let session = Source::new(source.clone(), options);
    let control = session.control();
    let mut seen = Vec::new();
    let ended = session.migrate_to(&to, |progress| {
        seen.push(progress.clone());
        if enough(progress) {
            control.cancel();
        }
    });
    arriving.join().unwrap();
    let Err(MigrateError::Aborted(aborted)) = ended else { panic!("{ended:?}") };
    assert!(aborted.cancelled, "{aborted}");
    (seen, incoming.last_progress().expect("a session ended"))
}

#[test]
fn what_is_left_has_the_ram_of_the_first_pass_and_the_rate_is_the_wires() {
    let device = FakeDeviceKind { pieces: 2, ..FakeDeviceKind::default() };
    let plan = Plan { devices: vec![device], ..Plan::default() };
    let source = Toy::booted(&plan);
    let written: u64 = source.ram().data_extents().unwrap().iter().map(|extent| extent.len()).sum();
    let bandwidth = 4 << 20;
    let (seen, _) = cancelled_when(&source, &plan, bandwidth, None, |progress| {
        progress.iteration > 1 || progress.bytes.ram > written * 3 / 4
    });
    // In the plan nothing is known yet.
    let first = seen.iter().find(|progress| progress.phase > Phase::Plan).unwrap();
    assert_eq!(first.bytes.ram, 0);
    assert!(first.ram_left >= written, "{} of {written} before anything moved", first.ram_left);
    let (mut last, mut passing) = (u64::MAX, 0);
    for progress in seen.iter().filter(|progress| progress.iteration == 1 && progress.phase == Phase::Iterate)
    {
        // Counted one after the other: a page may be in both, or in neither.
        let known = progress.ram_left + progress.bytes.ram;
        let slack = 257 * PAGE_SIZE;
        assert!((written - slack..=written + slack).contains(&known), "{known} of {written}: {progress:?}");
        assert!(progress.remaining >= progress.ram_left, "{progress:?}");
        assert!(progress.remaining <= last, "it went up within a pass: {progress:?}");
        last = progress.remaining;
        if progress.bytes.ram > written / 4 {
            // A tenth of the cap is far above what the first messages came to.
            assert!(progress.rate > bandwidth / 10, "{progress:?}");
            passing += 1;
        }
    }
    assert!(passing > 0, "{seen:?}");
}

#[test]
fn a_session_that_ends_early_says_what_it_was_and_where_the_time_went() {
    let plan = Plan::default();
    let source = Toy::booted(&plan);
    let state = tempfile::tempdir().unwrap();
    let (seen, there) =
        cancelled_when(&source, &plan, 64 << 20, Some(state.path()), |progress| progress.waiting);
    let note = read_journal(state.path(), VM).unwrap().unwrap().source_note.unwrap();
    assert!(note.reason.as_ref().is_some_and(|reason| reason.contains("cancelled")), "{note:?}");
    assert!(note.began <= note.written, "{note:?}");
    let here = seen.last().unwrap();
    for (side, progress) in [("source", here), ("destination", &there)] {
        let phases: Vec<_> = progress.phases.iter().map(|time| time.phase).collect();
        for phase in [Phase::Hello, Phase::Setup, Phase::Iterate] {
            assert!(phases.contains(&phase), "{side}: {phases:?}");
        }
        let took: Duration = progress.phases.iter().map(|time| time.took).sum();
        assert!(took <= progress.elapsed, "{side}: {took:?} of {:?}", progress.elapsed);
        let attempt = progress.attempt.as_ref().expect(side);
        assert_eq!((attempt.vm, attempt.epoch, attempt.kind), (VM, Epoch(0), AttemptKind::Migration));
        assert!(attempt.peer.starts_with("tcp:127.0.0.1:"), "{side}: {attempt:?}");
    }
    assert_eq!(here.attempt.as_ref().unwrap().attempt, there.attempt.unwrap().attempt);
}
