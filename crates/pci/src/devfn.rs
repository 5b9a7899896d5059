//! Where a function is on bus 0: its slot and its number there.

use std::fmt;

use vfio_migration_compat::GuestPciAddress;

/// Slot (1 to 31) and function (0 to 7) on bus 0, in one byte as in the address of a config access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Devfn(u8);

impl Devfn {
    /// Function 0 of `slot`, which is taken modulo 32.
    pub const fn in_slot(slot: u8) -> Self {
        Self::new(slot, 0)
    }

    /// Of `slot` (taken modulo 32) the function `function` (modulo 8).
    pub const fn new(slot: u8, function: u8) -> Self {
        Self((slot & 0x1f) << 3 | function & 7)
    }

    /// Slot on bus 0.
    pub const fn slot(self) -> u8 {
        self.0 >> 3
    }

    /// Function in its slot.
    pub const fn function(self) -> u8 {
        self.0 & 7
    }
}

impl From<Devfn> for GuestPciAddress {
    fn from(place: Devfn) -> Self {
        Self { domain: 0, bus: 0, slot: place.slot(), function: place.function() }
    }
}

/// As `lspci` in the guest shows it.
impl fmt::Display for Devfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        GuestPciAddress::from(*self).fmt(f)
    }
}
