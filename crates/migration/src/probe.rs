//! Asking a destination whether a machine fits, with nothing at hand but the machine's manifest.

use std::sync::Arc;

use vfio_migration_compat::{MachineManifest, Report};
use vfio_migration_device::IrqRouter;
use vfio_migration_memory::{DirtySource, GuestRam, RamSpec, WriteLog};
use vfio_migration_types::{Failure, Gpa, PAGE_SIZE, Phase, Side, VmId, error_chain};

use crate::control::Control;
use crate::error::MigrateError;
use crate::machine::{LockError, Machine, MachineError, MigratableDevice, Paused, Section};
use crate::options::SourceOptions;
use crate::rehearsal::Rehearse;
use crate::source::Source;
use crate::uri::Uri;

/// Asks the destination at `uri` whether what `manifest` describes could come, by the rules of both sides. The destination
/// reserves all that it would need, reports so, and releases it again.
///
/// `vm` is the identity that is asked for; a destination that expects another VM refuses it. Without one the answer is about the
/// rest.
///
/// `steer` gets the question's handle before it is asked: by [`Control::cancel`] another thread gives it up.
///
/// # Errors
/// Nobody could be asked. A refusal is no error: it is the answer.
pub fn probe(
    manifest: MachineManifest,
    vm: Option<VmId>,
    uri: &Uri,
    options: SourceOptions,
    steer: impl FnOnce(Control),
) -> Result<Report, MigrateError> {
    let ram = GuestRam::new("probe", &[RamSpec { gpa: Gpa(0), len: PAGE_SIZE }]).map_err(|error| {
        MigrateError::NotBegun(Failure::new(Side::Source, Phase::Plan, error_chain(&error)))
    })?;
    let machine = ManifestOnly { vm: vm.unwrap_or(VmId::NIL), manifest, ram: Arc::new(ram) };
    let source = Source::new(Arc::new(machine), options);
    steer(source.control());
    match source.rehearse_to(uri, Rehearse::Ask, |_| {}) {
        Ok(rehearsal) => Ok(rehearsal.report),
        Err(error) => error.report().ok_or(error),
    }
}

/// A machine of which there is a manifest alone. A session that only asks touches nothing else of it.
struct ManifestOnly {
    vm: VmId,
    manifest: MachineManifest,
    ram: Arc<GuestRam>,
}

impl ManifestOnly {
    fn nothing(doing: &str) -> MachineError {
        MachineError::new(doing, "there is a manifest, and no machine: a defect of this program")
    }

    fn no_lock(taking: bool) -> LockError {
        let source = Self::nothing("handling storage locks").into();
        LockError { lock: "of a manifest".into(), taking, source }
    }
}

impl Machine for ManifestOnly {
    fn id(&self) -> VmId {
        self.vm
    }

    fn manifest(&self) -> Result<MachineManifest, MachineError> {
        Ok(self.manifest.clone())
    }

    fn ram(&self) -> Arc<GuestRam> {
        Arc::clone(&self.ram)
    }

    /// Nobody writes its page.
    fn dirty_sources(&self) -> Vec<Arc<dyn DirtySource>> {
        vec![Arc::new(WriteLog::new("nobody", self.ram.size()))]
    }

    fn devices(&self) -> Vec<MigratableDevice> {
        Vec::new()
    }

    fn irq_router(&self) -> Arc<dyn IrqRouter> {
        Arc::new(NoInterrupts)
    }

    fn pause(&self) -> Result<bool, MachineError> {
        Err(Self::nothing("pausing"))
    }

    fn resume(&self, _: bool) -> Result<(), MachineError> {
        Err(Self::nothing("resuming"))
    }

    fn save(&self, _: &Paused) -> Result<Vec<Section>, MachineError> {
        Err(Self::nothing("saving"))
    }

    fn load(&self, _: Vec<Section>) -> Result<(), MachineError> {
        Err(Self::nothing("loading"))
    }

    fn release_locks(&self) -> Result<(), LockError> {
        Err(Self::no_lock(false))
    }

    fn take_locks(&self) -> Result<(), LockError> {
        Err(Self::no_lock(true))
    }
}

#[derive(Debug)]
struct NoInterrupts;

impl IrqRouter for NoInterrupts {
    fn commit(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Err(ManifestOnly::nothing("routing interrupts").into())
    }
}
