//! What to build.

use std::path::PathBuf;
use std::str::FromStr;

use vfio_migration_device::{KernelError, KernelPath};
use vfio_migration_types::{DeviceId, VmId};

/// A machine to build.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// Identity of the VM.
    pub id: VmId,
    /// RAM in bytes: see [`layout::ram_regions`](crate::layout::ram_regions) for what is possible.
    pub memory: u64,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// The processor that runs the guest.
    pub accelerator: Accelerator,
    /// Devices, in the order of their slots.
    pub devices: Vec<DeviceConfig>,
}

/// The processor that runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// vCPUs of KVM.
    Kvm,
    /// The software twin of the guest program, in a thread.
    Software,
}

/// A device as it was asked for: where it is, and its name in a migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Name, equal on both sides of a migration.
    pub id: DeviceId,
    /// Place of the device on this host; it may differ between the sides.
    pub path: DevicePath,
}

/// Place of a device on a host.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DevicePath {
    /// The socket of a vfio-user server.
    VfioUser(PathBuf),
    /// A device of the host kernel's VFIO.
    Kernel(KernelPath),
}

/// The text describes no device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{text}' describes no device: {why} (want vfio-user:SOCKET,id=NAME, vfio:ADDRESS,id=NAME, vfio:PATH,id=NAME or \
     mdev:UUID,id=NAME)"
)]
pub struct DeviceConfigError {
    text: String,
    why: String,
}

impl FromStr for DeviceConfig {
    type Err = DeviceConfigError;

    fn from_str(text: &str) -> Result<Self, DeviceConfigError> {
        Self::parse(text, None)
    }
}

impl DeviceConfig {
    /// A device that may go without a name, and is called `name` then.
    ///
    /// # Errors
    /// The text describes no device.
    pub fn named(text: &str, name: &DeviceId) -> Result<Self, DeviceConfigError> {
        Self::parse(text, Some(name))
    }

    fn parse(text: &str, otherwise: Option<&DeviceId>) -> Result<Self, DeviceConfigError> {
        let refuse = |why: String| DeviceConfigError { text: text.chars().take(200).collect(), why };
        let (kind, rest) = text.split_once(':').ok_or_else(|| refuse("it names no kind".into()))?;
        let (place, name) = match (rest.split_once(','), otherwise) {
            (Some((place, options)), _) => (place, options.strip_prefix("id=")),
            (None, Some(name)) => (rest, Some(name.as_str())),
            (None, None) => (rest, None),
        };
        let name = name.ok_or_else(|| refuse("it has no id".into()))?;
        let path = match kind {
            "vfio-user" if place.is_empty() => return Err(refuse("the socket's path is empty".into())),
            "vfio-user" => DevicePath::VfioUser(place.into()),
            "vfio" | "mdev" => {
                let path: KernelPath =
                    place.parse().map_err(|error: KernelError| refuse(error.to_string()))?;
                if (kind == "mdev") != matches!(path, KernelPath::Mdev(_)) {
                    let wants =
                        if kind == "mdev" { "a UUID" } else { "a PCI address or a path; for a UUID: mdev" };
                    return Err(refuse(format!("{kind} takes {wants}")));
                }
                DevicePath::Kernel(path)
            }
            _ => return Err(refuse("the kind is unknown".into())),
        };
        let id = DeviceId::new(name).map_err(|error| refuse(error.to_string()))?;
        Ok(Self { id, path })
    }
}

/// Workload of the guest program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Bytes of RAM that it dirties each second.
    pub dirty_rate: u64,
    /// Bytes of the blocks that devices write.
    pub block_len: u32,
    /// Descriptors that it keeps in flight per device.
    pub in_flight: u32,
    /// Time between two ticks, in microseconds.
    pub tick_us: u32,
}

impl Default for Workload {
    fn default() -> Self {
        Self { dirty_rate: 50 << 20, block_len: 1024, in_flight: 16, tick_us: 1000 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_texts() {
        let device: DeviceConfig = "vfio-user:/run/a b.sock,id=net0".parse().unwrap();
        assert_eq!(device.id.as_str(), "net0");
        assert_eq!(device.path, DevicePath::VfioUser("/run/a b.sock".into()));
        let kernel = |text: &str| match text.parse::<DeviceConfig>().unwrap().path {
            DevicePath::Kernel(path) => path,
            other => panic!("{other:?}"),
        };
        let uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
        assert_eq!(kernel("vfio:0000:01:00.0,id=net0"), KernelPath::Pci("0000:01:00.0".into()));
        assert_eq!(
            kernel("vfio:/dev/vfio/devices/vfio0,id=x"),
            KernelPath::Cdev("/dev/vfio/devices/vfio0".into())
        );
        assert_eq!(kernel(&format!("mdev:{uuid},id=x")), KernelPath::Mdev(uuid.into()));
        let why = |text: &str| text.parse::<DeviceConfig>().unwrap_err().to_string();
        assert!(why(&format!("vfio:{uuid},id=x")).contains("for a UUID: mdev"));
        assert!(why("mdev:0000:01:00.0,id=x").contains("mdev takes a UUID"));
        assert!(why("usb:1,id=x").contains("kind is unknown") && why("usb:1,id=x").contains("mdev:UUID"));
        let name = DeviceId::new("device").unwrap();
        let named = |text: &str| DeviceConfig::named(text, &name).map(|device| device.id.to_string());
        assert_eq!(named("vfio-user:/x").unwrap(), "device");
        assert_eq!(named("vfio-user:/x,id=a").unwrap(), "a");
        for bad in ["vfio-user:", "vfio-user:/x,name=a", "/x"] {
            assert!(named(bad).is_err(), "{bad}");
        }
        for bad in [
            "",
            "net0",
            "vfio-user:/x",
            "vfio-user:,id=a",
            "vfio-user:/x,name=a",
            "vfio-user:/x,id=a b",
            "vfio:,id=a",
            "vfio:0000:01:00.9,id=a",
            "vfio:0000:01:00.0",
            "vfio:../../x,id=a",
            "mdev:x,id=a",
        ] {
            assert!(bad.parse::<DeviceConfig>().is_err(), "{bad}");
        }
    }
}
