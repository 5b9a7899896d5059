//! A PCI function one of whose vectors stays masked.

use std::sync::Arc;

use vfio_migration_device::{ConfigRules, ConfigState, PciError, PciFunction, PciState};
use vfio_migration_types::DeviceId;

/// The high byte of PCI_COMMAND, and in it the bit that disables the pin.
const COMMAND_HIGH: usize = 5;
const PIN_DISABLED: u8 = 0x4;

/// Puts a device's interrupts back, but for one vector.
#[derive(Debug)]
pub(super) struct MaskingFunction {
    pub(super) function: Arc<dyn PciFunction>,
    /// The last vector; else the first.
    pub(super) last: bool,
}

impl MaskingFunction {
    fn masked(&self, state: &PciState) -> PciState {
        let mut state = state.clone();
        let victim = if self.last { state.vectors.last_mut() } else { state.vectors.first_mut() };
        match victim {
            Some(victim) => victim.masked = true,
            None => {
                state.config.iter_mut().skip(COMMAND_HIGH).take(1).for_each(|byte| *byte |= PIN_DISABLED);
            }
        }
        state
    }
}

impl PciFunction for MaskingFunction {
    fn id(&self) -> &DeviceId {
        self.function.id()
    }

    fn save_config(&self) -> Result<ConfigState, PciError> {
        self.function.save_config()
    }

    fn save_interrupts(&self, config: ConfigState) -> Result<PciState, PciError> {
        self.function.save_interrupts(config)
    }

    fn restore_config(&self, state: &PciState, rules: &ConfigRules) -> Result<(), PciError> {
        self.function.restore_config(&self.masked(state), rules)
    }

    fn stage_interrupts(&self, state: &PciState) -> Result<(), PciError> {
        self.function.stage_interrupts(&self.masked(state))
    }

    fn connect_interrupts(&self, state: &PciState) -> Result<u32, PciError> {
        self.function.connect_interrupts(&self.masked(state))
    }

    fn undo(&self) -> Result<(), PciError> {
        self.function.undo()
    }
}
