//! A vfio-user server and a client that are not ours, written from the specification in Python, and the command at their
//! other end. `cargo xtask test python-peers` runs these.

mod clients;
mod guests;
mod peer;
mod relay;
mod servers;
