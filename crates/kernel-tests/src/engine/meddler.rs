//! A wire with somebody on it who alters devices' state.

#[expect(dead_code, unreachable_pub, reason = "shared with the migration's tests, which cut the wire by it")]
#[path = "../../../migration/tests/migration/toy/proxy.rs"]
mod proxy;

use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicU64;

use self::proxy::{Meddling, forward};
use super::pair::{Ended, Pair, options};
use crate::check::Outcome;

pub(super) use self::proxy::Alter;

/// Lets all pass.
pub(super) fn nothing(_: bool, _: &mut Vec<u8>) {}

/// Migrates by such a wire.
pub(super) fn migrate(pair: &Pair, alter: Alter) -> Outcome<Ended> {
    let (here, near) = UnixStream::pair()?;
    let (far, there) = UnixStream::pair()?;
    let (near_back, far_back) = (near.try_clone()?, far.try_clone()?);
    std::thread::scope(|scope| {
        let pass = |from: UnixStream, to: UnixStream, meddling| {
            scope.spawn(move || {
                let passed = forward(from.into(), to.into(), meddling, &AtomicU64::new(0));
                passed.map_err(|error| error.to_string())
            })
        };
        let forth = pass(near, far, Meddling::Alter(alter));
        pass(far_back, near_back, Meddling::None);
        let ended = pair.migrate_between(here.into(), there.into(), options(), |_, _| {})?;
        forth.join().map_err(|_| "the meddler panicked")??;
        Ok(ended)
    })
}
