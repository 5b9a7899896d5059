//! What a whole pool loads, so that devices can be created already downgraded.

use std::collections::{BTreeMap, BTreeSet};

use schemars::JsonSchema;
use serde::Serialize;

use crate::host::HostManifest;
use crate::parameter::{Allowed, Parameter};
use crate::scalar::Scalar;
use crate::version::{ModelVersion, VersionRanges};

/// The newest version of a model, and the parameters, that each host of a pool loads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Baseline {
    /// Name of the model: `vendor.org/name`, as manifests declare it.
    pub model: String,
    /// The version to create devices at, `X.Y.Z`.
    pub version: String,
    /// What to set each parameter to.
    pub parameters: BTreeMap<String, Scalar>,
}

/// The reason for which a pool has no baseline.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BaselineError {
    /// There is no host.
    #[error("the pool has no host: give the manifests of all its hosts")]
    Empty,
    /// A host has no device of the model, and offers none.
    #[error(
        "{0} has no device of model {1} with a version, and offers none: take it out of the pool, or give it one"
    )]
    NoDevice(String, String),
    /// No version is loaded by all.
    #[error("no version of model {model} is loaded by every host: {versions}; update the oldest")]
    NoVersion {
        /// The model that was asked for.
        model: String,
        /// Versions that the hosts have.
        versions: String,
    },
    /// A parameter has no value that all take.
    #[error(
        "no value of parameter {0} is taken by every host that loads version {1}: create devices with like parameters"
    )]
    NoValue(String, String),
}

/// Most versions for which values of the parameters are looked for: the newest that every host loads.
const MOST_TRIED: usize = 64;

/// The newest version, and the parameters, of `model` that every host of the pool can load: each by one device or offer at least.
///
/// Values are chosen for one parameter after the other, in the order of their names, what is on before what is off and larger
/// numbers first: of several sets that would do, the first so found. They are looked for at the 64 newest versions that all load.
pub fn baseline(pool: &[HostManifest], model: &str) -> Result<Baseline, BaselineError> {
    if pool.is_empty() {
        return Err(BaselineError::Empty);
    }
    let own: Vec<BTreeMap<&str, Vec<Own<'_>>>> =
        pool.iter().map(|host| candidates(host, |name| name == model)).collect();
    find(pool, &own, model)
}

/// The [`baseline`] of each model that the pool has or offers, in the order of their names.
pub fn baselines(pool: &[HostManifest]) -> Vec<(String, Result<Baseline, BaselineError>)> {
    let own: Vec<BTreeMap<&str, Vec<Own<'_>>>> = pool.iter().map(|host| candidates(host, |_| true)).collect();
    let devices =
        pool.iter().flat_map(|host| host.devices.iter().chain(host.offers.iter().map(|offer| &offer.device)));
    let models: BTreeSet<&str> = devices.filter_map(|device| device.model.as_deref()).collect();
    models.into_iter().map(|model| (model.to_owned(), find(pool, &own, model))).collect()
}

fn find(
    pool: &[HostManifest],
    own: &[BTreeMap<&str, Vec<Own<'_>>>],
    model: &str,
) -> Result<Baseline, BaselineError> {
    let mut hosts = Vec::with_capacity(pool.len());
    for (host, own) in pool.iter().zip(own) {
        let Some(own) = own.get(model) else {
            return Err(BaselineError::NoDevice(crate::text::quote(&host.name), crate::text::quote(model)));
        };
        hosts.push(own.as_slice());
    }
    let versions: BTreeSet<ModelVersion> =
        hosts.iter().flat_map(|own| own.iter()).flat_map(Own::names).collect();
    let loaded: Vec<VersionSet> =
        hosts.iter().map(|own| own.iter().flat_map(Own::intervals).collect()).collect();
    let common = versions.iter().rev().filter(|version| loaded.iter().all(|host| host.contains(**version)));
    let mut first = None;
    for version in common.take(MOST_TRIED) {
        let loading = hosts.iter().map(|own| own.iter().filter(|own| own.loads(*version)).collect());
        match parameters(&loading.collect::<Vec<_>>()) {
            Ok(parameters) => {
                let (model, version) = (model.to_owned(), version.to_string());
                return Ok(Baseline { model, version, parameters });
            }
            Err(name) => {
                first.get_or_insert(BaselineError::NoValue(crate::text::quote(&name), version.to_string()));
            }
        }
    }
    Err(first.unwrap_or_else(|| BaselineError::NoVersion {
        model: crate::text::quote(model),
        versions: newest(pool, &hosts),
    }))
}

/// The newest version that each host has.
fn newest(pool: &[HostManifest], hosts: &[&[Own<'_>]]) -> String {
    let each = pool.iter().zip(hosts).map(|(host, own)| {
        let newest = own.iter().map(|own| own.version).max();
        let newest = newest.map_or_else(|| "none".to_owned(), |version| version.to_string());
        format!("{} has {newest}", crate::text::quote(&host.name))
    });
    each.collect::<Vec<_>>().join(", ")
}

/// A device or an offer of the model.
struct Own<'h> {
    version: ModelVersion,
    ranges: Option<&'h VersionRanges>,
    parameters: &'h BTreeMap<String, Parameter>,
}

impl Own<'_> {
    fn loads(&self, version: ModelVersion) -> bool {
        self.version.loads(version) || self.ranges.is_some_and(|ranges| ranges.contain(version))
    }

    /// The versions it speaks of.
    fn names(&self) -> Vec<ModelVersion> {
        std::iter::once(self.version).chain(self.ranges.iter().flat_map(|ranges| ranges.ends())).collect()
    }

    /// The versions it loads, first and last of each stretch.
    fn intervals(&self) -> Vec<(ModelVersion, ModelVersion)> {
        let declared = self.ranges.iter().flat_map(|ranges| ranges.intervals());
        std::iter::once(self.version.loaded()).chain(declared).collect()
    }
}

fn candidates<'h>(host: &'h HostManifest, wanted: impl Fn(&str) -> bool) -> BTreeMap<&'h str, Vec<Own<'h>>> {
    let mut candidates: BTreeMap<&str, Vec<Own<'_>>> = BTreeMap::new();
    for device in host.devices.iter().chain(host.offers.iter().map(|offer| &offer.device)) {
        let Some(model) = device.model.as_deref().filter(|model| wanted(model)) else { continue };
        let version = device.model_version.as_ref().and_then(|version| version.parse().ok());
        let Some(version) = version else { continue };
        let own = Own { version, ranges: device.loads.as_ref(), parameters: &device.parameters };
        candidates.entry(model).or_default().push(own);
    }
    candidates
}

/// The versions that one of several candidates loads: stretches in order, none touching the next.
struct VersionSet(Vec<(ModelVersion, ModelVersion)>);

impl FromIterator<(ModelVersion, ModelVersion)> for VersionSet {
    fn from_iter<T: IntoIterator<Item = (ModelVersion, ModelVersion)>>(all: T) -> Self {
        Self(merged(all.into_iter().collect()))
    }
}

impl VersionSet {
    fn contains(&self, version: ModelVersion) -> bool {
        within(&self.0, &version)
    }
}

/// Stretches in order, those that overlap made one.
fn merged<T: Ord + Copy>(mut all: Vec<(T, T)>) -> Vec<(T, T)> {
    all.sort_unstable();
    let mut merged: Vec<(T, T)> = Vec::with_capacity(all.len());
    for (from, to) in all {
        match merged.last_mut() {
            Some((_, end)) if from <= *end => *end = to.max(*end),
            _ => merged.push((from, to)),
        }
    }
    merged
}

/// Whether one of the stretches, in order, has it.
fn within<T: Ord>(stretches: &[(T, T)], thing: &T) -> bool {
    let after = stretches.partition_point(|(from, _)| from <= thing);
    after.checked_sub(1).and_then(|n| stretches.get(n)).is_some_and(|(_, to)| thing <= to)
}

/// The name of a parameter for which no value was found.
type Stuck = String;

/// A value for each parameter that one candidate at least of each host takes, all of them together.
fn parameters(hosts: &[Vec<&Own<'_>>]) -> Result<BTreeMap<String, Scalar>, Stuck> {
    let mut by_name: BTreeMap<&String, Vec<Having<'_>>> = BTreeMap::new();
    for (host, own) in hosts.iter().enumerate() {
        for (candidate, own) in own.iter().enumerate() {
            for (name, parameter) in own.parameters {
                by_name.entry(name).or_default().push(Having { host, candidate, parameter });
            }
        }
    }
    let mut left: Vec<BTreeSet<usize>> = hosts.iter().map(|own| (0..own.len()).collect()).collect();
    let mut chosen = BTreeMap::new();
    for (name, mut having) in by_name {
        having.retain(|one| left.get(one.host).is_some_and(|left| left.contains(&one.candidate)));
        if having.is_empty() {
            // Those that have it are out already, for another parameter.
            continue;
        }
        let taken = taken(&having, &left);
        let fits = |choice: &&Choice| taken.iter().all(|host| host.takes(choice));
        let values = values(&having);
        let Some(choice) = values.iter().find(fits) else {
            if !taken.iter().all(|host| host.unknown) {
                return Err(name.clone());
            }
            // Each host has a candidate that does not know it.
            for one in &having {
                left.get_mut(one.host).map(|left| left.remove(&one.candidate));
            }
            continue;
        };
        let mut keep: Vec<BTreeSet<usize>> = vec![BTreeSet::new(); left.len()];
        for one in &having {
            if let Some(left) = left.get_mut(one.host) {
                left.remove(&one.candidate);
            }
            if one.parameter.takes(&choice.value)
                && let Some(keep) = keep.get_mut(one.host)
            {
                keep.insert(one.candidate);
            }
        }
        for (left, keep) in left.iter_mut().zip(keep) {
            // Those that do not know it go on where it is off.
            if !choice.off {
                left.clear();
            }
            left.extend(keep);
        }
        chosen.insert(name.clone(), choice.value.clone());
    }
    Ok(chosen)
}

/// A candidate that has the parameter.
struct Having<'h> {
    host: usize,
    candidate: usize,
    parameter: &'h Parameter,
}

/// The values that one of a host's candidates takes.
#[derive(Default)]
struct Taken<'h> {
    /// One at least does not know the parameter, and so takes it where it is off.
    unknown: bool,
    values: BTreeSet<&'h Scalar>,
    ranges: Vec<(i64, i64)>,
}

impl Taken<'_> {
    fn takes(&self, choice: &Choice) -> bool {
        let ranged = matches!(choice.value, Scalar::Int(value) if within(&self.ranges, &value));
        self.unknown && choice.off || ranged || self.values.contains(&choice.value)
    }
}

fn taken<'h>(having: &[Having<'h>], left: &[BTreeSet<usize>]) -> Vec<Taken<'h>> {
    let mut hosts: Vec<(Taken<'_>, usize)> = left.iter().map(|_| Default::default()).collect();
    for one in having {
        let Some((host, count)) = hosts.get_mut(one.host) else { continue };
        *count += 1;
        host.values.insert(&one.parameter.value);
        for allowed in one.parameter.allowed.iter().flatten() {
            match allowed {
                Allowed::Value(value) => drop(host.values.insert(value)),
                Allowed::Range(range) => host.ranges.push((range.min, range.max)),
            }
        }
    }
    let hosts = hosts.into_iter().zip(left);
    hosts
        .map(|((host, count), left)| Taken {
            unknown: count < left.len(),
            ranges: merged(host.ranges),
            values: host.values,
        })
        .collect()
}

/// A value that a parameter may be set to.
struct Choice {
    value: Scalar,
    /// All that know the parameter are, with it, as those that do not.
    off: bool,
}

/// Values to try, the best first: what is on before what is off, larger numbers first.
fn values(having: &[Having<'_>]) -> Vec<Choice> {
    let mut values = BTreeSet::new();
    for one in having {
        values.insert(one.parameter.value.clone());
        values.extend(one.parameter.off.clone());
        for allowed in one.parameter.allowed.iter().flatten() {
            match allowed {
                Allowed::Value(value) => drop(values.insert(value.clone())),
                Allowed::Range(range) => values.extend([range.min, range.max].map(Scalar::Int)),
            }
        }
    }
    let first = having.first().and_then(|one| one.parameter.off.as_ref());
    let off = first.filter(|off| having.iter().all(|one| one.parameter.off.as_ref() == Some(*off)));
    let mut choices: Vec<Choice> =
        values.into_iter().map(|value| Choice { off: off == Some(&value), value }).collect();
    choices.sort_by(|a, b| a.off.cmp(&b.off).then(b.value.cmp(&a.value)));
    choices
}
