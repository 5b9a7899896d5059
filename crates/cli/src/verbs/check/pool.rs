//! Many hosts at once: what can go where, and what all of them load.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::Serialize;
use vfio_migration_compat::{Baseline, HostManifest, Manifest, Matrix, Policy, Verdict};
use vfio_migration_types::printable;

use crate::exit::{CliError, Exit};
use crate::output::{WaitingDisplay, print, print_json};
use crate::side;
use crate::verdict::json_word;

/// `check --matrix`: the devices that can go where, over all hosts.
pub(super) fn matrix(files: &[String], policy: &Policy, json: bool) -> Result<Exit, CliError> {
    let hosts = hosts(files, json)?;
    let matrix = vfio_migration_compat::matrix(&hosts, policy);
    if json {
        print_json(&matrix)?;
    } else {
        print(table(&matrix))?;
    }
    Ok(Exit::Done)
}

/// What `check --baseline --json` prints.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(crate) struct BaselineReport {
    /// Per model, what every host loads.
    pub(crate) baselines: Vec<Baseline>,
    /// Models that have none.
    pub(crate) without: Vec<WithoutBaseline>,
}

/// A model that has no baseline.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(crate) struct WithoutBaseline {
    /// Name of the model, as devices declare it.
    pub(crate) model: String,
    /// Why no version of the model is loaded by all hosts.
    pub(crate) why: String,
}

/// `check --baseline`: versions that all hosts load, of one model or of each that a host has or offers.
pub(super) fn baseline(files: &[String], model: Option<&str>, json: bool) -> Result<Exit, CliError> {
    let hosts = hosts(files, json)?;
    let devices = hosts
        .iter()
        .flat_map(|host| host.devices.iter().chain(host.offers.iter().map(|offer| &offer.device)));
    let models: BTreeSet<&str> = match model {
        Some(model) => [model].into(),
        None => devices.filter_map(|device| device.model.as_deref()).collect(),
    };
    let mut report = BaselineReport { baselines: Vec::new(), without: Vec::new() };
    for model in models {
        match vfio_migration_compat::baseline(&hosts, model) {
            Ok(baseline) => report.baselines.push(baseline),
            Err(why) => {
                report.without.push(WithoutBaseline { model: model.to_owned(), why: why.to_string() });
            }
        }
    }
    if json {
        print_json(&report)?;
    } else {
        print(baselines(&report))?;
    }
    Ok(if report.baselines.is_empty() { Exit::Incompatible } else { Exit::Done })
}

fn baselines(report: &BaselineReport) -> String {
    let mut text = String::new();
    for baseline in &report.baselines {
        text.push_str(&format!("{} {}\n", printable(&baseline.model), baseline.version));
        for (name, value) in &baseline.parameters {
            text.push_str(&format!("  {} = {value}\n", printable(name)));
        }
    }
    for without in &report.without {
        text.push_str(&format!("{}: no baseline: {}\n", printable(&without.model), without.why));
    }
    if text.is_empty() {
        text.push_str("no host of the pool has or offers a device that declares a model\n");
    }
    text
}

/// The files of a pool: those named, and those that end in `.json` in folders that are named.
fn pool(named: &[String]) -> Result<Vec<PathBuf>, CliError> {
    let mut files = Vec::new();
    for name in named {
        let path = Path::new(name);
        if !path.is_dir() {
            files.push(path.to_owned());
            continue;
        }
        let failed = |error: std::io::Error| CliError::caused(name, &error);
        let mut inside = Vec::new();
        for entry in std::fs::read_dir(path).map_err(failed)? {
            let file = entry.map_err(failed)?.path();
            if file.extension().is_some_and(|extension| extension == "json") {
                inside.push(file);
            }
        }
        if inside.is_empty() {
            return Err(CliError::failed(format!(
                "{name}: there is no host manifest (*.json) in this folder"
            )));
        }
        inside.sort();
        files.extend(inside);
    }
    Ok(files)
}

fn hosts(files: &[String], json: bool) -> Result<Vec<HostManifest>, CliError> {
    let waiting = WaitingDisplay::new(!json, "reading the hosts' manifests");
    pool(files)?
        .iter()
        .map(|path| {
            waiting.tick();
            let file = path.display();
            match side::read(path)?.manifest {
                Manifest::Host(host) => Ok(*host),
                other => {
                    let text = format!(
                        "{file} is the manifest of {}, and hosts are wanted here",
                        side::kind(&other)
                    );
                    Err(CliError::new(Exit::Usage, text))
                }
            }
        })
        .collect()
}

/// One line per device that differs, one column per kind of host.
fn table(matrix: &Matrix) -> String {
    let groups = matrix.cells.first().map_or(0, Vec::len);
    let mut text = String::new();
    for group in 0..groups {
        let names: Vec<&str> =
            matrix.hosts.iter().filter(|host| host.group == group).map(|host| host.name.as_str()).collect();
        text.push_str(&format!("hosts {}: {}\n", letter(group), first_few(&names)));
    }
    let rows: Vec<(String, Vec<String>)> = (0..matrix.cells.len())
        .map(|group| {
            let names: Vec<String> = matrix
                .devices
                .iter()
                .filter(|device| device.group == group)
                .map(|device| format!("{}/{}", device.host, device.device))
                .collect();
            let cells = matrix.cells.get(group).into_iter().flatten();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            (first_few(&names), cells.map(cell).collect())
        })
        .collect();
    let width = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0).max(6);
    let columns: Vec<usize> = (0..groups)
        .map(|group| {
            rows.iter().filter_map(|(_, cells)| cells.get(group)).map(|cell| cell.chars().count()).max()
        })
        .map(|most| most.unwrap_or(0).max(1))
        .collect();
    text.push_str(&format!("\n{:width$}", "device"));
    for (group, column) in columns.iter().enumerate() {
        text.push_str(&format!("  {:column$}", letter(group)));
    }
    text.push('\n');
    for (name, cells) in rows {
        text.push_str(&format!("{name:width$}"));
        for (cell, column) in cells.iter().zip(&columns) {
            text.push_str(&format!("  {cell:column$}"));
        }
        text.push('\n');
    }
    text
}

fn cell(cell: &vfio_migration_compat::Cell) -> String {
    let verdict = json_word(&cell.verdict);
    match (cell.verdict, cell.codes.split_first()) {
        (Verdict::Live, _) | (_, None) => verdict,
        (_, Some((code, []))) => format!("{verdict} ({code})"),
        (_, Some((code, more))) => format!("{verdict} ({code} and {} more)", more.len()),
    }
}

/// The first few of many names.
fn first_few(names: &[&str]) -> String {
    const SHOWN: usize = 3;
    let shown = names.iter().take(SHOWN).copied().collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN { format!("{shown} and {} more", names.len() - SHOWN) } else { shown }
}

/// A, B, … Z, A1, …
fn letter(index: usize) -> String {
    let letter = char::from(b'A' + u8::try_from(index % 26).unwrap_or(0));
    if index < 26 { letter.into() } else { format!("{letter}{}", index / 26) }
}
