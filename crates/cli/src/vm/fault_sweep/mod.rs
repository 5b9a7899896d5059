//! Every fault that the sample device can be told to have, at the source and at the destination, at every arc that it can strike,
//! and a cancel in every phase: what is said of the migration (exit code, JSON, text, status of both sides, events, history, journal)
//! agrees with what is (vCPUs, devices). Both `vm`s run in this process, with the software guest. A server that is killed in each
//! phase, and processes that are short of descriptors, are in `tests/process/losses.rs`.

mod after;
mod agreement;
mod cancels;
mod faults;
mod sides;
