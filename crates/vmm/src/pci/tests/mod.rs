//! Functions on a bus of fakes: no kernel, no KVM.

pub(crate) mod fakes;
mod functions;
mod pin_msi;
