//! PCI functions of this machine, and vfio-pci.

use std::fs;
use std::path::{Path, PathBuf};

use crate::check::Outcome;

/// Where the function of this vendor and device is in sysfs.
pub(crate) fn find(vendor: &str, device: &str) -> Option<PathBuf> {
    find_all(vendor, device).into_iter().next()
}

/// Where all functions of this vendor and device are in sysfs.
pub(crate) fn find_all(vendor: &str, device: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir("/sys/bus/pci/devices") else { return Vec::new() };
    let is = |path: &Path, file: &str, value: &str| {
        fs::read_to_string(path.join(file)).is_ok_and(|is| is.trim() == value)
    };
    let paths = entries.flatten().map(|entry| entry.path());
    paths.filter(|path| is(path, "vendor", vendor) && is(path, "device", device)).collect()
}

/// The PCI address that ends the path.
pub(crate) fn address(place: &Path) -> Outcome<&str> {
    Ok(place.file_name().and_then(|name| name.to_str()).ok_or("a device without an address")?)
}

/// Gives it to vfio-pci, where it stays.
pub(crate) fn bind(place: &Path) -> Outcome {
    fs::write(place.join("driver_override"), "vfio-pci")?;
    Ok(fs::write("/sys/bus/pci/drivers_probe", address(place)?)?)
}

/// Takes it from its driver, if it has one.
pub(crate) fn unbind(place: &Path) -> Outcome {
    let driver = place.join("driver");
    if driver.exists() {
        fs::write(driver.join("unbind"), address(place)?)?;
    }
    Ok(fs::write(place.join("driver_override"), "\n")?)
}
