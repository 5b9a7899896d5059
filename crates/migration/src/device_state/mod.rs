//! One device's half of the stream, at each side.

pub(crate) mod receive;
pub(crate) mod send;
pub(crate) mod tracked;
