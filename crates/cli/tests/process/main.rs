//! The command as its users run it: real processes, sockets, KVM.

mod agreement;
mod bad_input;
mod cancel;
mod compat;
mod completions;
mod control_socket;
mod demo;
mod device_files;
mod device_options;
mod drain;
mod endings;
mod foreign_text;
mod generated;
mod history;
mod host;
mod json;
mod limits;
mod moves;
mod quit;
mod receivers;
mod sabotage;
mod silent;
mod snapshots;
mod support;
mod targets;
mod watch;
