//! The reference VMM from outside: on KVM, on its software twin, and as a whole machine.

mod kvm;
mod machine;
mod sample;
mod software;
