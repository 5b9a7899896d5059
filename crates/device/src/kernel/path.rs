//! Names of kernel devices.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use vfio_migration_types::VmId;

use super::error::KernelError;

/// The name or the file by which a kernel VFIO device is found.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum KernelPath {
    /// A PCI function by its address, `0000:01:00.0`.
    Pci(String),
    /// A mediated device by its UUID, in lower case.
    Mdev(String),
    /// The device's own file, `/dev/vfio/devices/vfioN`.
    Cdev(PathBuf),
    /// A group's file, `/dev/vfio/N`, and the device's name in it.
    Group {
        /// The group's file, `/dev/vfio/N`.
        group: PathBuf,
        /// A PCI address or an mdev's UUID.
        name: String,
    },
}

impl FromStr for KernelPath {
    type Err = KernelError;

    /// `0000:01:00.0` (or `01:00.0`, of domain 0), a UUID, `/dev/vfio/devices/vfioN`, or `/dev/vfio/N:NAME` with the
    /// name of a device of the group.
    fn from_str(text: &str) -> Result<Self, KernelError> {
        let refuse = || KernelError::Path(text.chars().take(128).collect());
        if text.starts_with('/') {
            return match text.split_once(':') {
                Some((group, name)) if pci(name).is_some() || uuid(name).is_some() => {
                    let name = pci(name).or_else(|| uuid(name)).ok_or_else(refuse)?;
                    Ok(Self::Group { group: group.into(), name })
                }
                Some(_) => Err(refuse()),
                None => Ok(Self::Cdev(text.into())),
            };
        }
        pci(text).map(Self::Pci).or_else(|| uuid(text).map(Self::Mdev)).ok_or_else(refuse)
    }
}

impl fmt::Display for KernelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci(name) => write!(f, "PCI device {name}"),
            Self::Mdev(name) => write!(f, "mediated device {name}"),
            Self::Cdev(path) => write!(f, "{}", path.display()),
            Self::Group { group, name } => write!(f, "{} of {}", name, group.display()),
        }
    }
}

/// A PCI address as sysfs writes it. Nothing else gets into a path below sysfs.
fn pci(text: &str) -> Option<String> {
    let hex = |part: &str, digits: usize| {
        part.len() == digits && part.bytes().all(|digit| digit.is_ascii_hexdigit())
    };
    let (domain, rest) = match text.split(':').count() {
        2 => ("0000", text),
        3 => text.split_once(':')?,
        _ => return None,
    };
    let (bus, rest) = rest.split_once(':')?;
    let (slot, function) = rest.split_once('.')?;
    // Domains above ffff exist (VMD): five digits and more.
    let domain_fits = (4..=8).any(|digits| hex(domain, digits));
    let function_fits = function.len() == 1 && function.bytes().all(|digit| (b'0'..=b'7').contains(&digit));
    (domain_fits && hex(bus, 2) && hex(slot, 2) && function_fits)
        .then(|| format!("{domain}:{bus}:{slot}.{function}").to_ascii_lowercase())
}

fn uuid(text: &str) -> Option<String> {
    text.contains('-').then(|| text.parse::<VmId>().ok()).flatten().map(|uuid| uuid.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_apart() {
        let parse = |text: &str| text.parse::<KernelPath>().unwrap();
        assert_eq!(parse("0000:01:00.0"), KernelPath::Pci("0000:01:00.0".into()));
        assert_eq!(parse("1A:1f.7"), KernelPath::Pci("0000:1a:1f.7".into()));
        assert_eq!(parse("10000:01:00.0"), KernelPath::Pci("10000:01:00.0".into()));
        let uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
        assert_eq!(parse(&uuid.to_uppercase()), KernelPath::Mdev(uuid.into()));
        assert_eq!(parse("/dev/vfio/devices/vfio0"), KernelPath::Cdev("/dev/vfio/devices/vfio0".into()));
        let group = KernelPath::Group { group: "/dev/vfio/7".into(), name: "0000:01:00.0".into() };
        assert_eq!(parse("/dev/vfio/7:01:00.0"), group);
    }

    #[test]
    fn nonsense_is_refused_and_leaves_no_way_into_other_folders() {
        for bad in [
            "",
            "net0",
            "../..",
            "0000:01:00.8",
            "0000:01:00",
            "00:0g.0",
            "0000:01:00.0/..",
            "x:0000:01:00.0",
            "83b8f4f2-509f",
            "/dev/vfio/7:../../x",
        ] {
            assert!(matches!(bad.parse::<KernelPath>(), Err(KernelError::Path(_))), "{bad}");
        }
    }
}
