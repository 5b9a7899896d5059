//! What a process inherits from its parent about signals: which are blocked, and which are ignored. Launchers that hear signals by
//! signalfd(2) leave the first behind, shells that start a command with `&` the second; neither is meant for a VMM.

use std::ffi::c_int;

use vmm_sys_util::signal::unblock_signal;

/// All that Linux has.
const SIGNALS: std::ops::RangeInclusive<c_int> = 1..=64;
/// `SIG_DFL` of signal(2).
const DEFAULT: usize = 0;

// SAFETY: as declared in POSIX's signal.h, with the handler as the address that it is.
unsafe extern "C" {
    fn signal(signal: c_int, handler: usize) -> usize;
}

/// Makes every signal but those in `keep` do what it does by default. To be called before any handler is set: those of the Rust
/// runtime for SIGSEGV and SIGBUS go too, which take the first such signal from elsewhere for a fault that has passed, and without which an
/// overflowing stack ends the process by SIGSEGV.
pub fn reset_dispositions(keep: &[i32]) {
    for number in SIGNALS.filter(|number| !keep.contains(number)) {
        // It fails for those that nobody may set, or that the C library keeps for itself; those are as they should be.
        // SAFETY: no handler is installed, so nothing of ours runs at a signal; no memory is touched.
        let _ = unsafe { signal(number, DEFAULT) };
    }
}

/// Lets every signal through to the calling thread and the threads that it makes.
pub fn unblock_all() {
    for number in SIGNALS {
        // It fails for those that the C library keeps for itself, which cannot be blocked by means of it.
        let _ = unblock_signal(number);
    }
}
