//! The sample device from outside: working, migrating, with faults, and over its socket.

mod faults;
mod migration;
mod running;
mod socket;
mod support;
