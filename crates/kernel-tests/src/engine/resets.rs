//! A reset in the middle of a migration: a guest's own function-level reset, and one by somebody else at the destination.

use vfio_migration::{Control, Progress};
use vfio_migration_device::{Device, KernelDevice};
use vfio_migration_types::{MigrationState, Phase};

use super::faults::{lost, quiet};
use super::pair::{Ended, Pair, Wanted, options};
use crate::check::{Outcome, same};
use crate::migdev::set;

/// Migrates, and has another thread reset `card` once `when` says so.
fn reset_meanwhile(
    pair: &Pair,
    card: &KernelDevice,
    when: impl Fn(&Control, &Progress) -> bool,
) -> Outcome<Ended> {
    let mut options = options();
    options.pause_before_switchover = true;
    let mut reset = None;
    let ended = pair.migrate_seen(options, |control, progress| {
        if reset.is_none() && when(control, progress) {
            reset = std::thread::scope(|scope| scope.spawn(|| card.reset().is_ok()).join().ok());
        }
    })?;
    same("the reset", reset, Some(true))?;
    Ok(ended)
}

/// When everything was sent once, and the operator is waited for; nobody goes on.
fn waiting(_: &Control, progress: &Progress) -> bool {
    progress.waiting
}

/// The same, and on it goes.
fn going_on(control: &Control, progress: &Progress) -> bool {
    if progress.waiting {
        control.continue_switchover();
    }
    progress.waiting
}

/// When the guest has just been told to stand: nothing has been asked of the devices yet.
fn standing(control: &Control, progress: &Progress) -> bool {
    going_on(control, progress);
    progress.phase == Phase::Quiesce
}

/// The guest resets its device in pre-copy: its session is over, which is noticed, and said; the guest goes on.
pub(crate) fn by_the_guest() -> Outcome {
    let pair = quiet()?;
    pair.source.guest.expect_restart();
    let ended = reset_meanwhile(&pair, &pair.source.cards[0], waiting)?;
    pair.aborted(ended, lost(Phase::Iterate))?;
    same("set up anew", pair.source.guest.restarts(), 1)?;
    pair.moved(pair.migrate(options())?)?;
    pair.close()
}

/// The last moment at which that can be: noticed before the device is asked to go on from where it is not any more.
pub(crate) fn at_the_switchover() -> Outcome {
    let pair = quiet()?;
    pair.source.guest.expect_restart();
    let ended = reset_meanwhile(&pair, &pair.source.cards[0], standing)?;
    let arc = Some((MigrationState::Running, MigrationState::PreCopyP2p));
    let sound = "the device is in a sound state";
    pair.aborted(ended, Wanted { arc, errno: None, remedy: sound, ..lost(Phase::Quiesce) })?;
    same("set up anew", pair.source.guest.restarts(), 1)?;
    pair.moved(pair.migrate(options())?)?;
    pair.close()
}

/// A device without pre-copy has no session yet that could be lost: it moves as it is after the reset.
pub(crate) fn by_the_guest_without_pre_copy() -> Outcome {
    let pair = Pair::new(|instance| set(instance, "mig_flags", 3))?;
    // Where the guest finds it reset depends on when it looks.
    pair.source.guest.expect_restart();
    pair.destination.guest.expect_restart();
    let ended = reset_meanwhile(&pair, &pair.source.cards[0], going_on)?;
    pair.moved(ended)?;
    let restarts = pair.source.guest.restarts() + pair.destination.guest.restarts();
    same("set up anew", restarts, 1)?;
    pair.close()
}

/// A device that is loading is reset by somebody else: it must not pass for one that has taken its state.
pub(crate) fn at_the_destination() -> Outcome {
    let pair = quiet()?;
    let ended = reset_meanwhile(&pair, &pair.destination.cards[0], going_on)?;
    pair.aborted(ended, lost(Phase::Final))?;
    pair.moved(pair.migrate(options())?)?;
    pair.close()
}
