//! Whether the VMM may hot-plug RAM now: not while somebody counts on its layout.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::ram::GuestRam;

/// Who counts on the layout of one RAM, by number.
#[derive(Debug, Default)]
pub(crate) struct Holds(Mutex<(u64, BTreeMap<u64, String>)>);

impl Holds {
    fn lock(&self) -> MutexGuard<'_, (u64, BTreeMap<u64, String>)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// RAM whose layout somebody counts on, for as long as this is kept.
pub struct RamHold {
    ram: Arc<GuestRam>,
    number: u64,
}

/// RAM that is not to be changed now: no region of it may come, go, grow or move.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("guest RAM cannot be changed now: {}", .0.join("; "))]
pub struct RamHeld(
    /// Why, as phrases: one for each who counts on it.
    pub Vec<String>,
);

impl GuestRam {
    /// Asks whether RAM may be hot-plugged, unplugged, or given another place now. A session holds the layout from its first look at
    /// RAM until it has ended, what is undone behind its end included. May be called from any thread; blocks for nothing.
    ///
    /// # Errors
    /// It may not, and why.
    pub fn may_change(&self) -> Result<(), RamHeld> {
        let why: Vec<_> = self.holds.lock().1.values().cloned().collect();
        if why.is_empty() { Ok(()) } else { Err(RamHeld(why)) }
    }

    /// Holds the layout; `why`, a phrase, is what [`may_change`](Self::may_change) answers meanwhile.
    pub fn hold(self: &Arc<Self>, why: impl Into<String>) -> RamHold {
        let mut holds = self.holds.lock();
        holds.0 += 1;
        let number = holds.0;
        holds.1.insert(number, why.into());
        drop(holds);
        RamHold { ram: Arc::clone(self), number }
    }
}

impl Drop for RamHold {
    fn drop(&mut self) {
        self.ram.holds.lock().1.remove(&self.number);
    }
}

impl fmt::Debug for RamHold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RamHold").field("number", &self.number).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use vfio_migration_types::{Gpa, PAGE_SIZE};

    use super::*;
    use crate::owned::RamSpec;

    #[test]
    fn each_who_holds_it_is_named_until_it_lets_go() {
        let ram = Arc::new(GuestRam::new("held", &[RamSpec { gpa: Gpa(0), len: PAGE_SIZE }]).unwrap());
        ram.may_change().unwrap();
        let first = ram.hold("it moves to b");
        let second = ram.hold("it is saved");
        let both = RamHeld(vec!["it moves to b".into(), "it is saved".into()]);
        assert_eq!(ram.may_change(), Err(both));
        drop(first);
        let said = ram.may_change().unwrap_err().to_string();
        assert_eq!(said, "guest RAM cannot be changed now: it is saved");
        drop(second);
        ram.may_change().unwrap();
    }
}
