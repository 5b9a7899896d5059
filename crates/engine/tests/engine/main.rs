//! Both sides of the engine, alone, as a pair, and in a simulated world.

mod arrival;
mod cancel;
mod decision;
mod operator;
mod pair;
mod questions;
mod random;
mod rehearsal;
mod sweep;
mod world;
