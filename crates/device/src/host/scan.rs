//! The scan: PCI functions, mediated devices, and whatever else has a VFIO device.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::aliases::Variants;
use super::device::{HostDevice, HostDeviceKind};
use super::files::{Roots, link_name, link_parent, list};
use super::judge::{Surroundings, obstacles};
use super::kernel::{self, ConfigOption};
use super::opening::{User, needed, users};
use super::pci::{PciAddress, facts};

/// The outcome of a scan: devices, and what could not be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Scan {
    /// The devices, by kind and name.
    pub devices: Vec<HostDevice>,
    /// Places that could not be looked at, in sentences.
    pub problems: Vec<String>,
}

/// Scans a host. Opens no device and changes nothing. Every PCI function is in it; see
/// [`HostDevice::is_candidate`].
pub fn scan(roots: &Roots) -> Scan {
    let mut scanner = Scanner {
        roots,
        variants: Variants::read(roots),
        users: users(&roots.proc, &roots.dev),
        vfio: kernel::has_module(roots, "vfio"),
        built_without: kernel::config(roots).option("VFIO") == ConfigOption::Off,
        groups: BTreeMap::new(),
        found: Scan::default(),
    };
    if !roots.sys.is_dir() {
        scanner.found.problems.push(format!("there is no sysfs at {}", roots.sys.display()));
    }
    scanner.pci();
    scanner.mdevs();
    scanner.others();
    scanner.found
}

struct Scanner<'a> {
    roots: &'a Roots,
    variants: Variants,
    users: BTreeMap<PathBuf, Vec<User>>,
    vfio: bool,
    built_without: bool,
    /// Of each group that was looked at, who is in it.
    groups: BTreeMap<u32, Vec<String>>,
    found: Scan,
}

impl Scanner<'_> {
    fn pci(&mut self) {
        let dir = self.roots.sys.join("bus/pci/devices");
        for name in self.names(&dir) {
            let Ok(address) = name.parse::<PciAddress>() else { continue };
            let place = dir.join(&name);
            let facts = facts(&place);
            let variant = facts.modalias.as_deref().and_then(|alias| self.variants.of(alias)).map(Into::into);
            self.add(address.to_string(), &place, HostDeviceKind::Pci(Box::new(facts)), variant);
        }
    }

    fn mdevs(&mut self) {
        let dir = self.roots.sys.join("bus/mdev/devices");
        for name in self.names(&dir) {
            let place = dir.join(&name);
            let kind = HostDeviceKind::Mdev {
                parent: link_parent(&place),
                mdev_type: link_name(&place.join("mdev_type")),
            };
            self.add(name, &place, kind, None);
        }
    }

    /// VFIO devices that are on neither bus.
    fn others(&mut self) {
        let dir = self.roots.sys.join("class/vfio-dev");
        let known: BTreeSet<String> = self.found.devices.iter().map(|device| device.name.clone()).collect();
        for name in self.names(&dir) {
            let device = dir.join(&name).join("device");
            match link_name(&device) {
                Some(of) if known.contains(&of) => {}
                of => self.add(of.unwrap_or(name), &device, HostDeviceKind::Other, None),
            }
        }
    }

    fn add(&mut self, name: String, place: &Path, kind: HostDeviceKind, variant: Option<String>) {
        let driver = link_name(&place.join("driver"));
        let vfio_devs = list(&place.join("vfio-dev")).unwrap_or_default();
        let vfio = !vfio_devs.is_empty()
            || matches!(kind, HostDeviceKind::Other)
            // Nothing but VFIO has drivers for that bus.
            || (matches!(kind, HostDeviceKind::Mdev { .. }) && driver.is_some())
            || driver.as_deref().is_some_and(is_vfio_driver);
        let iommu_group: Option<u32> =
            link_name(&place.join("iommu_group")).and_then(|group| group.parse().ok());
        let dev = self.roots.dev.join("vfio");
        let existing = |path: PathBuf| path.symlink_metadata().is_ok().then_some(path);
        let noiommu = iommu_group.and_then(|group| existing(dev.join(format!("noiommu-{group}"))));
        let group = iommu_group.and_then(|group| existing(dev.join(group.to_string())));
        let cdev = vfio_devs.first().and_then(|name| existing(dev.join("devices").join(name)));
        let mut device = HostDevice {
            driver,
            vfio,
            variant,
            iommu_group,
            group_file: group.or_else(|| noiommu.clone()),
            cdev,
            needs: Vec::new(),
            users: Vec::new(),
            obstacles: Vec::new(),
            kind,
            name,
        };
        let files = device.cdev.iter().chain(device.group_file.iter());
        let mut users: Vec<User> = files.filter_map(|file| self.users.get(file)).flatten().cloned().collect();
        users.sort();
        users.dedup();
        device.users = users;
        if device.vfio {
            device.needs = needed(&self.roots.dev, device.cdev.as_deref(), device.group_file.as_deref());
        }
        // A mediated device has its group to itself.
        let shares = device.vfio && !matches!(device.kind, HostDeviceKind::Mdev { .. });
        let strangers = iommu_group.filter(|_| shares).map(|group| self.strangers(group)).unwrap_or_default();
        let place = Surroundings {
            sys: &self.roots.sys,
            vfio: self.vfio,
            built_without: self.built_without,
            noiommu: noiommu.is_some(),
            strangers: &strangers,
        };
        device.obstacles = obstacles(&device, &place);
        self.found.devices.push(device);
    }

    /// Members of a group that belong to a driver that keeps the group from VFIO: `name (driver)`.
    fn strangers(&mut self, group: u32) -> Vec<String> {
        if let Some(known) = self.groups.get(&group) {
            return known.clone();
        }
        let dir = self.roots.sys.join(format!("kernel/iommu_groups/{group}/devices"));
        let stranger = |name: String| {
            let driver = link_name(&dir.join(&name).join("driver"))?;
            let vfio = is_vfio_driver(&driver)
                || list(&dir.join(&name).join("vfio-dev")).is_ok_and(|devices| !devices.is_empty());
            (!vfio && !shares_group(&driver)).then(|| format!("{name} ({driver})"))
        };
        let strangers: Vec<String> = self.names(&dir).into_iter().filter_map(stranger).collect();
        self.groups.insert(group, strangers.clone());
        strangers
    }

    fn names(&mut self, dir: &Path) -> Vec<String> {
        list(dir).unwrap_or_else(|error| {
            self.found.problems.push(format!("{}: {error}", dir.display()));
            Vec::new()
        })
    }
}

/// Every VFIO driver of the kernel has it in its name (`drivers/vfio`, and mdev's `vfio_mdev`-like drivers); others are
/// known by the `vfio-dev` folder that the kernel makes since 6.1.
fn is_vfio_driver(driver: &str) -> bool {
    driver.contains("vfio")
}

/// Drivers that do no DMA of their own and leave a group to VFIO (`driver_managed_dma`).
fn shares_group(driver: &str) -> bool {
    matches!(driver, "pci-stub" | "pcieport" | "shpchp" | "pci-pf-stub")
}
