//! The codec against golden files, against itself, and against hostile bytes.
#![expect(clippy::cast_possible_truncation, reason = "lengths here are small, and wrong ones fail the test")]

mod forge;
mod golden;
mod hostile;
mod roundtrip;
mod samples;
mod strategies;
