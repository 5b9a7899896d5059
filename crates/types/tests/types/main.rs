//! The crate from outside, a file per subject.

mod arcs;
mod bitmap;
