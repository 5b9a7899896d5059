//! A reset in the middle of a migration: a guest's own function-level reset, and one by somebody else at the destination.

use vfio_migration::{Control, Progress};
use vfio_migration_device::{Device, KernelDevice};
use vfio_migration_types::Phase;

use super::faults::{lost, quiet};
use super::pair::{Ended, Pair, options, phase_of};
use crate::check::{Outcome, holds, same};
use crate::migdev::set;

/// Migrates, and has another thread reset `card` when all is ready for the switchover.
fn reset_meanwhile(pair: &Pair, card: &KernelDevice) -> Outcome<Ended> {
    let mut options = options();
    options.pause_before_switchover = true;
    let mut reset = None;
    let ended = pair.migrate_seen(options, |control: &Control, progress: &Progress| {
        if progress.waiting && reset.is_none() {
            reset = std::thread::scope(|scope| scope.spawn(|| card.reset().is_ok()).join().ok());
            control.go_on();
        }
    })?;
    same("the reset", reset, Some(true))?;
    Ok(ended)
}

/// The guest resets its device in pre-copy: its session is over, which is noticed, and said; the guest goes on.
pub(crate) fn by_the_guest() -> Outcome {
    let pair = quiet()?;
    pair.source.guest.expect_restart();
    let ended = reset_meanwhile(&pair, &pair.source.cards[0])?;
    // Noticed by the pass that is made while the operator is waited for, or by the one after.
    let phase = phase_of(&ended)?;
    holds(matches!(phase, Phase::Iterate | Phase::Quiesce), &format!("noticed in {phase}"))?;
    pair.aborted(ended, lost(phase))?;
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
    let ended = reset_meanwhile(&pair, &pair.source.cards[0])?;
    pair.moved(ended)?;
    let restarts = pair.source.guest.restarts() + pair.destination.guest.restarts();
    same("set up anew", restarts, 1)?;
    pair.close()
}

/// A device that is loading is reset by somebody else: it must not pass for one that has taken its state.
pub(crate) fn at_the_destination() -> Outcome {
    let pair = quiet()?;
    let ended = reset_meanwhile(&pair, &pair.destination.cards[0])?;
    pair.aborted(ended, lost(Phase::Final))?;
    pair.moved(pair.migrate(options())?)?;
    pair.close()
}
