//! The PCI side of a migration: what a VMM saves and puts back, because the device's own stream does not.
//!
//! Interrupts are configured by ioctl and config space is emulated by the VMM, so neither is in the device's
//! state. The order in which they go back (P6) is the library's; the doing is the VMM's, behind these traits:
//!
//! 1. the interrupt controller's state is in;
//! 2. [`PciFunction::restore_config`] for each: compare, load, PCI_COMMAND, BAR mappings;
//! 3. [`PciFunction::stage_interrupts`] for each, then one [`IrqRouter::commit`] for all;
//! 4. [`PciFunction::connect_interrupts`] for each: as few SET_IRQS as the back end allows, then what was pending is raised;
//! 5. RESUMING → STOP.

use std::fmt;

use vfio_migration_types::DeviceId;

/// Config space and BARs of one PCI function: what a VMM may have to read from the device itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigState {
    /// The guest's view of config space: 256 or 4096 bytes.
    pub bytes: Vec<u8>,
    /// Guest addresses of the BARs; 0 where a BAR is absent or the upper half of a 64-bit one.
    pub bars: [u64; 6],
}

/// Config space, BARs and interrupts of one PCI function, as they travel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciState {
    /// The guest's view of config space: 256 or 4096 bytes.
    pub config: Vec<u8>,
    /// Guest addresses of the BARs; 0 where a BAR is absent or the upper half of a 64-bit one.
    pub bars: [u64; 6],
    /// The whole MSI-X table, also while it is not enabled: the guest may be in the middle of filling it. Empty without
    /// MSI-X.
    pub vectors: Vec<VectorState>,
    /// Whether the function has MSI-X.
    pub msix: bool,
    /// The MSI vectors that were raised and not yet delivered, a bit each. Their messages and masks are in config space.
    pub msi_pending: u32,
    /// Whether an INTx interrupt was, or may have been, asserted and not yet ended by the guest.
    pub intx_pending: bool,
}

/// One MSI or MSI-X vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct VectorState {
    /// Address and data of the vector's message.
    pub message: MsiMessage,
    /// Masked by the guest.
    pub masked: bool,
    /// Raised while masked, or raised and not yet delivered.
    pub pending: bool,
}

/// A message-signalled interrupt: the write that raises it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct MsiMessage {
    /// Address, low and high halves together.
    pub address: u64,
    /// Data that is written to the address.
    pub data: u32,
}

/// Rules for config-space bytes that may differ between the two sides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConfigRules {
    /// Exceptions to the default mask, later ones winning.
    pub rules: Vec<ConfigRule>,
}

/// One exception: bytes `offset .. offset + len` are compared, or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigRule {
    /// First byte in config space.
    pub offset: u16,
    /// Number of bytes, from `offset` on.
    pub len: u16,
    /// Whether a difference is refused.
    pub compare: bool,
}

impl From<vfio_migration_compat::MaskRule> for ConfigRule {
    fn from(rule: vfio_migration_compat::MaskRule) -> Self {
        Self { offset: rule.offset, len: rule.len, compare: rule.compare }
    }
}

/// An error on the PCI side of a device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PciError {
    /// A config-space byte that must be equal differs.
    #[error(
        "device {device}: config space differs at {offset:#x}: source {source_byte:#04x}, destination \
         {destination_byte:#04x} (mask {mask:#04x}); if that is harmless, exempt the byte by a config rule"
    )]
    ConfigMismatch {
        /// The device of the function.
        device: DeviceId,
        /// Offset of the byte.
        offset: u16,
        /// Byte at the source.
        source_byte: u8,
        /// Byte at the destination.
        destination_byte: u8,
        /// Bits that are compared.
        mask: u8,
    },
    /// The state offered cannot belong to this function.
    #[error("device {device}: the PCI state does not fit: {what}")]
    Unfit {
        /// The device of the function.
        device: DeviceId,
        /// The fault of the state, as a phrase.
        what: String,
    },
    /// The VMM or the device failed.
    #[error("device {device}: {doing} failed")]
    Failed {
        /// The device of the function.
        device: DeviceId,
        /// The failed step, as a noun phrase.
        doing: String,
        /// The cause of the failure.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// A device's PCI function in the VMM. Called with the guest paused; at the source before and after the device is stopped, at the
/// destination while it resumes.
pub trait PciFunction: fmt::Debug + Send + Sync {
    /// The device it belongs to.
    fn id(&self) -> &DeviceId;

    /// Reads out config space and BARs. Called before the device is taken to STOP_COPY, where some refuse every access to a region
    /// (libvfio-user's servers do).
    fn save_config(&self) -> Result<ConfigState, PciError>;

    /// Adds the interrupts to what [`save_config`](Self::save_config) gave: vectors, and what is pending; the eventfds of masked
    /// vectors are drained into their pending bits first. Called when the device has stopped and raises nothing any more, so nothing
    /// of it may need an access to the device's regions.
    fn save_interrupts(&self, config: ConfigState) -> Result<PciState, PciError>;

    /// Compares `state.config` with the device's own under the default mask as changed by `rules`, loads it, writes
    /// PCI_COMMAND to the device, and maps the BARs where the guest has them. Called for all functions of a machine at once.
    fn restore_config(&self, state: &PciState, rules: &ConfigRules) -> Result<(), PciError>;

    /// Stages the routes of the vectors, which the machine's [`IrqRouter`] commits with those of all other functions.
    fn stage_interrupts(&self, state: &PciState) -> Result<(), PciError>;

    /// Connects the vectors' eventfds by SET_IRQS, and raises what `state` says was pending. Returns how many vectors are armed.
    fn connect_interrupts(&self, state: &PciState) -> Result<u32, PciError>;

    /// Takes back what [`restore_config`](Self::restore_config) and the interrupt steps did, so that the device can
    /// be released. Succeeds when there is nothing to take back.
    fn undo(&self) -> Result<(), PciError>;
}

/// The VMM's interrupt routing. Routes are staged one by one, by what [`PciFunction`]s have of their own for it, and take effect
/// together: on KVM each change replaces the whole table. A VMM that connects vectors one by one has nothing to do here.
pub trait IrqRouter: fmt::Debug + Send + Sync {
    /// Makes all staged routes effective at once.
    fn commit(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>>;
}
