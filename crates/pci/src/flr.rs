//! Function level reset: where a guest asks for one in config space.
//!
//! The device does it, when the write reaches it. What is emulated here must go back to its reset state as well: MSI-X
//! that stays on for a guest that has just reset its function would raise interrupts that it does not expect. (PCI Express
//! Base 6.6.2; Advanced Features ECN.)

use super::config::ConfigSpace;
use super::registers::{CAP_ADVANCED, CAP_EXPRESS};

/// Express: the dword of what it can do, and the byte that the bit to ask is in.
const EXPRESS_CAN: u16 = 4;
const EXPRESS_CAN_FLR: u32 = 1 << 28;
const EXPRESS_ASK: u16 = 9;
const EXPRESS_ASK_FLR: u8 = 1 << 7;
/// Advanced features: the same, the first two bytes of its dword being the capability's header.
const ADVANCED_CAN_FLR: u32 = 1 << 25;
const ADVANCED_ASK: u16 = 4;
const ADVANCED_ASK_FLR: u8 = 1 << 0;

/// The registers by which a function is reset, as bytes and the bit in each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ResetRegisters(Vec<(u16, u8)>);

impl ResetRegisters {
    /// The registers of a function that says it can be reset.
    pub(super) fn find(config: &ConfigSpace) -> Self {
        let asked = |cap: super::config::ConfigCapability| {
            let has = |offset: u16, bit: u32| config.u32(cap.offset + offset) & bit != 0;
            match cap.id {
                CAP_EXPRESS if has(EXPRESS_CAN, EXPRESS_CAN_FLR) => {
                    Some((cap.offset + EXPRESS_ASK, EXPRESS_ASK_FLR))
                }
                CAP_ADVANCED if has(0, ADVANCED_CAN_FLR) => {
                    Some((cap.offset + ADVANCED_ASK, ADVANCED_ASK_FLR))
                }
                _ => None,
            }
        };
        Self(config.capabilities().into_iter().filter_map(asked).collect())
    }

    /// Whether a write of `from` at `offset` asks for a reset.
    pub(super) fn asked(&self, offset: u16, from: &[u8]) -> bool {
        self.0.iter().any(|(register, bit)| {
            let at = register.checked_sub(offset).map(usize::from);
            at.and_then(|at| from.get(at)).is_some_and(|byte| byte & bit != 0)
        })
    }
}
