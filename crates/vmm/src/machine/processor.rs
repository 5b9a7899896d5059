//! What runs the guest: KVM, or the software twin.

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use vfio_migration::Section;
use vfio_migration_memory::DirtySource;

use crate::bus::IoBus;
use crate::error::VmmError;
use crate::guest::{self, BootInfo};
use crate::kvm::{KvmDirtyLog, KvmVm, cpu_features, section_versions};
use crate::software::SoftwareVm;

/// Longest wait for vCPUs to come back when the guest is paused. They come within a millisecond, unless a device
/// that one of them is just accessing does not answer.
const PAUSE_PATIENCE: Duration = Duration::from_secs(12);

/// Whether `/dev/kvm` answers, and if not, why.
///
/// # Errors
/// [`VmmError::NoKvm`].
pub fn kvm_answers() -> Result<(), VmmError> {
    KvmVm::open().map(|_| ())
}

/// The processor that runs the guest.
pub(super) trait Processor: fmt::Debug + Send + Sync {
    /// `"kvm"` or `"software"`.
    fn name(&self) -> &'static str;

    /// Loads the guest program and puts the first vCPU at its start.
    fn boot(&self, info: &BootInfo) -> Result<(), VmmError>;

    /// Makes the threads, paused.
    fn start(&self, bus: &Arc<dyn IoBus>) -> Result<(), VmmError>;

    fn pause(&self) -> Result<(), VmmError>;

    fn resume(&self) -> Result<(), VmmError>;

    /// Ends the threads for good.
    fn shutdown(&self);

    fn save(&self) -> Result<Vec<Section>, VmmError>;

    fn load(&self, sections: &[Section]) -> Result<(), VmmError>;

    /// Names and versions of its sections.
    fn section_versions(&self) -> BTreeMap<String, u32>;

    /// Opaque words: what the guest was given and a destination must be able to give.
    fn features(&self) -> Result<Vec<String>, VmmError>;

    fn dirty_sources(&self) -> Vec<Arc<dyn DirtySource>>;

    /// Learns of the file of a device of the kernel's VFIO, before the guest uses it. Returns whether it wants to be told
    /// when the device goes.
    fn add_vfio_file(&self, file: BorrowedFd<'_>) -> Result<bool, VmmError>;

    /// The device of that file goes.
    fn remove_vfio_file(&self, file: BorrowedFd<'_>) -> Result<(), VmmError>;

    /// The reason for which the guest stopped by itself.
    fn failure(&self) -> Option<String>;
}

/// vCPUs of KVM.
#[derive(Debug)]
pub(super) struct KvmProcessor {
    vm: Arc<KvmVm>,
    dirty: Arc<KvmDirtyLog>,
    /// Asked for as the machine is made: whoever asks for its manifest waits for nothing but its devices.
    features: Vec<String>,
}

impl KvmProcessor {
    pub(super) fn new(vm: Arc<KvmVm>) -> Result<Self, VmmError> {
        let dirty = Arc::new(vm.dirty_log()?);
        let features = cpu_features(&KvmVm::open()?)?;
        Ok(Self { vm, dirty, features })
    }
}

impl Processor for KvmProcessor {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn boot(&self, info: &BootInfo) -> Result<(), VmmError> {
        guest::load(&self.vm, info)
    }

    fn start(&self, bus: &Arc<dyn IoBus>) -> Result<(), VmmError> {
        self.vm.start(bus)
    }

    fn pause(&self) -> Result<(), VmmError> {
        self.vm.pause(PAUSE_PATIENCE)
    }

    fn resume(&self) -> Result<(), VmmError> {
        self.vm.resume()
    }

    fn shutdown(&self) {
        self.vm.shutdown();
    }

    fn save(&self) -> Result<Vec<Section>, VmmError> {
        self.vm.save_state()
    }

    fn load(&self, sections: &[Section]) -> Result<(), VmmError> {
        self.vm.load_state(sections)
    }

    fn section_versions(&self) -> BTreeMap<String, u32> {
        section_versions(self.vm.vcpus())
    }

    fn features(&self) -> Result<Vec<String>, VmmError> {
        Ok(self.features.clone())
    }

    fn dirty_sources(&self) -> Vec<Arc<dyn DirtySource>> {
        vec![self.dirty.clone()]
    }

    fn add_vfio_file(&self, file: BorrowedFd<'_>) -> Result<bool, VmmError> {
        self.vm.add_vfio_file(file)
    }

    fn remove_vfio_file(&self, file: BorrowedFd<'_>) -> Result<(), VmmError> {
        self.vm.remove_vfio_file(file)
    }

    fn failure(&self) -> Option<String> {
        self.vm.stop_reason().map(|reason| reason.to_string())
    }
}

/// The software twin of the guest program.
#[derive(Debug)]
pub(super) struct SoftwareProcessor(pub(super) SoftwareVm);

impl Processor for SoftwareProcessor {
    fn name(&self) -> &'static str {
        "software"
    }

    fn boot(&self, info: &BootInfo) -> Result<(), VmmError> {
        self.0.boot(info)
    }

    fn start(&self, bus: &Arc<dyn IoBus>) -> Result<(), VmmError> {
        self.0.start(bus)
    }

    fn pause(&self) -> Result<(), VmmError> {
        self.0.pause(PAUSE_PATIENCE)
    }

    fn resume(&self) -> Result<(), VmmError> {
        self.0.resume()
    }

    fn shutdown(&self) {
        self.0.shutdown();
    }

    fn save(&self) -> Result<Vec<Section>, VmmError> {
        self.0.save()
    }

    fn load(&self, sections: &[Section]) -> Result<(), VmmError> {
        self.0.load(sections)
    }

    fn section_versions(&self) -> BTreeMap<String, u32> {
        SoftwareVm::section_versions()
    }

    // It executes no instructions, so there is nothing that a destination's processor could lack.
    fn features(&self) -> Result<Vec<String>, VmmError> {
        Ok(Vec::new())
    }

    fn dirty_sources(&self) -> Vec<Arc<dyn DirtySource>> {
        vec![self.0.dirty_source()]
    }

    fn add_vfio_file(&self, _file: BorrowedFd<'_>) -> Result<bool, VmmError> {
        Ok(false)
    }

    fn remove_vfio_file(&self, _file: BorrowedFd<'_>) -> Result<(), VmmError> {
        Ok(())
    }

    fn failure(&self) -> Option<String> {
        self.0.failed().then(|| "the software guest gave up".to_owned())
    }
}
