//! The Device contract: one face over every kind of migratable device, shaped by the kernel's v2 migration uAPI
//! (`include/uapi/linux/vfio.h`), and its back ends.
//!
//! No method has a default that pretends success. What is only legal inside a session is a method of the session.
#![forbid(unsafe_code)]

mod contract;
mod describe;
mod dma_view;
mod error;
mod hardware;
pub mod host;
mod kernel;
mod pci;
mod pci_codec;
mod reset_callback;
mod session;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod vfio_user;
mod watch;

pub use contract::{
    Capabilities, CapabilitiesError, Chunk, Device, DirtyLog, NotMigratable, Position, PrecopyProgress,
    ResumingSession, SavingSession,
};
pub use describe::describe_hardware;
pub use dma_view::{DmaRange, DmaView, DmaViewError};
pub use error::{
    DeviceError, Remedy, TransitionError, is_late, is_out_of_time, is_server_gone, is_unsent_reset,
};
pub use hardware::{DmaAccess, Doorbell, IrqIndex, PciHardware, PciRegion, RegionFile, RegionIndex};
pub use kernel::adopt::VmmDevice;
#[cfg(feature = "bare-space")]
pub use kernel::bare::BareSpace;
pub use kernel::device::KernelDevice;
pub use kernel::error::KernelError;
pub use kernel::open::{IommuHandle, KernelOptions};
pub use kernel::path::KernelPath;
pub use kernel::space::DmaSpace;
pub use kernel::tracker::{TrackerChoice, TrackerKind};
pub use kernel::vmm_iommu::VmmIommu;
pub use pci::{
    ConfigRule, ConfigRules, ConfigState, IrqRouter, MsiMessage, PciError, PciFunction, PciState, VectorState,
};
pub use pci_codec::PciCodecError;
pub use reset_callback::{ResetCallback, ResetError};
pub use session::error::SessionError;
pub use vfio_user::adopt::VmmConnection;
pub use vfio_user::device::{VfioUserDevice, VfioUserOptions};
pub use vfio_user_peer::QuestionLimit;
pub use watch::{DeviceObserver, WatchedDevice};
