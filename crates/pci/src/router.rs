//! Interrupt routes: staged one by one, effective together.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use vfio_migration_device::{IrqRouter, MsiMessage};

use super::backend::MsiRouteTable;

/// The stock [`IrqRouter`]: keeps the whole table, and replaces the machine's by it with one call per commit.
#[derive(Debug)]
pub struct MsiRouter {
    table: Arc<dyn MsiRouteTable>,
    numbers: Range<u32>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    routes: BTreeMap<u32, MsiMessage>,
    /// The machine's table is not this one.
    staged: bool,
    /// Interrupt numbers that were given back, and the first that never was given.
    returned: BTreeSet<u32>,
    next_gsi: u32,
}

impl MsiRouter {
    /// A router without routes over the machine's `table`, for the interrupt numbers `numbers`.
    pub fn new(table: Arc<dyn MsiRouteTable>, numbers: Range<u32>) -> Self {
        let state = State {
            routes: BTreeMap::new(),
            staged: false,
            returned: BTreeSet::new(),
            next_gsi: numbers.start,
        };
        Self { table, numbers, state: Mutex::new(state) }
    }

    /// Sets an interrupt number aside for one vector; `None` when all are in use.
    pub fn allocate(&self) -> Option<u32> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gsi) = state.returned.pop_first() {
            return Some(gsi);
        }
        let gsi = Some(state.next_gsi).filter(|gsi| *gsi < self.numbers.end)?;
        state.next_gsi += 1;
        Some(gsi)
    }

    /// Takes back a number that [`allocate`](Self::allocate) gave, and stages the end of its route.
    pub fn free(&self, gsi: u32) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.staged |= state.routes.remove(&gsi).is_some();
        state.returned.insert(gsi);
    }

    /// Stages the route of `gsi`; `None` removes it.
    ///
    /// # Errors
    /// The number is not one of the router's.
    pub fn set(&self, gsi: u32, message: Option<MsiMessage>) -> Result<(), Box<dyn Error + Send + Sync>> {
        if !self.numbers.contains(&gsi) {
            return Err(format!("interrupt {gsi} is not one for messages").into());
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let before = match message {
            Some(message) => state.routes.insert(gsi, message),
            None => state.routes.remove(&gsi),
        };
        state.staged |= before != message;
        Ok(())
    }
}

impl IrqRouter for MsiRouter {
    fn commit(&self) -> Result<(), Box<dyn Error + Send + Sync>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.staged {
            self.table.replace(&state.routes)?;
            state.staged = false;
        }
        Ok(())
    }
}
