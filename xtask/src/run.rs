//! Running cargo and other programs, and how a ring that ran them ended.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

/// How a ring that did not fail ended.
pub(crate) enum Outcome {
    /// It ran; this many tests passed, where tests are counted.
    Passed(Option<u64>),
    /// It could not run here, for this reason.
    Skipped(String),
}

/// What the tests are built of, in the profile that README's reader runs. Every ring builds in this profile, and what it
/// runs in this choice of packages: another would compile everything again.
pub(crate) const BUILT: &[&str] = &["--release", "--workspace", "--lib", "--bins", "--tests"];

/// Runs cargo, output shown as it comes and returned.
pub(crate) fn cargo(top: &Path, arguments: &[&str]) -> Result<String, String> {
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(top).args(arguments);
    finish(command, &format!("cargo {}", arguments.join(" ")))
}

/// Runs a command to its end, as [`cargo`] does.
pub(crate) fn finish(mut command: Command, what: &str) -> Result<String, String> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("cannot start {what}: {error}"))?;
    let mut text = String::new();
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            println!("{line}");
            text.push_str(&line);
            text.push('\n');
        }
    }
    let status = child.wait().map_err(|error| format!("{what}: {error}"))?;
    if status.success() { Ok(text) } else { Err(format!("{what}: {status}")) }
}
