//! The recordings that README shows: what scripts in docs/pictures print, as pictures that play.
//!
//! A picture is SVG whose lines appear when they came. Where nothing moves, as in print, all of it is shown.

use std::fmt::Write;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::run::cargo;

/// Folder of the scripts and of the pictures.
const FOLDER: &str = "docs/pictures";
/// Most columns; what is longer is cut, and shows that it was.
const COLUMNS: usize = 100;
/// Width of a character and height of a line, in pixels.
const CELL: (f64, usize) = (7.8, 18);
/// Room around the text, in pixels.
const MARGIN: usize = 14;
/// Longest pause between two lines that is played.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// A line, and when it came.
struct Line {
    at: Duration,
    text: String,
}

/// Records each script that is `named`, all if none is, with the command that is built as users build it, or with `VFIO_MIGRATE`.
pub(crate) fn make(top: &Path, named: &[&str]) -> Result<(), String> {
    let command = match std::env::var_os("VFIO_MIGRATE") {
        Some(command) => PathBuf::from(command),
        None => {
            cargo(top, &["build", "--release", "--package", "vfio-migrate"])?;
            top.join("target/release/vfio-migrate")
        }
    };
    let command = std::path::absolute(&command).map_err(|error| format!("{}: {error}", command.display()))?;
    let folder = top.join(FOLDER);
    let entries = std::fs::read_dir(&folder).map_err(|error| format!("{FOLDER}: {error}"))?;
    let mut scripts: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    scripts.retain(|path| path.extension().is_some_and(|end| end == "sh"));
    scripts.sort();
    for script in scripts {
        let name = script.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if !named.is_empty() && !named.contains(&&*name) {
            continue;
        }
        let lines = record(&script, &command)?;
        let path = folder.join(format!("{name}.svg"));
        std::fs::write(&path, svg(&lines)).map_err(|error| format!("{}: {error}", path.display()))?;
        println!("{FOLDER}/{name}.svg: {} lines", lines.len());
    }
    Ok(())
}

/// Runs a script and takes down what it prints.
fn record(script: &Path, command: &Path) -> Result<Vec<Line>, String> {
    let failed = |error: std::io::Error| format!("{}: {error}", script.display());
    let folders = command.parent().into_iter().map(Path::to_path_buf);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths(folders.chain(std::env::split_paths(&path)))
        .map_err(|error| error.to_string())?;
    let begun = Instant::now();
    let mut child = Command::new("sh")
        .arg(script)
        .env("PATH", path)
        .env("COLUMNS", COLUMNS.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let (mut lines, mut last, mut played) = (Vec::new(), begun, Duration::ZERO);
    for text in child.stdout.take().into_iter().flat_map(|stdout| BufReader::new(stdout).lines()) {
        let now = Instant::now();
        played += now.duration_since(last).min(LONGEST_PAUSE);
        last = now;
        lines.push(Line { at: played, text: text.map_err(failed)? });
    }
    let status = child.wait().map_err(failed)?;
    if status.success() { Ok(lines) } else { Err(format!("{}: {status}", script.display())) }
}

/// The picture of these lines.
fn svg(lines: &[Line]) -> String {
    let columns = lines.iter().map(|line| line.text.chars().count()).max().unwrap_or(0).clamp(40, COLUMNS);
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "pixels"
    )]
    let width = (columns as f64 * CELL.0).ceil() as usize + 2 * MARGIN;
    let height = lines.len() * CELL.1 + 2 * MARGIN;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\">\n\
         <style>\n\
         text {{ font: 13px ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace; fill: #d7dae0; white-space: pre; }}\n\
         .typed {{ fill: #8fd18f; }}\n\
         @media (prefers-reduced-motion: no-preference) {{\n\
         text {{ animation: come 1ms backwards; }}\n\
         @keyframes come {{ from {{ opacity: 0; }} }}\n\
         }}\n\
         </style>\n\
         <rect width=\"100%\" height=\"100%\" rx=\"6\" fill=\"#1d2027\"/>\n"
    );
    for (number, line) in lines.iter().enumerate() {
        let typed = if line.text.starts_with("$ ") { " class=\"typed\"" } else { "" };
        let y = MARGIN + number * CELL.1 + 13;
        let at = line.at.as_secs_f64();
        // Writing to a string does not fail.
        let _ = writeln!(
            svg,
            "<text x=\"{MARGIN}\" y=\"{y}\"{typed} xml:space=\"preserve\" style=\"animation-delay:{at:.2}s\">{}</text>",
            escaped(&line.text)
        );
    }
    svg.push_str("</svg>\n");
    svg
}

/// A line as it stands in the picture: no longer than that is wide, and without what SVG would read as its own.
fn escaped(text: &str) -> String {
    let cut = text.chars().count() > COLUMNS;
    let kept = text.chars().take(if cut { COLUMNS - 1 } else { COLUMNS }).filter(|c| !c.is_control());
    let mut escaped: String = kept
        .map(|c| match c {
            '&' => "&amp;".into(),
            '<' => "&lt;".into(),
            '>' => "&gt;".into(),
            c => c.to_string(),
        })
        .collect();
    if cut {
        escaped.push('…');
    }
    escaped
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{COLUMNS, Line, escaped, svg};

    #[test]
    fn a_picture_has_each_line_at_its_time() {
        let line = |at, text: &str| Line { at: Duration::from_millis(at), text: text.into() };
        let picture = svg(&[line(0, "$ a <b> & c"), line(1500, "done")]);
        assert!(
            picture.contains("class=\"typed\"") && picture.contains("$ a &lt;b&gt; &amp; c</text>"),
            "{picture}"
        );
        assert!(picture.contains("animation-delay:1.50s\">done</text>"), "{picture}");
        assert_eq!(picture.matches("<text").count(), 2);
    }

    #[test]
    fn what_is_too_wide_shows_that_it_was_cut() {
        assert_eq!(escaped(&"x".repeat(COLUMNS)), "x".repeat(COLUMNS));
        let cut = escaped(&"x".repeat(COLUMNS + 1));
        assert!(cut.ends_with('…') && cut.chars().count() == COLUMNS, "{cut}");
        assert_eq!(escaped("a\u{1b}b"), "ab");
    }
}
