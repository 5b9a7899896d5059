//! Functions on a bus of fakes: no kernel, no KVM.

pub(crate) mod fakes;
mod functions;
mod hidden;
mod large_bars;
mod own_registers;
mod pin_msi;
mod vectors;
