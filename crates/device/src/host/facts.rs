//! Facts from sysfs and devlink that nobody can read from the device itself, open or not.

use std::collections::BTreeMap;
use std::path::Path;

use vfio_migration_compat::Scalar;

use super::files::{attribute, list, read_head};
use super::{devlink, vpd};

/// Bytes that vital product data can have: its address has 15 bits.
const VPD_MAX: u64 = 32 << 10;

/// Version of the firmware, of the function in folder `dir` or, for a virtual one, of its physical function, where its
/// driver shows one: in sysfs (`Documentation/ABI/stable/sysfs-class-infiniband`, fw_ver; `firmware_rev` of an NVMe
/// controller), or by devlink.
pub(crate) fn firmware(dir: &Path) -> Option<String> {
    let functions = [dir.to_owned(), dir.join("physfn")];
    let in_sysfs = functions.iter().find_map(|dir| {
        [("infiniband", "fw_ver"), ("nvme", "firmware_rev")].iter().find_map(|(class, file)| {
            let class = dir.join(class);
            list(&class).ok()?.iter().find_map(|name| attribute(&class.join(name).join(file)))
        })
    });
    in_sysfs.or_else(|| functions.iter().find_map(|dir| by_devlink(dir)))
}

fn by_devlink(dir: &Path) -> Option<String> {
    let real = dir.canonicalize().ok()?;
    // The kernel knows of this host alone, and `dir` may be of another.
    if !real.starts_with("/sys") {
        return None;
    }
    match devlink::running_versions("pci", real.file_name()?.to_str()?) {
        Ok(versions) => one_line(&versions),
        Err(error) => {
            tracing::debug!(dir = %real.display(), %error, "no firmware version");
            None
        }
    }
}

/// `fw` is the version of all of it; where there is none, each part's with its name.
fn one_line(versions: &BTreeMap<String, String>) -> Option<String> {
    if let Some(whole) = versions.get("fw") {
        return Some(whole.clone());
    }
    let parts: Vec<_> = versions
        .iter()
        .filter(|(name, _)| name.starts_with("fw."))
        .map(|(name, version)| format!("{name} {version}"))
        .collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

/// The maker's marks in a PCI function: under strict equality another part is another device.
pub(crate) fn product(dir: &Path) -> BTreeMap<String, Scalar> {
    let vpd = read_head(&dir.join("vpd"), VPD_MAX).map(|bytes| vpd::parse(&bytes)).unwrap_or_default();
    let facts = [("vpd_part", vpd.part), ("vpd_change", vpd.change)];
    facts.into_iter().filter_map(|(name, text)| Some((name.to_owned(), Scalar::Text(text?)))).collect()
}

/// The attributes that the driver's own rule compares, of a mediated device.
pub(crate) fn mediated(
    dir: &Path,
    driver: Option<&str>,
    mdev_type: Option<&str>,
) -> BTreeMap<String, Scalar> {
    let mut facts = BTreeMap::new();
    let mut put = |name: &str, value: Option<i64>| {
        facts.extend(value.map(|value| (name.to_owned(), Scalar::Int(value))));
    };
    match driver {
        // samples/vfio-mdev/mtty.c, mtty_types: one port and two.
        Some("mtty") => put(
            "ports",
            match mdev_type {
                Some("mtty-1") => Some(1),
                Some("mtty-2") => Some(2),
                _ => None,
            },
        ),
        // kernel/migdev/README.md, Instances.
        Some("migdev") => {
            let number = |name: &str| attribute(&dir.join(name))?.parse().ok();
            put("stream_version", number("version"));
            put("state_size", number("state_size"));
        }
        _ => {}
    }
    facts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_goes_before_its_parts() {
        let versions = |all: &[(&str, &str)]| {
            one_line(&all.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect())
        };
        assert_eq!(versions(&[("fw", "22.41"), ("fw.version", "9")]).as_deref(), Some("22.41"));
        let parts = versions(&[("fw.undi", "1.2"), ("board.id", "7"), ("fw.mgmt", "10.20.30")]);
        assert_eq!(parts.as_deref(), Some("fw.mgmt 10.20.30, fw.undi 1.2"));
        assert_eq!(versions(&[("board.id", "7")]), None);
    }

    #[test]
    fn what_drivers_of_mediated_devices_compare_is_read_where_they_show_it() {
        let top = tempfile::tempdir().unwrap();
        let facts = |driver, kind| mediated(top.path(), Some(driver), Some(kind));
        assert_eq!(facts("mtty", "mtty-2"), BTreeMap::from([("ports".into(), Scalar::Int(2))]));
        assert!(facts("mtty", "mtty-9").is_empty() && facts("other", "mtty-2").is_empty());
        assert!(facts("migdev", "migdev-1M").is_empty());
        std::fs::write(top.path().join("version"), "2\n").unwrap();
        std::fs::write(top.path().join("state_size"), "nonsense\n").unwrap();
        let wanted = BTreeMap::from([("stream_version".into(), Scalar::Int(2))]);
        assert_eq!(facts("migdev", "migdev-1M"), wanted);
    }
}
