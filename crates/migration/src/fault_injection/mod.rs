//! Negative controls: a machine with one thing broken on purpose, below the checks of a migration. They prove that the checks,
//! or the guest, see it.
//!
//! Each is a decorator of a trait that a VMM implements anyway, so that a migration without one runs exactly the same code.

mod device;
mod dirty;
mod pci;
mod stale;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vfio_migration_compat::MachineManifest;
use vfio_migration_device::{IrqRouter, PciFunction};
use vfio_migration_memory::{DirtySource, GuestRam};
use vfio_migration_types::{RamOffset, VmId};

use crate::fault_injection::device::{FaultyDevice, OneByOne};
use crate::fault_injection::dirty::{HiddenPages, HidingSource};
use crate::fault_injection::pci::MaskingFunction;
use crate::fault_injection::stale::StalePages;
use crate::held_file;
use crate::machine::{LockError, Machine, MachineError, MigratableDevice, Paused, Section};
use crate::session::threads::injected;

/// Lets the calling thread make so many threads of sessions, and no more, as a system does that has none left; `None`: as many
/// as it wants.
pub fn leave_threads(threads: Option<u32>) {
    injected::leave(threads);
}

/// Holds what is saved into the file at a path, or read of a journal there, as a disk does that hangs, until it is dropped.
#[derive(Debug)]
pub struct HeldFile(PathBuf);

impl HeldFile {
    /// Holds the file at `path`.
    pub fn at(path: &Path) -> Self {
        held_file::hold(path);
        Self(path.into())
    }

    /// Whether somebody waits for it.
    pub fn is_waited_for(&self) -> bool {
        held_file::is_waited_for(&self.0)
    }
}

impl Drop for HeldFile {
    fn drop(&mut self) {
        held_file::let_go(&self.0);
    }
}

/// A fault to inject into a session, by its side and effect.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum InjectedFault {
    /// At the source: pages of this stretch of RAM vanish from every dirty report, the last one too.
    HideDirtyPages(Range<RamOffset>),
    /// At the source: the devices' dirty logs are read and thrown away.
    HideDeviceLogs,
    /// At the source: devices are stopped and read one after another, without the P2P barrier.
    StopOneByOne,
    /// At the destination: once the last page has come, some pages of this stretch of RAM hold what they held before.
    StalePages(Range<RamOffset>),
    /// At the destination: the first vector of every device stays as if masked. A device without vectors has its pin disabled.
    MaskFirstVector,
    /// At the destination: the last vector.
    MaskLastVector,
}

/// `machine`, with `fault`: to be migrated, or to be arrived in, in its place.
pub fn inject(machine: Arc<dyn Machine>, fault: InjectedFault) -> Arc<dyn Machine> {
    let stale = match &fault {
        InjectedFault::StalePages(stretch) => Some(Arc::new(StalePages::new(machine.ram(), stretch.clone()))),
        _ => None,
    };
    Arc::new(FaultyMachine { machine, fault, stale, one_by_one: Arc::default() })
}

struct FaultyMachine {
    machine: Arc<dyn Machine>,
    fault: InjectedFault,
    stale: Option<Arc<StalePages>>,
    one_by_one: Arc<OneByOne>,
}

impl FaultyMachine {
    /// The device with what of it is broken; as it is when nothing is.
    fn faulty(&self, moved: MigratableDevice) -> MigratableDevice {
        let MigratableDevice { device, pci } = moved;
        let hidden = match &self.fault {
            InjectedFault::HideDirtyPages(stretch) => Some(HiddenPages::Within(stretch.clone())),
            InjectedFault::HideDeviceLogs => Some(HiddenPages::All),
            _ => None,
        };
        let one_by_one = (self.fault == InjectedFault::StopOneByOne).then(|| self.one_by_one.clone());
        let last = match self.fault {
            InjectedFault::MaskFirstVector => Some(false),
            InjectedFault::MaskLastVector => Some(true),
            _ => None,
        };
        let pci = match (pci, last) {
            (Some(function), Some(last)) => {
                Some(Arc::new(MaskingFunction { function, last }) as Arc<dyn PciFunction>)
            }
            (pci, _) => pci,
        };
        MigratableDevice {
            device: Arc::new(FaultyDevice::new(device, hidden, one_by_one, self.stale.clone())),
            pci,
        }
    }
}

impl Machine for FaultyMachine {
    fn id(&self) -> VmId {
        self.machine.id()
    }

    fn manifest(&self) -> Result<MachineManifest, MachineError> {
        self.machine.manifest()
    }

    fn configuration(&self) -> Result<Vec<u8>, MachineError> {
        self.machine.configuration()
    }

    fn ram(&self) -> Arc<GuestRam> {
        self.machine.ram()
    }

    fn dirty_sources(&self) -> Vec<Arc<dyn DirtySource>> {
        let sources = self.machine.dirty_sources();
        let InjectedFault::HideDirtyPages(stretch) = &self.fault else { return sources };
        let hide = |source| {
            Arc::new(HidingSource { source, hidden: HiddenPages::Within(stretch.clone()) })
                as Arc<dyn DirtySource>
        };
        sources.into_iter().map(hide).collect()
    }

    fn devices(&self) -> Vec<MigratableDevice> {
        self.machine.devices().into_iter().map(|moved| self.faulty(moved)).collect()
    }

    fn irq_router(&self) -> Arc<dyn IrqRouter> {
        self.machine.irq_router()
    }

    fn pause(&self) -> Result<bool, MachineError> {
        self.machine.pause()
    }

    fn resume(&self, run: bool) -> Result<(), MachineError> {
        self.machine.resume(run)
    }

    fn save(&self, paused: &Paused) -> Result<Vec<Section>, MachineError> {
        self.machine.save(paused)
    }

    fn load(&self, sections: Vec<Section>) -> Result<(), MachineError> {
        self.machine.load(sections)
    }

    fn release_locks(&self) -> Result<(), LockError> {
        self.machine.release_locks()
    }

    fn take_locks(&self) -> Result<(), LockError> {
        // Asked for when all pages have come, and before any digest of them is taken.
        if let Some(stale) = &self.stale {
            stale.put_back();
        }
        self.machine.take_locks()
    }
}
