//! Manifests in forms that schedulers know: Kubernetes node labels and attributes of dynamic resources, and plain
//! `path=value` lines ([`to_pairs`]).

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Serialize;

use crate::device::DeviceManifest;
use crate::host::HostManifest;
use crate::placement::candidates;
use crate::scalar::Scalar;
use crate::version::ModelVersion;

pub use crate::pairs::{from_pairs, to_pairs};

/// Before the slash of each label and attribute.
pub const PREFIX: &str = "vfio-migrate.org";
/// Longest name of a label after its prefix, and longest value (Kubernetes: "Labels and Selectors", syntax).
pub const LABEL_MAX: usize = 63;
/// Longest name of an attribute after its prefix, and most attributes and capacities of a device (Kubernetes:
/// `resource.k8s.io`, `DeviceMaxIDLength` and `ResourceSliceMaxAttributesAndCapacitiesPerDevice`).
pub const ATTRIBUTE_MAX: usize = 32;
/// Longest text of an attribute (Kubernetes: `DeviceAttributeMaxValueLength`).
pub const ATTRIBUTE_TEXT_MAX: usize = 64;

/// A host's labels as a Kubernetes node: per model the newest version it has or offers and how many devices, and its
/// kernel. Names and values are made legal; what had to be changed for that ends in a digest, so that it stays unlike others.
pub fn node_labels(host: &HostManifest) -> BTreeMap<String, String> {
    let mut models: BTreeMap<&str, (Option<ModelVersion>, u64)> = BTreeMap::new();
    for candidate in candidates(host) {
        let Some(model) = candidate.device.model.as_deref() else { continue };
        let version = candidate.device.model_version.as_ref().and_then(|text| text.parse().ok());
        let (newest, count) = models.entry(model).or_default();
        *newest = (*newest).max(version);
        *count = count.saturating_add(candidate.count.into());
    }
    let mut labels = BTreeMap::new();
    let mut put = |kind: &str, name: &str, value: &str| {
        let name = legal(&format!("{kind}.{name}"), LABEL_MAX);
        labels.insert(format!("{PREFIX}/{name}"), legal(value, LABEL_MAX));
    };
    for (model, (version, count)) in models {
        let name = model.replace('/', "_");
        if let Some(version) = version {
            put("version", &name, &version.to_string());
        }
        put("devices", &name, &count.to_string());
    }
    if let Some(kernel) = &host.kernel {
        labels.insert(format!("{PREFIX}/kernel"), legal(kernel, LABEL_MAX));
    }
    labels
}

/// A device of a Kubernetes `ResourceSlice`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct ResourceDevice {
    /// Name of the device in the slice: a DNS label.
    pub name: String,
    /// What it is, for the expressions of a claim.
    pub attributes: BTreeMap<String, Attribute>,
    /// What it has of things that are counted.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub capacity: BTreeMap<String, Quantity>,
}

/// One attribute, of one type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Attribute {
    /// `bool` of the API.
    Bool(bool),
    /// `int` of the API, 64 bits.
    Int(i64),
    /// `string` of the API, at most 64 characters.
    String(String),
    /// `version` of the API: semantic, as semver.org 2.0.0 has it.
    Version(String),
}

/// How much of a thing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Quantity {
    /// A Kubernetes quantity, here a whole number without a suffix.
    pub value: String,
}

/// A device's attributes and capacity, as a driver of dynamic resources publishes them. More than may be published are left out:
/// parameters in the order of their names, then capacities.
pub fn resource_device(device: &DeviceManifest) -> ResourceDevice {
    let mut attributes = BTreeMap::new();
    let text = |text: &str| Attribute::String(legal_text(text));
    let version = device.model_version.as_ref().and_then(|version| version.parse::<ModelVersion>().ok());
    let all = [
        ("model", device.model.as_deref().map(text)),
        ("modelVersion", version.map(|version| Attribute::Version(version.to_string()))),
        ("driver", device.driver_name().map(text)),
        ("mdevType", device.mdev_type.as_deref().map(text)),
        ("firmware", device.firmware.as_deref().map(text)),
        ("hostDriver", device.host_driver.as_deref().map(text)),
        ("preCopy", device.flags.map(|flags| Attribute::Bool(flags.pre_copy))),
        ("p2p", device.flags.map(|flags| Attribute::Bool(flags.p2p))),
        ("vendor", device.pci.map(|pci| Attribute::Int(pci.vendor.into()))),
        ("device", device.pci.map(|pci| Attribute::Int(pci.device.into()))),
    ];
    for (name, value) in all {
        attributes.extend(value.map(|value| (format!("{PREFIX}/{name}"), value)));
    }
    for (name, parameter) in &device.parameters {
        if attributes.len() == ATTRIBUTE_MAX {
            break;
        }
        let value = match &parameter.value {
            Scalar::Bool(value) => Attribute::Bool(*value),
            Scalar::Int(value) => Attribute::Int(*value),
            Scalar::Text(value) => text(value),
        };
        attributes.insert(format!("{PREFIX}/{}", identifier(&format!("param_{name}"))), value);
    }
    let room = ATTRIBUTE_MAX - attributes.len();
    let capacity = device.capacity.iter().take(room);
    let capacity = capacity
        .map(|(name, value)| {
            (format!("{PREFIX}/{}", identifier(name)), Quantity { value: value.to_string() })
        })
        .collect();
    let name = legal(&device.id.as_str().to_ascii_lowercase().replace(['.', '_'], "-"), LABEL_MAX);
    ResourceDevice { name, attributes, capacity }
}

/// `text` made of letters, digits, `-`, `_` and `.`, a letter or digit at both ends, at most `max` long.
fn legal(text: &str, max: usize) -> String {
    let inside = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let end = |letter: char| letter.is_ascii_alphanumeric();
    if text.len() <= max && text.bytes().all(inside) && text.starts_with(end) && text.ends_with(end) {
        return text.to_owned();
    }
    let digest = digest(text);
    let kept: String = text
        .chars()
        .map(|letter| if u8::try_from(letter).is_ok_and(inside) { letter } else { '-' })
        .take(max - digest.len() - 1)
        .collect();
    let kept = kept.trim_matches(|letter: char| !letter.is_ascii_alphanumeric());
    if kept.is_empty() { digest } else { format!("{kept}-{digest}") }
}

/// `text` as an identifier of letters, digits and `_`, at most [`ATTRIBUTE_MAX`] long.
fn identifier(text: &str) -> String {
    let inside = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
    let first = |letter: char| letter.is_ascii_alphabetic() || letter == '_';
    if text.len() <= ATTRIBUTE_MAX && text.starts_with(first) && text.chars().all(inside) {
        return text.to_owned();
    }
    let digest = digest(text);
    let kept: String = text
        .chars()
        .map(|letter| if inside(letter) { letter } else { '_' })
        .take(ATTRIBUTE_MAX - digest.len() - 2)
        .collect();
    let lead = if kept.starts_with(first) { "" } else { "_" };
    format!("{lead}{kept}_{digest}")
}

/// `text` cut to what an attribute may hold.
fn legal_text(text: &str) -> String {
    if text.len() <= ATTRIBUTE_TEXT_MAX {
        return text.to_owned();
    }
    let digest = digest(text);
    let mut end = ATTRIBUTE_TEXT_MAX - digest.len() - 1;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}-{digest}", &text[..end])
}

/// Eight letters that tell `text` from others.
fn digest(text: &str) -> String {
    blake3::hash(text.as_bytes()).to_hex().as_str().chars().take(8).collect()
}
