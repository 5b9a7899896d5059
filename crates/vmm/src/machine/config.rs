//! What to build.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use vfio_migration::unix_address;
use vfio_migration_device::{KernelError, KernelPath};
use vfio_migration_types::{DeviceId, VmId};

use vfio_migration_pci::PciBus;

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
    /// Devices; those that ask for no slot get, in this order, the slots that are free.
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
    /// Its slot on the guest's PCI bus; `None` for the first that is free.
    pub slot: Option<u8>,
    /// Whether its PRE_COPY is used where it has one.
    pub pre_copy: bool,
    /// Longest wait for a change of its migration state or its reset, for vfio-user; `None` for 30 s.
    pub timeout: Option<Duration>,
    /// The token of a virtual function whose physical function has one, for vfio-pci: a UUID in lower case.
    pub vf_token: Option<String>,
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
     mdev:UUID,id=NAME, and behind it ,pre-copy=on|off ,slot=N or, for vfio-user, ,timeout=30s, for vfio, ,vf-token=UUID)"
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
    /// The device at `path`, with no option set.
    pub fn new(id: DeviceId, path: DevicePath) -> Self {
        Self { id, path, slot: None, pre_copy: true, timeout: None, vf_token: None }
    }

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
        let (place, options) = rest.split_once(',').unwrap_or((rest, ""));
        let path = match kind {
            "vfio-user" if place.is_empty() => return Err(refuse("the socket's path is empty".into())),
            "vfio-user" => {
                let path = PathBuf::from(place);
                unix_address(&path).map_err(|error| refuse(error.to_string()))?;
                DevicePath::VfioUser(path)
            }
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
        let options = Options::parse(options).map_err(refuse)?;
        let id = match (options.id, otherwise) {
            (Some(id), _) => DeviceId::new(id).map_err(|error| refuse(error.to_string()))?,
            (None, Some(name)) => name.clone(),
            (None, None) => return Err(refuse("it has no id".into())),
        };
        if options.slot.is_some() && otherwise.is_some() {
            return Err(refuse("a device without a guest has no slot".into()));
        }
        let pci = matches!(&path, DevicePath::Kernel(KernelPath::Pci(_) | KernelPath::Group { .. }));
        if options.vf_token.is_some() && !pci {
            return Err(refuse("vf-token is for a PCI function, by its address".into()));
        }
        if options.timeout.is_some() && !matches!(path, DevicePath::VfioUser(_)) {
            return Err(refuse("timeout is for vfio-user: nothing ends a wait for a driver".into()));
        }
        let Options { slot, pre_copy, timeout, vf_token, .. } = options;
        Ok(Self { id, path, slot, pre_copy: pre_copy.unwrap_or(true), timeout, vf_token })
    }
}

/// The longest `timeout` of a device, in seconds.
const TIMEOUT_MAX: u64 = 3600;

/// What follows a device's place, each at most once and in any order.
#[derive(Default)]
struct Options<'a> {
    id: Option<&'a str>,
    slot: Option<u8>,
    pre_copy: Option<bool>,
    timeout: Option<Duration>,
    vf_token: Option<String>,
}

impl<'a> Options<'a> {
    fn parse(text: &'a str) -> Result<Self, String> {
        let mut options = Self::default();
        for option in text.split(',').filter(|_| !text.is_empty()) {
            let (name, value) =
                option.split_once('=').ok_or_else(|| format!("'{option}' is no NAME=VALUE"))?;
            let before = match name {
                "id" => options.id.replace(value).is_some(),
                "slot" => {
                    let slot = value.parse().ok().filter(|slot| (1..=PciBus::SLOTS).contains(slot));
                    let slot = slot.ok_or_else(|| format!("slot={value} is not 1 to {}", PciBus::SLOTS))?;
                    options.slot.replace(slot).is_some()
                }
                "pre-copy" => {
                    let on = match value {
                        "on" => true,
                        "off" => false,
                        _ => return Err(format!("pre-copy={value} is neither on nor off")),
                    };
                    options.pre_copy.replace(on).is_some()
                }
                "timeout" => {
                    let seconds = value.strip_suffix('s').and_then(|seconds| seconds.parse().ok());
                    let seconds = seconds.filter(|seconds| (1..=TIMEOUT_MAX).contains(seconds));
                    let seconds =
                        seconds.ok_or_else(|| format!("timeout={value} is not 1s to {TIMEOUT_MAX}s"))?;
                    options.timeout.replace(Duration::from_secs(seconds)).is_some()
                }
                "vf-token" => {
                    let token: VmId = value.parse().map_err(|_| format!("vf-token={value} is no UUID"))?;
                    options.vf_token.replace(token.to_string()).is_some()
                }
                _ => return Err(format!("there is no option {name}")),
            };
            if before {
                return Err(format!("{name} is there twice"));
            }
        }
        Ok(options)
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
        let all = "vfio:0000:01:00.0,slot=4,vf-token=83B8F4F2-509f-382f-3c1e-e6bfe0fa1001,pre-copy=off,id=a";
        let all: DeviceConfig = all.parse().unwrap();
        assert_eq!((all.slot, all.pre_copy, all.id.as_str()), (Some(4), false, "a"));
        assert_eq!(all.vf_token.as_deref(), Some(uuid));
        let plain: DeviceConfig = "vfio-user:/x,id=a".parse().unwrap();
        assert_eq!((plain.slot, plain.pre_copy, plain.vf_token), (None, true, None));
        assert!(!DeviceConfig::named("vfio-user:/x,pre-copy=off", &name).unwrap().pre_copy);
        let patient: DeviceConfig = "vfio-user:/x,timeout=90s,id=a".parse().unwrap();
        assert_eq!(patient.timeout, Some(Duration::from_secs(90)));
        assert!(why("mdev:83b8f4f2-509f-382f-3c1e-e6bfe0fa1001,id=a,timeout=9s").contains("for vfio-user"));
        assert!(named("vfio-user:/x,slot=1").is_err(), "there is no bus");
        assert!(why("vfio-user:/x,id=a,addr=5").contains("no option addr"));
        for bad in [
            "",
            "net0",
            "vfio-user:/x,id=a,",
            "vfio-user:/x,id=a,id=b",
            "vfio-user:/x,id=a,slot=0",
            "vfio-user:/x,id=a,slot=32",
            "vfio-user:/x,id=a,slot=+4,slot=5",
            "vfio-user:/x,id=a,pre-copy=no",
            "vfio-user:/x,id=a,pre-copy",
            "vfio-user:/x,id=a,timeout=30",
            "vfio-user:/x,id=a,timeout=0s",
            "vfio-user:/x,id=a,timeout=3601s",
            "vfio-user:/x,id=a,vf-token=83b8f4f2-509f-382f-3c1e-e6bfe0fa1001",
            "vfio:0000:01:00.0,id=a,vf-token=secret",
            "vfio:/dev/vfio/devices/vfio0,id=a,vf-token=83b8f4f2-509f-382f-3c1e-e6bfe0fa1001",
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
