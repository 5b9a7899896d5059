//! The engine between two machines in one process, each with kernel devices of its own: what it does with every fault that
//! a device can be told to have. A user of the uAPI sees the same faults in `migdev/faults.rs`.

pub(crate) mod adopted;
pub(crate) mod arcs;
pub(crate) mod awake;
pub(crate) mod faults;
mod machine;
mod meddler;
pub(crate) mod moves;
mod pair;
mod program;
pub(crate) mod resets;
pub(crate) mod serial;
mod tap;
pub(crate) mod unlogged;
