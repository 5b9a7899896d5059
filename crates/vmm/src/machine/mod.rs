//! The reference machine: processor, bus and devices put together, as the migration library sees a VMM.
//!
//! - [`MachineConfig`]: what to build.
//! - [`ReferenceMachine`]: built, booted, paused, migrated; implements [`Machine`].
//! - [`Report`]: what the guest program says of itself.

mod build;
mod config;
mod open;
mod opening;
mod processor;
mod reset_device;
mod sections;
mod slots;

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vfio_migration::{LockError, Machine, MachineError, MigratableDevice, Paused, Section};
use vfio_migration_compat::{DeviceManifest, MachineManifest, RamRegion};
use vfio_migration_device::{Device, IrqRouter, is_late};
use vfio_migration_memory::{DirtySource, GuestRam};
use vfio_migration_types::{DeviceId, VmId};

pub use config::{Accelerator, DeviceConfig, DeviceConfigError, DevicePath, MachineConfig, Workload};
pub use open::open_alone;
pub use opening::OpeningStep;
pub use processor::kvm_answers;
pub use slots::assign_places;

use crate::error::{VmmError, errno_within};
use crate::guest::{Report, read_report};
use crate::platform::PlatformBus;
use open::DeviceLink;
use processor::Processor;
use reset_device::NotedDevice;
use vfio_migration_pci::{PciBus, PciHost, VfioPciFunction};

/// Kind of the machine in its manifest.
const MACHINE: &str = "vfio-migrate/q1";

/// Time that the devices of a machine that is given up have to forget each other's BARs, and each of them to end its DMA, before they are
/// closed all the same.
const PEERS_LIMIT: Duration = Duration::from_secs(5);
const RELEASE_LIMIT: Duration = Duration::from_secs(2);

/// A machine of the reference VMM.
///
/// Whether its guest runs is decided by two parties: its operator ([`stop`](Self::stop), [`cont`](Self::cont)) and a
/// migration, which may hold it still. While it is held the operator is refused, so that nothing starts a guest that
/// may be somebody else's.
pub struct ReferenceMachine {
    config: MachineConfig,
    /// Identity of the guest: that of the configuration, until another was [adopted](Self::adopt).
    id: Mutex<VmId>,
    ram: Arc<GuestRam>,
    processor: Box<dyn Processor>,
    platform: Arc<PlatformBus>,
    pci: Arc<PciBus>,
    host: Arc<PciHost>,
    devices: Vec<Attached>,
    run: Mutex<Run>,
}

/// A device and its function.
struct Attached {
    device: Arc<dyn Device>,
    /// The same, as a migration gets it.
    noted: Arc<NotedDevice>,
    function: Arc<VfioPciFunction>,
    link: DeviceLink,
    /// VFIO file of the device, which the processor was told of.
    vfio_file: Option<OwnedFd>,
}

/// Whether the guest runs.
#[derive(Debug, Default)]
struct Run {
    running: bool,
    /// A migration has it.
    held: bool,
}

impl ReferenceMachine {
    /// Configuration that the machine was built from. Its identity may have changed since: see [`id`](Self::id).
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// Identity of the VM, as both sides of a migration know it.
    pub fn id(&self) -> VmId {
        *self.id.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the identity of the guest that is about to come in: for a machine that was built without a given one.
    pub fn adopt(&self, id: VmId) {
        *self.id.lock().unwrap_or_else(PoisonError::into_inner) = id;
    }

    /// `"kvm"` or `"software"`.
    pub fn accelerator(&self) -> &'static str {
        self.processor.name()
    }

    /// Whether vCPUs run.
    pub fn is_running(&self) -> bool {
        self.run().running
    }

    /// The reason for which the guest stopped by itself, if it did.
    pub fn failure(&self) -> Option<String> {
        self.processor.failure().or_else(|| {
            self.platform.failure().map(|code| format!("the guest program gave up with code {code:#x}"))
        })
    }

    /// Device accesses of the guest, and changes of devices that it asked for, that failed: of all devices together.
    pub fn device_errors(&self) -> u64 {
        self.devices.iter().map(|attached| attached.function.errors()).sum()
    }

    /// Device accesses that came while the guest was paused, and were held back: 0, unless the VMM has a bug.
    pub fn gate_violations(&self) -> u64 {
        self.host.gate().violations()
    }

    /// Size of the guest's RAM, bytes.
    pub fn memory(&self) -> u64 {
        self.ram.size()
    }

    /// Devices to which the connection is lost, each with the reason.
    pub fn lost_devices(&self) -> Vec<(DeviceId, String)> {
        let lost = |attached: &Attached| Some((attached.device.id().clone(), attached.link.lost()?));
        self.devices.iter().filter_map(lost).collect()
    }

    /// Devices that work and were reset under the guest, or were to be, by a migration that was undone: the state that the guest had in
    /// them is gone. Until another guest starts in this machine, or comes in.
    pub fn reset_devices(&self) -> Vec<DeviceId> {
        let reset = |attached: &&Attached| attached.noted.was_reset() && attached.link.lost().is_none();
        self.devices.iter().filter(reset).map(|attached| attached.device.id().clone()).collect()
    }

    /// Devices that have not taken all the interrupts which the guest has unmasked, since they refused or were late. Asks them
    /// nothing.
    pub fn unsettled_devices(&self) -> Vec<DeviceId> {
        let unsettled =
            |attached: &&Attached| attached.function.is_unsettled() && attached.link.lost().is_none();
        self.devices.iter().filter(unsettled).map(|attached| attached.device.id().clone()).collect()
    }

    /// Gives such a device its interrupts once more, if it answers and the guest runs. Says whether it has them now; waits for a
    /// device that is late for as long as a request to it may take.
    pub fn settle_interrupts(&self, device: &DeviceId) -> bool {
        let mut attached = self.devices.iter().filter(|attached| attached.device.id() == device);
        attached.all(|attached| {
            // Asked before anything is held that the guest, or whoever pauses it, may wait for.
            let late = attached.device.state().is_err_and(|error| is_late(&error));
            !late && attached.function.settle_interrupts()
        })
    }

    /// The guest program's report.
    ///
    /// # Errors
    /// The RAM cannot be read.
    pub fn report(&self) -> Result<Report, VmmError> {
        read_report(&self.ram)
    }

    /// The operator pauses the guest. Pausing a paused guest does nothing.
    ///
    /// # Errors
    /// A migration holds the guest, or a vCPU does not come back.
    pub fn stop(&self) -> Result<(), VmmError> {
        let mut run = self.run();
        self.require_free(&run)?;
        self.halt(&mut run)
    }

    /// The operator lets the guest run.
    ///
    /// # Errors
    /// A migration holds the guest, or it has stopped by itself.
    pub fn cont(&self) -> Result<(), VmmError> {
        let mut run = self.run();
        self.require_free(&run)?;
        self.go(&mut run)
    }

    /// The migration that held the guest is over, and the guest is ours: the operator decides again.
    pub fn release(&self) {
        self.run().held = false;
    }

    fn require_free(&self, run: &Run) -> Result<(), VmmError> {
        if run.held {
            return Err(VmmError::Refused("the guest is held by a migration; cancel it, or wait".into()));
        }
        Ok(())
    }

    fn halt(&self, run: &mut Run) -> Result<(), VmmError> {
        if run.running {
            self.processor.pause()?;
            self.host.gate().close();
            run.running = false;
        }
        Ok(())
    }

    fn go(&self, run: &mut Run) -> Result<(), VmmError> {
        if !run.running {
            self.host.gate().open();
            // Nothing runs that could pass it.
            self.set_going().inspect_err(|_| self.host.gate().close())?;
            run.running = true;
        }
        Ok(())
    }

    fn set_going(&self) -> Result<(), VmmError> {
        for attached in &self.devices {
            attached.function.deliver_pending().map_err(|error| VmmError::Refused(error.to_string()))?;
        }
        self.processor.resume()
    }

    /// Refuses to migrate a guest that cannot go on anywhere.
    fn require_sound(&self) -> Result<(), MachineError> {
        match self.failure() {
            Some(why) => Err(MachineError::new("pausing the guest", format!("it stopped by itself: {why}"))),
            None => Ok(()),
        }
    }

    /// Another guest has, or gets, the devices.
    fn forget_resets(&self) {
        for attached in &self.devices {
            attached.noted.forget();
        }
    }

    fn run(&self) -> MutexGuard<'_, Run> {
        self.run.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Machine for ReferenceMachine {
    fn id(&self) -> VmId {
        Self::id(self)
    }

    fn manifest(&self) -> Result<MachineManifest, MachineError> {
        let describe = |attached: &Attached| {
            let guest_address = Some(attached.function.devfn().into());
            attached.device.manifest().map(|device| DeviceManifest { guest_address, ..device })
        };
        let devices = self.devices.iter().map(describe).collect::<Result<Vec<_>, _>>();
        let devices = devices.map_err(failed("describing the devices"))?;
        Ok(MachineManifest {
            machine: MACHINE.into(),
            accelerator: self.processor.name().into(),
            vcpus: u32::from(self.config.vcpus),
            ram: self
                .ram
                .regions()
                .iter()
                .map(|region| RamRegion { gpa: region.gpa, len: region.len })
                .collect(),
            cpu: self.processor.features().map_err(failed("asking for CPU features"))?,
            sections: self.section_versions(),
            devices,
            ..MachineManifest::default()
        })
    }

    fn ram(&self) -> Arc<GuestRam> {
        Arc::clone(&self.ram)
    }

    fn dirty_sources(&self) -> Vec<Arc<dyn DirtySource>> {
        self.processor.dirty_sources()
    }

    fn devices(&self) -> Vec<MigratableDevice> {
        self.devices
            .iter()
            .map(|attached| MigratableDevice {
                device: attached.noted.clone(),
                pci: Some(attached.function.clone()),
            })
            .collect()
    }

    fn irq_router(&self) -> Arc<dyn IrqRouter> {
        self.host.router().clone()
    }

    fn pause(&self) -> Result<bool, MachineError> {
        let mut run = self.run();
        let ran = run.running;
        self.require_sound()?;
        self.halt(&mut run).map_err(failed("pausing the guest"))?;
        // Its last instructions may have been the fatal ones.
        self.require_sound()?;
        run.held = true;
        Ok(ran)
    }

    fn resume(&self, run_guest: bool) -> Result<(), MachineError> {
        let mut run = self.run();
        if run_guest {
            self.go(&mut run).map_err(failed("letting the guest run"))?;
        }
        run.held = false;
        Ok(())
    }

    fn save(&self, _paused: &Paused) -> Result<Vec<Section>, MachineError> {
        self.save_sections().map_err(failed("saving the machine's state"))
    }

    fn load(&self, sections: Vec<Section>) -> Result<(), MachineError> {
        self.run().held = true;
        self.forget_resets();
        self.load_sections(&sections).map_err(failed("loading the machine's state"))
    }

    // The reference machine has no storage, so there is nothing to lock.
    fn release_locks(&self) -> Result<(), LockError> {
        Ok(())
    }

    fn take_locks(&self) -> Result<(), LockError> {
        Ok(())
    }
}

impl fmt::Debug for ReferenceMachine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReferenceMachine")
            .field("id", &self.id())
            .field("run", &*self.run())
            .finish_non_exhaustive()
    }
}

impl Drop for ReferenceMachine {
    fn drop(&mut self) {
        self.processor.shutdown();
        // A device that is late keeps nobody from closing it, and the others.
        let limits = self.devices.iter().map(|attached| attached.device.limit_question(PEERS_LIMIT));
        let limits: Vec<_> = limits.collect();
        self.host.dissolve_peers();
        drop(limits);
        for attached in &self.devices {
            let _limit = attached.device.limit_question(RELEASE_LIMIT);
            // All devices close next, which takes everything back at their drivers and servers too. Until then none is a bus
            // master any more, so none reaches for what another had.
            if let Err(error) = attached.function.release() {
                tracing::debug!(%error, "a device was not released cleanly");
            }
            if let Some(file) = &attached.vfio_file
                && let Err(error) = self.processor.remove_vfio_file(file.as_fd())
            {
                tracing::debug!(%error, "KVM keeps a VFIO file");
            }
        }
    }
}

fn failed<E: std::error::Error + Send + Sync + 'static>(
    doing: &'static str,
) -> impl FnOnce(E) -> MachineError {
    move |error| MachineError { errno: errno_within(&error), ..MachineError::new(doing, error) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::IoBus;
    use crate::platform::FAILURE;

    fn machine() -> Arc<ReferenceMachine> {
        let config = MachineConfig {
            id: VmId([1; 16]),
            memory: 64 << 20,
            vcpus: 1,
            accelerator: Accelerator::Software,
            devices: Vec::new(),
        };
        ReferenceMachine::build(config).unwrap()
    }

    #[test]
    fn a_guest_that_stopped_by_itself_is_not_migrated() {
        let machine = machine();
        machine.boot(&Workload::default()).unwrap();
        machine.cont().unwrap();
        machine.platform.pio_write(FAILURE, &7u32.to_le_bytes());
        let error = machine.pause().unwrap_err();
        assert!(error.source.to_string().starts_with("it stopped by itself: "), "{}", error.source);
        machine.stop().unwrap();
    }

    #[test]
    fn a_guest_that_cannot_run_leaves_the_gate_closed() {
        let machine = machine();
        assert!(machine.cont().is_err(), "nothing was booted");
        assert!(machine.host.gate().is_closed() && !machine.is_running());
    }

    #[test]
    fn the_end_of_a_pause_gives_the_guest_back_to_its_operator() {
        let machine = machine();
        machine.boot(&Workload::default()).unwrap();
        assert!(!machine.pause().unwrap(), "its operator had not let it run");
        assert!(machine.cont().is_err(), "it is held");
        machine.resume(false).unwrap();
        assert!(!machine.is_running());
        machine.cont().unwrap();
        assert!(machine.pause().unwrap());
        machine.resume(true).unwrap();
        assert!(machine.is_running());
    }

    #[test]
    fn the_identity_of_the_guest_that_comes_is_taken() {
        let machine = machine();
        assert_eq!(machine.id(), VmId([1; 16]));
        machine.adopt(VmId([2; 16]));
        assert_eq!((machine.id(), Machine::id(&*machine)), (VmId([2; 16]), VmId([2; 16])));
        assert_eq!((machine.device_errors(), machine.gate_violations()), (0, 0));
        assert_eq!(machine.lost_devices(), []);
    }
}
