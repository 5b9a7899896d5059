//! Guest RAM from outside, a file per subject.

mod dirty;
mod mapping;
mod pieces;
mod ram;
