//! What a whole pool loads, so that devices can be created already downgraded.

use std::collections::{BTreeMap, BTreeSet};

use schemars::JsonSchema;
use serde::Serialize;

use crate::device::DeviceManifest;
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
        "host {0} has no device of model {1} with a version, and offers none: take it out of the pool, or give it one"
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

/// The newest version, and the parameters, of `model` that every host of the pool can load: each by one device or offer at least.
///
/// Values are chosen for one parameter after the other, in the order of their names, what is on before what is off and larger
/// numbers first: of several sets that would do, the first so found.
pub fn baseline(pool: &[HostManifest], model: &str) -> Result<Baseline, BaselineError> {
    if pool.is_empty() {
        return Err(BaselineError::Empty);
    }
    let mut hosts = Vec::new();
    for host in pool {
        let own = candidates(host, model);
        if own.is_empty() {
            return Err(BaselineError::NoDevice(crate::text::quote(&host.name), crate::text::quote(model)));
        }
        hosts.push(own);
    }
    let versions: BTreeSet<ModelVersion> = hosts.iter().flatten().flat_map(Own::names).collect();
    let loaded_by_all =
        |version: &&ModelVersion| hosts.iter().all(|host| host.iter().any(|own| own.loads(**version)));
    let common: Vec<ModelVersion> = versions.iter().rev().filter(loaded_by_all).copied().collect();
    let mut first = None;
    for version in common {
        match parameters(&hosts, version) {
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
        versions: crate::text::list(
            &pool
                .iter()
                .zip(&hosts)
                .map(|(host, own)| {
                    let newest = own.iter().map(|own| own.version).max();
                    let newest = newest.map_or_else(|| "none".to_owned(), |version| version.to_string());
                    format!("{} has {newest}", crate::text::quote(&host.name))
                })
                .collect::<Vec<_>>(),
        ),
    }))
}

/// A device or an offer of the model.
struct Own<'h> {
    version: ModelVersion,
    ranges: VersionRanges,
    parameters: &'h BTreeMap<String, Parameter>,
}

impl Own<'_> {
    fn loads(&self, version: ModelVersion) -> bool {
        self.version.loads(version) || self.ranges.contain(version)
    }

    /// The versions it speaks of.
    fn names(&self) -> Vec<ModelVersion> {
        std::iter::once(self.version).chain(self.ranges.ends()).collect()
    }
}

fn candidates<'h>(host: &'h HostManifest, model: &str) -> Vec<Own<'h>> {
    let all = host.devices.iter().chain(host.offers.iter().map(|offer| &offer.device));
    let own = |device: &'h DeviceManifest| {
        let version = device.model_version.as_ref()?.parse().ok()?;
        let ranges = device.loads.as_ref().and_then(|ranges| ranges.parse().ok()).unwrap_or_default();
        Some(Own { version, ranges, parameters: &device.parameters })
    };
    all.filter(|device| device.model.as_deref() == Some(model)).filter_map(own).collect()
}

/// The name of a parameter for which no value was found.
type Stuck = String;

/// A value for each parameter that one candidate at least of each host takes, all of them together.
fn parameters(hosts: &[Vec<Own<'_>>], version: ModelVersion) -> Result<BTreeMap<String, Scalar>, Stuck> {
    let hosts: Vec<Vec<&Own<'_>>> =
        hosts.iter().map(|host| host.iter().filter(|own| own.loads(version)).collect()).collect();
    let names: BTreeSet<&String> = hosts.iter().flatten().flat_map(|own| own.parameters.keys()).collect();
    let mut left = hosts;
    let mut chosen = BTreeMap::new();
    for name in names {
        let values = values(&left, name);
        let fits = |value: &&Choice| {
            left.iter().all(|host| host.iter().any(|own| value.is_taken(own.parameters.get(name))))
        };
        let choice = values.iter().find(fits).ok_or_else(|| name.clone())?;
        for host in &mut left {
            host.retain(|own| choice.is_taken(own.parameters.get(name)));
        }
        chosen.insert(name.clone(), choice.0.clone());
    }
    Ok(chosen)
}

/// A value that a parameter may be set to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Choice(Scalar, bool);

impl Choice {
    /// Whether a candidate takes it: one that does not know the parameter, where it is off.
    fn is_taken(&self, parameter: Option<&Parameter>) -> bool {
        parameter.map_or(self.1, |parameter| parameter.takes(&self.0))
    }
}

/// Values to try, the best first: what is on before what is off, larger numbers first.
fn values(hosts: &[Vec<&Own<'_>>], name: &String) -> Vec<Choice> {
    let parameters: Vec<&Parameter> =
        hosts.iter().flatten().filter_map(|own| own.parameters.get(name)).collect();
    let mut values = BTreeSet::new();
    for parameter in &parameters {
        values.insert(parameter.value.clone());
        values.extend(parameter.off.clone());
        for allowed in parameter.allowed.iter().flatten() {
            match allowed {
                Allowed::Value(value) => values.insert(value.clone()),
                Allowed::Range(range) => {
                    values.insert(Scalar::Int(range.min));
                    values.insert(Scalar::Int(range.max))
                }
            };
        }
    }
    let off = |value: &Scalar| parameters.iter().all(|parameter| parameter.off.as_ref() == Some(value));
    let mut choices: Vec<Choice> =
        values.into_iter().map(|value| Choice(value.clone(), off(&value))).collect();
    choices.sort_by(|a, b| a.1.cmp(&b.1).then(b.0.cmp(&a.0)));
    choices
}
