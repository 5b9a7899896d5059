//! RAM's half of the stream, at each side, and what is dirty of it.

pub(crate) mod digests;
pub(crate) mod dirty;
pub(crate) mod receive;
pub(crate) mod send;
pub(crate) mod uncovered;
