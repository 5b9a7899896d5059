//! The verbs that ask a running `vm` over its control socket: those that are followed to an end, and those of one request.

use std::num::NonZeroU64;
use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vfio_migration_compat::Verdict;

use crate::address::Address;
use crate::args::moves::{
    IncomingCommand, MigrateCommand, QuitCommand, RehearseCommand, SaveCommand, SetCommand, StatusCommand,
};
use crate::control::client::{ControlClient, ControlError};
use crate::control::failure::FailureInfo;
use crate::control::protocol::{
    ControlVerb, FollowedReport, IncomingArguments, MigrateArguments, MigrationStatus, ParameterArguments,
    QuitArguments, SaveArguments, StatusReport, VmStatus,
};
use crate::control::rehearsal::{RehearsalInfo, RehearseArguments};
use crate::exit::{CliError, Exit, FailureReport};
use crate::follow::{OnInterrupt, follow, followed_text, text};
use crate::interrupt::UserInterrupt;
use crate::output::{eprint_lines, eprintln_line, print, print_json};
use crate::target::VmTarget;
use crate::units::{format_size, milliseconds};
use crate::verdict;
use crate::words::device_map;

/// What `rehearse --json` prints.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct RehearseReport {
    #[serde(flatten)]
    pub(crate) found: RehearsalInfo,
    /// What a device had not answered when the rehearsal ended: it is undone when the answer comes.
    #[serde(default)]
    pub(crate) left_undone: Vec<FailureInfo>,
}

/// What `migrate --json` and `save --control --json` print when what they asked for has ended, or goes on without them.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct EndedReport {
    #[serde(flatten)]
    pub(crate) report: FollowedReport,
    /// How it failed, where it did: as every verb that fails tells it.
    #[serde(flatten)]
    pub(crate) failure: Option<FailureReport>,
}

/// What the verbs that only ask a `vm` for something print with `--json`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "Acknowledged")]
pub(crate) struct ActionReply {
    /// The request was taken.
    pub(crate) ok: bool,
}

/// `migrate`: asks a running `vm` to move its guest, and waits for the end.
pub(crate) fn migrate(command: &MigrateCommand, interrupt: &UserInterrupt) -> Result<Exit, CliError> {
    // A word that is no address is a usage error, whether or not the `vm` can be reached.
    command.uri.parse::<Address>()?;
    let arguments = MigrateArguments {
        uri: command.uri.clone(),
        options: command.options.clone(),
        switchover: command.switchover.clone(),
    };
    let mut client = command.target.connect(Some(interrupt))?;
    begin(&mut client, ControlVerb::Migrate, json!(arguments))?;
    let goes_on = |state: MigrationStatus| !command.detach && state.is_under_way();
    let report = follow(&mut client, goes_on, command.target.json, interrupt, OnInterrupt::Cancel)?;
    tell_end(report, command.target.json)
}

/// Asks for a session, which is followed then.
fn begin(client: &mut ControlClient, verb: ControlVerb, arguments: Value) -> Result<(), CliError> {
    match client.call(verb, arguments) {
        Ok(_) => Ok(()),
        Err(error @ ControlError::Interrupted(_)) => Err(CliError::failed(format!(
            "{error} before the `vm` answered: whether it has begun, and how it ends, `status` tells"
        ))),
        Err(error) => Err(error.not_done()),
    }
}

/// Prints how what was followed has ended; why it failed, and what was left undone, goes to stderr.
fn tell_end(report: StatusReport, json: bool) -> Result<Exit, CliError> {
    let report =
        report.latest().ok_or_else(|| CliError::failed("the `vm` does not know what became of it"))?;
    let migration = &report.migration;
    if let Some(why) = verdict::why(migration) {
        eprint_lines(&format!("vfio-migrate: {why}"));
    }
    for failure in &migration.left_undone {
        eprintln_line(format_args!("vfio-migrate: left undone: {}", failure.text));
    }
    let exit = migration.exit();
    if json {
        let why = migration.error.clone();
        let why = why.unwrap_or_else(|| format!("it ended as {}", verdict::json_word(&migration.status)));
        let failure = (exit != Exit::Done).then(|| CliError::new(exit, why).report());
        print_json(&EndedReport { report, failure })?;
    } else {
        print(followed_text(&report))?;
    }
    Ok(exit)
}

/// `rehearse`: everything up to the switchover for real, and undone.
pub(crate) fn rehearse(command: &RehearseCommand, interrupt: &UserInterrupt) -> Result<Exit, CliError> {
    command.to.parse::<Address>()?;
    device_map(&command.options.device_map)?;
    let arguments =
        RehearseArguments { uri: command.to.clone(), options: command.options.clone(), pause: command.pause };
    let mut client = command.target.connect(Some(interrupt))?;
    begin(&mut client, ControlVerb::Rehearse, json!(arguments))?;
    let json = command.target.json;
    let report =
        follow(&mut client, MigrationStatus::is_under_way, json, interrupt, OnInterrupt::Cancel)?.latest();
    let migration = report.map(|report| report.migration);
    let (found, error, left_undone) = match migration {
        Some(migration) => (migration.rehearsal, migration.error, migration.left_undone),
        None => (None, None, Vec::new()),
    };
    for failure in &left_undone {
        eprintln_line(format_args!("vfio-migrate: left undone: {}", failure.text));
    }
    let Some(found) = found else {
        // It says that it was the rehearsal, and whether it was cancelled.
        return Err(CliError::failed(
            error.unwrap_or_else(|| "the rehearsal did not say why it failed".into()),
        ));
    };
    let verdict = found.verdict;
    if command.target.json {
        print_json(&RehearseReport { found, left_undone })?;
    } else {
        print(rehearsal_text(&found))?;
    }
    // A rehearsal is of a live migration.
    Ok(if verdict <= Verdict::LiveWithWarning { Exit::Done } else { Exit::Incompatible })
}

/// `save --control`: asks a running `vm` to write its guest into a file, and waits for the end.
pub(crate) fn save(
    command: &SaveCommand,
    control: &Path,
    interrupt: &UserInterrupt,
) -> Result<Exit, CliError> {
    let target = VmTarget { control: control.to_owned(), json: command.json };
    // The `vm` may have another working directory.
    let path = std::path::absolute(&command.output)
        .map_err(|error| CliError::caused(&format!("{}", command.output.display()), &error))?;
    let path = path
        .to_str()
        .ok_or_else(|| CliError::new(Exit::Usage, format!("{} is not UTF-8", path.display())))?;
    let arguments = SaveArguments { path: path.into(), options: command.options.clone() };
    let mut client = target.connect(Some(interrupt))?;
    begin(&mut client, ControlVerb::Save, json!(arguments))?;
    let report =
        follow(&mut client, MigrationStatus::is_under_way, command.json, interrupt, OnInterrupt::Cancel)?;
    tell_end(report, command.json)
}

/// `status`: prints the report on a `vm` and its migration.
pub(crate) fn status(
    command: &StatusCommand,
    control: &Path,
    interrupt: &UserInterrupt,
) -> Result<Exit, CliError> {
    let target = VmTarget { control: control.to_owned(), json: command.json };
    let mut client = target.connect_within(command.patience.timeout, Some(interrupt))?;
    let goes_on = |state: MigrationStatus| command.watch && state.is_under_way();
    let report = follow(&mut client, goes_on, command.json, interrupt, OnInterrupt::Leave)?;
    if command.json {
        print_json(&report)?;
    } else {
        print(text(&report))?;
    }
    Ok(report.exit())
}

/// `cancel`: the migration is given up.
pub(crate) fn cancel(target: &VmTarget) -> Result<Exit, CliError> {
    let mut client = target.connect(None)?;
    let waits = client.query().is_ok_and(|report| report.vm.status == VmStatus::Inmigrate);
    let done = if waits {
        "cancelling: the wait for a guest ends, and `incoming` begins another"
    } else {
        "cancelling"
    };
    ask(client, target, ControlVerb::MigrateCancel, Value::Null, done)
}

/// `continue`: a migration that waits before its switchover goes on.
pub(crate) fn continue_migration(target: &VmTarget) -> Result<Exit, CliError> {
    request(target, ControlVerb::MigrateContinue, Value::Null, "the migration goes on")
}

/// `set`: other limits for the migration under way.
pub(crate) fn set(command: &SetCommand) -> Result<Exit, CliError> {
    let arguments = ParameterArguments {
        // At least one: it is not 0, and is rounded up.
        downtime_limit: command.downtime_limit.map(milliseconds).and_then(NonZeroU64::new),
        max_bandwidth: command.bandwidth,
    };
    request(&command.target, ControlVerb::MigrateSetParameters, json!(arguments), "set")
}

/// `stop`: the guest is paused.
pub(crate) fn stop(target: &VmTarget) -> Result<Exit, CliError> {
    request(target, ControlVerb::Stop, Value::Null, "the guest is paused")
}

/// `cont`: the guest runs.
pub(crate) fn cont(target: &VmTarget) -> Result<Exit, CliError> {
    request(target, ControlVerb::Cont, Value::Null, "the guest runs")
}

/// `quit`: the process ends.
pub(crate) fn quit(command: &QuitCommand) -> Result<Exit, CliError> {
    let arguments = QuitArguments { force: command.force };
    request(&command.target, ControlVerb::Quit, json!(arguments), "the process ends")
}

/// `incoming`: a `vm` that has no guest waits for one again.
pub(crate) fn incoming(command: &IncomingCommand) -> Result<Exit, CliError> {
    command.uri.parse::<Address>()?;
    let arguments = IncomingArguments { uri: command.uri.clone(), options: command.options.clone() };
    request(&command.target, ControlVerb::MigrateIncoming, json!(arguments), "it waits for a guest")
}

fn request(target: &VmTarget, verb: ControlVerb, arguments: Value, done: &str) -> Result<Exit, CliError> {
    ask(target.connect(None)?, target, verb, arguments, done)
}

fn ask(
    mut client: ControlClient,
    target: &VmTarget,
    verb: ControlVerb,
    arguments: Value,
    done: &str,
) -> Result<Exit, CliError> {
    match client.call(verb, arguments) {
        Ok(_) => {}
        // The process may be gone before its answer is read.
        Err(ControlError::Closed | ControlError::Disconnected(_)) if verb == ControlVerb::Quit => {}
        Err(error) => return Err(error.not_done()),
    }
    if target.json {
        print_json(&ActionReply { ok: true })?;
    } else {
        print(format!("{done}\n"))?;
    }
    Ok(Exit::Done)
}

fn rehearsal_text(found: &RehearsalInfo) -> String {
    let mut text = verdict::text(&found.report());
    if let Some(predicted) = found.predicted_downtime_ms {
        text.push_str(&format!("the guest would be paused for about {predicted:.1} ms:\n"));
        for part in &found.parts {
            text.push_str(&format!(
                "  {:24} {:9.1} ms  {}\n",
                part.name,
                part.ms,
                verdict::json_word(&part.basis)
            ));
        }
    }
    let rate =
        |rate: Option<u64>| rate.map_or("not measured".into(), |rate| format!("{}/s", format_size(rate)));
    text.push_str(&format!(
        "on the wire {}, loaded there {}\n",
        rate(found.rates.wire),
        rate(found.rates.load)
    ));
    text.push_str(&format!("the guest dirties {}\n", rate(found.rates.ram_dirty)));
    for (device, dirty) in &found.rates.devices {
        text.push_str(&format!("device {device} dirties {}\n", rate(*dirty)));
    }
    text
}
