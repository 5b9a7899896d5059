//! `status`: how a `vm` and its migration stand.

use std::time::Duration;

use crate::args::moves::Status;
use crate::control::protocol::MigrationState;
use crate::exit::{Exit, Failure};
use crate::follow::{ask, text};
use crate::interrupt::Interrupt;
use crate::output::{print, print_json};
use crate::progress::Progress;

/// How often `--watch` looks.
const WATCH_EVERY: Duration = Duration::from_millis(200);

pub(crate) fn run(options: &Status, interrupt: &Interrupt) -> Result<Exit, Failure> {
    let mut client = options.target.connect()?;
    let mut report = ask(&mut client)?;
    if options.watch {
        let mut progress = Progress::new(!options.target.json);
        while matches!(report.migration.status, MigrationState::Active | MigrationState::PreSwitchover) {
            progress.show(&report.migration);
            client.next_event(WATCH_EVERY).map_err(|error| Failure::caused("lost the vm", &error))?;
            interrupt.check()?;
            report = ask(&mut client)?;
        }
    }
    if options.target.json {
        print_json(&report)?;
    } else {
        print(text(&report))?;
    }
    Ok(Exit::Done)
}
