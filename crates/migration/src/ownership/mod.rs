//! Ownership of a VM: the journal, and its answer to a process that starts.

pub(crate) mod journal;
pub(crate) mod status;
