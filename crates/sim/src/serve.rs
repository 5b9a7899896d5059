//! The device on a vfio-user socket.

use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex};

use rustix::io::Errno;
use vfio_migration_guest_driver::registers::{VECTORS, offset};
use vfio_migration_types::error_chain;
use vfio_user_peer::{
    Backend, DeviceInfo, DmaChannel, DmaMapping, Extension, IoFd, IoFdKind, IovaRange, IrqAction, IrqInfo,
    IrqRequest, IrqRequestData, MigrationFlags, MigrationState, MmapArea, PrecopyInfo, RegionInfo, Server,
    ServerError, ServerEvent, StopHandle,
};

use crate::device::SampleDevice;
use crate::dma::{DmaTarget, MessageDma};
use crate::error::SimError;
use crate::migrate::StateRead;
use crate::options::Options;
use crate::pci::{self, irq, region};
use crate::shared::lock;

/// Serves a fresh device on `path`, to one client after the other, until `stop` is used. What a client did to the
/// device, its migration state too, stays for the next; its mappings and eventfds go with it.
///
/// A scripted death kills the process.
///
/// # Errors
/// The device cannot be made, or the socket fails.
pub fn serve(path: impl AsRef<Path>, options: Options, stop: &StopHandle) -> Result<(), ServeError> {
    // Listening comes first: a client of a device with much state finds the socket, and waits for its greeting.
    options.check()?;
    let server = Server::bind(path)?;
    let device = SampleDevice::new(options)?;
    device.hangs_until(stop);
    let backend = SampleBackend::new(Arc::new(device));
    server.serve(&backend, stop)?;
    Ok(())
}

/// The reason for which a device is not (or no longer) served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The device cannot be made.
    #[error("the sample device cannot be made")]
    Device(#[from] SimError),
    /// The socket could not be made, or failed.
    #[error("the sample device cannot be served")]
    Server(#[from] ServerError),
}

/// A [`SampleDevice`] as a vfio-user server's back end.
pub struct SampleBackend {
    device: Arc<SampleDevice>,
    channel: Mutex<Option<DmaChannel>>,
    die: Box<dyn Fn() + Send + Sync>,
}

impl SampleBackend {
    /// Serves `device`. A scripted death kills the process, as a crash would.
    pub fn new(device: Arc<SampleDevice>) -> Self {
        Self::with_death(device, || {
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        })
    }

    /// Serves `device`; a scripted death calls `die`, and is then answered with EIO.
    pub fn with_death(device: Arc<SampleDevice>, die: impl Fn() + Send + Sync + 'static) -> Self {
        Self { device, channel: Mutex::default(), die: Box::new(die) }
    }

    /// The device behind it.
    pub fn device(&self) -> &Arc<SampleDevice> {
        &self.device
    }

    fn answer<T>(&self, result: Result<T, SimError>) -> Result<T, Errno> {
        result.map_err(|error| {
            tracing::info!("refused: {}", error_chain(&error));
            if error.is_death() {
                (self.die)();
            }
            error.errno()
        })
    }

    fn vector(start: u32, n: usize) -> Result<usize, Errno> {
        let start = usize::try_from(start).map_err(|_| Errno::INVAL)?;
        start.checked_add(n).filter(|vector| *vector < VECTORS).ok_or(Errno::INVAL)
    }
}

impl fmt::Debug for SampleBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SampleBackend").field("device", &self.device).finish_non_exhaustive()
    }
}

impl Backend for SampleBackend {
    fn device_info(&self) -> DeviceInfo {
        DeviceInfo { resettable: true, pci: true, num_regions: region::COUNT, num_irqs: irq::COUNT }
    }

    fn region_info(&self, index: u32) -> Result<RegionInfo, Errno> {
        let size = pci::region_size(index);
        let mut info = RegionInfo { size, read: size > 0, write: size > 0, ..RegionInfo::default() };
        if index == region::BAR2 {
            info.mmap = true;
            info.areas = vec![MmapArea { offset: 0, size }];
            info.fd = Some(self.device.mailbox_arc());
        }
        Ok(info)
    }

    fn irq_info(&self, index: u32) -> Result<IrqInfo, Errno> {
        Ok(match index {
            irq::MSIX => {
                let count = u32::try_from(VECTORS).map_err(|_| Errno::INVAL)?;
                IrqInfo { count, eventfd: true, ..IrqInfo::default() }
            }
            _ => IrqInfo::default(),
        })
    }

    fn region_read(&self, index: u32, offset: u64, into: &mut [u8]) -> Result<(), Errno> {
        self.answer(self.device.region_read(index, offset, into))
    }

    fn region_write(&self, index: u32, offset: u64, from: &[u8]) -> Result<(), Errno> {
        self.answer(self.device.region_write(index, offset, from))
    }

    fn region_io_fds(&self, index: u32) -> Result<Vec<IoFd>, Errno> {
        let kind = IoFdKind::Eventfd { flags: 0, datamatch: 0 };
        Ok(match index {
            region::BAR0 => {
                vec![IoFd { offset: offset::DOORBELL, size: 4, kind, fd: self.device.doorbell_arc() }]
            }
            _ => Vec::new(),
        })
    }

    fn set_irqs(&self, request: IrqRequest) -> Result<(), Errno> {
        if request.index != irq::MSIX {
            // Disabling what is not there is how a client cleans up.
            let disables = request.count == 0 && matches!(request.data, IrqRequestData::None);
            return if disables { Ok(()) } else { Err(Errno::INVAL) };
        }
        if request.action != IrqAction::Trigger {
            // As vfio-pci: masking is the VMM's, which emulates the table.
            return Err(Errno::NOTTY);
        }
        let count = usize::try_from(request.count).map_err(|_| Errno::INVAL)?;
        let answer = |result| self.answer(result);
        match request.data {
            IrqRequestData::None if request.count == 0 => {
                (0..VECTORS).try_for_each(|vector| answer(self.device.connect_vector(vector, None)))
            }
            IrqRequestData::None => (0..count)
                .try_for_each(|n| answer(self.device.trigger_vector(Self::vector(request.start, n)?))),
            IrqRequestData::Bool(entries) => {
                let set = entries.iter().enumerate().filter(|(_, set)| **set);
                set.map(|(n, _)| n)
                    .try_for_each(|n| answer(self.device.trigger_vector(Self::vector(request.start, n)?)))
            }
            IrqRequestData::Eventfd(fds) => fds.into_iter().enumerate().try_for_each(|(n, fd)| {
                answer(self.device.connect_vector(Self::vector(request.start, n)?, Some(fd)))
            }),
            IrqRequestData::Disconnect => (0..count)
                .try_for_each(|n| answer(self.device.connect_vector(Self::vector(request.start, n)?, None))),
        }
    }

    fn dma_map(&self, mapping: DmaMapping) -> Result<(), Errno> {
        let DmaMapping { iova, len, prot, fd, offset, .. } = mapping;
        let target = match &fd {
            Some(fd) => DmaTarget::File(std::os::fd::AsFd::as_fd(fd), offset),
            None => {
                let channel = lock(&self.channel).clone().ok_or(Errno::NOTCONN)?;
                DmaTarget::Messages(Arc::new(Channel(channel)))
            }
        };
        self.answer(self.device.dma_map(iova, len, prot.write, target))
    }

    fn dma_unmap(&self, iova: u64, len: u64) -> Result<(), Errno> {
        self.answer(self.device.dma_unmap(iova, len))
    }

    fn reset(&self) -> Result<(), Errno> {
        self.answer(self.device.reset())
    }

    fn extension(&self) -> Extension {
        let options = self.device.options();
        if !options.extension {
            return Extension::NONE;
        }
        Extension { p2p: options.p2p, precopy_info: options.precopy, ..Extension::ALL }
    }

    fn migration_flags(&self) -> Result<MigrationFlags, Errno> {
        if self.device.options().migration { Ok(self.device.migration_flags()) } else { Err(Errno::NOTTY) }
    }

    fn mig_state(&self) -> Result<MigrationState, Errno> {
        Ok(self.device.state())
    }

    fn set_mig_state(&self, to: MigrationState) -> Result<(), Errno> {
        self.answer(self.device.set_state(to))
    }

    fn mig_data_read(&self, into: &mut [u8]) -> Result<usize, Errno> {
        Ok(match self.answer(self.device.read_data(into))? {
            StateRead::Data(count) => count,
            StateRead::NothingNow | StateRead::End => 0,
        })
    }

    fn mig_data_write(&self, from: &[u8]) -> Result<(), Errno> {
        self.answer(self.device.write_data(from))
    }

    fn dma_logging_supported(&self) -> bool {
        let options = self.device.options();
        options.migration && options.dirty_log
    }

    fn dma_logging_start(&self, page_size: u64, ranges: &[IovaRange]) -> Result<u64, Errno> {
        let ranges: Vec<_> = ranges.iter().map(|range| (range.iova, range.len)).collect();
        self.answer(self.device.start_dma_log(page_size, &ranges))
    }

    fn dma_logging_stop(&self) -> Result<(), Errno> {
        self.answer(self.device.stop_dma_log())
    }

    fn dma_logging_report(&self, range: IovaRange, page_size: u64, bitmap: &mut [u64]) -> Result<(), Errno> {
        self.answer(self.device.report_dma_log(range.iova, range.len, page_size, bitmap))
    }

    fn precopy_info(&self) -> Result<PrecopyInfo, Errno> {
        let progress = self.answer(self.device.progress())?;
        let (initial_bytes, dirty_bytes) = (progress.initial_bytes, progress.dirty_bytes);
        Ok(PrecopyInfo { initial_bytes, dirty_bytes, reinit: progress.reinit })
    }

    fn mig_data_size(&self) -> Result<u64, Errno> {
        Ok(self.device.stop_copy_size())
    }

    fn manifest(&self) -> Result<Vec<u8>, Errno> {
        Ok(self.device.manifest().to_string().into_bytes())
    }

    fn client_connected(&self, dma: DmaChannel) {
        *lock(&self.channel) = Some(dma);
    }

    fn client_gone(&self) {
        *lock(&self.channel) = None;
    }

    /// The same as the default, with the limit that was reached by its name.
    fn server_event(&self, event: &ServerEvent) {
        tracing::warn!("{}", error_chain(event));
    }
}

struct Channel(DmaChannel);

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Channel")
    }
}

impl MessageDma for Channel {
    fn read(&self, iova: u64, into: &mut [u8]) -> Result<(), Errno> {
        self.0.read(iova, into)
    }

    fn write(&self, iova: u64, from: &[u8]) -> Result<(), Errno> {
        self.0.write(iova, from)
    }
}
