//! Guest RAM from outside, a file per subject.

mod dirty;
mod kinds;
mod lender;
mod lent;
mod mapping;
mod owned;
mod pieces;
mod ram;
mod vm_memory;
