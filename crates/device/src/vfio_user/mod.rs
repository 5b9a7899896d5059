//! The vfio-user back end: a device that another process emulates.
//!
//! What the protocol lacks (P2P, pre-copy progress, a size estimate, a manifest) is there when the server speaks the
//! `x-vfio-migrate` extension, and absent, not guessed, when it does not.

mod dirty;
mod dma;
mod hardware;
mod manifest;
mod migrate;
mod port;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use vfio_migration_memory::GuestRam;
use vfio_migration_types::{DeviceId, MigrationFlags};
use vfio_user_peer::{Client, ClientError, ClientOptions, OnConnect, irq_index};

use self::dirty::ServerLog;
use self::dma::GuestDma;
use self::port::ServerPort;
use crate::contract::{Capabilities, NotMigratable};
use crate::error::DeviceError;
use crate::hardware::PciRegion;
use crate::session::StateMachine;

/// Most regions that a server may have. A PCI function has nine; a server may add its own.
const REGIONS_MAX: u32 = 64;

/// How a vfio-user device is opened. [`Default`] suits a VMM.
#[derive(Clone, Debug)]
pub struct VfioUserOptions {
    /// Limit on each request. A state transition must fit into it. 10 s.
    pub timeout: Duration,
    /// How long to wait for the server to come up. 5 s.
    pub connect_timeout: Duration,
    /// Keep guest memory's descriptor back, so that the server asks for each access (DMA_READ, DMA_WRITE). Slow; for
    /// servers that are not to map guest RAM. Such accesses are logged here.
    pub message_dma: bool,
    /// The device holds a guest's state that a journal names: leave it as it is.
    pub keep_state: bool,
}

impl Default for VfioUserOptions {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(5),
            message_dma: false,
            keep_state: false,
        }
    }
}

/// A device served over vfio-user. Cheap to clone: clones are the same connection.
#[derive(Clone, Debug)]
pub struct VfioUserDevice {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    id: DeviceId,
    client: Arc<Client>,
    flags: Result<MigrationFlags, NotMigratable>,
    machine: Arc<StateMachine>,
    dma: Arc<GuestDma>,
    message_dma: bool,
    regions: Vec<PciRegion>,
    files: Vec<Option<(Arc<OwnedFd>, u64)>>,
    irqs: [u32; 3],
    log: ServerLog,
    capabilities: OnceLock<Result<Capabilities, NotMigratable>>,
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
        let flags = migrate::find_flags(&id, &client);
        let known = flags.as_ref().ok().copied();
        let machine = StateMachine::new(id.clone(), Box::new(ServerPort(client.clone())), known);
        let mut inner = Inner {
            log: ServerLog::default(),
            message_dma: options.message_dma,
            regions: Vec::new(),
            files: Vec::new(),
            irqs: [0; 3],
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
            if let Some(count) = inner.irqs.get_mut(index as usize) {
                // The specification allows 2048 MSI-X vectors; more is a lie that would be allocated for.
                *count = irqs.count.min(2048);
            }
        }
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Whether the connection still works, as far as is known. Notices a server that hung up while nothing is asked of
    /// it; asks it nothing.
    pub fn is_alive(&self) -> bool {
        self.inner.client.is_alive()
    }
}

impl Inner {
    /// `doing` failed by `error`.
    fn failed(&self, doing: impl Into<String>, error: ClientError) -> DeviceError {
        DeviceError::new(self.id.clone(), doing, error.errno(), error)
    }
}
