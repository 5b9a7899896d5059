//! `status`: how a `vm` and its migration stand.

use crate::args::moves::Status;
use crate::control::protocol::MigrationState;
use crate::exit::{Exit, Failure};
use crate::follow::{OnInterrupt, follow, text};
use crate::interrupt::Interrupt;
use crate::output::{print, print_json};

pub(crate) fn run(options: &Status, interrupt: &Interrupt) -> Result<Exit, Failure> {
    let mut client = options.target.connect()?;
    let goes_on =
        |state| options.watch && matches!(state, MigrationState::Active | MigrationState::PreSwitchover);
    let report = follow(&mut client, goes_on, options.target.json, interrupt, OnInterrupt::Leave)?;
    if options.target.json {
        print_json(&report)?;
    } else {
        print(text(&report))?;
    }
    Ok(Exit::Done)
}
