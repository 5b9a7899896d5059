//! Manifests as JSON documents, as they come from a stranger.
//!
//! `{"schema": "vfio-migrate.org/manifest/1", "kind": "device" | "machine" | "host", …}`, and beside these two the
//! manifest's own fields.

use serde_json::{Map, Value};
use vfio_migration_types::{DEVICES_MAX, DeviceId};

use crate::device::{DeviceManifest, ManifestNote};
use crate::error::ManifestError;
use crate::host::HostManifest;
use crate::limits;
use crate::machine::MachineManifest;
use crate::tree::{self, at_most_bytes, beyond, compact, json, parse, typed};

/// The schema's name, with its version.
pub const SCHEMA: &str = "vfio-migrate.org/manifest/1";
/// The schema's name without the version.
const FAMILY: &str = "vfio-migrate.org/manifest/";

/// Content of a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Manifest {
    /// One device, on its own: what `describe DEVICE` writes.
    Device(Box<DeviceManifest>),
    /// A VM with all its devices, as it is at the source.
    Machine(Box<MachineManifest>),
    /// A host, with what it has and what it could create.
    Host(Box<HostManifest>),
}

/// A manifest in a document, with what this version does not know of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// What this version reads of the document.
    pub manifest: Manifest,
    /// The document as it came, to keep what is not known of it.
    came: Value,
}

impl Document {
    /// Longest document, in bytes.
    pub const MAX_BYTES: usize = 8 << 20;

    /// Reads a document that may come from anybody. `origin`, a file's name for example, goes into errors.
    ///
    /// # Errors
    /// Where in the document what rule is broken.
    pub fn parse(bytes: &[u8], origin: &str) -> Result<Self, ManifestError> {
        at_most_bytes(origin, bytes.len(), Self::MAX_BYTES)?;
        Self::from_tree(parse(bytes, origin)?, origin)
    }

    pub(crate) fn from_tree(came: Value, origin: &str) -> Result<Self, ManifestError> {
        let Value::Object(mut fields) = came.clone() else {
            return Err(ManifestError::new(origin, "", "a manifest is an object"));
        };
        let mut text = |name: &str| match fields.remove(name) {
            Some(Value::String(text)) => Ok(text),
            Some(_) => Err(ManifestError::new(origin, name, "this must be text")),
            None => {
                let rule = format!(
                    "{name:?} is missing: a manifest begins with {{\"schema\": {SCHEMA:?}, \"kind\": \"device\" or \"machine\" or \"host\"}}"
                );
                Err(ManifestError::new(origin, "", rule))
            }
        };
        let schema = text("schema")?;
        if schema != SCHEMA {
            let shown = crate::text::quote(&schema);
            let rule = if schema.starts_with(FAMILY) {
                format!("{shown} is another version of the schema; this program reads {SCHEMA:?}")
            } else {
                format!("{shown} is no schema of a manifest (want {SCHEMA:?})")
            };
            return Err(ManifestError::new(origin, "schema", rule));
        }
        let kind = text("kind")?;
        let fields = Value::Object(fields);
        let manifest = match kind.as_str() {
            "device" => Manifest::Device(Box::new(typed(fields, origin)?)),
            "machine" => Manifest::Machine(Box::new(typed(fields, origin)?)),
            "host" => Manifest::Host(Box::new(typed(fields, origin)?)),
            other => {
                let other = crate::text::quote(other);
                let rule = format!("there is no manifest of kind {other} (want device, machine or host)");
                return Err(ManifestError::new(origin, "kind", rule));
            }
        };
        manifest.check(origin)?;
        Ok(Self { manifest, came })
    }

    /// The paths of what this version does not know of it, each the topmost. It is kept, and has no effect.
    pub fn unknown(&self) -> Vec<String> {
        let mut known = self.manifest.clone();
        known.forget_unknown();
        let mut found = Vec::new();
        beyond(&self.came, &known.tree(), "", &mut found);
        found
    }

    /// The document as JSON for people: indented, the same text for the same manifest, what was unknown included.
    pub fn to_json(&self) -> String {
        format!("{:#}\n", self.tree())
    }

    pub(crate) fn tree(&self) -> Value {
        let mut tree = self.manifest.tree();
        tree::merge(&self.came, &mut tree);
        tree
    }
}

impl From<Manifest> for Document {
    fn from(manifest: Manifest) -> Self {
        Self { manifest, came: Value::Null }
    }
}

impl From<DeviceManifest> for Document {
    fn from(device: DeviceManifest) -> Self {
        Manifest::Device(Box::new(device)).into()
    }
}

impl From<MachineManifest> for Document {
    fn from(machine: MachineManifest) -> Self {
        Manifest::Machine(Box::new(machine)).into()
    }
}

impl From<HostManifest> for Document {
    fn from(host: HostManifest) -> Self {
        Manifest::Host(Box::new(host)).into()
    }
}

impl Manifest {
    /// The value of a document's `kind`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Device(_) => "device",
            Self::Machine(_) => "machine",
            Self::Host(_) => "host",
        }
    }

    fn check(&self, origin: &str) -> Result<(), ManifestError> {
        match self {
            Self::Device(device) => limits::device(device, ""),
            Self::Machine(machine) => limits::machine(machine),
            Self::Host(host) => limits::host(host),
        }
        .map_err(|breach| breach.of(origin))
    }

    fn tree(&self) -> Value {
        let (schema, kind) = (SCHEMA.to_owned(), self.kind().to_owned());
        let mut fields = Map::from_iter([("schema".into(), schema.into()), ("kind".into(), kind.into())]);
        let manifest = match self {
            Self::Device(device) => json(device),
            Self::Machine(machine) => json(machine),
            Self::Host(host) => json(host),
        };
        if let Value::Object(more) = manifest {
            fields.extend(more);
        }
        Value::Object(fields)
    }

    fn forget_unknown(&mut self) {
        let machine = |machine: &mut MachineManifest| {
            machine.extra.clear();
            machine.devices.iter_mut().for_each(|device| device.extra.clear());
        };
        match self {
            Self::Device(device) => device.extra.clear(),
            Self::Machine(it) => machine(it),
            Self::Host(host) => {
                host.extra.clear();
                host.limits.extra.clear();
                host.devices.iter_mut().for_each(|device| device.extra.clear());
                host.accepts.iter_mut().flatten().for_each(|accept| accept.extra.clear());
                for offer in &mut host.offers {
                    offer.extra.clear();
                    offer.device.extra.clear();
                }
            }
        }
    }
}

impl DeviceManifest {
    /// The fields that are not a maker's to declare: they are found out from the device itself, or are its VMM's.
    pub const FOUND_OUT: [&str; 11] = [
        "id",
        "backend",
        "flags",
        "no_migration",
        "pci",
        "guest_address",
        "regions",
        "capabilities",
        "irqs",
        "dirty",
        "state_size",
    ];

    /// Reads what the maker of a device declares of it: the fields of a manifest but for [those](Self::FOUND_OUT) that are found
    /// out otherwise. What has no effect is told in [`notes`](Self::notes). `text` may come from anybody.
    ///
    /// # Errors
    /// As [`Document::parse`].
    pub fn declared(text: &[u8], id: DeviceId, origin: &str) -> Result<Self, ManifestError> {
        at_most_bytes(origin, text.len(), MachineManifest::MAX_BYTES)?;
        let mut came = parse(text, origin)?;
        let Value::Object(fields) = &mut came else {
            return Err(ManifestError::new(origin, "", "a manifest is an object"));
        };
        fields.remove("schema");
        fields.remove("kind");
        fields.remove("notes");
        let note = |field: String, text: &str| ManifestNote { field, text: text.to_owned() };
        let found_out = Self::FOUND_OUT.into_iter().filter(|name| fields.remove(*name).is_some());
        let mut notes: Vec<ManifestNote> = found_out
            .map(|name| {
                note(name.to_owned(), "it is not the maker's to say: it is found out from the device")
            })
            .collect();
        fields.insert("id".into(), id.as_str().into());
        let mut device: Self = typed(came.clone(), origin)?;
        let mut known = device.clone();
        known.extra.clear();
        let mut unknown = Vec::new();
        beyond(&came, &json(&known), "", &mut unknown);
        notes.extend(unknown.into_iter().map(|field| note(field, "it is not known to this version")));
        device.notes = notes;
        limits::device(&device, "").map_err(|breach| breach.of(origin))?;
        Ok(device)
    }
}

impl MachineManifest {
    /// Longest manifest on the wire, in bytes.
    pub const MAX_BYTES: usize = 1 << 20;
    /// Most devices of a manifest.
    pub const MAX_DEVICES: usize = DEVICES_MAX as usize;

    /// The manifest as JSON, without the document's two fields: UTF-8, compact, the same bytes for the same manifest.
    ///
    /// # Errors
    /// [`from_json`](Self::from_json) would not take it back.
    pub fn to_json(&self) -> Result<Vec<u8>, ManifestError> {
        let origin = "the machine's manifest";
        limits::machine(self).map_err(|breach| breach.of(origin))?;
        let json = compact(self, origin)?;
        at_most_bytes(origin, json.len(), Self::MAX_BYTES)?;
        Ok(json)
    }

    /// Reads a manifest. `json` may come from anybody.
    pub fn from_json(json: &[u8]) -> Result<Self, ManifestError> {
        let origin = "the peer's manifest";
        at_most_bytes(origin, json.len(), Self::MAX_BYTES)?;
        let manifest: Self = typed(parse(json, origin)?, origin)?;
        limits::machine(&manifest).map_err(|breach| breach.of(origin))?;
        Ok(manifest)
    }
}
