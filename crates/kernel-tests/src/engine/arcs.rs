//! Each arc that can fail, at the source and at the destination.

use rustix::io::Errno;
use vfio_migration::{IncomingError, MigrateError};
use vfio_migration_device::Device;
use vfio_migration_types::{MigrationState, Phase};

use super::pair::{Ended, Pair, Wanted, options, told};
use crate::check::{Outcome, holds, same};
use crate::instance::Instance;
use crate::migdev::{get, set};

use MigrationState::{PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};
use Phase::{Clean, Quiesce, Ready, Run, Setup};

/// A phase and the arc that is taken in it.
type Step = (Phase, MigrationState, MigrationState);

/// What each set of flags goes through at the source before it commits.
const WAYS: [(u64, &[Step]); 4] = [
    (7, &[(Setup, Running, PreCopy), (Quiesce, PreCopy, PreCopyP2p), (Quiesce, PreCopyP2p, StopCopy)]),
    (5, &[(Setup, Running, PreCopy), (Quiesce, PreCopy, StopCopy)]),
    (3, &[(Quiesce, Running, RunningP2p), (Quiesce, RunningP2p, Stop), (Quiesce, Stop, StopCopy)]),
    (1, &[(Quiesce, Running, Stop), (Quiesce, Stop, StopCopy)]),
];
const SOUND: &str = "the device is in a sound state; its driver's log says why it refused";
const RESET: &str = "only a reset helps, which loses the device's state";

/// Has arc number `arc` from now on fail, by `fault`.
fn arm(instance: &Instance, fault: &str, arc: u64) -> Outcome {
    set(instance, "arcs", 0)?;
    set(instance, "fail_errno", 12)?;
    set(instance, fault, arc)
}

fn disarm(instance: &Instance) -> Outcome {
    set(instance, "fail_arc", 0)?;
    set(instance, "error_arc", 0)
}

fn with_flags(flags: u64) -> Outcome<Pair> {
    Pair::new(|instance| set(instance, "mig_flags", flags))
}

/// An arc that fails before the commit: the device goes back by itself, and the next migration of the same guest may fail
/// elsewhere. When nothing fails, it moves.
pub(crate) fn source_fails() -> Outcome {
    for (flags, way) in WAYS {
        let pair = with_flags(flags)?;
        for (arc, (phase, from, to)) in (1..).zip(way) {
            arm(&pair.from[0], "fail_arc", arc)?;
            let wanted = Wanted {
                phase: *phase,
                device: Some("card0"),
                arc: Some((*from, *to)),
                errno: Some(Errno::NOMEM),
                text: "failed",
                remedy: SOUND,
                reset: false,
            };
            let ended = pair.migrate(options())?;
            disarm(&pair.from[0])?;
            pair.aborted(ended, wanted).map_err(|error| format!("flags {flags}, arc {arc}: {error}"))?;
        }
        let arcs = get(&pair.from[0], "arcs")?;
        let completed = pair.moved(pair.migrate(options())?)?;
        same("left undone", completed.left_undone, vec![])?;
        same("arcs of a whole migration", get(&pair.from[0], "arcs")? - arcs, way.len() as u64 + 1)?;
        pair.close()?;
    }
    Ok(())
}

/// An arc that ends in ERROR: the device is reset on the way back, and named.
pub(crate) fn source_errs() -> Outcome {
    for (flags, way) in WAYS {
        let pair = with_flags(flags)?;
        for (arc, (phase, from, to)) in (1..).zip(way) {
            arm(&pair.from[0], "error_arc", arc)?;
            pair.source.guest.expect_restart();
            let wanted = Wanted {
                phase: *phase,
                device: Some("card0"),
                arc: Some((*from, *to)),
                errno: Some(Errno::IO),
                text: "it is in ERROR",
                remedy: RESET,
                reset: true,
            };
            let ended = pair.migrate(options())?;
            disarm(&pair.from[0])?;
            pair.aborted(ended, wanted).map_err(|error| format!("flags {flags}, arc {arc}: {error}"))?;
            same("set up anew", pair.source.guest.restarts(), arc)?;
        }
        pair.moved(pair.migrate(options())?)?;
        pair.close()?;
    }
    Ok(())
}

/// An arc of the way back fails too: the device is reset and named, the guest goes on beside it; or stands, if it was said
/// that it should then.
pub(crate) fn way_back_fails() -> Outcome {
    let cases = [(7, 4..=6), (3, 4..=6), (1, 3..=4)];
    for (flags, back) in cases {
        let pair = with_flags(flags)?;
        for arc in back {
            for fault in ["fail_arc", "error_arc"] {
                // RUNNING to RESUMING takes the devices with P2P three arcs, the others two.
                arm(&pair.to[0], "fail_arc", if flags == 1 { 3 } else { 4 })?;
                arm(&pair.from[0], fault, arc)?;
                pair.source.guest.expect_restart();
                let ended = pair.migrate(options())?;
                disarm(&pair.from[0])?;
                let wanted = Wanted { reset: true, ..unloaded(Errno::NOMEM, SOUND) };
                pair.aborted(ended, wanted)
                    .map_err(|error| format!("flags {flags}, {fault} {arc}: {error}"))?;
            }
        }
        disarm(&pair.to[0])?;
        pair.moved(pair.migrate(options())?)?;
        pair.close()?;
    }
    Ok(())
}

/// The destination's driver does not take what it was given.
fn unloaded(errno: Errno, remedy: &'static str) -> Wanted {
    Wanted {
        phase: Ready,
        device: Some("card0"),
        arc: Some((Resuming, Stop)),
        errno: Some(errno),
        text: "RESUMING to STOP failed",
        remedy,
        reset: false,
    }
}

/// The same where the guest is not to run beside a device that lost its state.
pub(crate) fn way_back_fails_and_holds() -> Outcome {
    let pair = with_flags(7)?;
    arm(&pair.to[0], "fail_arc", 4)?;
    arm(&pair.from[0], "fail_arc", 4)?;
    let mut options = options();
    options.keep_paused_if_reset = true;
    let aborted = match pair.migrate(options)?.source {
        Err(MigrateError::Aborted(aborted)) => aborted,
        other => return Err(format!("not aborted: {other:?}").into()),
    };
    told(&aborted.cause, unloaded(Errno::NOMEM, SOUND))?;
    same("devices that were reset", aborted.reset.len(), 1)?;
    holds(!aborted.restored && !pair.source.guest.runs(), "the guest is held")?;
    // Its operator sees to the device, and lets it run.
    pair.source.guest.expect_restart();
    pair.source.guest.go();
    pair.goes_on_here()?;
    pair.close()
}

/// An arc that the source takes when the guest is gone: it moved, and what is left to do is said.
pub(crate) fn clean_up_fails() -> Outcome {
    for (fault, errno, remedy) in [("fail_arc", Errno::NOMEM, SOUND), ("error_arc", Errno::IO, RESET)] {
        let pair = with_flags(7)?;
        arm(&pair.from[0], fault, 4)?;
        let ended = pair.migrate(options())?;
        let arrived = ended.destination?;
        holds(arrived.report.guest.runs(), "the guest runs there")?;
        drop(arrived);
        pair.destination.guest.goes_on()?;
        let left_undone = ended.source?.left_undone;
        let [failure] = left_undone.as_slice() else {
            return Err(format!("one thing is left undone: {left_undone:?}").into());
        };
        let wanted = Wanted {
            phase: Clean,
            device: Some("card0"),
            arc: Some((StopCopy, Stop)),
            errno: Some(errno),
            text: "STOP_COPY to STOP failed",
            remedy,
            reset: false,
        };
        told(failure, wanted)?;
        holds(!pair.source.guest.runs(), "it does not run here")?;
        // Whoever opens the device next finds it reset.
        disarm(&pair.from[0])?;
        pair.close()?;
    }
    Ok(())
}

/// An arc that fails at the destination before the commit: its device is reset and released, and the guest goes on here.
pub(crate) fn destination_fails() -> Outcome {
    for (flags, to_resuming) in [(7, 3), (1, 2)] {
        let pair = with_flags(flags)?;
        for (fault, errno) in [("fail_arc", Errno::NOMEM), ("error_arc", Errno::IO)] {
            for arc in 1..=to_resuming + 1 {
                let remedy = if fault == "fail_arc" { SOUND } else { RESET };
                let begins = Wanted {
                    phase: Setup,
                    arc: Some((Running, Resuming)),
                    text: "RUNNING to RESUMING failed",
                    ..unloaded(errno, remedy)
                };
                let wanted = if arc > to_resuming { unloaded(errno, remedy) } else { begins };
                arm(&pair.to[0], fault, arc)?;
                let ended = pair.migrate(options())?;
                disarm(&pair.to[0])?;
                pair.aborted(ended, wanted)
                    .map_err(|error| format!("flags {flags}, {fault} {arc}: {error}"))?;
            }
        }
        pair.moved(pair.migrate(options())?)?;
        pair.close()?;
    }
    Ok(())
}

/// An arc that fails when the guest is the destination's: it is held there, and never runs here again.
pub(crate) fn start_fails() -> Outcome {
    for (fault, errno, remedy) in [("fail_arc", Errno::NOMEM, SOUND), ("error_arc", Errno::IO, RESET)] {
        for (arc, from, to) in [(5, Stop, RunningP2p), (6, RunningP2p, Running)] {
            let pair = with_flags(7)?;
            arm(&pair.to[0], fault, arc)?;
            let Ended { source, destination } = pair.migrate(options())?;
            let held = match destination {
                Err(IncomingError::OwnedNotStarted(held)) => held,
                other => return Err(format!("the destination does not hold it: {other:?}").into()),
            };
            let wanted =
                Wanted { phase: Run, arc: Some((from, to)), text: "failed", ..unloaded(errno, remedy) };
            told(&held.cause, wanted)?;
            let source = source?;
            same("why it does not run there, at the source", source.guest.failure(), Some(&held.cause))?;
            same("the downtime of a guest that does not run", source.downtime, None)?;
            let runs = (pair.source.guest.runs(), pair.destination.guest.runs());
            same("runs here, runs there", runs, (false, false))?;
            drop(held);
            disarm(&pair.to[0])?;
            if fault == "fail_arc" {
                // Its operator takes the device on, and lets the guest run: all of it is there.
                pair.destination.cards[0].set_state(Running)?;
                pair.destination.guest.go();
                pair.destination.guest.goes_on()?;
            }
            pair.close()?;
        }
    }
    Ok(())
}
