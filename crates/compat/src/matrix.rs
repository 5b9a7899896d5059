//! Which device of which host can go to which host.
//!
//! Devices that no rule can tell apart are compared once: a pool of like hosts costs as many comparisons as it has
//! kinds, not as it has devices.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::json;

use crate::check::check_devices;
use crate::device::DeviceManifest;
use crate::host::HostManifest;
use crate::placement::{candidates, host_reasons, nothing};
use crate::policy::Policy;
use crate::report::{Reason, Verdict};

/// Which device of which host can go to which host: for devices and hosts of one group, the same answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Matrix {
    /// The devices, by host and name.
    pub devices: Vec<MatrixDevice>,
    /// The hosts, in the order given.
    pub hosts: Vec<MatrixHost>,
    /// The answers: by group of devices, then by group of hosts.
    pub cells: Vec<Vec<Cell>>,
    /// How many pairs of devices were compared.
    pub comparisons: usize,
}

/// A device of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct MatrixDevice {
    /// Name of the host that has the device.
    pub host: String,
    /// Name of the device on that host.
    pub device: String,
    /// Which row of the cells is its.
    pub group: usize,
}

/// A host that devices could go to, as a column.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct MatrixHost {
    /// Name of the host.
    pub name: String,
    /// Which column of the cells is its.
    pub group: usize,
}

/// Whether a device can go to a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Cell {
    /// The best that one of the host's devices or offers gives.
    pub verdict: Verdict,
    /// Codes of the reasons of the best, in order, each once.
    pub codes: Vec<String>,
}

impl Matrix {
    /// Whether the `device`th device can go to the `host`th host.
    pub fn cell(&self, device: usize, host: usize) -> Option<&Cell> {
        let (device, host) = (self.devices.get(device)?, self.hosts.get(host)?);
        self.cells.get(device.group)?.get(host.group)
    }
}

/// Asks for each device of each host whether each host could take it. Other devices of a machine, and what is taken
/// already, are not looked at: [`check_placement`](crate::check_placement) does for one machine and one host.
pub fn matrix(hosts: &[HostManifest], policy: &Policy) -> Matrix {
    let sizeless = Policy { max_state_size: None, ..policy.clone() };
    let named = policy.allow.iter().any(|allow| allow.device.is_some());
    let mut kinds = Kinds { named, devices: Vec::new(), numbers: BTreeMap::new() };
    let mut rows: Groups<(usize, Option<u64>), &DeviceManifest> = Groups::default();
    let mut columns: Groups<String, (&HostManifest, Vec<usize>)> = Groups::default();
    let mut matrix = Matrix::default();
    for host in hosts {
        for device in &host.devices {
            let group = rows.number((kinds.number(device), device.state_size), || device);
            let (host, device) = (host.name.clone(), device.id.to_string());
            matrix.devices.push(MatrixDevice { host, device, group });
        }
        let mut own: Vec<usize> = candidates(host).iter().map(|one| kinds.number(one.device)).collect();
        own.sort_unstable();
        own.dedup();
        let key = json!([own, host.limits.max_state_bytes, host.accepts]).to_string();
        let group = columns.number(key, || (host, own));
        matrix.hosts.push(MatrixHost { name: host.name.clone(), group });
    }
    let mut compared: BTreeMap<(usize, usize), Compared> = BTreeMap::new();
    for (device, (kind, _)) in rows.members.iter().zip(rows.keys()) {
        let mut cells = Vec::with_capacity(columns.members.len());
        for (host, own) in &columns.members {
            for to in own {
                compared.entry((kind, *to)).or_insert_with(|| {
                    matrix.comparisons += 1;
                    Compared::new(&kinds, kind, *to, &sizeless)
                });
            }
            let best = own.iter().filter_map(|to| compared.get(&(kind, *to)));
            let best = best.min_by_key(|compared| (compared.verdict, compared.codes.len()));
            cells.push(cell(device, host, best, policy));
        }
        matrix.cells.push(cells);
    }
    matrix
}

/// Result of comparing a pair of kinds.
struct Compared {
    verdict: Verdict,
    codes: Vec<String>,
}

impl Compared {
    fn new(kinds: &Kinds<'_>, from: usize, to: usize, policy: &Policy) -> Self {
        let pair = kinds.devices.get(from).zip(kinds.devices.get(to));
        let report = pair.map(|(from, to)| check_devices(from, to, policy)).unwrap_or_default();
        Self {
            verdict: report.verdict,
            codes: report.reasons.into_iter().map(|reason| reason.code).collect(),
        }
    }
}

fn cell(device: &DeviceManifest, host: &HostManifest, best: Option<&Compared>, policy: &Policy) -> Cell {
    let mut reasons = host_reasons(device, host, policy);
    if best.is_none() {
        reasons.extend(nothing(device, policy));
    }
    let own = reasons.iter().map(|reason: &Reason| Verdict::from(reason.severity)).max().unwrap_or_default();
    let mut codes: Vec<String> = reasons.into_iter().map(|reason| reason.code).collect();
    codes.extend(best.into_iter().flat_map(|best| best.codes.iter().cloned()));
    codes.sort_unstable();
    codes.dedup();
    Cell { verdict: own.max(best.map(|best| best.verdict).unwrap_or_default()), codes }
}

/// Devices that a rule can tell apart, numbered.
struct Kinds<'h> {
    /// The policy names devices, so names tell them apart too.
    named: bool,
    devices: Vec<&'h DeviceManifest>,
    numbers: BTreeMap<[u8; 32], usize>,
}

impl<'h> Kinds<'h> {
    fn number(&mut self, device: &'h DeviceManifest) -> usize {
        let named = self.named.then_some(&device.id);
        let more =
            json!([device.identity(), device.parameters, device.dirty, device.iommu_page_sizes, named]);
        let key = *blake3::hash(more.to_string().as_bytes()).as_bytes();
        *self.numbers.entry(key).or_insert_with(|| {
            self.devices.push(device);
            self.devices.len() - 1
        })
    }
}

/// Things numbered by a key, in the order they came.
struct Groups<K, M> {
    members: Vec<M>,
    numbers: BTreeMap<K, usize>,
}

impl<K: Ord, M> Default for Groups<K, M> {
    fn default() -> Self {
        Self { members: Vec::new(), numbers: BTreeMap::new() }
    }
}

impl<K: Ord + Clone, M> Groups<K, M> {
    fn number(&mut self, key: K, member: impl FnOnce() -> M) -> usize {
        *self.numbers.entry(key).or_insert_with(|| {
            self.members.push(member());
            self.members.len() - 1
        })
    }

    /// The keys, in the order of the members.
    fn keys(&self) -> Vec<K> {
        let mut keys: Vec<(usize, K)> = self.numbers.iter().map(|(key, n)| (*n, key.clone())).collect();
        keys.sort_by_key(|(n, _)| *n);
        keys.into_iter().map(|(_, key)| key).collect()
    }
}
