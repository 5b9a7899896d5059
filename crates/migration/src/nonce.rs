//! Random numbers that name an attempt, or a lease.

use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

/// One that was never drawn before.
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
