//! Runs of the command that end by themselves.

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::check::Outcome;

/// The command, in the image.
pub(crate) const PROGRAM: &str = "/vfio-migrate";

/// Result of a run of the command.
pub(crate) struct CommandRun {
    /// `None`: a signal ended it.
    pub(crate) exit: Option<i32>,
    pub(crate) stderr: String,
    /// The object that it printed.
    pub(crate) report: Value,
}

/// Runs it with `--json`.
pub(crate) fn run(arguments: &[&str]) -> Outcome<CommandRun> {
    run_as(arguments, None)
}

/// Runs it with `--json`, as another user if one is named.
pub(crate) fn run_as(arguments: &[&str], user: Option<u32>) -> Outcome<CommandRun> {
    let mut command = Command::new(PROGRAM);
    command.args(arguments).arg("--json").stdin(Stdio::null());
    if let Some(user) = user {
        command.uid(user).gid(user);
    }
    let output = command.output()?;
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let report = serde_json::from_slice(&output.stdout).map_err(|error| {
        format!("{arguments:?} printed no JSON object ({error}), {}: {stderr}", output.status)
    })?;
    Ok(CommandRun { exit: output.status.code(), stderr, report })
}
