//! What a site knows of its devices and cannot be read anywhere: a file (TOML) that fills what a manifest does not know.
//!
//! ```toml
//! [host]
//! cpu = ["cpuid.7.0.ebx.5"]
//!
//! [devices.net0]
//! model = "example.org/nic"
//! model_version = "2.3.0"
//! firmware = "22.41"
//! ```
//!
//! `[devices."*"]` is for every device. What a manifest knows is not overwritten: a site file that says otherwise is wrong.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::document::Document;
use crate::error::ManifestError;
use crate::tree;

/// Content of a site file.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SiteFacts {
    /// Fields of a host's manifest.
    pub host: Map<String, Value>,
    /// Fields of devices' manifests, by the devices' names; `"*"` for all.
    pub devices: std::collections::BTreeMap<String, Map<String, Value>>,
}

impl SiteFacts {
    /// Longest file, in bytes.
    pub const MAX_BYTES: usize = 1 << 20;

    /// Reads a site file. `origin` goes into errors.
    ///
    /// # Errors
    /// Where in the file what is wrong.
    pub fn parse(text: &[u8], origin: &str) -> Result<Self, ManifestError> {
        tree::at_most_bytes(origin, text.len(), Self::MAX_BYTES)?;
        tree::toml(text, origin)
    }

    /// Fills what `document` does not know.
    ///
    /// # Errors
    /// The file contradicts what the manifest knows, or says what no manifest can say.
    pub fn fill(&self, document: &Document) -> Result<Document, ManifestError> {
        let mut tree = document.tree();
        let kind = document.manifest.kind();
        if kind == "device" {
            self.fill_device(&mut tree, "")?;
        } else {
            if kind == "host" {
                fill(&mut tree, &self.host, "host")?;
            }
            let devices = tree.get_mut("devices").and_then(Value::as_array_mut);
            for (n, device) in devices.into_iter().flatten().enumerate() {
                self.fill_device(device, &format!("devices[{n}]"))?;
            }
        }
        Document::from_tree(tree, "the manifest, filled from the site file,")
    }

    fn fill_device(&self, device: &mut Value, at: &str) -> Result<(), ManifestError> {
        let name = device.get("id").and_then(Value::as_str).unwrap_or_default().to_owned();
        // The device's own entry first: what it fills is known when everybody's comes.
        if let Some(facts) = self.devices.get(&name) {
            fill(device, facts, at)?;
        }
        let Some(facts) = self.devices.get("*") else { return Ok(()) };
        let own = self.devices.get(&name);
        let rest = facts.iter().filter(|(field, _)| own.is_none_or(|own| !own.contains_key(*field)));
        fill(device, &rest.map(|(field, value)| (field.clone(), value.clone())).collect(), at)
    }
}

/// Puts `facts` where nothing is known.
fn fill(tree: &mut Value, facts: &Map<String, Value>, at: &str) -> Result<(), ManifestError> {
    let Some(fields) = tree.as_object_mut() else { return Ok(()) };
    for (name, value) in facts {
        let path = if at.is_empty() { name.clone() } else { format!("{at}.{name}") };
        match fields.get_mut(name) {
            None | Some(Value::Null) => {
                fields.insert(name.clone(), value.clone());
            }
            Some(known) if known == value => {}
            // Of parameters, facts and the like a site may know some.
            Some(known @ Value::Object(_)) if value.is_object() => {
                fill(known, value.as_object().unwrap_or(&Map::new()), &path)?;
            }
            Some(Value::Array(items)) if items.is_empty() => {
                fields.insert(name.clone(), value.clone());
            }
            Some(known) => {
                let (known, said) =
                    (crate::text::quote(&known.to_string()), crate::text::quote(&value.to_string()));
                let rule = format!(
                    "it is known to be {known}, and the site file says {said}: correct the site file"
                );
                return Err(ManifestError::new("the site file", path, rule));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use vfio_migration_types::DeviceId;

    use super::*;
    use crate::device::DeviceManifest;
    use crate::document::Manifest;
    use crate::host::HostManifest;

    fn host() -> Document {
        let device = |name: &str| DeviceManifest {
            firmware: (name == "net1").then(|| "7".into()),
            ..DeviceManifest::new(DeviceId::new(name).unwrap())
        };
        HostManifest {
            name: "a".into(),
            devices: vec![device("net0"), device("net1")],
            ..HostManifest::default()
        }
        .into()
    }

    fn facts(text: &str) -> SiteFacts {
        SiteFacts::parse(text.as_bytes(), "site.toml").unwrap()
    }

    #[test]
    fn what_is_not_known_is_filled() {
        let filled = facts(
            "[host]\nmemory = 4096\n[devices.net0]\nmodel = \"a.org/nic\"\n[devices.\"*\"]\nmodel = \"b.org/nic\"\nfacts = { ports = 2 }\n",
        )
        .fill(&host())
        .unwrap();
        let Manifest::Host(host) = filled.manifest else { panic!() };
        assert_eq!(host.memory, Some(4096));
        let models: Vec<_> = host.devices.iter().map(|device| device.model.as_deref()).collect();
        assert_eq!(models, [Some("a.org/nic"), Some("b.org/nic")]);
        assert_eq!(host.devices[1].facts.len(), 1);
        assert_eq!(host.devices[1].firmware.as_deref(), Some("7"));
    }

    #[test]
    fn what_is_known_is_not_overwritten() {
        let error = facts("[devices.net1]\nfirmware = \"8\"\n").fill(&host()).unwrap_err();
        assert!(error.to_string().contains("devices[1].firmware"), "{error}");
        assert!(
            facts("[devices.net1]\nfirmware = \"7\"\n").fill(&host()).is_ok(),
            "to say the same is no harm"
        );
        let error = facts("[devices.net0]\nregions = 5\n").fill(&host()).unwrap_err();
        assert!(error.to_string().contains("regions"), "{error}");
        assert!(SiteFacts::parse(b"[device.net0]\n", "site.toml").is_err(), "a slip in a name is told");
    }
}
