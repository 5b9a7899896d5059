//! Manifests of real devices: what sysfs shows without opening them, against what the open device says, and devlink.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;

use rustix::io::Errno;
use serde_json::Value;
use vfio_migration_device::host::{DevlinkError, Roots, running_versions, scan};
use vfio_migration_device::{Device, KernelDevice, KernelOptions, KernelPath};
use vfio_migration_memory::{GuestRam, RamSpec};
use vfio_migration_types::{DeviceId, Gpa};

use crate::check::{Outcome, holds, same};
use crate::instance::Instance;
use crate::migdev;
use crate::mtty::one_port;

/// All that is known of a device that nobody opened is the same of the open one: whoever compares a manifest from a file
/// with one that a VM gives would be told of differences that are none.
pub(crate) fn alike_open_and_not() -> Outcome {
    let kinds = [one_port()?, Instance::new("mtty", "mtty-2")?, migdev::small()?];
    for (instance, facts) in kinds.iter().zip([1, 1, 2]) {
        let (closed, open) = (closed(instance)?, open(instance)?);
        contradiction("", &closed, &open).map_or(Ok(()), Err)?;
        same("facts", closed["facts"].as_object().map(serde_json::Map::len), Some(facts))?;
    }
    // One of another kind is told from it.
    let differs = contradiction("", &closed(&kinds[0])?, &open(&kinds[1])?).ok_or("no difference")?;
    holds(differs.contains("ports") || differs.contains("mdev_type"), &differs)
}

fn closed(instance: &Instance) -> Outcome<Value> {
    let roots = Roots::default();
    let found = scan(&roots);
    let device = found.devices.iter().find(|device| device.name == instance.uuid()).ok_or("not found")?;
    Ok(serde_json::to_value(device.manifest(&DeviceId::new("dev0")?, &roots))?)
}

fn open(instance: &Instance) -> Outcome<Value> {
    let path: KernelPath = instance.uuid().parse()?;
    let ram = Arc::new(GuestRam::new("ktest", &[RamSpec { gpa: Gpa(0), len: 1 << 20 }])?);
    let device = KernelDevice::open(DeviceId::new("dev0")?, &path, ram, &KernelOptions::default())?;
    Ok(serde_json::to_value(device.manifest()?)?)
}

/// Where one value says something else than the other, both being known.
fn contradiction(place: &str, one: &Value, other: &Value) -> Option<String> {
    match (one, other) {
        (Value::Object(one), Value::Object(other)) => one.iter().find_map(|(name, value)| {
            contradiction(&format!("{place}/{name}"), value, other.get(name).unwrap_or(&Value::Null))
        }),
        (Value::Null, _) => None,
        _ => (one != other).then(|| format!("{place}: {one} and {other}")),
    }
}

/// netdevsim says that its management firmware is 10.20.30 (`drivers/net/netdevsim/dev.c`).
pub(crate) fn by_devlink() -> Outcome {
    let ask = || running_versions("netdevsim", "netdevsim7");
    let gone = |answer: Result<BTreeMap<String, String>, DevlinkError>| {
        holds(
            matches!(answer, Err(DevlinkError::Refused(Errno::NODEV))),
            &format!("no such device: {answer:?}"),
        )
    };
    gone(ask())?;
    fs::write("/sys/bus/netdevsim/new_device", "7 1")?;
    same("versions", ask()?, BTreeMap::from([("fw.mgmt".into(), "10.20.30".into())]))?;
    fs::write("/sys/bus/netdevsim/del_device", "7")?;
    gone(ask())
}
