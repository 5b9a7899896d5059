//! Manifests of real devices: what sysfs shows without opening them, against what the open device says, and devlink.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;

use rustix::io::Errno;
use serde_json::Value;
use vfio_migration_compat::DeviceManifest;
use vfio_migration_device::host::{DevlinkError, Roots, running_versions, scan};
use vfio_migration_device::{Device, KernelDevice, KernelOptions, KernelPath, describe_hardware};
use vfio_migration_memory::{GuestRam, RamSpec};
use vfio_migration_types::{DeviceId, Gpa};

use crate::check::{Outcome, holds, same};
use crate::command;
use crate::instance::Instance;
use crate::migdev;
use crate::mtty::one_port;
use crate::pci;

/// All that is known of a device that nobody opened is the same of the open one: whoever compares a manifest from a file
/// with one that a VM gives would be told of differences that are none.
pub(crate) fn alike_open_and_not() -> Outcome {
    let kinds = [one_port()?, Instance::new("mtty", "mtty-2")?, migdev::small()?];
    for (instance, facts) in kinds.iter().zip([1, 1, 2]) {
        let (closed, open) = (closed(instance.uuid())?, open(instance)?);
        contradiction("", &closed, &open).map_or(Ok(()), Err)?;
        same("facts", closed["facts"].as_object().map(serde_json::Map::len), Some(facts))?;
    }
    // One of another kind is told from it.
    let differs = contradiction("", &closed(kinds[0].uuid())?, &open(&kinds[1])?).ok_or("no difference")?;
    holds(differs.contains("ports") || differs.contains("mdev_type"), &differs)
}

/// A function of PCI Express and one of conventional PCI: VFIO shows an owner what sysfs shows everybody.
pub(crate) fn alike_as_pci_functions() -> Outcome {
    let mut seen = Vec::new();
    for (vendor, device) in [("0x8086", "0x10d3"), ("0x1234", "0x11e8")] {
        let place = pci::find(vendor, device).ok_or_else(|| format!("no {vendor}:{device}"))?;
        pci::bind(&place)?;
        let both = as_function(pci::address(&place)?);
        pci::unbind(&place)?;
        let (mut closed, open) = both?;
        // Told from its driver alone; what was opened here tells of its hardware.
        holds(
            closed["no_migration"].take().is_string(),
            &format!("why it does not migrate is known: {closed}"),
        )?;
        contradiction("", &closed, &open).map_or(Ok(()), Err)?;
        for part in ["pci", "regions", "irqs", "capabilities"] {
            holds(!closed[part].is_null(), &format!("{part} is known: {closed}"))?;
        }
        seen.push((closed, open));
    }
    let capabilities = seen[0].0["capabilities"].as_array().map_or(0, Vec::len);
    holds(capabilities >= 5, &format!("a network card has more than {capabilities} capabilities"))?;
    holds(contradiction("", &seen[0].0, &seen[1].1).is_some(), "the other function is told from it")
}

fn as_function(address: &str) -> Outcome<(Value, Value)> {
    let closed = closed(address)?;
    let path: KernelPath = address.parse()?;
    let ram = Arc::new(GuestRam::new("ktest", &[RamSpec { gpa: Gpa(0), len: 1 << 20 }])?);
    let device = KernelDevice::open(DeviceId::new("dev0")?, &path, ram, &KernelOptions::default())?;
    // It cannot migrate, so that it has no manifest of its own.
    let open = describe_hardware(&device, DeviceManifest::new(DeviceId::new("dev0")?))?;
    let mut open = serde_json::to_value(open)?;
    for known_elsewhere in ["backend", "driver", "kernel"] {
        open[known_elsewhere] = closed[known_elsewhere].clone();
    }
    Ok((closed, open))
}

fn closed(name: &str) -> Outcome<Value> {
    let roots = Roots::default();
    let found = scan(&roots);
    let device = found.devices.iter().find(|device| device.name == name).ok_or("not found")?;
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
        (Value::Array(one), Value::Array(other)) if one.len() == other.len() => {
            let mut pairs = one.iter().zip(other).enumerate();
            pairs.find_map(|(index, (one, other))| contradiction(&format!("{place}/{index}"), one, other))
        }
        (Value::Null, _) => None,
        _ => (one != other).then(|| format!("{place}: {one} and {other}")),
    }
}

/// The command opens a device that nobody uses when it may, and what it then says is what the open device says. One that
/// somebody has is described as far as sysfs shows it, with a warning.
pub(crate) fn probed() -> Outcome {
    let (one, other) = (migdev::small()?, migdev::small()?);
    let (a, b) = (format!("mdev:{}", one.uuid()), format!("mdev:{}", other.uuid()));
    let describe = |more: &[&str]| command::run(&[&["describe", "--name", "dev0", &a], more].concat());
    let closed = describe(&[])?.report;
    for part in ["flags", "dirty", "state_size", "regions", "irqs", "pci"] {
        holds(closed[part].is_null(), &format!("{part} is not known of a closed device: {closed}"))?;
    }
    let run = describe(&["--probe"])?;
    same("exit code", run.exit, Some(0))?;
    holds(run.stderr.is_empty(), &run.stderr)?;
    let asked = run.report;
    let open = open(&one)?;
    contradiction("", &open, &asked).map_or(Ok(()), Err)?;
    // The one that was opened here has no memory yet.
    holds(asked["dirty"]["device_log"].is_boolean(), &format!("who can log its writes was tried: {asked}"))?;

    let check = |more: &[&str]| -> Outcome<bool> {
        let run = command::run(&[&["check", &a, &b], more].concat())?;
        same(&run.stderr, run.exit, Some(0))?;
        let reasons = run.report["reasons"].as_array().ok_or("no reasons")?;
        let unknown =
            reasons.iter().find(|reason| reason["code"] == "strict-unknown").ok_or("all is known")?;
        Ok(unknown["field"].as_str().ok_or("of no field")?.split(',').any(|field| field == "flags"))
    };
    holds(check(&[])?, "the flags of closed devices are not known")?;
    holds(!check(&["--probe"])?, "those of open ones are")?;

    let held = one.open()?;
    let run = describe(&["--probe"])?;
    drop(held);
    same("exit code of one in use", run.exit, Some(0))?;
    same("what is said of one in use", &run.report, &closed)?;
    holds(run.stderr.contains("what only an open device tells is not known"), &run.stderr)
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
