//! Every other fault that migdev can be told to have.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::io::Errno;
use vfio_migration::{IncomingError, MigrateError};
use vfio_migration_compat::Allow;
use vfio_migration_device::TrackerKind;
use vfio_migration_types::{Granule, Iova, MigrationState, Phase, Range};
use vfio_migration_uapi::{start_dma_logging, stop_dma_logging};

use super::meddler;
use super::pair::{Pair, Wanted, options, phase_of};
use crate::check::{Outcome, holds, same};
use crate::instance::Instance;
use crate::migdev::{get, set};

/// Bytes of a migdev header and of its bulk state in a [`Pair`].
const INITIAL: u64 = 32 + 16 * (24 + 4096);
const LOG: &str = "look at the device server's or the driver's log";

fn plain() -> Outcome<Pair> {
    Pair::new(|_| Ok(()))
}

/// What harms nobody: the guest moves, all of it.
fn moves_all_the_same(fault: impl Fn(&Instance) -> Outcome) -> Outcome {
    let pair = Pair::new(fault)?;
    let mut options = options();
    options.verify = true;
    let completed = pair.moved(pair.migrate(options)?)?;
    same("RAM's digests agree", completed.ram_digest_match, Some(true))?;
    holds(completed.bytes.device_precopy >= INITIAL, &format!("pre-copy: {:?}", completed.bytes))?;
    same("left undone", completed.left_undone, vec![])?;
    same("damage", get(&pair.to[0], "integrity")?, 0)?;
    pair.close()
}

/// Reads that give less than was asked for.
pub(crate) fn short_read() -> Outcome {
    moves_all_the_same(|instance| set(instance, "short_read", 100))
}

/// A driver that says 0 where it should say ENOMSG.
pub(crate) fn precopy_zero() -> Outcome {
    moves_all_the_same(|instance| set(instance, "precopy_zero", 1))
}

/// Estimates that are wrong either way are estimates: what is read decides where the state ends.
pub(crate) fn wrong_size() -> Outcome {
    for percent in [0, 10, 1000] {
        moves_all_the_same(|instance| set(instance, "size_percent", percent))?;
    }
    Ok(())
}

/// The session ends under the source, in pre-copy and in stop-copy, as by a reset that the guest asked for: noticed, and
/// said; the guest sets its device up anew.
pub(crate) fn enodev_at_the_source() -> Outcome {
    let pair = quiet()?;
    for (after, phase) in [(1000, Phase::Iterate), (INITIAL + 10, Phase::Final)] {
        pair.source.guest.expect_restart();
        set(&pair.from[0], "enodev_after", after)?;
        let ended = pair.migrate(options())?;
        set(&pair.from[0], "enodev_after", 0)?;
        pair.aborted(ended, lost(phase)).map_err(|error| format!("after {after} bytes: {error}"))?;
    }
    same("set up anew", pair.source.guest.restarts(), 2)?;
    pair.moved(pair.migrate(options())?)?;
    pair.close()
}

/// The same at the destination.
pub(crate) fn enodev_at_the_destination() -> Outcome {
    let pair = quiet()?;
    for (after, phase) in [(1000, Phase::Iterate), (INITIAL + 10, Phase::Final)] {
        set(&pair.to[0], "enodev_after", after)?;
        let ended = pair.migrate(options())?;
        set(&pair.to[0], "enodev_after", 0)?;
        pair.aborted(ended, lost(phase)).map_err(|error| format!("after {after} bytes: {error}"))?;
    }
    pair.moved(pair.migrate(options())?)?;
    pair.close()
}

/// Bulk state that stays as it is, so that a count of bytes is a place in the stream.
pub(super) fn quiet() -> Outcome<Pair> {
    Pair::new(|instance| set(instance, "dirty_rate", 0))
}

pub(super) fn lost(phase: Phase) -> Wanted {
    Wanted {
        phase,
        device: Some("card0"),
        arc: None,
        errno: Some(Errno::NODEV),
        text: "the session was lost: the device is in RUNNING",
        remedy: LOG,
        reset: false,
    }
}

/// Arcs that take long cost downtime, and nothing else while the limit allows.
pub(crate) fn slow() -> Outcome {
    let pair = Pair::new(|instance| set(instance, "arc_delay_ms", 50))?;
    let completed = pair.moved(pair.migrate(options())?)?;
    // PRE_COPY_P2P, STOP_COPY; STOP, RUNNING_P2P, RUNNING.
    let least = Duration::from_millis(5 * 50);
    let downtime = completed.downtime.ok_or("the guest does not run there")?;
    holds(downtime >= least, &format!("downtime {downtime:?} of at least {least:?}"))?;
    pair.close()
}

/// An arc that takes too long for the limit ends the attempt, on either side; the guest goes on when the arc has ended.
pub(crate) fn too_slow() -> Outcome {
    let pair = plain()?;
    let mut options = options();
    options.downtime_limit = LIMIT;
    options.pause_before_switchover = true;
    // The source names its own device; of the destination's it knows none.
    let own = Some((MigrationState::PreCopy, MigrationState::PreCopyP2p));
    for (slow, next, phase, arc) in
        [(&pair.from[0], 2, Phase::Quiesce, own), (&pair.to[0], 4, Phase::Ready, None)]
    {
        set(slow, "arcs", 0)?;
        let (armed, ended) = (AtomicBool::new(false), AtomicBool::new(false));
        let ended = std::thread::scope(|scope| {
            // Only the arc that has begun is to be slow, not the way back.
            scope.spawn(|| {
                let begun =
                    || armed.load(Ordering::Acquire) && get(slow, "arcs").is_ok_and(|arcs| arcs >= next);
                while !(ended.load(Ordering::Acquire) || begun()) {
                    std::thread::yield_now();
                }
                let _ = set(slow, "arc_delay_ms", 0);
            });
            let outcome = pair.migrate_seen(options.clone(), |control, progress| {
                if progress.waiting && !armed.load(Ordering::Acquire) {
                    let _ = set(slow, "arc_delay_ms", TOO_SLOW_MS);
                    armed.store(true, Ordering::Release);
                    control.continue_switchover();
                }
            });
            ended.store(true, Ordering::Release);
            outcome
        })?;
        let wanted = Wanted {
            phase,
            device: arc.map(|_| "card0"),
            arc,
            errno: arc.map(|_| Errno::TIMEDOUT),
            text: "above the downtime limit",
            remedy: "raise the downtime limit",
            reset: false,
        };
        pair.aborted(ended, wanted)?;
    }
    options.pause_before_switchover = false;
    pair.moved(pair.migrate(options)?)?;
    pair.close()
}

const LIMIT: Duration = Duration::from_millis(1000);
const TOO_SLOW_MS: u64 = 1300;

/// A log that leaves pages out is found out by the digests, before the guest could run there.
pub(crate) fn log_omits() -> Outcome {
    let pair = Pair::new(|instance| set(instance, "log_omit_every", 1))?;
    let mut options = options();
    options.verify = true;
    let wanted = Wanted {
        phase: Phase::Ready,
        device: None,
        arc: None,
        errno: None,
        text: "digest",
        remedy: "",
        reset: false,
    };
    let (ended, _) = pair.migrate_at_work(options)?;
    pair.aborted(ended, wanted)?;
    pair.close()
}

/// The kernel refuses to log, because somebody else has it log already: nothing has begun, and the guest goes on.
pub(crate) fn log_refused() -> Outcome {
    let pair = plain()?;
    let card = &pair.source.cards[0];
    same("tracker", card.tracker().kind, TrackerKind::DeviceLog)?;
    start_dma_logging(card.kvm_file(), Granule::PAGE, &[Range::new(Iova(0), 4096)?])?;
    let ended = pair.migrate(options())?;
    let _ = stop_dma_logging(card.kvm_file());
    let wanted = Wanted { phase: Phase::Setup, ..unlogged("the dirty log of device card0 failed: starting") };
    pair.aborted(ended, wanted)?;
    pair.moved(pair.migrate(options())?)?;
    pair.close()
}

/// The log ends under the migration: nobody knows any more what the device wrote, so there is no going on.
pub(crate) fn log_lost() -> Outcome {
    let pair = plain()?;
    let card = &pair.source.cards[0];
    let mut options = options();
    options.pause_before_switchover = true;
    let ended = pair.migrate_seen(options, |control, progress| {
        if progress.waiting {
            let _ = stop_dma_logging(card.kvm_file());
            control.continue_switchover();
        }
    })?;
    // Noticed by the pass that is made while the operator is waited for, or by the last one.
    let phase = phase_of(&ended)?;
    holds(matches!(phase, Phase::Iterate | Phase::Final), &format!("noticed in {phase}"))?;
    let wanted = Wanted { phase, ..unlogged("the dirty log of device card0 failed: reporting") };
    pair.aborted(ended, wanted)?;
    pair.moved(pair.migrate(super::pair::options())?)?;
    pair.close()
}

fn unlogged(text: &'static str) -> Wanted {
    Wanted {
        phase: Phase::Setup,
        device: Some("card0"),
        arc: None,
        errno: Some(Errno::INVAL),
        text,
        remedy: LOG,
        reset: false,
    }
}

/// Without digests such a guest arrives, and finds itself that writes are lost: the guest that judges here is awake.
pub(crate) fn log_omits_unseen() -> Outcome {
    let pair = Pair::new(|instance| set(instance, "log_omit_every", 1))?;
    let (ended, _) = pair.migrate_at_work(options())?;
    let why = pair.moved(ended).err().ok_or("a guest arrived whole whose device's writes were not sent")?;
    holds(why.to_string().contains("the guest found that"), &why.to_string())
}

/// State of a newer driver: refused by the rule for this driver before any RAM moves; and, where a policy allows it all the
/// same, by the destination's driver with its header. The guest runs both times.
pub(crate) fn newer_version() -> Outcome {
    let pair = plain()?;
    set(&pair.from[0], "version", 2)?;
    let mut sent = 0;
    let ended = pair.migrate_seen(options(), |_, progress| sent = progress.bytes.ram)?;
    let (Err(MigrateError::Refused(here)), Err(IncomingError::Refused(there))) =
        (&ended.source, &ended.destination)
    else {
        return Err(format!("both sides refuse: {ended:?}").into());
    };
    same("reasons of both sides", here, there)?;
    let named = here.iter().any(|reason| reason.code == "driver-migdev-version");
    holds(named, &format!("the version is a reason: {here:?}"))?;
    same("RAM sent", sent, 0)?;
    drop(ended);
    pair.goes_on_here()?;

    let mut allowed = options();
    let code = "driver-migdev-version".to_owned();
    allowed.policy.allow.push(Allow { code, ..Allow::default() });
    let wanted = Wanted {
        phase: Phase::Iterate,
        device: Some("card0"),
        arc: None,
        errno: Some(Errno::OPNOTSUPP),
        text: "writing its state failed",
        remedy: LOG,
        reset: false,
    };
    pair.aborted(pair.migrate(allowed)?, wanted)?;
    set(&pair.from[0], "version", 1)?;
    set(&pair.to[0], "version", 2)?;
    pair.moved(pair.migrate(options())?)?;
    pair.close()
}

/// State that was cut short on its way, to a driver that takes anything: refused by its end mark.
pub(crate) fn truncated() -> Outcome {
    let pair = plain()?;
    set(&pair.to[0], "accept_truncated", 1)?;
    let ended = meddler::migrate(&pair, |stopped, piece| {
        if stopped {
            piece.truncate(piece.len() / 2);
        }
    })?;
    let wanted = Wanted {
        phase: Phase::Ready,
        device: Some("card0"),
        arc: None,
        errno: None,
        text: "bytes of state arrived where",
        remedy: "",
        reset: false,
    };
    pair.aborted(ended, wanted)?;
    pair.moved(meddler::migrate(&pair, meddler::nothing)?)?;
    pair.close()
}
