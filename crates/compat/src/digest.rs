//! Digests of what identifies a device or a machine: of nothing that moves.

use serde_json::{Value, json};

use crate::device::DeviceManifest;
use crate::machine::MachineManifest;

impl DeviceManifest {
    /// A digest of what identifies it: model, version, parameters' values, driver, layout, firmware, facts. Not of its name, its
    /// place, its back end or kernel, of estimates, capacity or dirty tracking.
    pub fn identity(&self) -> [u8; 32] {
        hash(&self.identity_tree())
    }

    fn identity_tree(&self) -> Value {
        let parameters: serde_json::Map<String, Value> =
            self.parameters.iter().map(|(name, parameter)| (name.clone(), parameter.value.json())).collect();
        let regions = self.regions.as_ref().map(|regions| {
            let mut regions: Vec<_> = regions
                .iter()
                .filter(|region| region.size != 0)
                .map(|region| (region.index, region.size, region.read, region.write))
                .collect();
            regions.sort_unstable();
            regions
        });
        let irqs = self.irqs.as_ref().map(|irqs| {
            irqs.iter().filter(|(_, count)| **count != 0).map(|(n, count)| (*n, *count)).collect::<Vec<_>>()
        });
        let capabilities = self.capabilities.clone().map(|mut capabilities| {
            capabilities.sort_unstable();
            capabilities
        });
        let driver = self.driver.as_ref().map(|driver| json!([driver.name, driver.version]));
        json!({
            "model": self.model,
            "model_version": self.model_version,
            "loads": self.loads,
            "parameters": parameters,
            "driver": driver,
            "mdev_type": self.mdev_type,
            "flags": self.flags,
            "pci": self.pci,
            "regions": regions,
            "capabilities": capabilities,
            "config_mask": self.config_mask,
            "irqs": irqs,
            "firmware": self.firmware,
            "host_driver": self.host_driver,
            "facts": self.facts,
        })
    }
}

impl DeviceManifest {
    /// Its name, what identifies it, and where the guest sees it, if that is known.
    fn tree_in_machine(&self) -> Value {
        let (id, tree) = (self.id.as_str(), self.identity_tree());
        self.guest_address.map_or_else(|| json!([id, tree]), |address| json!([id, tree, address]))
    }
}

impl MachineManifest {
    /// A digest of what identifies it: the machine, and each device with its name and its place in the guest. Not of the order of devices or CPU features.
    pub fn identity_digest(&self) -> [u8; 32] {
        let mut devices: Vec<&DeviceManifest> = self.devices.iter().collect();
        devices.sort_by(|a, b| a.id.cmp(&b.id));
        let devices: Vec<Value> = devices.into_iter().map(DeviceManifest::tree_in_machine).collect();
        let mut cpu: Vec<&String> = self.cpu.iter().collect();
        cpu.sort_unstable();
        cpu.dedup();
        hash(&json!({
            "machine": self.machine,
            "accelerator": self.accelerator,
            "vcpus": self.vcpus,
            "ram": self.ram,
            "cpu": cpu,
            "sections": self.sections,
            "devices": devices,
        }))
    }
}

/// BLAKE3 over an encoding of our own. The text that `serde_json` writes will not do: the order of its fields and the form of its
/// numbers depend on features that any crate of the same build can turn on, and the two sides are two builds.
fn hash(tree: &Value) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    encode(tree, &mut hasher);
    *hasher.finalize().as_bytes()
}

/// A letter for the kind, then the value: numbers in 8 bytes, little endian; text behind its length; lists behind the number
/// of their items; maps behind the number of their fields, each name before its value, by the names' bytes ascending.
fn encode(value: &Value, hasher: &mut blake3::Hasher) {
    match value {
        Value::Null => drop(hasher.update(b"n")),
        Value::Bool(value) => drop(hasher.update(if *value { b"t" } else { b"f" })),
        Value::Number(number) => {
            let (kind, bytes) = match (number.as_u64(), number.as_i64()) {
                (Some(number), _) => (b"u", number.to_le_bytes()),
                (None, Some(number)) => (b"i", number.to_le_bytes()),
                (None, None) => (b"d", number.as_f64().unwrap_or(f64::NAN).to_bits().to_le_bytes()),
            };
            hasher.update(kind).update(&bytes);
        }
        Value::String(text) => {
            hasher.update(b"s");
            encode_text(text, hasher);
        }
        Value::Array(items) => {
            hasher.update(b"l").update(&(items.len() as u64).to_le_bytes());
            items.iter().for_each(|item| encode(item, hasher));
        }
        Value::Object(fields) => {
            hasher.update(b"m").update(&(fields.len() as u64).to_le_bytes());
            let mut fields: Vec<_> = fields.iter().collect();
            fields.sort_unstable_by_key(|(name, _)| *name);
            for (name, value) in fields {
                encode_text(name, hasher);
                encode(value, hasher);
            }
        }
    }
}

fn encode_text(text: &str, hasher: &mut blake3::Hasher) {
    hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(digest: [u8; 32]) -> String {
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Both sides of a migration compute it, each in a build of its own: these bytes must never change unnoticed.
    #[test]
    fn an_encoding_of_our_own_is_hashed() {
        let tree = json!({"b": [1, -2, 0.5, true, false, null], "a": {"z": "", "ä": "text"}});
        let mut bytes = Vec::new();
        let mut field = |parts: &[&[u8]]| parts.iter().for_each(|part| bytes.extend_from_slice(part));
        let n = |n: u64| n.to_le_bytes();
        field(&[b"m", &n(2), &n(1), b"a", b"m", &n(2), &n(1), b"z", b"s", &n(0)]);
        field(&[&n(2), "ä".as_bytes(), b"s", &n(4), b"text"]);
        field(&[&n(1), b"b", b"l", &n(6), b"u", &n(1), b"i", &(-2i64).to_le_bytes()]);
        field(&[b"d", &0.5f64.to_bits().to_le_bytes(), b"t", b"f", b"n"]);
        assert_eq!(hash(&tree), *blake3::hash(&bytes).as_bytes());
    }

    #[test]
    fn the_identity_of_a_machine_is_the_same_in_every_build() {
        let text = br#"{"schema":1,"machine":"m/1","accelerator":"kvm","vcpus":1,"ram":[{"gpa":0,"len":4096}],"cpu":["b","a"],
            "sections":{"kvm.vcpu.0":1},"devices":[{"id":"net0","model":"org/x","model_version":"1.2","backend":"kernel",
            "parameters":{"rings":{"value":4},"mode":{"value":"fast"}},"irqs":{"2":3}}]}"#;
        let machine = MachineManifest::from_json(text).unwrap();
        assert_eq!(
            hex(machine.identity_digest()),
            "54c54e426d09e6337df482baf9641efdd4422f0cba41bd1f7bbb3abf00506044"
        );
    }
}
