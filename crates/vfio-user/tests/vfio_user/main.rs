//! Clients and servers against each other, against liars, and against another implementation.

mod bounded;
mod by_hand;
mod codec;
mod commands;
mod dma;
mod drop_reasons;
mod foreign_clients;
mod foreign_servers;
mod interop;
mod late_clients;
mod late_servers;
mod lifecycle;
mod lying_clients;
mod lying_servers;
mod rig;
mod silent_clients;
