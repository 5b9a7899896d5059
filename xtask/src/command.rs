//! Commands that are run to their end, and what is told of those that fail.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Runs a command to its end; an error holds the end of what it said.
pub(crate) fn command(program: &str, arguments: &[&str], dir: &Path) -> Result<String, String> {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(dir)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("cannot start {program}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    Err(format!("{program} {}: {}\n{}", arguments.join(" "), output.status, tail(&said)))
}

/// A path as an argument.
pub(crate) fn text(path: &Path) -> Result<&str, String> {
    path.to_str().ok_or_else(|| format!("{}: a path that is no text", path.display()))
}

/// Tells what went wrong with the file at `path`.
pub(crate) fn failed(path: &Path) -> impl FnOnce(std::io::Error) -> String {
    let path: PathBuf = path.into();
    move |error| format!("{}: {error}", path.display())
}

/// The last lines of a long text.
pub(crate) fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(30)..].join("\n")
}
