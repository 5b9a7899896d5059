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

impl MachineManifest {
    /// A digest of what identifies it: the machine, and each device with its name. Not of the order of devices or CPU features.
    pub fn identity_digest(&self) -> [u8; 32] {
        let mut devices: Vec<_> =
            self.devices.iter().map(|device| (device.id.as_str(), device.identity_tree())).collect();
        devices.sort_by(|a, b| a.0.cmp(b.0));
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

/// Of JSON whose fields are in the order of their names: `serde_json`'s map keeps them so.
fn hash(tree: &Value) -> [u8; 32] {
    *blake3::hash(tree.to_string().as_bytes()).as_bytes()
}
