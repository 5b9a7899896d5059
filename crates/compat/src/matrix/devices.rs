//! Which device of which host can go to which host.
//!
//! Devices that no rule can tell apart are compared once: a pool of like hosts costs as many comparisons as it has
//! kinds, not as it has devices. Of a pair no more is made than its rank, and of that only as much as may still count.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;

use super::table::{Answers, Cell, Matrix, MatrixDevice, MatrixHost, Numbered};
use super::work::{self, MatrixError};
use crate::codes;
use crate::device::DeviceManifest;
use crate::findings::{Comparing, Findings, Rank};
use crate::host::HostManifest;
use crate::parameter::Allowed;
use crate::placement::{candidates, nothing};
use crate::policy::Policy;
use crate::report::Verdict;
use crate::rules::{device, live};
use crate::scalar::Scalar;

/// Asks for each device of each host whether each host could take it. Other devices of a machine, and what is taken
/// already, are not looked at: [`machine_matrix`](crate::machine_matrix) does for machines.
///
/// # Errors
/// There is too much to compare.
pub fn matrix(hosts: &[HostManifest], policy: &Policy) -> Result<Matrix, MatrixError> {
    within(hosts, policy, work::MAX_WORK)
}

/// [`matrix`] with no more work than `most`.
fn within(hosts: &[HostManifest], policy: &Policy, most: u64) -> Result<Matrix, MatrixError> {
    let comparing = Comparing::under(policy);
    let named = policy.allow.iter().any(|allow| allow.device.is_some());
    let mut kinds = Kinds { named, devices: Vec::new(), numbers: Numbered::default() };
    // Rows by kind and size of the state, columns by what a host has and bears: to begin with, as much as can differ.
    let mut matrix = Matrix::default();
    let mut row_numbers = Numbered::default();
    let mut rows: Vec<Row<'_>> = Vec::new();
    let mut column_numbers = Numbered::default();
    let mut columns: Vec<(&HostManifest, Vec<usize>)> = Vec::new();
    for host in hosts {
        for device in &host.devices {
            let kind = kinds.number(device);
            let group = row_numbers.number((kind, device.state_size));
            if group == rows.len() {
                rows.push(Row { kind, device });
            }
            let (host, device) = (host.name.clone(), device.id.to_string());
            matrix.devices.push(MatrixDevice { host, device, group });
        }
        let mut own: Vec<usize> = candidates(host).iter().map(|one| kinds.number(one.device)).collect();
        own.sort_unstable();
        own.dedup();
        let key = json!([own, host.limits.max_state_bytes, host.accepts]).to_string();
        let group = column_numbers.number(key);
        if group == columns.len() {
            columns.push((host, own));
        }
        matrix.hosts.push(MatrixHost { name: host.name.clone(), group });
    }
    let mut order: Vec<usize> = (0..rows.len()).collect();
    order.sort_by_key(|row| rows.get(*row).map(|row| row.kind));

    let places: Vec<Places<'_>> = columns.iter().map(|(_, own)| Places::new(own, &kinds)).collect();
    let mut ranks = Ranks::new(&kinds, policy, &comparing);
    let mut answers = Answers::default();
    let mut numbers = vec![0; rows.len()];
    let mut best: Vec<Option<usize>> = Vec::new();
    for (row, number) in order.iter().filter_map(|n| Some((rows.get(*n)?, *n))) {
        if ranks.begin(row.kind) {
            best.clear();
            for places in &places {
                best.push(ranks.best(places));
                work::check(&comparing, most)?;
            }
        }
        let cells = columns.iter().zip(&best).map(|((host, _), best)| {
            let best = best.and_then(|kind| kinds.devices.get(kind)).copied();
            cell(row.device, host, best, policy, &comparing)
        });
        if let Some(place) = numbers.get_mut(number) {
            *place = answers.row(cells);
        }
        work::check(&comparing, most)?;
    }
    matrix.comparisons = ranks.compared;
    let rows: Vec<usize> =
        matrix.devices.iter().filter_map(|device| numbers.get(device.group).copied()).collect();
    let (groups, merged, cells) = answers.table(&rows, columns.len());
    for (device, group) in matrix.devices.iter_mut().zip(groups) {
        device.group = group;
    }
    if cells.is_empty() {
        // Without a row all columns are alike, and there is none.
        matrix.hosts.iter_mut().for_each(|host| host.group = 0);
    } else {
        for host in &mut matrix.hosts {
            host.group = merged.get(host.group).copied().unwrap_or_default();
        }
    }
    matrix.cells = cells;
    Ok(matrix)
}

/// Devices that are asked about as one.
struct Row<'h> {
    kind: usize,
    device: &'h DeviceManifest,
}

fn cell(
    device: &DeviceManifest,
    host: &HostManifest,
    best: Option<&DeviceManifest>,
    policy: &Policy,
    comparing: &Comparing,
) -> Cell {
    let mut findings = Findings::codes(policy, comparing);
    live::state(device, &mut findings);
    live::host(device, host, &mut findings);
    match best {
        Some(best) => drop(device::compare(device, best, &[], &mut findings)),
        None => nothing(device, &mut findings),
    }
    Cell::of(findings)
}

/// Devices that a rule can tell apart, numbered.
struct Kinds<'h> {
    /// The policy names devices, so names tell them apart too.
    named: bool,
    devices: Vec<&'h DeviceManifest>,
    numbers: Numbered<[u8; 32]>,
}

impl<'h> Kinds<'h> {
    fn number(&mut self, device: &'h DeviceManifest) -> usize {
        let named = self.named.then_some(&device.id);
        let more =
            json!([device.identity(), device.parameters, device.dirty, device.iommu_page_sizes, named]);
        let number = self.numbers.number(*blake3::hash(more.to_string().as_bytes()).as_bytes());
        if number == self.devices.len() {
            self.devices.push(device);
        }
        number
    }
}

/// The kinds that a host has, found by what they take.
struct Places<'k> {
    own: Vec<usize>,
    /// By model: a device goes to one of its own, or else nowhere.
    models: BTreeMap<Option<&'k str>, OfModel<'k>>,
}

/// Kinds of one model, by the values that they take of the parameter in which they differ most: where thousands of devices
/// differ in one, nearly all of them need no look.
struct OfModel<'k> {
    all: Vec<usize>,
    parameter: Option<&'k str>,
    by_value: BTreeMap<&'k Scalar, Vec<usize>>,
    /// They take ranges, or do not know the parameter.
    others: Vec<usize>,
}

impl<'k> Places<'k> {
    fn new(own: &[usize], kinds: &Kinds<'k>) -> Self {
        let mut models: BTreeMap<Option<&str>, Vec<usize>> = BTreeMap::new();
        for kind in own {
            if let Some(device) = kinds.devices.get(*kind) {
                models.entry(device.model.as_deref()).or_default().push(*kind);
            }
        }
        let models = models.into_iter().map(|(model, all)| (model, OfModel::new(all, kinds))).collect();
        Self { own: own.to_vec(), models }
    }
}

impl<'k> OfModel<'k> {
    fn new(all: Vec<usize>, kinds: &Kinds<'k>) -> Self {
        let devices = || all.iter().filter_map(|kind| Some((*kind, *kinds.devices.get(*kind)?)));
        let mut values: BTreeMap<&str, BTreeSet<&Scalar>> = BTreeMap::new();
        for (name, parameter) in devices().flat_map(|(_, device)| &device.parameters) {
            values.entry(name).or_default().insert(&parameter.value);
        }
        let parameter = values.iter().max_by_key(|(_, values)| values.len()).map(|(name, _)| *name);
        let mut by_value: BTreeMap<&Scalar, Vec<usize>> = BTreeMap::new();
        let mut others = Vec::new();
        for (kind, device) in devices() {
            let Some(own) = parameter.and_then(|name| device.parameters.get(name)) else {
                others.push(kind);
                continue;
            };
            let mut values: BTreeSet<&Scalar> = BTreeSet::from([&own.value]);
            let mut ranged = false;
            for allowed in own.allowed.iter().flatten() {
                match allowed {
                    Allowed::Value(value) => drop(values.insert(value)),
                    Allowed::Range(_) => ranged = true,
                }
            }
            if ranged {
                others.push(kind);
            } else {
                values.into_iter().for_each(|value| by_value.entry(value).or_default().push(kind));
            }
        }
        Self { all, parameter, by_value, others }
    }

    /// Those that may take a device. All others do not take a parameter of its.
    fn may_take(&self, device: &DeviceManifest) -> Vec<usize> {
        let value = self.parameter.and_then(|name| device.parameters.get(name));
        let Some(value) = value else { return self.all.clone() };
        let exactly = self.by_value.get(&value.value).map(Vec::as_slice).unwrap_or_default();
        exactly.iter().chain(&self.others).copied().collect()
    }
}

/// How far a device of one kind is from each kind of devices it could go to.
struct Ranks<'k> {
    kinds: &'k Kinds<'k>,
    /// Without a limit on the state's size, which tells no kinds apart.
    policy: Policy,
    comparing: &'k Comparing,
    /// Another model, or a parameter's value that is not taken, is a refusal, whatever the policy allows.
    refusing: bool,
    from: Option<(usize, &'k DeviceManifest)>,
    known: Vec<Option<Known>>,
    compared: usize,
}

#[derive(Clone, Copy)]
struct Known {
    rank: Rank,
    /// Otherwise it is at least so far.
    exactly: bool,
}

impl<'k> Ranks<'k> {
    fn new(kinds: &'k Kinds<'k>, policy: &Policy, comparing: &'k Comparing) -> Self {
        let policy = Policy { max_state_size: None, ..policy.clone() };
        let differing = [
            &codes::DEVICE_MODEL,
            &codes::DEVICE_PARAMETER,
            &codes::DEVICE_PARAMETER_UNKNOWN,
            &codes::STRICT_PARAMETER,
        ];
        let refusing = !differing.into_iter().any(|code| comparing.allows(code));
        Self { kinds, policy, comparing, refusing, from: None, known: Vec::new(), compared: 0 }
    }

    /// Goes on with devices of kind `from`. Whether that is another kind than before.
    fn begin(&mut self, from: usize) -> bool {
        let another = self.from.is_none_or(|(before, _)| before != from);
        if another {
            self.from = self.kinds.devices.get(from).map(|device| (from, *device));
            self.known.clear();
            self.known.resize(self.kinds.devices.len(), None);
        }
        another
    }

    /// The kind of a host's that is nearest; where several are, that of the device itself or else the first that is found.
    fn best(&mut self, places: &Places<'_>) -> Option<usize> {
        let (from, device) = self.from?;
        let itself = places.own.binary_search(&from).is_ok().then_some(from);
        let mut best: Option<(Rank, usize)> = None;
        if self.refusing {
            let likely = places.models.get(&device.model.as_deref()).map(|all| all.may_take(device));
            let likely = likely.unwrap_or_default().into_iter();
            if self.nearest(itself.into_iter().chain(likely), Rank::default(), &mut best) {
                return best.map(|(_, to)| to);
            }
            // Whatever is left is refused for one reason at least.
            let refused = Rank { verdict: Verdict::No, count: 1 };
            if best.is_none_or(|(rank, _)| rank > refused) {
                self.nearest(places.own.iter().copied(), refused, &mut best);
            }
        } else {
            self.nearest(itself.into_iter().chain(places.own.iter().copied()), Rank::default(), &mut best);
        }
        best.map(|(_, to)| to)
    }

    /// Looks for a kind nearer than the best so far. Whether one was found than which none can be nearer.
    fn nearest(
        &mut self,
        kinds: impl Iterator<Item = usize>,
        least: Rank,
        best: &mut Option<(Rank, usize)>,
    ) -> bool {
        for to in kinds {
            let rank = self.rank(to, best.map(|(rank, _)| rank));
            if best.is_none_or(|(nearest, _)| rank < nearest) {
                *best = Some((rank, to));
            }
            if rank <= least {
                return true;
            }
        }
        false
    }

    /// The rank of kind `to`, or where that is no less than `bound` whatever is known not to be less.
    fn rank(&mut self, to: usize, bound: Option<Rank>) -> Rank {
        let before = self.known.get(to).copied().flatten();
        if let Some(known) = before
            && (known.exactly || bound.is_some_and(|bound| known.rank >= bound))
        {
            return known.rank;
        }
        // What was looked at in vain once is looked at to its end.
        let bound = bound.filter(|_| before.is_none()).unwrap_or(Rank::FARTHEST);
        let mut findings = Findings::rank_below(&self.policy, self.comparing, bound);
        if let Some(((_, from), to)) = self.from.zip(self.kinds.devices.get(to)) {
            device::compare(from, to, &[], &mut findings);
        }
        let known = Known { rank: findings.rank(), exactly: !findings.is_decided() };
        if let Some(place) = self.known.get_mut(to) {
            self.compared += usize::from(place.is_none());
            *place = Some(known);
        }
        known.rank
    }
}

#[cfg(test)]
mod tests {
    use vfio_migration_types::DeviceId;

    use super::*;
    use crate::parameter::Parameter;

    const PARAMETERS: u64 = 64;

    /// A host of devices of which each differs from each in the last of what is compared.
    fn host(name: &str, first: u64, count: u64) -> HostManifest {
        let device = |n: u64| DeviceManifest {
            model: Some("acme.com/nic".into()),
            parameters: (0..PARAMETERS).map(|p| (format!("p{p:02}"), Parameter::new(1))).collect(),
            host_driver: Some(n.to_string()),
            ..DeviceManifest::new(DeviceId::new(format!("d{n}")).unwrap())
        };
        let devices = (first..first + count).map(device).collect();
        HostManifest { name: name.into(), devices, ..HostManifest::default() }
    }

    #[test]
    fn what_differs_in_too_much_is_refused() {
        let of =
            |count, most| within(&[host("a", 0, count), host("b", count, count)], &Policy::default(), most);
        // Each device is compared with all of the other host, and no parameter is left out.
        let least = |devices: u64, candidates: u64| 2 * devices * candidates * PARAMETERS;
        let enough = of(24, 2 * least(24, 24)).unwrap();
        assert!(enough.comparisons >= 2 * 24 * 24, "{}", enough.comparisons);
        assert_eq!(of(24, least(24, 24)), Err(MatrixError::TooMuch));
        // So are two of the largest hosts, with an offer beside each device, long before their end.
        assert!(least(4096, 2 * 4096) > 10 * work::MAX_WORK);
    }
}
