//! Files whose disk hangs, for tests.

use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, PoisonError};

use crate::session::lock::lock;

/// Paths, and whether somebody waits for one.
static HELD: Mutex<Vec<(PathBuf, bool)>> = Mutex::new(Vec::new());
static LET_GO: Condvar = Condvar::new();

pub(crate) fn hold(path: &Path) {
    lock(&HELD).push((path.into(), false));
}

pub(crate) fn is_waited_for(path: &Path) -> bool {
    lock(&HELD).iter().any(|(held, waited)| held == path && *waited)
}

pub(crate) fn let_go(path: &Path) {
    lock(&HELD).retain(|(held, _)| held != path);
    LET_GO.notify_all();
}

pub(crate) fn wait(path: &Path) {
    let mut held = lock(&HELD);
    while let Some((_, waited)) = held.iter_mut().find(|(held, _)| held == path) {
        *waited = true;
        held = LET_GO.wait(held).unwrap_or_else(PoisonError::into_inner);
    }
}
