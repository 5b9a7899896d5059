//! Opening a device: the one place that knows which back end it has.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use vfio_migration_device::{
    CapabilitiesError, Device, DmaSpace, KernelDevice, KernelOptions, PciHardware, VfioUserDevice,
    VfioUserOptions,
};
use vfio_migration_memory::{GuestRam, RamSpec};
use vfio_migration_types::{Gpa, PAGE_SIZE};

use super::opening::OpeningStep;
use super::{DeviceConfig, DevicePath};
use crate::error::VmmError;

/// Pause between two looks for a server that is not up yet.
const LISTENS_EVERY: Duration = Duration::from_millis(10);

/// A device, by its two faces.
pub(super) struct OpenedDevice {
    pub(super) device: Arc<dyn Device>,
    pub(super) hardware: Arc<dyn PciHardware>,
    pub(super) link: DeviceLink,
    /// The VFIO file that KVM is to know, of a device that has one.
    pub(super) vfio_file: Option<OwnedFd>,
    /// The driver says that the device has no reset.
    no_reset: bool,
}

impl OpenedDevice {
    /// Resets it. A device that has no reset, and could not migrate anyway, is taken as it is.
    ///
    /// # Errors
    /// The reset failed, or a device that can migrate has none.
    pub(super) fn reset(&self) -> Result<(), VmmError> {
        match self.device.reset() {
            Err(error)
                if self.no_reset
                    && matches!(error.errno, Some(Errno::INVAL | Errno::NOTTY))
                    && matches!(self.device.capabilities(), Err(CapabilitiesError::NotMigratable(_))) =>
            {
                let device = self.device.id();
                tracing::warn!(%device, "it cannot be reset: the guest finds it as its last user left it");
                Ok(())
            }
            done => done.map_err(VmmError::device),
        }
    }
}

/// The connection between this process and a device.
pub(super) struct DeviceLink(Box<dyn Fn() -> Option<String> + Send + Sync>);

impl DeviceLink {
    /// Why it is lost; `None` while it works, as far as is known.
    pub(super) fn lost(&self) -> Option<String> {
        (self.0)()
    }
}

/// Opens a device that no guest has, in the state that it is in. It reaches no memory.
///
/// # Errors
/// It is not there, in use, or does not answer as its kind should.
pub fn open_alone(config: &DeviceConfig) -> Result<Arc<dyn Device>, VmmError> {
    let ram = Arc::new(GuestRam::new("device", &[RamSpec { gpa: Gpa(0), len: PAGE_SIZE }])?);
    match &config.path {
        DevicePath::VfioUser(socket) => {
            let options = VfioUserOptions { keep_state: true, ..served_options(config) };
            let device = VfioUserDevice::open(config.id.clone(), socket, ram, &options);
            Ok(Arc::new(device.map_err(VmmError::device)?))
        }
        DevicePath::Kernel(path) => {
            let options = KernelOptions { keep_state: true, ..kernel_options(config) };
            let device = KernelDevice::open(config.id.clone(), path, ram, &options);
            Ok(Arc::new(device.map_err(VmmError::device)?))
        }
    }
}

/// Longest time that `step` of a device takes; `None`: as long as its driver takes.
pub(super) fn step_limit(config: &DeviceConfig, step: OpeningStep) -> Option<Duration> {
    let options = matches!(config.path, DevicePath::VfioUser(_)).then(|| served_options(config))?;
    Some(match step {
        OpeningStep::Listen { .. } => options.connect_timeout,
        OpeningStep::Open => options.open_timeout,
        OpeningStep::Reset => options.transition_timeout,
    })
}

fn served_options(config: &DeviceConfig) -> VfioUserOptions {
    let default = VfioUserOptions::default();
    let transition_timeout = config.timeout.unwrap_or(default.transition_timeout);
    // A device that somebody left half way is taken to RUNNING as it is opened, which has as long.
    let open_timeout = default.open_timeout.max(transition_timeout);
    VfioUserOptions { pre_copy: config.pre_copy, transition_timeout, open_timeout, ..default }
}

/// Opens `config` for a guest with `ram`, and resets it. `begins` hears of each step with the longest time that it may take, and what
/// it returns is dropped with the step's end.
///
/// # Errors
/// As [`open`], or it could not be reset.
pub(super) fn open_and_reset<T>(
    config: &DeviceConfig,
    ram: &Arc<GuestRam>,
    space: &DmaSpace,
    begins: impl Fn(OpeningStep, Option<Duration>) -> T,
) -> Result<OpenedDevice, VmmError> {
    let step = |step| begins(step, step_limit(config, step));
    let begun = Instant::now();
    let mut listens: Option<(Errno, T)> = None;
    let opened = loop {
        let opening = step(OpeningStep::Open);
        let opened = open(config, ram, space);
        drop(opening);
        let Some(errno) = opened.as_ref().err().and_then(VmmError::nobody_listens) else { break opened? };
        let is_over = |limit| begun.elapsed() >= limit;
        if step_limit(config, OpeningStep::Listen { errno }).is_none_or(is_over) {
            break opened?;
        }
        if listens.as_ref().is_none_or(|(told, _)| *told != errno) {
            listens = Some((errno, step(OpeningStep::Listen { errno })));
        }
        // There is no event to wait for: the socket may not exist yet.
        std::thread::sleep(LISTENS_EVERY);
    };
    drop(listens);
    let resetting = step(OpeningStep::Reset);
    // A reset is some requests, which have as long together as is told.
    let limit = step_limit(config, OpeningStep::Reset);
    let limited = limit.and_then(|limit| opened.device.limit_question(limit));
    opened.reset()?;
    drop((limited, resetting));
    Ok(opened)
}

fn kernel_options(config: &DeviceConfig) -> KernelOptions {
    let vf_token = config.vf_token.clone();
    KernelOptions { pre_copy: config.pre_copy, vf_token, ..KernelOptions::default() }
}

/// Opens `config` for a guest with `ram`, which kernel devices reach by one address space.
///
/// # Errors
/// It is not there, or does not answer as its kind should.
fn open(config: &DeviceConfig, ram: &Arc<GuestRam>, space: &DmaSpace) -> Result<OpenedDevice, VmmError> {
    match &config.path {
        DevicePath::VfioUser(socket) => {
            // Its caller waits for the server, and tells.
            let options = VfioUserOptions { connect_timeout: Duration::ZERO, ..served_options(config) };
            let device = VfioUserDevice::open(config.id.clone(), socket, ram.clone(), &options);
            let device = Arc::new(device.map_err(VmmError::device)?);
            let served = device.clone();
            let link = DeviceLink(Box::new(move || served.lost()));
            Ok(OpenedDevice {
                device: device.clone(),
                hardware: device,
                link,
                vfio_file: None,
                no_reset: false,
            })
        }
        DevicePath::Kernel(path) => {
            let options = KernelOptions { space: Some(space.clone()), ..kernel_options(config) };
            let device = KernelDevice::open(config.id.clone(), path, ram.clone(), &options);
            let device = Arc::new(device.map_err(VmmError::device)?);
            let file = device.kvm_file().try_clone_to_owned();
            let file =
                file.map_err(|source| VmmError::Io { doing: "keeping a VFIO file for KVM".into(), source })?;
            // A kernel device that is unbound tells its user so by the errors of its calls.
            let link = DeviceLink(Box::new(|| None));
            let no_reset = !device.says_resettable();
            Ok(OpenedDevice {
                device: device.clone(),
                hardware: device,
                link,
                vfio_file: Some(file),
                no_reset,
            })
        }
    }
}
