//! What each signal does to this process. It is the same for every verb, and settled before anything else is done.
//!
//! - Those of [`ENDING`] ask the process to end. A verb that has something to clean up hears them through
//!   [`UserInterrupt`](crate::interrupt::UserInterrupt); any other ends at once.
//! - Those without effect are for other programs: a timer, a limit, a mistyped `kill`. None of them may end a guest.
//! - SIGQUIT ends the process at once and leaves a core, as do the signals of a fault. SIGPIPE is ignored by the Rust runtime.
//!   The stop signals stop the process, and SIGCONT lets it go on.
//!
//! What the parent blocked or ignored is forgotten, SIGHUP under nohup(1) apart.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::io::Errno;
use rustix::process::Signal;
use vfio_migration_vmm::inherited_signals::{reset_dispositions, unblock_all};

use crate::exit::CliError;

/// The signals that ask the process to end. SIGXCPU is the soft limit on CPU time: the hard one would be SIGKILL.
pub(crate) const ENDING: [Signal; 5] = [Signal::INT, Signal::TERM, Signal::HUP, Signal::POWER, Signal::XCPU];

/// The signals without effect, besides the real-time ones. A file that would grow past its limit (SIGXFSZ) is an error of
/// the write instead, EFBIG.
const WITHOUT_EFFECT: [Signal; 8] = [
    Signal::USR1,
    Signal::USR2,
    Signal::ALARM,
    Signal::VTALARM,
    Signal::PROF,
    Signal::IO,
    Signal::STKFLT,
    Signal::XFSZ,
];

/// The real-time signals of Linux, those included that the C library keeps for itself.
const REAL_TIME: std::ops::RangeInclusive<i32> = 32..=64;

/// Settles what every signal does, whatever was inherited. Those without effect have a handler that does nothing, and not SIG_IGN,
/// because what is ignored is so in every program that this one starts.
pub(crate) fn settle() -> Result<(), CliError> {
    reset_dispositions(&[Signal::HUP, Signal::PIPE].map(Signal::as_raw));
    let nothing = Arc::new(AtomicBool::new(false));
    for signal in WITHOUT_EFFECT.into_iter().map(Signal::as_raw).chain(REAL_TIME) {
        match signal_hook::flag::register(signal, nothing.clone()) {
            Ok(_) => {}
            // The C library's own: it has handlers for them while it uses them.
            Err(error)
                if REAL_TIME.contains(&signal) && Errno::from_io_error(&error) == Some(Errno::INVAL) => {}
            Err(error) => return Err(CliError::caused("cannot settle what signals do", &error)),
        }
    }
    // Last, since what has waited arrives at once.
    unblock_all();
    Ok(())
}

/// Those of [`ENDING`] that this process hears. SIGHUP is not among them where it was ignored when the process began, as under
/// nohup(1).
pub(crate) fn heard() -> impl Iterator<Item = Signal> {
    let hangup_ignored = ignored_at_start(Signal::HUP);
    ENDING.into_iter().filter(move |signal| *signal != Signal::HUP || !hangup_ignored)
}

fn ignored_at_start(signal: Signal) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal.as_raw() - 1) & 1 == 1)
}
