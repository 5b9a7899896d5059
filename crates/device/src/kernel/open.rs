//! The ways to an open kernel device.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, Weak};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use vfio_migration_memory::GuestRam;
use vfio_migration_types::{DeviceId, error_chain};
use vfio_migration_uapi::{self as uapi, Ioas, Type1, UapiError};

use super::error::KernelError;
use super::iommu::Iommu;
use super::path::KernelPath;
use super::space::{AddressSpace, Container, DmaSpace, IommufdSpace, PageTable, SpaceMember, Spaces};
use super::sysfs::{self, SysDevice};
use crate::error::DeviceError;

/// Options for opening a kernel device. [`Default`] suits a VMM.
#[derive(Clone, Debug)]
pub struct KernelOptions {
    /// Mount point of sysfs: `/sys`.
    pub sysfs: PathBuf,
    /// Folder of device files: `/dev`.
    pub dev: PathBuf,
    /// Open by the group also where the device has a file of its own.
    pub prefer_group: bool,
    /// Leave a device that is not RUNNING as it was found, because it holds a guest's state that a journal names.
    pub keep_state: bool,
    /// Use the device's PRE_COPY, where it has one.
    pub pre_copy: bool,
    /// The address space that devices of one guest share. `None`: one of the device's own.
    pub space: Option<DmaSpace>,
    /// Token of a virtual function whose physical function has one: a UUID, in lower case. The device is then opened by
    /// its group.
    pub vf_token: Option<String>,
}

impl Default for KernelOptions {
    fn default() -> Self {
        Self {
            sysfs: "/sys".into(),
            dev: "/dev".into(),
            prefer_group: false,
            keep_state: false,
            pre_copy: true,
            space: None,
            vf_token: None,
        }
    }
}

/// The IOMMU between memory and a device whose descriptor was handed over.
#[derive(Debug)]
#[non_exhaustive]
pub enum IommuHandle {
    /// A type1 container with its IOMMU set, and the device's group, which is in it.
    Type1 {
        /// The container, an open `/dev/vfio/vfio`.
        container: OwnedFd,
        /// The group, an open `/dev/vfio/N`.
        group: OwnedFd,
    },
    /// An iommufd. The device is attached to a new address space of it.
    Iommufd {
        /// The iommufd, an open `/dev/iommu`.
        iommufd: OwnedFd,
        /// The device's id there, when it is bound already.
        bound: Option<u32>,
    },
}

/// A device that is open and attached to an address space.
#[derive(Debug)]
pub(super) struct AttachedDevice {
    pub(super) device: Arc<OwnedFd>,
    /// The group that it was opened by; `None` for a device that was opened by its own file.
    pub(super) group: Option<Arc<OwnedFd>>,
    pub(super) iommu: Iommu,
    pub(super) sys: Option<SysDevice>,
}

/// Opens the device at `path`: by its own file where the kernel has one and iommufd, by its group otherwise.
pub(super) fn open(
    id: &DeviceId,
    path: &KernelPath,
    ram: &Arc<GuestRam>,
    options: &KernelOptions,
) -> Result<AttachedDevice, DeviceError> {
    let opener = Opener { id, doing: format!("opening {path}"), options };
    let space = options.space.clone().unwrap_or_default();
    let mut spaces = space.enter(ram).ok_or_else(|| opener.failed(KernelError::OtherRam))?;
    let spaces = &mut *spaces;
    match path {
        KernelPath::Pci(address) => {
            let sys = sysfs::pci(&options.sysfs, address).map_err(|error| opener.failed(error))?;
            opener.found(spaces, sys)
        }
        KernelPath::Mdev(uuid) => {
            let sys = sysfs::mdev(&options.sysfs, uuid).map_err(|error| opener.failed(error))?;
            opener.found(spaces, sys)
        }
        KernelPath::Cdev(file) => opener.cdev(spaces, file, sysfs::cdev(&options.sysfs, file)),
        KernelPath::Group { group, name } => {
            opener.group(spaces, group, name, sysfs::named(&options.sysfs, name))
        }
    }
}

/// The entry of sysfs for the device at `path`.
pub(super) fn described(path: &KernelPath, options: &KernelOptions) -> Result<SysDevice, KernelError> {
    let unknown = || KernelError::NoDevice(format!("{path} below {}", options.sysfs.display()));
    match path {
        KernelPath::Pci(address) => sysfs::pci(&options.sysfs, address),
        KernelPath::Mdev(uuid) => sysfs::mdev(&options.sysfs, uuid),
        KernelPath::Cdev(file) => sysfs::cdev(&options.sysfs, file).ok_or_else(unknown),
        KernelPath::Group { name, .. } => sysfs::named(&options.sysfs, name).ok_or_else(unknown),
    }
}

/// Takes over a device that somebody else opened.
pub(super) fn take_over(
    id: &DeviceId,
    device: OwnedFd,
    handle: IommuHandle,
    options: &KernelOptions,
) -> Result<AttachedDevice, DeviceError> {
    let opener = Opener { id, doing: "taking over the device's descriptor".into(), options };
    let device = Arc::new(device);
    match handle {
        IommuHandle::Type1 { container, group } => {
            let container = Type1::new(container).map_err(|error| opener.refused(error))?;
            let space = AddressSpace::Type1(Arc::new(Container::new(container)));
            Ok(AttachedDevice { device, group: Some(Arc::new(group)), iommu: own(space), sys: None })
        }
        IommuHandle::Iommufd { iommufd, bound } => {
            let iommufd = Arc::new(iommufd);
            let number = opener.bind(&device, &iommufd, bound)?;
            let space = Arc::new(opener.iommufd_space(iommufd)?);
            let iommu = own(opener.attach(&device, space, number)?);
            Ok(AttachedDevice { device, group: None, iommu, sys: None })
        }
    }
}

struct Opener<'a> {
    id: &'a DeviceId,
    doing: String,
    options: &'a KernelOptions,
}

impl Opener<'_> {
    fn found(&self, spaces: &mut Spaces, sys: SysDevice) -> Result<AttachedDevice, DeviceError> {
        sys.check_driver().map_err(|error| self.failed(error))?;
        let dev = &self.options.dev;
        // By its own file it can be opened with a token only since Linux 6.17.
        if !self.options.prefer_group
            && self.options.vf_token.is_none()
            && let Some(name) = &sys.vfio
        {
            let file = dev.join("vfio/devices").join(name);
            if file.exists() && dev.join("iommu").exists() {
                return self.cdev(spaces, &file, Some(sys));
            }
        }
        let Some(number) = &sys.group else {
            return Err(self.failed(KernelError::NoGroup(sys.name)));
        };
        let group = dev.join("vfio").join(number);
        let name = sys.name.clone();
        self.group(spaces, &group, &name, Some(sys))
    }

    fn cdev(
        &self,
        spaces: &mut Spaces,
        file: &Path,
        sys: Option<SysDevice>,
    ) -> Result<AttachedDevice, DeviceError> {
        let device = Arc::new(self.file(file)?);
        let space = match spaces.iommufd.upgrade() {
            Some(space) => {
                let number = self.bind(&device, &space.ioas.iommufd(), None)?;
                self.attach(&device, space, number)?
            }
            None => {
                let iommufd = Arc::new(self.file(&self.options.dev.join("iommu"))?);
                let number = self.bind(&device, &iommufd, None)?;
                let space = Arc::new(self.iommufd_space(iommufd)?);
                let attached = self.attach(&device, space.clone(), number)?;
                spaces.iommufd = Arc::downgrade(&space);
                attached
            }
        };
        Ok(AttachedDevice { device, group: None, iommu: own(space), sys })
    }

    /// Binds the device to `iommufd` unless it is. Gives its id there.
    fn bind(
        &self,
        device: &Arc<OwnedFd>,
        iommufd: &Arc<OwnedFd>,
        bound: Option<u32>,
    ) -> Result<u32, DeviceError> {
        if let Some(number) = bound {
            return Ok(number);
        }
        uapi::bind_iommufd((**device).as_fd(), (**iommufd).as_fd()).map_err(|error| match error.errno() {
            // A device opened by its own file is opened once, and this is how the kernel says so
            // (vfio_main.c, vfio_df_open).
            Some(errno @ Errno::INVAL) => {
                let error = KernelError::Refused { remedy: KernelError::remedy(Errno::BUSY), source: error };
                DeviceError::new(self.id.clone(), self.doing.clone(), Some(errno), error)
            }
            _ => self.refused(error),
        })
    }

    fn iommufd_space(&self, iommufd: Arc<OwnedFd>) -> Result<IommufdSpace, DeviceError> {
        let ioas = Ioas::new(iommufd).map_err(|error| self.refused(error))?;
        Ok(IommufdSpace::new(Arc::new(ioas)))
    }

    /// Attaches the device to an address space, by a page table that tracks dirty pages if the IOMMU can: that has to be
    /// asked for now. One that another device has is taken where this device's IOMMU takes it.
    fn attach(
        &self,
        device: &Arc<OwnedFd>,
        space: Arc<IommufdSpace>,
        number: u32,
    ) -> Result<AddressSpace, DeviceError> {
        let fd = (**device).as_fd();
        if let Err(why) = can_track(&space.ioas, number) {
            uapi::attach(fd, space.ioas.id()).map_err(|error| self.refused(error))?;
            return Ok(AddressSpace::Iommufd { space, table: Err(why) });
        }
        let mut tables = space.tables.lock().unwrap_or_else(PoisonError::into_inner);
        tables.retain(|table| table.strong_count() > 0);
        let mut there = tables.iter().filter_map(Weak::upgrade);
        let table = match there.find(|table| uapi::attach(fd, table.id).is_ok()) {
            Some(table) => Ok(table),
            None => tracking_table(&space.ioas, number)
                .map(|id| Arc::new(PageTable::new(space.ioas.iommufd(), id)))
                .and_then(|table| match uapi::attach(fd, table.id) {
                    Ok(_) => {
                        tables.push(Arc::downgrade(&table));
                        Ok(table)
                    }
                    Err(error) => Err(error_chain(&error)),
                }),
        };
        drop(tables);
        if table.is_err() {
            uapi::attach(fd, space.ioas.id()).map_err(|error| self.refused(error))?;
        }
        Ok(AddressSpace::Iommufd { space, table })
    }

    fn group(
        &self,
        spaces: &mut Spaces,
        file: &Path,
        name: &str,
        sys: Option<SysDevice>,
    ) -> Result<AttachedDevice, DeviceError> {
        let containers: Vec<Arc<Container>> = spaces.containers.iter().filter_map(Weak::upgrade).collect();
        let known = containers.iter().find_map(|container| Some((container.clone(), container.group(file)?)));
        let (container, group) = match known {
            Some(known) => known,
            None => {
                let group = Arc::new(self.file(file)?);
                let status = uapi::group_status((*group).as_fd()).map_err(|error| self.refused(error))?;
                if !status.viable {
                    let number = file.file_name().map(|name| name.to_string_lossy().into_owned());
                    return Err(self.failed(KernelError::NotViable(number.unwrap_or_default())));
                }
                // The first that takes it: a group whose IOMMU cannot be behind one has one of its own.
                let takes = |container: &&Arc<Container>| {
                    uapi::set_container((*group).as_fd(), &container.type1).is_ok()
                };
                let container = match containers.iter().find(takes) {
                    Some(container) => container.clone(),
                    None => {
                        let container = Arc::new(self.container(&group)?);
                        spaces.containers.push(Arc::downgrade(&container));
                        container
                    }
                };
                container.keep(file.into(), &group);
                (container, group)
            }
        };
        // The form in which vfio-pci takes a token (`vfio_pci_core_match`).
        let text = match &self.options.vf_token {
            Some(token) => format!("{name} vf_token={token}"),
            None => name.into(),
        };
        let text = CString::new(text).map_err(|_| self.failed(KernelError::Path(name.into())))?;
        let device = uapi::group_device((*group).as_fd(), &text).map_err(|error| match error.errno() {
            Some(Errno::NODEV) => {
                self.failed(KernelError::NoDevice(format!("device {name} in {}", file.display())))
            }
            _ => self.refused(error),
        })?;
        let iommu = own(AddressSpace::Type1(container));
        Ok(AttachedDevice { device: Arc::new(device), group: Some(group), iommu, sys })
    }

    /// A container with `group` in it, and its IOMMU set.
    fn container(&self, group: &Arc<OwnedFd>) -> Result<Container, DeviceError> {
        let container = self.file(&self.options.dev.join("vfio/vfio"))?;
        let container = Type1::new(container).map_err(|error| self.refused(error))?;
        if !container.has_type1v2().map_err(|error| self.refused(error))? {
            return Err(self.failed(KernelError::NoType1));
        }
        uapi::set_container((**group).as_fd(), &container).map_err(|error| self.refused(error))?;
        container.set_iommu().map_err(|error| self.refused(error))?;
        Ok(Container::new(container))
    }

    fn file(&self, path: &Path) -> Result<OwnedFd, DeviceError> {
        rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|errno| {
            let error = KernelError::open(PathBuf::from(path), errno);
            DeviceError::new(self.id.clone(), self.doing.clone(), Some(errno), error)
        })
    }

    fn failed(&self, error: KernelError) -> DeviceError {
        DeviceError::new(self.id.clone(), self.doing.clone(), None, error)
    }

    fn refused(&self, error: UapiError) -> DeviceError {
        let errno = error.errno();
        match errno {
            Some(errno @ (Errno::BUSY | Errno::PERM | Errno::ACCESS | Errno::NOMEM)) => {
                let error = KernelError::Refused { remedy: KernelError::remedy(errno), source: error };
                DeviceError::new(self.id.clone(), self.doing.clone(), Some(errno), error)
            }
            _ => DeviceError::new(self.id.clone(), self.doing.clone(), errno, error),
        }
    }
}

fn own(space: AddressSpace) -> Iommu {
    Iommu::Own(SpaceMember::new(space))
}

/// A page table that tracks dirty pages for the device `number`, or why there is none.
pub(super) fn tracking_table(space: &Ioas, number: u32) -> Result<u32, String> {
    can_track(space, number)?;
    space.make_tracking_table(number).map_err(|error| error_chain(&error))
}

/// Whether the IOMMU before the device `number` tracks dirty pages, or why not.
fn can_track(space: &Ioas, number: u32) -> Result<(), String> {
    match uapi::hw_info(space.fd(), number) {
        Ok(info) if info.dirty_tracking => Ok(()),
        Ok(_) => Err("the IOMMU does not track dirty pages".into()),
        Err(error) if matches!(error.errno(), Some(Errno::NOENT | Errno::OPNOTSUPP)) => {
            Err("no IOMMU stands before the device".into())
        }
        Err(error) => Err(error_chain(&error)),
    }
}
