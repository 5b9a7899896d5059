//! I/O ports that the program uses, beside the configuration mechanism of PCI (0xCF8 and 0xCFC) and a first serial line at 0x3F8.

/// First of the four ports whose read latches the host's monotonic clock, in nanoseconds, and gives its low half.
pub const CLOCK_LOW: u16 = 0xC00;
/// First of the four ports that give the latched high half.
pub const CLOCK_HIGH: u16 = 0xC04;
/// A guest that gave up writes its failure code, four bytes, here.
pub const FAILURE: u16 = 0xC08;
