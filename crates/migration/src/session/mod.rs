//! Code that the sessions of both sides share: threads, failures, progress, and what they ask of the host.

pub(crate) mod abandon;
pub(crate) mod abort;
pub(crate) mod awaited;
pub(crate) mod events;
pub(crate) mod fail;
pub(crate) mod host;
pub(crate) mod interrupt;
pub(crate) mod lock;
pub(crate) mod parallel;
pub(crate) mod rate;
pub(crate) mod start_devices;
pub(crate) mod threads;
pub(crate) mod work_error;
