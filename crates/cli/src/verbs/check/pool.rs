//! Many hosts and machines at once: what can go where, and what all of them load.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use schemars::JsonSchema;
use serde::Serialize;
use vfio_migration_compat::{
    Baseline, Cell, HostManifest, MachineManifest, Manifest, Matrix, Policy, PoolMachine, Verdict,
};
use vfio_migration_types::printable;

use crate::exit::{CliError, Exit};
use crate::output::{WaitingDisplay, print, print_json};
use crate::probe::HostAccess;
use crate::side::{self, CheckSide};
use crate::table::{TableRow, list, table, width};
use crate::verdict::json_word;

/// `check --matrix`: what can go where. With a machine among the sides, which machine to which host; else which device.
pub(super) fn matrix(
    sides: &[String],
    policy: &Policy,
    local: &HostAccess,
    timeout: Duration,
    json: bool,
) -> Result<Exit, CliError> {
    let Pool { hosts, machines } = pool(sides, local, timeout, json)?;
    let matrix = if machines.is_empty() {
        vfio_migration_compat::matrix(&hosts, policy)
    } else {
        vfio_migration_compat::machine_matrix(&machines, &hosts, policy)
    };
    let matrix = matrix.map_err(|error| CliError::caused("no matrix", &error))?;
    if matrix.cells.is_empty() {
        let names: Vec<&str> = hosts.iter().map(|host| host.name.as_str()).collect();
        let text = format!(
            "no matrix: none of these hosts has a device that could move: {}; `describe --host` lists vfio-user devices \
             whose sockets it is given",
            names.join(", ")
        );
        return Err(CliError::failed(text));
    }
    if json {
        print_json(&matrix)?;
    } else {
        let columns = if hosts.is_empty() { "machines" } else { "hosts" };
        print(text(&matrix, columns, width()))?;
    }
    Ok(Exit::Done)
}

/// What `check --baseline --json` prints.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(crate) struct BaselineReport {
    /// Per model, what every host and machine loads.
    pub(crate) baselines: Vec<Baseline>,
    /// Models that have none.
    pub(crate) without: Vec<WithoutBaseline>,
}

/// A model that has no baseline.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(crate) struct WithoutBaseline {
    /// Name of the model, as devices declare it.
    pub(crate) model: String,
    /// Why no version of the model is loaded by all.
    pub(crate) why: String,
}

/// `check --baseline`: versions that all hosts and machines load, of one model or of each that one has or offers.
pub(super) fn baseline(
    sides: &[String],
    model: Option<&str>,
    local: &HostAccess,
    timeout: Duration,
    json: bool,
) -> Result<Exit, CliError> {
    let Pool { mut hosts, machines } = pool(sides, local, timeout, json)?;
    // A machine's devices load what those of a host do.
    hosts.extend(machines.into_iter().map(|PoolMachine { name, manifest, .. }| HostManifest {
        name,
        devices: manifest.devices,
        ..HostManifest::default()
    }));
    let found = match model {
        Some(model) => vec![(model.to_owned(), vfio_migration_compat::baseline(&hosts, model))],
        None => vfio_migration_compat::baselines(&hosts),
    };
    let mut report = BaselineReport { baselines: Vec::new(), without: Vec::new() };
    for (model, found) in found {
        match found {
            Ok(baseline) => report.baselines.push(baseline),
            Err(why) => report.without.push(WithoutBaseline { model, why: why.to_string() }),
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
        text.push_str("none of the pool has or offers a device that declares a model\n");
    }
    text
}

/// What a pool has.
struct Pool {
    hosts: Vec<HostManifest>,
    machines: Vec<PoolMachine>,
}

fn pool(sides: &[String], local: &HostAccess, timeout: Duration, json: bool) -> Result<Pool, CliError> {
    let waiting = WaitingDisplay::new(!json, "reading the manifests of the pool");
    let mut pool = Pool { hosts: Vec::new(), machines: Vec::new() };
    let mut machines: Vec<(String, MachineManifest)> = Vec::new();
    let mut seen = BTreeSet::new();
    for side in expanded(sides)? {
        waiting.tick();
        // By what it is, not by how it is called.
        if !seen.insert(std::fs::canonicalize(&side).unwrap_or_else(|_| PathBuf::from(&side))) {
            return Err(CliError::new(Exit::Usage, format!("{side} is there twice")));
        }
        let refused = |what: &str| {
            let text = format!(
                "{side} is {what}: a pool has hosts and machines; `describe --host` makes a host of devices"
            );
            Err(CliError::new(Exit::Usage, text))
        };
        match side::resolve(&side, None, local, timeout)? {
            CheckSide::Known(document, _) => match document.manifest {
                Manifest::Host(host) => pool.hosts.push(*host),
                Manifest::Machine(machine) => machines.push((side, *machine)),
                device @ Manifest::Device(_) => return refused(side::kind(&device)),
            },
            CheckSide::Receiver(_) => return refused("the address of a receiver"),
        }
    }
    let mut names: BTreeMap<String, usize> = BTreeMap::new();
    for (side, _) in &machines {
        *names.entry(short(side)).or_default() += 1;
    }
    // A manifest names no machine: its file does, by its whole path where the short one would do for two.
    pool.machines = machines
        .into_iter()
        .map(|(side, manifest)| {
            let short = short(&side);
            let name = if names.get(&short) == Some(&1) { short } else { side };
            PoolMachine { name, manifest }
        })
        .collect();
    Ok(pool)
}

/// The name of a file without its folders and ending; another side as it stands.
fn short(side: &str) -> String {
    let path = Path::new(side);
    let stem = path.file_stem().filter(|_| path.is_file()).and_then(|stem| stem.to_str());
    stem.unwrap_or(side).to_owned()
}

/// The sides of a pool: those named, and the files that end in `.json` in folders that are named.
fn expanded(named: &[String]) -> Result<Vec<String>, CliError> {
    let mut sides = Vec::new();
    for name in named {
        let path = Path::new(name);
        if !path.is_dir() {
            sides.push(name.clone());
            continue;
        }
        let failed = |error: std::io::Error| CliError::caused(name, &error);
        let mut inside = Vec::new();
        for entry in std::fs::read_dir(path).map_err(failed)? {
            let file = entry.map_err(failed)?.path();
            if file.extension().is_some_and(|extension| extension == "json") {
                inside.push(file.into_os_string().into_string().map_err(|file| {
                    CliError::failed(format!("{}: the name of this file is no text", file.display()))
                })?);
            }
        }
        if inside.is_empty() {
            return Err(CliError::failed(format!("{name}: there is no manifest (*.json) in this folder")));
        }
        inside.sort();
        sides.extend(inside);
    }
    Ok(sides)
}

/// The columns by letter, then a line per row that differs.
fn text(matrix: &Matrix, columns: &str, width: usize) -> String {
    let mut text = String::new();
    let letters: Vec<String> = (0..matrix.cells.first().map_or(0, Vec::len)).map(letter).collect();
    let mut names: Vec<Vec<String>> = vec![Vec::new(); letters.len()];
    for host in &matrix.hosts {
        if let Some(names) = names.get_mut(host.group) {
            names.push(printable(&host.name).into_owned());
        }
    }
    for (letter, names) in letters.iter().zip(&names) {
        text.push_str(&list(&format!("{columns} {letter}: "), names, width));
    }
    let mut rows: Vec<TableRow> =
        matrix.cells.iter().map(|cells| (Vec::new(), cells.iter().map(cell).collect())).collect();
    let devices =
        matrix.devices.iter().map(|device| (format!("{}/{}", device.host, device.device), device.group));
    let machines = matrix.machines.iter().map(|machine| (machine.name.clone(), machine.group));
    for (name, group) in devices.chain(machines) {
        if let Some((names, _)) = rows.get_mut(group) {
            names.push(printable(&name).into_owned());
        }
    }
    let head = if matrix.machines.is_empty() { "device" } else { "machine" };
    text.push('\n');
    text.push_str(&table(head, &letters, &rows, width));
    text
}

/// The verdict, and behind it the codes of all reasons: a line each.
fn cell(cell: &Cell) -> Vec<String> {
    let verdict = json_word(&cell.verdict);
    let last = cell.codes.len().checked_sub(1).filter(|_| cell.verdict != Verdict::Live);
    let Some(last) = last else { return vec![verdict] };
    let lines = cell.codes.iter().enumerate().map(|(n, code)| {
        let before = if n == 0 { format!("{verdict} (") } else { "  ".into() };
        format!("{before}{code}{}", if n == last { ")" } else { "," })
    });
    lines.collect()
}

/// A, B, … Z, A1, …
fn letter(index: usize) -> String {
    let letter = char::from(b'A' + u8::try_from(index % 26).unwrap_or(0));
    if index < 26 { letter.into() } else { format!("{letter}{}", index / 26) }
}
