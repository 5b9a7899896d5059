//! `history`: what became of the sessions of a state directory, without any `vm`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::args::ask::HistoryCommand;
use crate::exit::{CliError, Exit};
use crate::history::{History, HistoryRecord, text};
use crate::output::{eprintln_line, print, print_json};

/// What `history --json` prints.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct HistoryReport {
    /// The sessions that ended, the latest last.
    pub(crate) records: Vec<HistoryRecord>,
    /// Lines of the history that are no records: torn by a crash, or written by a later version.
    pub(crate) unreadable: u64,
}

pub(crate) fn run(command: &HistoryCommand) -> Result<Exit, CliError> {
    if !command.state_dir.is_dir() {
        return Err(CliError::failed(format!("{} is no directory", command.state_dir.display())));
    }
    let History { mut records, unreadable } = History::read(&command.state_dir)?;
    if let Some(vm) = command.vm {
        let vm = vm.to_string();
        records.retain(|record| record.vm.as_deref() == Some(&*vm));
    }
    if let Some(last) = command.last {
        records.drain(..records.len().saturating_sub(last));
    }
    if command.json {
        print_json(&HistoryReport { records, unreadable })?;
        return Ok(Exit::Done);
    }
    if unreadable > 0 {
        eprintln_line(format_args!("vfio-migrate: {unreadable} lines of the history are no records"));
    }
    print(records.iter().map(text).collect::<String>())?;
    Ok(Exit::Done)
}
