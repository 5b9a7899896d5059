//! The devices, machines and hosts that the table changes.

use serde_json::{Value, json};

/// Source and destination of a base, before changes.
pub(crate) fn base(name: &str) -> Value {
    match name {
        "sample" | "models" => sample("net0"),
        "full" => full(),
        "bare" => json!({"id": "net0"}),
        "machine" | "mapped" => machine(),
        driver => kernel(driver),
    }
}

/// A device that declares its model.
fn sample(id: &str) -> Value {
    json!({
        "id": id,
        "model": "vfio-migrate.org/sample",
        "model_version": "1.2.0",
        "backend": "vfio-user",
        "parameters": {"queues": {"value": 4, "off": 1, "allowed": [1, {"min": 2, "max": 4}]}},
        "flags": {"p2p": true, "pre_copy": true},
        "pci": {"vendor": 22086, "device": 19795, "subsystem_vendor": 22086, "subsystem": 1, "revision": 1, "class": 16_711_680},
        "regions": [{"index": 0, "size": 16384}, {"index": 2, "size": 1_048_576}],
        "irqs": {"2": 2},
        "capabilities": [{"id": 17, "offset": 64}, {"id": 9, "offset": 80, "len": 8}],
        "dirty": {"device_log": true},
        "state_size": 65536,
    })
}

/// A device without a model of which everything is known.
fn full() -> Value {
    let mut device = sample("net0");
    let more = json!({
        "model": null,
        "model_version": null,
        "driver": {"name": "acme_vfio_pci", "version": "1"},
        "firmware": "1",
        "facts": {"colour": "blue"},
    });
    for (name, value) in more.as_object().unwrap() {
        device[name] = value.clone();
    }
    device
}

/// A device that a driver of the kernel serves.
fn kernel(driver: &str) -> Value {
    let mut device = full();
    let (name, facts) = match driver {
        "mtty" => ("mtty", json!({"ports": 1})),
        "migdev" => ("migdev", json!({"stream_version": 1, "state_size": 4096})),
        "mlx5" => ("mlx5_vfio_pci", json!({})),
        "hisi" => ("hisi-acc-vfio-pci", json!({"stream_version": "1.0", "qp_num": 2, "isolation": 0})),
        "qat" => ("qat_vfio_pci", json!({"capabilities": 15, "state_size": 4096})),
        "xe" => ("xe_vfio_pci", json!({})),
        "vgpu" => ("nvidia-vgpu-vfio", json!({})),
        "gvt" => ("i915", json!({})),
        other => panic!("no base {other}"),
    };
    device["driver"] = json!({"name": name});
    device["facts"] = facts;
    device["firmware"] = Value::Null;
    device["parameters"] = json!({});
    match driver {
        "mtty" => device["mdev_type"] = "mtty-1".into(),
        "gvt" => device["mdev_type"] = "i915-GVTg_V5_4".into(),
        "vgpu" => {
            device["mdev_type"] = "nvidia-63".into();
            device["host_driver"] = "550.54".into();
            device["parameters"] = json!({"ecc": {"value": true}});
        }
        _ => {}
    }
    device
}

fn machine() -> Value {
    json!({
        "machine": "vfio-migrate/q1",
        "accelerator": "kvm",
        "vcpus": 2,
        "ram": [{"gpa": 0, "len": 1_073_741_824}],
        "cpu": ["avx", "sse2"],
        "sections": {"vcpu": 3, "clock": 1},
        "devices": [at("00:04.0", sample("net0")), at("00:05.0", sample("net1"))],
    })
}

/// A device of a machine, where its guest sees it.
fn at(address: &str, mut device: Value) -> Value {
    device["guest_address"] = address.into();
    device
}

/// A host that has room for [`machine`]: one device, and another that it could create.
pub(crate) fn host() -> Value {
    json!({
        "name": "a",
        "cpu": ["avx", "sse2"],
        "vcpus": 16,
        "memory": 17_179_869_184u64,
        "devices": [sample("vf0")],
        "offers": [{"device": sample("pf0"), "count": 1}],
        "limits": {},
    })
}
