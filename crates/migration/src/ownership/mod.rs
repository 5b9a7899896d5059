//! Who owns a VM: the journal, and what it says to a process that starts.

pub(crate) mod journal;
pub(crate) mod status;
