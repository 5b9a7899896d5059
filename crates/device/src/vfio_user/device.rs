//! An open vfio-user device: the connection, and what was asked of the server as it was opened.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use vfio_migration_memory::{DirtySource, GuestRam};
use vfio_migration_types::{DeviceId, MigrationFlags, Range, error_chain};
use vfio_user_peer::{Client, ClientError, ClientOptions, OnConnect, irq_index};

use super::dirty::ServerLog;
use super::dma::GuestDma;
use super::port::ServerPort;
use super::states::shared_flags;
use crate::contract::NotMigratable;
use crate::error::DeviceError;
use crate::hardware::{PciRegion, RegionIndex};
use crate::reset_callback::ResetCallback;
use crate::session::state_machine::StateMachine;

/// Most regions that a server may have. A PCI function has nine; a server may add its own.
const REGIONS_MAX: u32 = 64;
/// Most mappable areas of all its regions: each is a mapping of this process, and a memory slot of KVM's.
const MMAP_AREAS_MAX: usize = 256;

/// Options for opening a vfio-user device. [`Default`] suits a VMM.
#[derive(Clone, Debug)]
pub struct VfioUserOptions {
    /// Limit on each request. 10 s.
    pub timeout: Duration,
    /// The same for each change of the migration state and for a reset. 30 s.
    pub transition_timeout: Duration,
    /// Limit on opening it, which is many requests. A minute.
    pub open_timeout: Duration,
    /// Longest wait for the server to come up. 5 s.
    pub connect_timeout: Duration,
    /// Keep guest memory's descriptor back, so that the server asks for each access (DMA_READ, DMA_WRITE). Slow; for
    /// servers that are not to map guest RAM. Such accesses are logged here.
    pub message_dma: bool,
    /// The device holds a guest's state that a journal names: leave it as it is.
    pub keep_state: bool,
    /// Use the device's PRE_COPY, where it has one. Without it, its state is read while it is stopped.
    pub pre_copy: bool,
}

impl Default for VfioUserOptions {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(10),
            transition_timeout: Duration::from_secs(30),
            open_timeout: Duration::from_secs(60),
            connect_timeout: Duration::from_secs(5),
            message_dma: false,
            keep_state: false,
            pre_copy: true,
        }
    }
}

/// A device served over vfio-user. Cheap to clone: clones are the same connection.
#[derive(Clone, Debug)]
pub struct VfioUserDevice {
    pub(super) inner: Arc<ServedDevice>,
}

/// A connection, and whose it is.
#[derive(Debug)]
pub(super) struct Connected {
    pub(super) client: Arc<Client>,
    pub(super) dma: Arc<GuestDma>,
    /// The VMM's own reset, of a device that it runs itself.
    pub(super) reset: Option<ResetCallback>,
}

#[derive(Debug)]
pub(super) struct ServedDevice {
    pub(super) id: DeviceId,
    pub(super) client: Arc<Client>,
    pub(super) flags: Result<MigrationFlags, NotMigratable>,
    pub(super) machine: Arc<StateMachine>,
    pub(super) dma: Arc<GuestDma>,
    pub(super) message_dma: bool,
    /// The VMM runs it: the connection is the VMM's, and so are its DMA mappings.
    pub(super) run_by_vmm: bool,
    /// Limits on its answers: to a change of state, and to anything else.
    pub(super) limits: (Duration, Duration),
    pub(super) regions: Vec<PciRegion>,
    pub(super) files: Vec<Option<(Arc<OwnedFd>, u64)>>,
    pub(super) irqs: [u32; 3],
    pub(super) noresize: [bool; 3],
    pub(super) log: ServerLog,
}

impl VfioUserDevice {
    /// Connects to the server at `socket`. The server's DMA goes to `ram`, at bus addresses that equal guest addresses.
    ///
    /// A device that a former client left stopped is set running again (with nothing enabled, and after a reset), unless
    /// [`VfioUserOptions::keep_state`] says otherwise.
    ///
    /// # Errors
    /// Nobody listens, it is no vfio-user server, or no PCI device.
    pub fn open(
        id: DeviceId,
        socket: impl AsRef<Path>,
        ram: Arc<GuestRam>,
        options: &VfioUserOptions,
    ) -> Result<Self, DeviceError> {
        let socket = socket.as_ref();
        let dma = Arc::new(GuestDma::new(&id, ram));
        let client_options = ClientOptions {
            timeout: options.timeout,
            transition_timeout: options.transition_timeout,
            limit_all: Some(options.open_timeout),
            connect_timeout: options.connect_timeout,
            dma: Some(dma.clone()),
            on_connect: if options.keep_state { OnConnect::Leave } else { OnConnect::Recover },
            ..ClientOptions::default()
        };
        let failed = |doing: String| {
            let id = id.clone();
            move |error: ClientError| DeviceError::new(id, doing, error.errno(), error)
        };
        let client = Client::connect(socket, client_options)
            .map_err(failed(format!("connecting to {}", socket.display())))?;
        let connected = Connected { client: Arc::new(client), dma, reset: None };
        let limits = (options.transition_timeout, options.timeout);
        let device = Self::of(id, connected, options.pre_copy, options.message_dma, limits)?;
        device.inner.client.limit_all(None);
        Ok(device)
    }

    /// Asks the server what its device is made of.
    pub(super) fn of(
        id: DeviceId,
        connected: Connected,
        pre_copy: bool,
        message_dma: bool,
        limits: (Duration, Duration),
    ) -> Result<Self, DeviceError> {
        let Connected { client, dma, reset } = connected;
        let failed = |doing: &'static str| {
            let id = id.clone();
            move |error: ClientError| DeviceError::new(id, doing, error.errno(), error)
        };
        let info = client.device_info().map_err(failed("asking for device info"))?;
        if !info.pci || info.num_regions > REGIONS_MAX {
            let what = format!("it is no PCI device (flags say so), or has {} regions", info.num_regions);
            return Err(DeviceError::new(id, "opening", None, what));
        }
        let flags = find_flags(&client).map_err(failed("asking whether it can migrate"))?;
        let flags = flags.map(|flags| MigrationFlags { pre_copy: flags.pre_copy && pre_copy, ..flags });
        let known = flags.as_ref().ok().copied();
        let run_by_vmm = reset.is_some();
        let port = ServerPort { client: client.clone(), reset };
        let machine = StateMachine::new(id.clone(), Box::new(port), known);
        let mut inner = ServedDevice {
            log: ServerLog::new(id.clone(), client.clone(), dma.clone()),
            message_dma,
            run_by_vmm,
            limits,
            regions: Vec::new(),
            files: Vec::new(),
            irqs: [0; 3],
            noresize: [false; 3],
            machine: Arc::new(machine),
            dma,
            client,
            flags,
            id,
        };
        for index in 0..info.num_regions {
            inner.add_region(index)?;
        }
        for index in
            [irq_index::INTX, irq_index::MSI, irq_index::MSIX].into_iter().filter(|n| *n < info.num_irqs)
        {
            let irqs =
                inner.client.irq_info(index).map_err(|error| inner.failed("asking for interrupts", error))?;
            if let Some((count, noresize)) =
                inner.irqs.get_mut(index as usize).zip(inner.noresize.get_mut(index as usize))
            {
                *count = irqs.count;
                *noresize = irqs.noresize;
            }
        }
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Gives all that it is asked from now on so long together; `None`: each request has its own limit, and no more. For who asks
    /// something that is many requests, and closes it then.
    pub fn limit_all(&self, limit: Option<Duration>) {
        self.inner.client.limit_all(limit);
    }

    /// Whether the connection still works, as far as is known. Notices a server that hung up while nothing is asked of
    /// it; asks it nothing.
    pub fn is_alive(&self) -> bool {
        self.inner.client.is_alive()
    }

    /// Why the connection no longer works; `None` while it does, as far as is known.
    pub fn lost(&self) -> Option<String> {
        self.inner.client.lost()
    }
}

impl Drop for ServedDevice {
    /// The end of the connection ends the server's log, but the VMM's connection goes on.
    fn drop(&mut self) {
        if self.run_by_vmm
            && let Err(error) = self.log.stop()
        {
            tracing::warn!(device = %self.id, error = %error_chain(&error), "its dirty log was not stopped as it went");
        }
    }
}

impl ServedDevice {
    /// Asks for a region and keeps what it is like.
    fn add_region(&mut self, index: u32) -> Result<(), DeviceError> {
        let asked = self.client.region_info(index);
        let info = asked.map_err(|error| self.failed(format!("asking for region {index}"), error))?;
        if info.size == 0 {
            return Ok(());
        }
        let refuse = |what: String| {
            DeviceError::new(self.id.clone(), format!("asking for region {index}"), None, what)
        };
        let mut mappable = Vec::new();
        for area in info.mmap_areas() {
            let inside = area.offset.checked_add(area.size).is_some_and(|end| end <= info.size);
            let range = Range::new(area.offset, area.size).ok().filter(|_| inside);
            mappable.push(range.ok_or_else(|| {
                let (start, len) = (area.offset, area.size);
                refuse(format!("mappable area {start:#x}+{len:#x} of {:#x} bytes", info.size))
            })?);
        }
        // Sorted, areas that overlap are neighbours.
        mappable.sort_by_key(|area: &Range<u64>| area.start());
        if let Some(pair) = mappable.windows(2).find(|pair| pair[0].overlaps(&pair[1])) {
            return Err(refuse(format!("mappable areas that overlap at {:#x}", pair[1].start())));
        }
        let before: usize = self.regions.iter().map(|region| region.mappable.len()).sum();
        if before + mappable.len() > MMAP_AREAS_MAX {
            let in_all = before + mappable.len();
            return Err(refuse(format!(
                "{in_all} mappable areas of one device, where {MMAP_AREAS_MAX} are the most"
            )));
        }
        if info.fd.is_none() {
            mappable.clear();
        }
        self.files.push(info.fd.map(|fd| (fd, info.offset)));
        self.regions.push(PciRegion {
            index: RegionIndex(index),
            size: info.size,
            readable: info.read,
            writable: info.write,
            mappable,
        });
        Ok(())
    }

    /// `doing` failed by `error`.
    pub(super) fn failed(&self, doing: impl Into<String>, error: ClientError) -> DeviceError {
        DeviceError::new(self.id.clone(), doing, error.errno(), error)
    }
}

/// The device's migration flags, or its server's word that it has none.
///
/// # Errors
/// The server has not answered.
fn find_flags(client: &Client) -> Result<Result<MigrationFlags, NotMigratable>, ClientError> {
    match client.migration_flags() {
        Ok(flags) => Ok(flags
            .map(shared_flags)
            .ok_or_else(|| NotMigratable("its server does not implement migration".into()))),
        Err(nonsense @ ClientError::Protocol { .. }) => {
            Ok(Err(NotMigratable(format!("its server does not say whether it can: {nonsense}"))))
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use vfio_migration_memory::RamSpec;
    use vfio_migration_types::{Gpa, PAGE_SIZE};
    use vfio_user_peer::{
        Backend, DeviceInfo, DmaMapping, Errno, IrqInfo, IrqRequest, MmapArea, RegionInfo, Server,
        StopHandle, region_index,
    };

    use super::*;

    /// A device whose regions have so many mappable areas each, one behind the other, or all at one place.
    struct Areas(u64, bool, Arc<OwnedFd>);

    impl Backend for Areas {
        fn device_info(&self) -> DeviceInfo {
            DeviceInfo { resettable: false, pci: true, num_regions: region_index::COUNT, num_irqs: 0 }
        }

        fn region_info(&self, _index: u32) -> Result<RegionInfo, Errno> {
            let place = |n: u64| if self.1 { 0 } else { n << 13 };
            // From the last to the first: the order is nobody's promise.
            let areas = (0..self.0).rev().map(|n| MmapArea { offset: place(n), size: 4096 }).collect();
            let (size, fd) = (1 << 20, Some(Arc::clone(&self.2)));
            Ok(RegionInfo { size, read: true, write: true, mmap: true, areas, offset: 0, fd })
        }

        fn irq_info(&self, _index: u32) -> Result<IrqInfo, Errno> {
            Err(Errno::INVAL)
        }

        fn region_read(&self, _index: u32, _offset: u64, _into: &mut [u8]) -> Result<(), Errno> {
            Ok(())
        }

        fn region_write(&self, _index: u32, _offset: u64, _from: &[u8]) -> Result<(), Errno> {
            Ok(())
        }

        fn set_irqs(&self, _request: IrqRequest) -> Result<(), Errno> {
            Ok(())
        }

        fn dma_map(&self, _mapping: DmaMapping) -> Result<(), Errno> {
            Ok(())
        }

        fn dma_unmap(&self, _iova: u64, _len: u64) -> Result<(), Errno> {
            Ok(())
        }
    }

    fn open(areas: u64, overlap: bool) -> Result<usize, DeviceError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("areas.sock");
        let server = Server::bind(&path).unwrap();
        let file = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        let (backend, stop) = (Areas(areas, overlap, Arc::new(file)), StopHandle::new().unwrap());
        let ram = GuestRam::new("areas", &[RamSpec { gpa: Gpa(0), len: PAGE_SIZE }]).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| server.serve(&backend, &stop).unwrap());
            let options = VfioUserOptions::default();
            let device = VfioUserDevice::open("net0".parse().unwrap(), &path, Arc::new(ram), &options);
            let areas = device.map(|device| device.inner.regions.iter().map(|it| it.mappable.len()).sum());
            stop.stop();
            areas
        })
    }

    #[test]
    fn mappable_areas_are_counted_and_do_not_overlap() {
        assert_eq!(open(28, false).unwrap(), 28 * 9);
        let refused = |areas, overlap, says: &str| {
            let error = vfio_migration_types::error_chain(&open(areas, overlap).unwrap_err());
            assert!(error.contains(says), "{error}");
        };
        refused(29, false, "261 mappable areas of one device, where 256 are the most");
        refused(2, true, "overlap at 0x0");
        refused(65, false, "asking for region 0");
    }
}
