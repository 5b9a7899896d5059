//! An open vfio-user device: the connection, and what was asked of the server as it was opened.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use vfio_migration_memory::GuestRam;
use vfio_migration_types::{DeviceId, MigrationFlags, Range};
use vfio_user_peer::{Client, ClientError, ClientOptions, OnConnect, irq_index};

use super::dirty::ServerLog;
use super::dma::GuestDma;
use super::port::ServerPort;
use crate::contract::{Capabilities, NotMigratable};
use crate::error::DeviceError;
use crate::hardware::{PciRegion, RegionIndex};
use crate::session::state_machine::StateMachine;

/// Most regions that a server may have. A PCI function has nine; a server may add its own.
const REGIONS_MAX: u32 = 64;

/// Options for opening a vfio-user device. [`Default`] suits a VMM.
#[derive(Clone, Debug)]
pub struct VfioUserOptions {
    /// Limit on each request. A state transition must fit into it. 10 s.
    pub timeout: Duration,
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

#[derive(Debug)]
pub(super) struct ServedDevice {
    pub(super) id: DeviceId,
    pub(super) client: Arc<Client>,
    pub(super) flags: Result<MigrationFlags, NotMigratable>,
    pub(super) machine: Arc<StateMachine>,
    pub(super) dma: Arc<GuestDma>,
    pub(super) message_dma: bool,
    pub(super) regions: Vec<PciRegion>,
    pub(super) files: Vec<Option<(Arc<OwnedFd>, u64)>>,
    pub(super) irqs: [u32; 3],
    pub(super) noresize: [bool; 3],
    pub(super) log: ServerLog,
    pub(super) capabilities: OnceLock<Result<Capabilities, NotMigratable>>,
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
        let info = client.device_info().map_err(failed("asking for device info".into()))?;
        if !info.pci || info.num_regions > REGIONS_MAX {
            let what = format!("it is no PCI device (flags say so), or has {} regions", info.num_regions);
            return Err(DeviceError::new(id, "opening", None, what));
        }
        let client = Arc::new(client);
        let flags = find_flags(&client)
            .map(|flags| MigrationFlags { pre_copy: flags.pre_copy && options.pre_copy, ..flags });
        let known = flags.as_ref().ok().copied();
        let machine = StateMachine::new(id.clone(), Box::new(ServerPort(client.clone())), known);
        let mut inner = ServedDevice {
            log: ServerLog::new(id.clone(), client.clone(), dma.clone()),
            message_dma: options.message_dma,
            regions: Vec::new(),
            files: Vec::new(),
            irqs: [0; 3],
            noresize: [false; 3],
            capabilities: OnceLock::new(),
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
                // The specification allows 2048 MSI-X vectors; more is a lie that would be allocated for.
                *count = irqs.count.min(2048);
                *noresize = irqs.noresize;
            }
        }
        Ok(Self { inner: Arc::new(inner) })
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

impl ServedDevice {
    /// Asks for a region and keeps what it is like.
    fn add_region(&mut self, index: u32) -> Result<(), DeviceError> {
        let asked = self.client.region_info(index);
        let info = asked.map_err(|error| self.failed(format!("asking for region {index}"), error))?;
        if info.size == 0 {
            return Ok(());
        }
        let mut mappable = Vec::new();
        for area in info.mmap_areas() {
            let inside = area.offset.checked_add(area.size).is_some_and(|end| end <= info.size);
            match Range::new(area.offset, area.size) {
                Ok(range) if inside && !mappable.iter().any(|other: &Range<u64>| other.overlaps(&range)) => {
                    mappable.push(range);
                }
                _ => {
                    let what = format!(
                        "mappable area {:#x}+{:#x} of {:#x} bytes",
                        area.offset, area.size, info.size
                    );
                    return Err(DeviceError::new(
                        self.id.clone(),
                        format!("asking for region {index}"),
                        None,
                        what,
                    ));
                }
            }
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

/// The device's migration flags, or the reason why it has none.
fn find_flags(client: &Client) -> Result<MigrationFlags, NotMigratable> {
    client
        .migration_flags()
        .map_err(|error| NotMigratable(format!("its server does not say whether it can: {error}")))?
        .ok_or_else(|| NotMigratable("its server does not implement migration".into()))
}
