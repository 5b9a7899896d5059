//! The control socket of `vm`: newline JSON with QMP-like verbs and events, documented in `docs/control.md`.

mod client;
mod guest;
mod place;
mod protocol;
mod rehearsal;
mod server;

pub(crate) use client::{Client, ClientError};
pub(crate) use guest::{GuestInfo, STAGE_RUNNING};
pub(crate) use protocol::{
    Event, IncomingArguments, MigrateArguments, MigrationInfo, MigrationState, NoArguments,
    ParameterArguments, PhaseInfo, Refused, SaveArguments, StatusInfo, TransferInfo, Verb,
};
pub(crate) use rehearsal::{RehearsalInfo, RehearseArguments};
pub(crate) use server::{Bound, Handler, Publisher};
