//! `migrate`: asks a running `vm` to move, and waits for the end.

use std::time::Duration;

use serde_json::{Value, json};

use super::status;
use crate::args::Migrate;
use crate::control::{MigrateArguments, MigrationState, Verb};
use crate::exit::{Exit, Failure};
use crate::interrupt::Interrupt;
use crate::output::{print, print_json, say};
use crate::progress::Progress;
use crate::units::milliseconds;

pub(crate) fn run(options: &Migrate, interrupt: &Interrupt) -> Result<Exit, Failure> {
    // A word that is no address is a usage error, whether or not the `vm` can be reached.
    super::vm::uri(&options.uri)?;
    let arguments = MigrateArguments {
        uri: options.uri.clone(),
        downtime_limit: Some(milliseconds(options.downtime_limit)),
        max_bandwidth: options.bandwidth,
        give_up_after: options.give_up.map(milliseconds),
        pause_before_switchover: options.pause_before_switchover,
        verify: options.verify,
        allow_all_dirty: options.allow_all_dirty,
        device_map: options.map.iter().cloned().collect(),
        post_copy: options.post_copy,
    };
    let mut client = options.target.connect()?;
    client.call(Verb::Migrate, json!(arguments)).map_err(|error| Failure::asked("refused", &error))?;
    let mut report = status::ask(&mut client)?;
    let mut progress = Progress::new(!options.target.json);
    let mut cancelled = false;
    while !options.detach
        && matches!(report.migration.status, MigrationState::Active | MigrationState::PreSwitchover)
    {
        progress.show(&report.migration);
        client
            .next_event(Duration::from_millis(200))
            .map_err(|error| Failure::caused("lost the vm", &error))?;
        if interrupt.requested() && !cancelled {
            cancelled = true;
            // Too late to cancel is not a failure: the loop then sees how it ended.
            if let Err(error) = client.call(Verb::MigrateCancel, Value::Null) {
                say(format_args!("vfio-migrate: {error}"));
            }
        }
        report = status::ask(&mut client)?;
    }
    drop(progress);
    if options.target.json {
        print_json(&report)?;
    } else {
        print(status::text(&report))?;
    }
    Ok(match report.migration.status {
        MigrationState::Completed | MigrationState::Active | MigrationState::PreSwitchover => Exit::Done,
        MigrationState::Unresolved => Exit::Unresolved,
        _ if report.migration.incompatible => Exit::Incompatible,
        _ => Exit::Failed,
    })
}
