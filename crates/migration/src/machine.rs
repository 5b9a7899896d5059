//! The interface of a VMM: its machine, as a migration sees it.
//!
//! The trait is small on purpose, and no method has a default that pretends success. Pausing yields a [`Paused`]
//! token: only with it can machine state be saved, so "the vCPUs are paused" is a type and not a comment.

use std::fmt;
use std::sync::Arc;

use rustix::io::Errno;
use vfio_migration_compat::MachineManifest;
use vfio_migration_device::{Device, IrqRouter, PciFunction};
use vfio_migration_memory::{DirtySource, GuestRam};
use vfio_migration_types::VmId;

/// A piece of machine state with a name and a layout version, for example `"kvm.vcpu.0"`, version 1.
#[derive(Clone, PartialEq, Eq)]
pub struct Section {
    /// Name: 1 to 128 bytes. Names that begin with `"pci."` are the library's own.
    pub name: String,
    /// Version of the layout of `bytes`.
    pub version: u32,
    /// The state, at most 16 MiB.
    pub bytes: Vec<u8>,
}

impl fmt::Debug for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Section({} v{}, {} bytes)", self.name, self.version, self.bytes.len())
    }
}

/// A device that moves with the machine, and its PCI function where it has one.
#[derive(Clone, Debug)]
pub struct MigratableDevice {
    /// The device: its own state travels through it.
    pub device: Arc<dyn Device>,
    /// The VMM's side of it: config space, BARs, interrupts. Saved and put back by the library's order, not by
    /// [`Machine::save`].
    pub pci: Option<Arc<dyn PciFunction>>,
}

/// A virtual machine that can be migrated, as source or as destination.
///
/// Methods block; a session calls them from its own threads, never two of [`pause`](Self::pause),
/// [`resume`](Self::resume), [`save`](Self::save) and [`load`](Self::load) at once. A VMM whose operator resumes the
/// guest while a session holds it paused must not let it run before the session ends or calls `resume`.
pub trait Machine: Send + Sync {
    /// The VM's identity, equal on both sides.
    fn id(&self) -> VmId;

    /// The machine's manifest: RAM layout, CPU, sections, and the manifest of each device, in the order of
    /// [`devices`](Self::devices), with the [`guest_address`](vfio_migration_compat::DeviceManifest::guest_address) of each
    /// that is a PCI function to the guest: a device that has another at the destination is refused.
    fn manifest(&self) -> Result<MachineManifest, MachineError>;

    /// What the VMM at the destination wants to know before it makes a machine, and a manifest does not say: in a layout of the VMM's
    /// own, at most 65535 bytes, taken once in the plan. It arrives as
    /// [`IncomingOffer::configuration`](crate::IncomingOffer::configuration). Empty where there is none.
    ///
    /// # Errors
    /// Nothing has begun; the guest goes on.
    fn configuration(&self) -> Result<Vec<u8>, MachineError> {
        Ok(Vec::new())
    }

    /// The guest's RAM, all of it.
    fn ram(&self) -> Arc<GuestRam>;

    /// The VMM's own dirty sources: the hypervisor's log of vCPU writes, and a log of the VMM's own writes. The
    /// devices' logs are taken from the devices. Whoever else writes RAM, and logs nothing, is a source too, whose
    /// [`coverage`](DirtySource::coverage) is [`Nothing`](vfio_migration_memory::Coverage::Nothing): that is refused, or sent once
    /// more while the guest is paused.
    fn dirty_sources(&self) -> Vec<Arc<dyn DirtySource>>;

    /// The machine's devices, in manifest order.
    fn devices(&self) -> Vec<MigratableDevice>;

    /// The router that sets the devices' interrupt routes.
    fn irq_router(&self) -> Arc<dyn IrqRouter>;

    /// Stops all vCPUs, completes what they had under way, and closes every way by which the VMM itself would touch a
    /// device's BARs. Returns whether the guest ran until now: a guest that its operator had paused stays its
    /// operator's to resume. Use [`Paused::pause`] to call it.
    ///
    /// # Errors
    /// The guest is as it was.
    fn pause(&self) -> Result<bool, MachineError>;

    /// Ends the pause, and lets the vCPUs run if `run`. Called at the end of each [`pause`](Self::pause) that is not
    /// committed, with what `pause` answered: with `false` the guest stays paused, but is its operator's to resume
    /// again. At the destination it is called once, after everything was loaded: with `true` the guest runs for the
    /// first time, with `false` it arrives paused and is its operator's.
    ///
    /// # Errors
    /// The guest is paused, and the pause goes on: the call may be repeated.
    fn resume(&self, run: bool) -> Result<(), MachineError>;

    /// Reads out the machine's state: vCPUs, interrupt controller, clock, emulated devices. Called after every device
    /// has stopped, so that no interrupt arrives later. At most 4096 sections.
    fn save(&self, paused: &Paused) -> Result<Vec<Section>, MachineError>;

    /// Loads the machine's state, all sections at once; the interrupt controller must be ready for interrupts when it
    /// returns. Devices' PCI state is not among them.
    ///
    /// # Errors
    /// Also a section that is unknown, of an unknown version, missing, or left over: nothing is skipped in silence.
    fn load(&self, sections: Vec<Section>) -> Result<(), MachineError>;

    /// Releases every storage lock, at the source, once the guest is paused. A machine without any succeeds.
    fn release_locks(&self) -> Result<(), LockError>;

    /// Takes every storage lock: at the destination before READY, at the source when a migration is undone. All, or
    /// none: what this call took before a failure is released. A lock that is still held counts as taken, so that the
    /// call can be made after a [`release_locks`](Self::release_locks) that failed half way, and be repeated: a source
    /// on its way back repeats it for some seconds, while the destination releases its own. A machine without any
    /// succeeds.
    fn take_locks(&self) -> Result<(), LockError>;
}

/// Something in the VMM failed.
#[derive(Debug, thiserror::Error)]
#[error("{doing} failed")]
pub struct MachineError {
    /// The failed step, as a noun phrase: `"saving vCPU 0"`.
    pub doing: String,
    /// errno, where one is known.
    pub errno: Option<Errno>,
    /// The VMM's own error.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

impl MachineError {
    /// `doing` failed, because of `source` (an error, or a text).
    pub fn new(
        doing: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { doing: doing.into(), errno: None, source: source.into() }
    }
}

/// A storage lock could not be taken or released.
#[derive(Debug, thiserror::Error)]
#[error("the storage lock {lock} cannot be {action}", action = if *taking { "taken" } else { "released" })]
pub struct LockError {
    /// The lock: a path, a URL, whatever its operator knows it by.
    pub lock: String,
    /// Whether it was to be taken (else released).
    pub taking: bool,
    /// The VMM's own error.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// The pause of a guest. Dropping it lets the guest run again, if it ran before; [`commit`](Self::commit) is the only
/// way to end the pause for good.
pub struct Paused {
    machine: Arc<dyn Machine>,
    ran: bool,
    keep: bool,
}

impl Paused {
    /// Pauses the machine, by [`Machine::pause`].
    pub fn pause(machine: &Arc<dyn Machine>) -> Result<Self, MachineError> {
        let ran = machine.pause()?;
        Ok(Self { machine: Arc::clone(machine), ran, keep: false })
    }

    /// Whether the guest ran before.
    pub fn ran(&self) -> bool {
        self.ran
    }

    /// Ends the pause: the guest runs, if it ran before.
    ///
    /// # Errors
    /// The guest is paused, and the machine's pause goes on.
    pub fn resume(mut self) -> Result<(), MachineError> {
        // The outcome that the caller gets stays true: nothing is tried again behind its back.
        self.keep = true;
        self.machine.resume(self.ran)
    }

    /// Ends the pause. After a failure the pause goes on with this token, and this can be tried again.
    pub(crate) fn end(&mut self) -> Result<(), MachineError> {
        self.machine.resume(self.ran)?;
        self.keep = true;
        Ok(())
    }

    /// The guest is somebody else's, or nobody's: it never runs here again.
    pub fn commit(mut self) {
        self.keep = true;
    }

    /// Whether dropping the token leaves the guest paused.
    pub(crate) fn stays_paused(&self) -> bool {
        self.keep
    }

    /// From here, dropping the token no longer lets the guest run: COMMIT may have been sent.
    pub(crate) fn keep_paused(&mut self) {
        self.keep = true;
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        if !self.keep
            && let Err(error) = self.machine.resume(self.ran)
        {
            tracing::error!(%error, "the guest could not be resumed");
        }
    }
}

impl fmt::Debug for Paused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Paused").field("ran", &self.ran).field("keep", &self.keep).finish_non_exhaustive()
    }
}
