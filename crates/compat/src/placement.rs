//! Whether a host has room for a machine: each of its devices is given one of the host's, or one that it could create.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::codes;
use crate::device::DeviceManifest;
use crate::findings::{Comparing, Findings, Found, Rank};
use crate::host::HostManifest;
use crate::machine::MachineManifest;
use crate::policy::Policy;
use crate::report::{Report, Verdict};
use crate::rules::{device, live, machine};
use crate::text::quote;
use crate::tree::json;

/// Whether `host` can take `source`, and every reason. Devices are given to the host's so that as many as can be move
/// live, then with a warning, then by snapshot; for a device that finds none, the reasons against the nearest are listed.
///
/// Machine state is not compared: a host has no machine yet.
pub fn check_placement(source: &MachineManifest, host: &HostManifest, policy: &Policy) -> Report {
    let mut findings = Findings::new(policy);
    let (strict, map) = place_machine(source, host, &mut findings, &Comparing::under(policy));
    Report::of(findings.reasons, strict, map)
}

/// Places a machine: whether equality was strict, and which device is given which.
pub(crate) fn place_machine(
    source: &MachineManifest,
    host: &HostManifest,
    findings: &mut Findings<'_>,
    comparing: &Comparing,
) -> (bool, BTreeMap<String, String>) {
    machine::place(source, host, findings);
    let mut devices: Vec<&DeviceManifest> = source.devices.iter().collect();
    devices.sort_by(|a, b| a.id.cmp(&b.id));
    place(&devices, host, findings, comparing)
}

/// [`check_placement`] of one device alone.
pub fn check_device_placement(source: &DeviceManifest, host: &HostManifest, policy: &Policy) -> Report {
    let mut findings = Findings::new(policy);
    let (strict, map) = place(&[source], host, &mut findings, &Comparing::under(policy));
    Report::of(findings.reasons, strict, map)
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

fn place(
    devices: &[&DeviceManifest],
    host: &HostManifest,
    findings: &mut Findings<'_>,
    comparing: &Comparing,
) -> (bool, BTreeMap<String, String>) {
    let policy = findings.policy();
    let candidates = candidates(host);
    let may_go = |from: usize, to: usize| {
        let (Some(device), Some(candidate)) = (devices.get(from), candidates.get(to)) else { return false };
        policy.map.destination(&device.id).is_none_or(|name| *name == candidate.device.id)
    };
    // No more of each pair than how far it is: what stands against all but one of a host's devices is for nobody.
    let ranks: Vec<Vec<Rank>> = devices
        .iter()
        .enumerate()
        .map(|(n, device)| {
            let mut nearest = Rank::FARTHEST;
            let rank = |(to, candidate): (usize, &Candidate<'_>)| {
                let mut findings = Findings::rank_below(policy, comparing, nearest);
                fit(device, candidate, devices.len(), &mut findings);
                let rank = findings.rank();
                if rank.verdict == Verdict::No && may_go(n, to) {
                    nearest = nearest.min(rank);
                }
                rank
            };
            candidates.iter().enumerate().map(rank).collect()
        })
        .collect();
    let given = assign(&ranks, &candidates, may_go);
    let mut strict = false;
    let mut map = BTreeMap::new();
    for (n, device) in devices.iter().enumerate() {
        live::host(device, host, findings);
        let row = ranks.get(n).map(Vec::as_slice).unwrap_or_default();
        let nearest = || {
            let all = row.iter().enumerate().filter(|(to, _)| may_go(n, *to));
            all.min_by_key(|(to, rank)| (**rank, *to)).map(|(to, _)| to)
        };
        let own = given.get(n).copied().flatten();
        let shown = own.or_else(nearest);
        let shown = shown.and_then(|to| candidates.get(to));
        let candidate = shown.map(|candidate| candidate.device);
        if own.is_none() {
            let instead = candidate.map_or_else(String::new, |one| format!("; the nearest is {}", one.id));
            let text = format!("host {} has no free device for it{instead}", quote(&host.name));
            let (source, destination) = (json(&device.id), json(candidate.map(|one| &one.id)));
            let found = Found { field: "id".into(), source, destination, text };
            findings.add(&codes::HOST_NO_DEVICE, Some(device), found);
        } else if let Some(candidate) = candidate {
            map.insert(device.id.to_string(), candidate.id.to_string());
        }
        if let Some(candidate) = shown {
            strict |= fit(device, candidate, devices.len(), findings);
        }
    }
    (strict, map)
}

/// Compares a device, one of so many of its machine, with a candidate. Returns whether equality was strict.
fn fit(
    device: &DeviceManifest,
    candidate: &Candidate<'_>,
    devices: usize,
    findings: &mut Findings<'_>,
) -> bool {
    let strict = device::compare(device, candidate.device, &[], findings);
    if devices > 1 {
        live::peers(device, Some(candidate.device), findings);
    }
    strict
}

/// Gives each device a candidate, the best verdicts first: a matching of a bipartite graph, grown by augmenting paths.
fn assign(
    ranks: &[Vec<Rank>],
    candidates: &[Candidate<'_>],
    may_go: impl Fn(usize, usize) -> bool,
) -> Vec<Option<usize>> {
    let mut given = vec![None; ranks.len()];
    for level in [Verdict::Live, Verdict::LiveWithWarning, Verdict::SnapshotOnly] {
        let edge = |from: usize, to: usize| {
            let rank = ranks.get(from).and_then(|row| row.get(to));
            may_go(from, to) && rank.is_some_and(|rank| rank.verdict <= level)
        };
        for from in 0..ranks.len() {
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

/// The reason of a host that has nothing to give.
pub(crate) fn nothing(device: &DeviceManifest, findings: &mut Findings<'_>) {
    let text = "the host has no device and offers none".to_owned();
    let found = Found { field: "id".into(), source: json(&device.id), destination: Value::Null, text };
    findings.add(&codes::HOST_NO_DEVICE, Some(device), found);
}
