//! Whether the VMM may hot-plug RAM now: not while somebody counts on its layout.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Who counts on the layout of one RAM, by number.
#[derive(Debug, Default)]
pub(crate) struct Holds(Mutex<(u64, BTreeMap<u64, String>)>);

impl Holds {
    pub(crate) fn check(&self) -> Result<(), RamHeld> {
        let why: Vec<_> = self.lock().1.values().cloned().collect();
        if why.is_empty() { Ok(()) } else { Err(RamHeld(why)) }
    }

    pub(crate) fn hold(self: &Arc<Self>, why: String) -> RamHold {
        let mut holds = self.lock();
        holds.0 += 1;
        let number = holds.0;
        holds.1.insert(number, why);
        RamHold { of: Arc::clone(self), number }
    }

    fn lock(&self) -> MutexGuard<'_, (u64, BTreeMap<u64, String>)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// RAM whose layout somebody counts on, for as long as this is kept.
pub struct RamHold {
    of: Arc<Holds>,
    number: u64,
}

/// RAM that is not to be changed now: no region of it may come, go, grow or move.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("guest RAM cannot be changed now: {}", .0.join("; "))]
pub struct RamHeld(
    /// Why, as phrases: one for each who counts on it.
    pub Vec<String>,
);

impl Drop for RamHold {
    fn drop(&mut self) {
        self.of.lock().1.remove(&self.number);
    }
}

impl fmt::Debug for RamHold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RamHold").field("number", &self.number).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_who_holds_it_is_named_until_it_lets_go() {
        let ram = Arc::new(Holds::default());
        ram.check().unwrap();
        let first = ram.hold("it moves to b".into());
        let second = ram.hold("it is saved".into());
        let both = RamHeld(vec!["it moves to b".into(), "it is saved".into()]);
        assert_eq!(ram.check(), Err(both));
        drop(first);
        let said = ram.check().unwrap_err().to_string();
        assert_eq!(said, "guest RAM cannot be changed now: it is saved");
        drop(second);
        ram.check().unwrap();
    }
}
