//! One connection between the two sides: making it, frames over it, and how much may be sent.

pub(crate) mod binding;
pub(crate) mod connect;
pub(crate) mod credit;
pub(crate) mod error;
pub(crate) mod greeting;
pub(crate) mod handed;
pub(crate) mod limiter;
pub(crate) mod link;
pub(crate) mod listener;
pub(crate) mod liveness;
pub(crate) mod reader;
pub(crate) mod source_host;
pub(crate) mod tls;
pub(crate) mod transport;
