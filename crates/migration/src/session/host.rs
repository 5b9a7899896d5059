//! Services of a session's host: clocks that two processes of one host compare, and random numbers.

use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};
use rustix::time::{ClockId, clock_gettime};

/// CLOCK_MONOTONIC now, in nanoseconds.
pub(crate) fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(nanos)
}

/// The host's boot id, by which two processes know that they read one clock; zeros when the host does not say.
pub(crate) fn boot_id() -> [u8; 16] {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    text.trim().parse::<vfio_migration_types::VmId>().map_or([0; 16], |id| id.0)
}

/// 16 random bytes, the name of an attempt or a lease: never drawn before.
pub(crate) fn nonce() -> Result<[u8; 16], Errno> {
    let mut nonce = [0; 16];
    let mut done = 0;
    while done < nonce.len() {
        match getrandom(nonce.get_mut(done..).unwrap_or_default(), GetRandomFlags::empty()) {
            Ok(read) => done += read,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(nonce)
}
