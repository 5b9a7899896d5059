//! Names of the config-space registers that are used here (PCI Local Bus 3.0, `include/uapi/linux/pci_regs.h`).

pub(super) const COMMAND: u16 = 0x04;
pub(super) const STATUS: u16 = 0x06;
pub(super) const CACHE_LINE_SIZE: u16 = 0x0c;
pub(super) const LATENCY_TIMER: u16 = 0x0d;
pub(super) const HEADER_TYPE: u16 = 0x0e;
pub(super) const BAR0: u16 = 0x10;
pub(super) const ROM_ADDRESS: u16 = 0x30;
pub(super) const CAPABILITY_LIST: u16 = 0x34;
pub(super) const INTERRUPT_LINE: u16 = 0x3c;
pub(super) const INTERRUPT_PIN: u16 = 0x3d;
pub(super) const HEADER_END: u16 = 0x40;
pub(super) const EXTENDED: u16 = 0x100;

pub(super) const COMMAND_IO: u16 = 0x1;
pub(super) const COMMAND_MEMORY: u16 = 0x2;
pub(super) const COMMAND_MASTER: u16 = 0x4;
pub(super) const COMMAND_INTX_DISABLE: u16 = 0x400;
/// IO, memory, bus master, parity, SERR, INTx disable.
pub(super) const COMMAND_WRITABLE: u16 = 0x547;
pub(super) const STATUS_CAP_LIST: u16 = 0x10;

pub(super) const CAP_PM: u8 = 0x01;
pub(super) const CAP_VPD: u8 = 0x03;
pub(super) const CAP_MSI: u8 = 0x05;
pub(super) const CAP_VENDOR: u8 = 0x09;
pub(super) const CAP_EXPRESS: u8 = 0x10;
pub(super) const CAP_MSIX: u8 = 0x11;
pub(super) const CAP_ADVANCED: u8 = 0x13;

pub(super) const MSI_CONTROL: u16 = 2;
pub(super) const MSI_ADDRESS: u16 = 4;
/// The enable bit, and how many vectors are in use.
pub(super) const MSI_WRITABLE: u8 = 0x71;
pub(super) const MSI_ENABLE: u16 = 0x1;
pub(super) const MSI_WIDE: u16 = 0x80;
pub(super) const MSI_MASKABLE: u16 = 0x100;

pub(super) const MSIX_CONTROL: u16 = 2;
pub(super) const MSIX_TABLE: u16 = 4;
pub(super) const MSIX_PBA: u16 = 8;
pub(super) const MSIX_CAP_LEN: u16 = 12;
pub(super) const MSIX_ENABLE: u16 = 0x8000;
pub(super) const MSIX_MASK_ALL: u16 = 0x4000;

/// Advanced error reporting.
pub(super) const EXT_AER: u16 = 0x01;
/// Sizes of BARs.
pub(super) const EXT_RESIZABLE_BAR: u16 = 0x15;
/// Latency tolerance reporting.
pub(super) const EXT_LTR: u16 = 0x18;
