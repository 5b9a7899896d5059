//! The trait that a device implements to be served.

use rustix::io::Errno;

use super::dma::DmaChannel;
use crate::codec::Extension;
use crate::error::chain;
use crate::event::ServerEvent;
use crate::migration_state::{MigrationFlags, MigrationState};
use crate::model::{DeviceInfo, DmaMapping, IoFd, IovaRange, IrqAction, IrqInfo, PrecopyInfo, RegionInfo};

/// A SET_IRQS request that passed the server's checks: the range lies within the type's count, the action suits the data.
#[derive(Debug)]
#[non_exhaustive]
pub struct IrqRequest {
    /// Interrupt type, see [`irq_index`](crate::irq_index).
    pub index: u32,
    /// Index of the first interrupt.
    pub start: u32,
    /// Number of interrupts. Zero (with [`IrqRequestData::None`], [`IrqAction::Trigger`] and start 0) disables the type.
    pub count: u32,
    /// What is to be done to the interrupts.
    pub action: IrqAction,
    /// To which of them.
    pub data: IrqRequestData,
}

/// To which interrupts of the range an [`IrqRequest`] applies.
#[derive(Debug)]
pub enum IrqRequestData {
    /// The action applies to every interrupt of the request.
    None,
    /// Those whose entry is true; `count` entries.
    Bool(Vec<bool>),
    /// Connect these, `count` of them, in order, in place of what was connected.
    Eventfd(Vec<std::os::fd::OwnedFd>),
    /// Disconnect the eventfds of all.
    Disconnect,
}

/// A device, as a [`Server`](super::Server) serves it.
///
/// Methods are called from the serving thread, one at a time, with `&self`: a device has locks of its own, so that
/// its threads can run beside. A method that blocks keeps the client waiting. An `Err` is sent to the client as it is.
///
/// No default pretends success: what a device does not implement is refused, with ENOTTY for features and EINVAL for
/// commands, as the kernel and libvfio-user do.
///
/// # What the server has checked before it calls
///
/// Sizes and descriptor counts against the negotiated limits; that regions and interrupt types exist and accesses
/// lie within them; that DMA mappings do not overlap, that one to be unmapped was mapped; that states exist in
/// `migration_flags`; that MIG_DATA_READ comes in a saving state and MIG_DATA_WRITE in RESUMING.
///
/// # What becomes of a device when its client leaves
///
/// Its migration state is retained. The server takes back every DMA mapping ([`dma_unmap`](Self::dma_unmap)), disables
/// every interrupt type that was used ([`set_irqs`](Self::set_irqs)) and stops DMA logging, then calls
/// [`client_gone`](Self::client_gone).
pub trait Backend: Send + Sync {
    /// Number of regions and interrupt types; constant.
    fn device_info(&self) -> DeviceInfo;

    /// Region `index`, below `num_regions`. A region that the device lacks has size 0; one has at most 64 mappable areas.
    fn region_info(&self, index: u32) -> Result<RegionInfo, Errno>;

    /// Interrupt type `index`, below `num_irqs`. One that the device lacks has count 0.
    fn irq_info(&self, index: u32) -> Result<IrqInfo, Errno>;

    /// Fills `into` from region `index` at `offset`; the range lies within the region.
    fn region_read(&self, index: u32, offset: u64, into: &mut [u8]) -> Result<(), Errno>;

    /// Writes `from` to region `index` at `offset`; the range lies within the region.
    fn region_write(&self, index: u32, offset: u64, from: &[u8]) -> Result<(), Errno>;

    /// Descriptors that accesses to region `index` may go to, at most 128; empty for none.
    fn region_io_fds(&self, index: u32) -> Result<Vec<IoFd>, Errno> {
        let _ = index;
        Err(Errno::INVAL)
    }

    /// Connects, disconnects, masks, unmasks or raises interrupts. Called in any migration state.
    fn set_irqs(&self, request: IrqRequest) -> Result<(), Errno>;

    /// Adds memory that the device may reach. Called in any migration state.
    fn dma_map(&self, mapping: DmaMapping) -> Result<(), Errno>;

    /// Removes a mapping, exactly as it was added. When this returns, the device no longer touches it.
    fn dma_unmap(&self, iova: u64, len: u64) -> Result<(), Errno>;

    /// Resets the device. As in the kernel this leaves it in RUNNING with nothing enabled, whatever state it was in,
    /// and ends any saving or resuming session. DMA mappings and connected eventfds stay.
    fn reset(&self) -> Result<(), Errno> {
        Err(Errno::INVAL)
    }

    /// Which parts of the extension the device offers; none by default. Constant.
    fn extension(&self) -> Extension {
        Extension::default()
    }

    /// What migration the device supports. The server hides P2P from a client without the extension.
    fn migration_flags(&self) -> Result<MigrationFlags, Errno> {
        Err(Errno::NOTTY)
    }

    /// The state that the device is in.
    fn mig_state(&self) -> Result<MigrationState, Errno> {
        Err(Errno::NOTTY)
    }

    /// Takes one arc, to `to`, and returns when it is complete. The server walks combination transitions itself: `to` is
    /// always the end of a single arc out of the present state, for a device with `migration_flags`.
    ///
    /// # Errors
    /// The device stays where it was, or is in ERROR.
    fn set_mig_state(&self, to: MigrationState) -> Result<(), Errno> {
        let _ = to;
        Err(Errno::NOTTY)
    }

    /// Fills the front of `into` with the next migration data and says how much; 0 when there is none (in PRE_COPY: none now).
    fn mig_data_read(&self, into: &mut [u8]) -> Result<usize, Errno> {
        let _ = into;
        Err(Errno::NOTTY)
    }

    /// Takes all of `from` as the next migration data.
    fn mig_data_write(&self, from: &[u8]) -> Result<(), Errno> {
        let _ = from;
        Err(Errno::NOTTY)
    }

    /// Whether the device can log its DMA writes: what a PROBE of the three logging features answers.
    fn dma_logging_supported(&self) -> bool {
        false
    }

    /// Starts logging DMA writes to `ranges` (everything, when empty) in pages of about `page_size` bytes. Returns the page
    /// size chosen. Not called while logging: the server answers a second START itself (it succeeds with the same page
    /// size and ranges within the first START's, EINVAL otherwise).
    fn dma_logging_start(&self, page_size: u64, ranges: &[IovaRange]) -> Result<u64, Errno> {
        let _ = (page_size, ranges);
        Err(Errno::NOTTY)
    }

    /// Stops logging. Called only while logging.
    fn dma_logging_stop(&self) -> Result<(), Errno> {
        Err(Errno::NOTTY)
    }

    /// Sets in `bitmap`, which is clean, bit `n % 64` of word `n / 64` for every page of `page_size` bytes, counted from
    /// `range.iova`, that was written since the last report, and forgets them. Works in every state.
    fn dma_logging_report(&self, range: IovaRange, page_size: u64, bitmap: &mut [u64]) -> Result<(), Errno> {
        let _ = (range, page_size, bitmap);
        Err(Errno::NOTTY)
    }

    /// Pre-copy estimates; called in PRE_COPY and PRE_COPY_P2P only. Extension.
    fn precopy_info(&self) -> Result<PrecopyInfo, Errno> {
        Err(Errno::NOTTY)
    }

    /// Estimated bytes of STOP_COPY data, in any state. Extension; feature 9 of the kernel.
    fn mig_data_size(&self) -> Result<u64, Errno> {
        Err(Errno::NOTTY)
    }

    /// What the device says of itself: JSON text, an object. Which fields it may have, and which are found out from the device
    /// and not its maker's to say, is in `docs/devices.md` of vfio-migrate, under "The manifest of a vfio-user server".
    /// Extension.
    fn manifest(&self) -> Result<Vec<u8>, Errno> {
        Err(Errno::NOTTY)
    }

    /// A client completed the handshake. `dma` reaches its memory for as long as it stays: for mappings without a
    /// descriptor. It may be used from any thread, from inside the methods of this trait too.
    fn client_connected(&self, dma: DmaChannel) {
        let _ = dma;
    }

    /// The client left, or was dropped; its [`DmaChannel`] fails from now on.
    fn client_gone(&self) {}

    /// The server tells what no client hears, such as why it dropped one: also of a connection that never became a
    /// client. Called from the serving thread; of a client that was dropped before its [`client_gone`](Self::client_gone).
    /// The default warns, by a `tracing` event.
    fn server_event(&self, event: &ServerEvent) {
        tracing::warn!("{}", chain(event));
    }
}
