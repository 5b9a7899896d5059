//! The control socket of `vm`: newline JSON with QMP-like verbs and events, documented in `docs/control.md`.

pub(crate) mod access;
pub(crate) mod awaited;
pub(crate) mod client;
pub(crate) mod clients;
pub(crate) mod event;
pub(crate) mod expected;
pub(crate) mod failure;
pub(crate) mod guest;
mod lines;
pub(crate) mod protocol;
pub(crate) mod refused;
pub(crate) mod rehearsal;
mod request;
pub(crate) mod security;
pub(crate) mod server;
pub(crate) mod verbs;
