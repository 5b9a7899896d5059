//! The verbs, but for `demo` and `vm`, which have folders of their own.

pub(crate) mod check;
pub(crate) mod describe;
pub(crate) mod device;
pub(crate) mod device_file;
pub(crate) mod devices;
pub(crate) mod doctor;
pub(crate) mod explain;
pub(crate) mod history;
pub(crate) mod moves;
pub(crate) mod state_dir;
pub(crate) mod tls;
