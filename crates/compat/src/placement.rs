//! Whether a host has room for a machine: each of its devices is given one of the host's, or one that it could create.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::codes;
use crate::device::DeviceManifest;
use crate::findings::{Findings, Found};
use crate::host::HostManifest;
use crate::machine::MachineManifest;
use crate::policy::Policy;
use crate::report::{Reason, Report, Verdict};
use crate::rules::{device, live, machine};
use crate::text::quote;
use crate::tree::json;

/// Whether `host` can take `source`, and every reason. Devices are given to the host's so that as many as can be move
/// live, then with a warning, then by snapshot; for a device that finds none, the reasons against the nearest are listed.
///
/// Machine state is not compared: a host has no machine yet.
pub fn check_placement(source: &MachineManifest, host: &HostManifest, policy: &Policy) -> Report {
    let mut findings = Findings::new(policy);
    machine::place(source, host, &mut findings);
    let mut devices: Vec<&DeviceManifest> = source.devices.iter().collect();
    devices.sort_by(|a, b| a.id.cmp(&b.id));
    place(&devices, host, findings)
}

/// [`check_placement`] of one device alone.
pub fn check_device_placement(source: &DeviceManifest, host: &HostManifest, policy: &Policy) -> Report {
    place(&[source], host, Findings::new(policy))
}

/// A device of the host's, or an offer.
pub(crate) struct Candidate<'h> {
    pub(crate) device: &'h DeviceManifest,
    /// Number of devices of this kind.
    pub(crate) count: u32,
}

/// What a host has and could create, in the order of names.
pub(crate) fn candidates(host: &HostManifest) -> Vec<Candidate<'_>> {
    let own = host.devices.iter().map(|device| Candidate { device, count: 1 });
    let offers = host.offers.iter();
    let offers = offers.map(|offer| Candidate { device: &offer.device, count: offer.count.unwrap_or(1) });
    let mut all: Vec<_> = own.chain(offers).filter(|candidate| candidate.count > 0).collect();
    all.sort_by(|a, b| a.device.id.cmp(&b.device.id));
    all
}

/// Verdict on one device on one candidate.
struct Fit {
    verdict: Verdict,
    reasons: Vec<Reason>,
    strict: bool,
}

fn place(devices: &[&DeviceManifest], host: &HostManifest, mut findings: Findings<'_>) -> Report {
    let policy = findings.policy();
    let candidates = candidates(host);
    let fits: Vec<Vec<Fit>> = devices
        .iter()
        .map(|device| candidates.iter().map(|one| fit(device, one, devices.len(), policy)).collect())
        .collect();
    let may_go = |from: usize, to: usize| {
        let (Some(device), Some(candidate)) = (devices.get(from), candidates.get(to)) else { return false };
        policy.map.destination(&device.id).is_none_or(|name| *name == candidate.device.id)
    };
    let given = assign(&fits, &candidates, may_go);
    let mut strict = false;
    let mut map = BTreeMap::new();
    for (n, device) in devices.iter().enumerate() {
        live::host(device, host, &mut findings);
        let row = fits.get(n).map(Vec::as_slice).unwrap_or_default();
        let nearest = || {
            let all = row.iter().enumerate().filter(|(to, _)| may_go(n, *to));
            all.min_by_key(|(to, fit)| (fit.verdict, fit.reasons.len(), *to)).map(|(to, _)| to)
        };
        let own = given.get(n).copied().flatten();
        let shown = own.or_else(nearest);
        let candidate = shown.and_then(|to| candidates.get(to)).map(|candidate| candidate.device);
        if own.is_none() {
            let instead = candidate.map_or_else(String::new, |one| format!("; the nearest is {}", one.id));
            let text = format!("host {} has no free device for it{instead}", quote(&host.name));
            let (source, destination) = (json(&device.id), json(candidate.map(|one| &one.id)));
            let found = Found { field: "id".into(), source, destination, text };
            findings.add(&codes::HOST_NO_DEVICE, Some(device), found);
        } else if let Some(candidate) = candidate {
            map.insert(device.id.to_string(), candidate.id.to_string());
        }
        if let Some(fit) = shown.and_then(|to| row.get(to)) {
            strict |= fit.strict;
            findings.reasons.extend(fit.reasons.iter().cloned());
        }
    }
    Report::of(findings.reasons, strict, map)
}

fn fit(device: &DeviceManifest, candidate: &Candidate<'_>, devices: usize, policy: &Policy) -> Fit {
    let mut findings = Findings::new(policy);
    let strict = device::compare(device, candidate.device, &mut findings);
    if devices > 1 {
        live::peers(device, Some(candidate.device), &mut findings);
    }
    Fit { verdict: findings.verdict(), reasons: findings.reasons, strict }
}

/// Gives each device a candidate, the best verdicts first: a matching of a bipartite graph, grown by augmenting paths.
fn assign(
    fits: &[Vec<Fit>],
    candidates: &[Candidate<'_>],
    may_go: impl Fn(usize, usize) -> bool,
) -> Vec<Option<usize>> {
    let mut given = vec![None; fits.len()];
    for level in [Verdict::Live, Verdict::LiveWithWarning, Verdict::SnapshotOnly] {
        let edge = |from: usize, to: usize| {
            let fit = fits.get(from).and_then(|row| row.get(to));
            may_go(from, to) && fit.is_some_and(|fit| fit.verdict <= level)
        };
        for from in 0..fits.len() {
            if given.get(from) == Some(&None) {
                augment(from, candidates, &edge, &mut given, &mut vec![false; candidates.len()]);
            }
        }
    }
    given
}

/// Finds a candidate for `from`, moving others where they have another choice. Recursion is as deep as there are devices.
fn augment(
    from: usize,
    candidates: &[Candidate<'_>],
    edge: &impl Fn(usize, usize) -> bool,
    given: &mut Vec<Option<usize>>,
    seen: &mut Vec<bool>,
) -> bool {
    for (to, candidate) in candidates.iter().enumerate() {
        if !edge(from, to) || std::mem::replace(seen.get_mut(to).unwrap_or(&mut false), true) {
            continue;
        }
        let holders: Vec<usize> = (0..given.len()).filter(|n| given.get(*n) == Some(&Some(to))).collect();
        let free = u32::try_from(holders.len()).is_ok_and(|taken| taken < candidate.count);
        if free || holders.into_iter().any(|holder| augment(holder, candidates, edge, given, seen)) {
            if let Some(place) = given.get_mut(from) {
                *place = Some(to);
            }
            return true;
        }
    }
    false
}

/// Whether `device` may go to any host at all, for a matrix: what the host itself says of it.
pub(crate) fn host_reasons(device: &DeviceManifest, host: &HostManifest, policy: &Policy) -> Vec<Reason> {
    let mut findings = Findings::new(policy);
    live::state(device, &mut findings);
    live::host(device, host, &mut findings);
    findings.reasons
}

/// The reason of a host that has nothing to give.
pub(crate) fn nothing(device: &DeviceManifest, policy: &Policy) -> Vec<Reason> {
    let mut findings = Findings::new(policy);
    let text = "the host has no device and offers none".to_owned();
    let found = Found { field: "id".into(), source: json(&device.id), destination: Value::Null, text };
    findings.add(&codes::HOST_NO_DEVICE, Some(device), found);
    findings.reasons
}
