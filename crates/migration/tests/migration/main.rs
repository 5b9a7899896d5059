//! Migrations between two machines in one process, a file per subject.

mod cancel;
mod configuration;
mod connections;
mod constructed;
mod cut_wire;
mod device_file;
mod expectation;
mod faults;
mod migrate;
mod next_source;
mod other_owners;
mod plain_text;
mod progress;
mod ram_hold;
mod ram_kinds;
mod rehearsal;
mod snapshot;
mod strangers;
mod threads;
mod tls;
mod toy;
mod unanswered;
mod uncovered;
mod unresolved;
mod waits;
