//! The table of pairs: each with its verdict and all its codes; and each rule's negative control.

use crate::bases;
use std::collections::BTreeSet;

use serde_json::Value;
use vfio_migration_compat::{
    Allow, DeviceMap, HostManifest, MachineManifest, Policy, Report, Severity, Verdict, check_devices,
    check_machines, check_placement, codes, explain, session_codes,
};

struct Row {
    name: String,
    base: String,
    source: Value,
    destination: Value,
    verdict: String,
    strict: bool,
    codes: Vec<String>,
}

fn rows() -> Vec<Row> {
    let lines = include_str!("table.txt").lines();
    lines.filter(|line| !line.is_empty() && !line.starts_with('#')).map(row).collect()
}

fn row(line: &str) -> Row {
    let parts: Vec<&str> = line.split(" |").map(str::trim).collect();
    let [name, base, source, destination, verdict, codes] = parts[..] else { panic!("{line}") };
    let mut codes: Vec<String> = codes.split_whitespace().map(str::to_owned).collect();
    let strict = codes.first().is_some_and(|first| first == "strict");
    codes.drain(..usize::from(strict));
    let of = |side: &str| bases::base(if side == "host" { "machine" } else { side });
    Row {
        name: name.to_owned(),
        base: base.to_owned(),
        source: changed(of(base), source),
        destination: changed(if base == "host" { bases::host() } else { of(base) }, destination),
        verdict: verdict.to_owned(),
        strict,
        codes,
    }
}

fn changed(mut tree: Value, changes: &str) -> Value {
    for change in changes.split(';').filter(|change| !change.is_empty()) {
        let (path, value) = change.split_once('=').unwrap();
        let steps = path.replace('[', ".").replace(']', "");
        let steps: Vec<&str> = steps.split('.').collect();
        let (last, before) = steps.split_last().unwrap();
        let mut at = &mut tree;
        for step in before {
            at = match step.parse::<usize>() {
                Ok(n) if at.is_array() => &mut at[n],
                _ => &mut at[*step],
            };
        }
        match (at, value) {
            (Value::Array(items), "-") => drop(items.remove(last.parse().unwrap())),
            (Value::Object(fields), "-") => drop(fields.remove(*last)),
            (Value::Array(items), value) if last.parse() == Ok(items.len()) => items.push(word(value)),
            (Value::Array(items), value) => items[last.parse::<usize>().unwrap()] = word(value),
            (at, value) => at[*last] = word(value),
        }
    }
    tree
}

/// JSON, or a word; versions are words.
fn word(text: &str) -> Value {
    match serde_json::from_str(text) {
        Ok(value) if !matches!(&value, Value::Number(n) if n.is_f64()) => value,
        _ => text.into(),
    }
}

/// Answers a row, with these codes allowed.
fn ask(row: &Row, allowed: &[&str]) -> Report {
    let allow = allowed.iter().map(|code| Allow { code: (*code).into(), ..Allow::default() }).collect();
    let mut policy = Policy { allow, ..Policy::default() };
    if row.base == "models" {
        policy.require_declared_model = true;
        policy.max_state_size = Some(1 << 20);
    }
    let (source, destination) = (row.source.clone(), row.destination.clone());
    let map = |from: &str, to: &str| -> DeviceMap {
        [(from.parse().unwrap(), to.parse().unwrap())].into_iter().collect()
    };
    match row.base.as_str() {
        "machine" => check_machines(&typed(source), &typed(destination), &DeviceMap::new(), &policy),
        "mapped" => check_machines(&typed(source), &typed(destination), &map("net0", "eth0"), &policy),
        "host" => check_placement(&typed(source), &typed(destination), &policy),
        _ => check_devices(&typed(source), &typed(destination), &policy),
    }
}

fn typed<T: serde::de::DeserializeOwned>(tree: Value) -> T {
    serde_json::from_value(tree).unwrap()
}

fn kebab(verdict: Verdict) -> String {
    serde_json::to_value(verdict).unwrap().as_str().unwrap().to_owned()
}

#[test]
fn every_pair_has_its_verdict_and_all_its_codes() {
    let rows = rows();
    assert!(rows.len() >= 60, "{}", rows.len());
    let mut wrong = Vec::new();
    for row in &rows {
        let report = ask(row, &[]);
        let mut found: Vec<String> = report.reasons.iter().map(|reason| reason.code.clone()).collect();
        found.sort();
        if (kebab(report.verdict), report.strict, &found) != (row.verdict.clone(), row.strict, &row.codes) {
            wrong.push(format!("{}: {} strict {} {found:?}", row.name, kebab(report.verdict), report.strict));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// Codes that manifests can give.
fn of_rules() -> impl Iterator<Item = &'static str> {
    codes().filter(|code| session_codes().all(|other| other != *code))
}

#[test]
fn every_code_is_reached_by_a_pair() {
    let used: BTreeSet<String> = rows().into_iter().flat_map(|row| row.codes).collect();
    let known: BTreeSet<String> = of_rules().map(str::to_owned).collect();
    assert_eq!(used, known);
}

/// It was that rule that fired: with its code allowed the verdict is better, with every other allowed it is not.
#[test]
fn each_rule_alone_makes_its_verdict() {
    let mut tried = BTreeSet::new();
    for row in rows() {
        let serious: BTreeSet<&str> = row
            .codes
            .iter()
            .filter(|code| explain(code).unwrap().severity > Severity::Warning)
            .map(String::as_str)
            .collect();
        if serious.is_empty() {
            continue;
        }
        let all: Vec<&str> = serious.iter().copied().collect();
        let report = ask(&row, &all);
        assert!(report.verdict <= Verdict::LiveWithWarning || row.base == "host", "{}", row.name);
        for code in &serious {
            let others: Vec<&str> = serious.iter().copied().filter(|other| other != code).collect();
            let wanted = Verdict::from(explain(code).unwrap().severity);
            if row.base != "host" {
                assert_eq!(ask(&row, &others).verdict, wanted, "{}: {code}", row.name);
            }
            tried.insert((*code).to_owned());
        }
    }
    let serious = of_rules().filter(|code| explain(code).unwrap().severity > Severity::Warning);
    assert_eq!(tried, serious.map(str::to_owned).collect());
}

#[test]
fn reasons_name_the_field_both_values_and_who_can_fix_it() {
    let rows = rows();
    let reason = |name: &str, code: &str| {
        let report = ask(rows.iter().find(|row| row.name == name).unwrap(), &[]);
        report.reasons.into_iter().find(|reason| reason.code == code).unwrap()
    };
    let ports = reason("mtty-2 to mtty-1", "driver-mtty-ports");
    assert_eq!((&*ports.field, &ports.source, &ports.destination), ("facts.ports", &2.into(), &1.into()));
    assert!(ports.text.contains("ports") && ports.text.contains("2 at the source"), "{}", ports.text);
    let queues = reason("fewer queues", "device-parameter");
    assert_eq!((&*queues.field, queues.device.as_deref()), ("parameters.queues", Some("net0")));
    assert_eq!(serde_json::to_value(queues.fix).unwrap(), "configuration");
    assert!(!queues.text.contains("strict") && queues.text.contains("takes 1, 2 to 4"), "{}", queues.text);
    let strict = reason("another version of the driver", "strict-driver-version");
    assert!(strict.text.contains("equality is strict"), "{}", strict.text);
    for row in &rows {
        for reason in ask(row, &[]).reasons {
            assert!(!reason.text.is_empty() && !reason.field.is_empty(), "{}", row.name);
            let entry = explain(&reason.code).unwrap();
            assert_eq!((reason.severity, reason.fix), (entry.severity, entry.fix), "{}", row.name);
        }
    }
}

/// A user has to take every one of them from the guest.
#[test]
fn every_feature_that_a_cpu_lacks_is_named() {
    let features: Vec<String> = (0..30).map(|n| format!("feature{n}")).collect();
    let source = MachineManifest { cpu: features.clone(), ..MachineManifest::default() };
    let to_machine =
        check_machines(&source, &MachineManifest::default(), &DeviceMap::new(), &Policy::default());
    let host = HostManifest { name: "h".into(), cpu: Some(Vec::new()), ..HostManifest::default() };
    let to_host = check_placement(&source, &host, &Policy::default());
    for report in [to_machine, to_host] {
        let reason = report.reasons.iter().find(|reason| reason.code == "cpu-features").unwrap();
        for feature in &features {
            assert!(reason.text.contains(&format!("\"{feature}\"")), "{feature}: {}", reason.text);
        }
    }
}

#[test]
fn a_map_says_where_devices_go() {
    let rows = rows();
    let report = ask(rows.iter().find(|row| row.name == "a map").unwrap(), &[]);
    let map: Vec<(&str, &str)> = report.map.iter().map(|(from, to)| (from.as_str(), to.as_str())).collect();
    assert_eq!(map, [("net0", "eth0"), ("net1", "net1")]);
    let report = ask(rows.iter().find(|row| row.name == "a machine on a host").unwrap(), &[]);
    let to: BTreeSet<&str> = report.map.values().map(String::as_str).collect();
    assert_eq!((report.map.len(), to), (2, BTreeSet::from(["pf0", "vf0"])));
}
