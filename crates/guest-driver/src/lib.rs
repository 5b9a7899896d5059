//! What every driver of the sample device has in common: [`registers`], the [`Ring`] and its [`Descriptor`]s, and the check of
//! an [`ExpectedBlock`], written from the device's contract and not from its code.
//!
//! A driver brings its own way to device and memory, [`SharedMemory`] and [`DeviceRegisters`], and its own policy: what it posts, when it looks, what it
//! counts, and where it keeps what it knows. The guest program in assembly (`guest-image`) shares nothing with this crate, nor do
//! the devices that it drives, `sim` but for the register map, and `kernel/migdev`: what is wrong here shows as a lost block.
#![no_std]
#![forbid(unsafe_code)]

mod block;
pub mod registers;
mod ring;

pub use block::{ExpectedBlock, Flaw};
pub use ring::{DESCRIPTOR_LEN, Descriptor, DeviceRegisters, P2P, Ring, SharedMemory};
