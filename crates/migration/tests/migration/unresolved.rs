//! A source that lost the answer to its COMMIT asks again when its VMM says so, or is told whose the guest is.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use vfio_migration::types::Phase;
use vfio_migration::{
    Destination, DestinationOptions, GuestOutcome, Machine, MigrateError, Resolution, Side, Source,
    SourceOptions, UnresolvedMigration, Uri, read_journal,
};
use vfio_migration_engine::ownership::SourceState;

use crate::faults::small;
use crate::toy::proxy::{Meddling, forward};
use crate::toy::*;

const RUNNING: u16 = 0x0006;
const COMMIT: u16 = 0x001d;

/// What is left of a migration over a connection that was handed over, and was cut at this frame: before COMMIT arrived, or before its
/// answer did.
struct Cut {
    unresolved: Box<UnresolvedMigration>,
    source: Arc<Toy>,
    machine: Arc<Toy>,
    /// Where the destination answers, while the test looks on.
    at: Uri,
    state: tempfile::TempDir,
}

fn cut_at(frame: u16, look: impl FnOnce(&Cut)) {
    let plan = small();
    let (source, machine) = (Toy::booted(&plan), Toy::new(&plan));
    let state = tempfile::tempdir().unwrap();
    let dir = |side: &str| Some(state.path().join(side));
    let (mut here, mut there) = (SourceOptions::default(), DestinationOptions::default());
    here.downtime_limit = Duration::from_secs(2);
    (here.state_dir, there.state_dir) = (dir("source"), dir("destination"));
    let at: Uri = format!("unix:{}", state.path().join("at").display()).parse().unwrap();
    let mut destination = Destination::listen(&at, there).unwrap();
    let control = destination.control();
    let (end, of_source) = UnixStream::pair().unwrap();
    let of_destination = UnixStream::connect(state.path().join("at")).unwrap();
    let (up, down) = match frame {
        COMMIT => (Meddling::CutBefore(COMMIT), Meddling::None),
        _ => (Meddling::None, Meddling::CutBefore(frame)),
    };
    std::thread::scope(|scope| {
        let (from, to) = (of_source.try_clone().unwrap(), of_destination.try_clone().unwrap());
        scope.spawn(move || forward(from.into(), to.into(), up, &AtomicU64::new(0)).unwrap());
        scope.spawn(move || {
            forward(of_destination.into(), of_source.into(), down, &AtomicU64::new(0)).unwrap();
        });
        let built = machine.clone();
        scope.spawn(move || {
            let arrived = destination.accept(|_| Ok(built as Arc<dyn Machine>));
            assert_eq!(arrived.is_ok(), frame == RUNNING, "{arrived:?}");
            destination.answer_queries(Duration::from_secs(30)).unwrap();
        });
        let session = Source::new(source.clone(), here);
        let steer = session.control();
        let error = session.migrate_over(end.into(), |progress| {
            // Nobody waits for what cannot come: over a connection that was handed over nothing can be asked.
            if progress.phase == Phase::Run {
                steer.process_ends("the test");
            }
        });
        let Err(MigrateError::Unresolved(unresolved)) = error else { panic!("{error:?}") };
        source.prove_standing();
        look(&Cut { unresolved, source, machine, at, state });
        control.cancel();
    });
}

impl Cut {
    fn ask(&self) -> Result<Resolution, vfio_migration::Failure> {
        self.unresolved.ask(Some(&self.at), || false)
    }

    fn journal(&self) -> SourceState {
        read_journal(&self.state.path().join("source"), VM).unwrap().unwrap().source.unwrap().state
    }
}

#[test]
fn a_guest_that_arrived_is_found_by_asking_again() {
    cut_at(RUNNING, |cut| {
        assert_eq!(cut.journal(), SourceState::Committing);
        let nowhere: Uri = format!("unix:{}", cut.state.path().join("nowhere").display()).parse().unwrap();
        let failure = cut.unresolved.ask(Some(&nowhere), || false).unwrap_err();
        assert!(failure.text.contains("nowhere") && cut.unresolved.is_pending(), "{failure}");
        let failure = cut.unresolved.ask(None, || false).unwrap_err();
        assert!(failure.text.contains("handed over") && failure.remedy.contains("address"), "{failure}");
        assert_eq!(cut.journal(), SourceState::Committing, "nothing has changed");
        let resolution = cut.ask().unwrap();
        let moved = Resolution::Moved { guest: Some(GuestOutcome::Running), left_undone: Vec::new() };
        assert_eq!(resolution, moved);
        assert_eq!(cut.journal(), SourceState::Released);
        assert!(!cut.unresolved.is_pending());
        cut.ask().unwrap_err();
        prove_moved(&cut.source, &cut.machine);
        cut.machine.prove_running();
    });
}

#[test]
fn a_guest_that_was_declined_goes_on_when_that_is_heard() {
    cut_at(COMMIT, |cut| {
        assert_eq!(cut.journal(), SourceState::Committing);
        let resolution = cut.ask().unwrap();
        let Resolution::Undone { cause, restored: true, not_undone } = resolution else {
            panic!("{resolution:?}")
        };
        assert!(not_undone.is_empty() && cause.side == Side::Destination, "{cause} {not_undone:?}");
        assert_eq!(cut.journal(), SourceState::Owner);
        let file = read_journal(&cut.state.path().join("source"), VM).unwrap().unwrap();
        assert_eq!(file.source_note.unwrap().reason, Some(cause.to_string()));
        cut.source.prove_restored();
    });
}

#[test]
fn asking_is_given_up_when_its_caller_says_so() {
    cut_at(COMMIT, |cut| {
        let failure = cut.unresolved.ask(Some(&cut.at), || true).unwrap_err();
        assert!(failure.text.contains("given up"), "{failure}");
        assert!(cut.unresolved.is_pending() && cut.journal() == SourceState::Committing);
        cut.source.prove_standing();
    });
}

#[test]
fn a_person_decides_where_nobody_answers() {
    cut_at(COMMIT, |cut| {
        let resolution = cut.unresolved.decide(Side::Source).unwrap();
        assert!(matches!(resolution, Resolution::Undone { restored: true, .. }), "{resolution:?}");
        assert_eq!(cut.journal(), SourceState::Owner);
        cut.source.prove_restored();
    });
    cut_at(RUNNING, |cut| {
        let resolution = cut.unresolved.decide(Side::Destination).unwrap();
        assert_eq!(resolution, Resolution::Moved { guest: None, left_undone: Vec::new() });
        assert_eq!(cut.journal(), SourceState::Released);
        cut.source.prove_standing();
    });
}

/// The journal comes first: while it cannot be written, the guest stays where it is, and it can be tried again.
#[test]
fn a_guest_does_not_go_on_before_the_journal_says_so() {
    cut_at(COMMIT, |cut| {
        let away = move_away(&cut.state.path().join("source"));
        let failure = cut.ask().unwrap_err();
        assert!(failure.text.contains("failed") && cut.unresolved.is_pending(), "{failure}");
        cut.source.prove_standing();
        move_back(&away, &cut.state.path().join("source"));
        assert!(matches!(cut.ask().unwrap(), Resolution::Undone { restored: true, .. }));
        cut.source.prove_restored();
    });
}

/// Puts a file where the state directory was.
fn move_away(dir: &Path) -> std::path::PathBuf {
    let away = dir.with_extension("away");
    std::fs::rename(dir, &away).unwrap();
    std::fs::write(dir, "").unwrap();
    away
}

fn move_back(away: &Path, dir: &Path) {
    std::fs::remove_file(dir).unwrap();
    std::fs::rename(away, dir).unwrap();
}
