//! Interrupt routes: staged one by one, effective together.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};

use vfio_migration_device::{IrqRouter, MsiMessage};

use super::backend::MsiRouteTable;
use crate::layout::{GSIS, IOAPIC_PINS};

/// End of the interrupt numbers for messages: the pins of the two PICs have routes of their own, which count too.
const MESSAGES_END: u32 = GSIS - 16;
/// First pin of the IOAPIC that is a PCI function's: 16 to 23 are, and no chip has any of them.
const FIRST_PCI_PIN: u32 = 16;

/// The IOAPIC pin that pin `pin` (1 to 4) of a function in `slot` is wired to. Functions share pins.
pub(super) fn pin_of(slot: u8, pin: u8) -> u32 {
    let pins = IOAPIC_PINS - FIRST_PCI_PIN;
    FIRST_PCI_PIN + (u32::from(slot) + u32::from(pin.saturating_sub(1))) % pins
}

/// The stock [`IrqRouter`]: keeps the whole table, and replaces the machine's by it with one call per commit.
#[derive(Debug)]
pub struct MsiRouter {
    table: Arc<dyn MsiRouteTable>,
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
    /// A router without routes over the machine's `table`.
    pub fn new(table: Arc<dyn MsiRouteTable>) -> Self {
        let state = State {
            routes: BTreeMap::new(),
            staged: false,
            returned: BTreeSet::new(),
            next_gsi: IOAPIC_PINS,
        };
        Self { table, state: Mutex::new(state) }
    }

    /// Sets an interrupt number aside for one vector; `None` when all are in use.
    pub fn allocate(&self) -> Option<u32> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gsi) = state.returned.pop_first() {
            return Some(gsi);
        }
        let gsi = Some(state.next_gsi).filter(|gsi| *gsi < MESSAGES_END)?;
        state.next_gsi += 1;
        Some(gsi)
    }

    /// Takes back a number that [`allocate`](Self::allocate) gave, and stages the end of its route.
    pub fn free(&self, gsi: u32) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.staged |= state.routes.remove(&gsi).is_some();
        state.returned.insert(gsi);
    }
}

impl IrqRouter for MsiRouter {
    fn set(&self, gsi: u32, message: Option<MsiMessage>) -> Result<(), Box<dyn Error + Send + Sync>> {
        if !(IOAPIC_PINS..MESSAGES_END).contains(&gsi) {
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

    fn commit(&self) -> Result<(), Box<dyn Error + Send + Sync>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.staged {
            self.table.replace(&state.routes)?;
            state.staged = false;
        }
        Ok(())
    }
}
