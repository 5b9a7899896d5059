//! `save --device` and `restore`: the state of one device to and from a file, for authors of drivers and device servers.

use std::num::NonZeroU64;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use vfio_migration::{
    AtomicFile, DeviceControl, DeviceFileError, DeviceReport, RestoreDeviceOptions, SaveDeviceOptions,
    Snapshot, restore_device, save_device,
};
use vfio_migration_device::Device;
use vfio_migration_types::{DeviceId, MigrationState, as_millis_f64, error_chain};
use vfio_migration_vmm::machine::{DeviceConfig, open_alone};

use crate::args::moves::{RestoreCommand, SaveCommand};
use crate::exit::{CliError, Exit};
use crate::interrupt::UserInterrupt;
use crate::output::{print, print_json};
use crate::progress_display::ProgressDisplay;
use crate::units::format_size;

/// Time after which progress is looked at again, and Ctrl-C.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Time after which a device that does not answer is not waited for, once the work with it is cancelled. That of a session that
/// ends without it is less.
const UNANSWERED: Duration = Duration::from_millis(1500);
/// The name of a device that nobody names.
const NAME: &str = "dev0";

/// What `save --device --json` and `restore --json` print.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct DeviceFileReport {
    /// Name of the device, in the file too.
    pub(crate) device: String,
    /// How the device was reached: `vfio-user` or `kernel`.
    pub(crate) backend: String,
    /// The kernel driver that has it, where one is known.
    pub(crate) driver: Option<String>,
    /// The model that it declares, if any.
    pub(crate) model: Option<String>,
    /// Version of the model.
    pub(crate) model_version: Option<String>,
    /// Path of the file, as it was given.
    pub(crate) file: String,
    /// Bytes of the file.
    pub(crate) file_bytes: u64,
    /// BLAKE3 digest of the file without its last 32 bytes, which are it; hexadecimal.
    pub(crate) file_digest: String,
    /// Bytes of device state.
    pub(crate) state_bytes: u64,
    /// Those that were read while the device could run.
    pub(crate) precopy_bytes: u64,
    /// Those that were read while it was stopped.
    pub(crate) stopcopy_bytes: u64,
    /// BLAKE3 digest of the state, hexadecimal.
    pub(crate) state_digest: String,
    /// Each transition of the device, in order.
    pub(crate) arcs: Vec<ArcReport>,
    /// From the open device to the end, milliseconds.
    pub(crate) total_ms: f64,
    /// The state that the device is in now: `RUNNING` or `STOP`.
    pub(crate) left_in: String,
    /// With `--save-again`: the second file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) again: Option<Box<DeviceFileReport>>,
    /// With `--save-again`: whether the state that was read is the state that was loaded. Absent when the file has data of
    /// pre-copy: the two are then not made of the same pieces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) same_state: Option<bool>,
}

/// One arc that the device took, and its time.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct ArcReport {
    /// State before the arc, as the kernel's header calls it without the prefix: `RUNNING`.
    pub(crate) from: String,
    /// State after the arc.
    pub(crate) to: String,
    /// It was a reset and no arc: the state from before it is gone.
    pub(crate) reset: bool,
    /// How long it took, milliseconds.
    pub(crate) ms: f64,
}

/// `save --device`: writes the state of a device into a file.
pub(crate) fn save(command: &SaveCommand, device: &str, interrupt: &UserInterrupt) -> Result<Exit, CliError> {
    let config = parse(device, None)?;
    let mut how = SaveDeviceOptions::default();
    (how.force, how.stop_copy_only) = (command.options.force, command.stop_copy_only);
    how.state_limit = command.options.state_limit.map(NonZeroU64::get);
    let doing = format!("cannot save {device}");
    check_target(&command.output, how.force, &doing)?;
    let (of_thread, output) = (interrupt.clone(), command.output.clone());
    let report = watch(interrupt, !command.json, "saved", move |control| {
        let device = open_alone(&config).map_err(|error| CliError::caused(&doing, &error))?;
        of_thread.check()?;
        let report = save_device(&device, &output, how, control);
        Ok(report.map_err(|error| failed(&doing, &error))?.into())
    })?;
    print_report(&report, command.json, "saved into")
}

/// `restore`: loads the state in a file into a device.
pub(crate) fn restore(command: &RestoreCommand, interrupt: &UserInterrupt) -> Result<Exit, CliError> {
    // A usage error comes before any file is read.
    parse(&command.device, None)?;
    let doing = format!("cannot restore {} into {}", command.file.display(), command.device);
    if let Some(again) = &command.save_again {
        check_target(again, false, &doing)?;
    }
    let file = command.file.clone();
    let snapshot = interrupt.watch(move || Snapshot::open(&file))?;
    let snapshot = snapshot.map_err(|error| CliError::caused(&doing, &error))?;
    let (of_thread, json, command) = (interrupt.clone(), command.json, command.clone());
    let report = watch(interrupt, !json, "loaded", move |control| {
        let config = fitting(&snapshot, &command)?;
        of_thread.check()?;
        let device = open_alone(&config).map_err(|error| CliError::caused(&doing, &error))?;
        of_thread.check()?;
        match &command.save_again {
            None => {
                let report = restore_device(snapshot, &device, stopped(command.leave_stopped), control);
                Ok(report.map_err(|error| failed(&doing, &error))?.into())
            }
            Some(again) => {
                let report = restore_device(snapshot, &device, stopped(true), control);
                let report = report.map_err(|error| failed(&doing, &error))?;
                save_again(&device, report, again, command.leave_stopped, control)
            }
        }
    })?;
    print_report(&report, json, "restored from")
}

/// Judges where a file is to be written before a device is opened: opening it may reset it.
fn check_target(file: &Path, replace: bool, doing: &str) -> Result<(), CliError> {
    AtomicFile::create(file, replace).map(drop).map_err(|error| CliError::caused(doing, &error))
}

fn stopped(leave_stopped: bool) -> RestoreDeviceOptions {
    let mut how = RestoreDeviceOptions::default();
    how.leave_stopped = leave_stopped;
    how
}

/// Saves a device that was just loaded and is stopped, and lets it run unless `leave_stopped`.
fn save_again(
    device: &Arc<dyn Device>,
    loaded: DeviceReport,
    file: &Path,
    leave_stopped: bool,
    control: &DeviceControl,
) -> Result<DeviceFileReport, CliError> {
    let doing = format!("cannot save it again into {}", file.display());
    let mut again = save_device(device, file, SaveDeviceOptions::default(), control)
        .map_err(|error| failed(&doing, &error))?;
    again.arcs.drain(..loaded.arcs.len().min(again.arcs.len()));
    let same =
        (loaded.precopy == 0 && again.precopy == 0).then_some(loaded.state_digest == again.state_digest);
    let mut report = DeviceFileReport::from(loaded);
    report.same_state = same;
    report.again = Some(Box::new(again.into()));
    if !leave_stopped {
        device
            .set_state(MigrationState::Running)
            .map_err(|error| CliError::caused("it is loaded and saved again, and does not start", &error))?;
        report.left_in = MigrationState::Running.to_string();
    }
    Ok(report)
}

/// The device, by the name that the file gives it.
fn fitting(snapshot: &Snapshot, command: &RestoreCommand) -> Result<DeviceConfig, CliError> {
    let file = command.file.display();
    let unfit = |text: String| CliError::new(Exit::Incompatible, text);
    let Some(device) = snapshot.device() else {
        return Err(unfit(format!(
            "{file} holds the guest of a whole VM: `vfio-migrate vm --restore {file} …` brings it back"
        )));
    };
    let config = parse(&command.device, Some(&device.id))?;
    if config.id != device.id {
        return Err(unfit(format!(
            "the device in {file} is called {}, not {}; without ,id= it takes the name from the file",
            device.id, config.id
        )));
    }
    Ok(config)
}

fn parse(text: &str, name: Option<&DeviceId>) -> Result<DeviceConfig, CliError> {
    let usage = |text: String| CliError::new(Exit::Usage, format!("--device: {text}"));
    let otherwise = match name {
        Some(name) => name.clone(),
        None => DeviceId::new(NAME).map_err(|error| usage(error.to_string()))?,
    };
    DeviceConfig::named(text, &otherwise).map_err(|error| usage(error.to_string()))
}

/// Does `work` on a thread of its own, shows how far it is, and cancels it on Ctrl-C. A device that does not answer then is not
/// waited for: the process ends, and what there was of a file with it.
fn watch(
    interrupt: &UserInterrupt,
    shown: bool,
    done: &str,
    work: impl FnOnce(&DeviceControl) -> Result<DeviceFileReport, CliError> + Send + 'static,
) -> Result<DeviceFileReport, CliError> {
    let control = DeviceControl::default();
    let mut progress = ProgressDisplay::new(shown);
    let (ended, end) = channel::<()>();
    let of_thread = control.clone();
    let working = std::thread::Builder::new().name("device".into()).spawn(move || {
        let result = work(&of_thread);
        drop(ended);
        result
    });
    let working = working.map_err(|error| CliError::caused("there is no thread left", &error))?;
    let mut cancelled = None;
    while end.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
        let (moved, left) = control.progress();
        progress.update_bytes(done, moved, left);
        let Some(name) = interrupt.name() else { continue };
        let since = *cancelled.get_or_insert_with(Instant::now);
        control.cancel();
        if since.elapsed() >= UNANSWERED {
            return Err(CliError::failed(format!(
                "interrupted by {name} while the device does not answer; it is left on its way, and a reset ends that"
            )));
        }
    }
    working.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn failed(doing: &str, error: &DeviceFileError) -> CliError {
    match error {
        DeviceFileError::Cancelled(fate) => CliError::failed(format!("interrupted; {fate}")),
        DeviceFileError::NotMigratable(_)
        | DeviceFileError::OtherDevice(_)
        | DeviceFileError::OfMachine { .. } => {
            CliError::new(Exit::Incompatible, format!("{doing}: {}", error_chain(error)))
        }
        error => CliError::caused(doing, error),
    }
}

fn print_report(report: &DeviceFileReport, json: bool, how: &str) -> Result<Exit, CliError> {
    if json { print_json(report) } else { print(text(report, how)) }?;
    Ok(Exit::Done)
}

impl From<DeviceReport> for DeviceFileReport {
    fn from(report: DeviceReport) -> Self {
        let arcs = report.arcs.iter().map(|arc| ArcReport {
            from: arc.from.to_string(),
            to: arc.to.to_string(),
            reset: arc.reset,
            ms: as_millis_f64(arc.took),
        });
        Self {
            driver: report.device.driver.as_ref().map(|driver| driver.name.clone()),
            device: report.device.id.to_string(),
            backend: report.device.backend,
            model: report.device.model,
            model_version: report.device.model_version,
            file: report.file.display().to_string(),
            file_bytes: report.file_bytes,
            file_digest: hexadecimal(&report.file_digest),
            state_bytes: report.precopy + report.stopcopy,
            precopy_bytes: report.precopy,
            stopcopy_bytes: report.stopcopy,
            state_digest: hexadecimal(&report.state_digest),
            arcs: arcs.collect(),
            total_ms: as_millis_f64(report.took),
            left_in: report.left_in.to_string(),
            again: None,
            same_state: None,
        }
    }
}

fn hexadecimal(digest: &[u8; 32]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The report for people.
fn text(report: &DeviceFileReport, how: &str) -> String {
    let what = match (&report.model, &report.model_version, &report.driver) {
        (Some(model), Some(version), _) => format!("{model} {version}"),
        (Some(model), None, _) => model.clone(),
        (None, _, Some(driver)) => format!("driver {driver}"),
        (None, _, None) => "no model declared".into(),
    };
    let mut text = format!(
        "device {} ({}, {what}) {how} {} ({}), and is in {}\n\
         state: {}, of which {} before it was stopped and {} while it was; {:.1} ms\n",
        report.device,
        report.backend,
        report.file,
        format_size(report.file_bytes),
        report.left_in,
        format_size(report.state_bytes),
        format_size(report.precopy_bytes),
        format_size(report.stopcopy_bytes),
        report.total_ms
    );
    for arc in &report.arcs {
        let by = if arc.reset { " by a reset" } else { "" };
        text.push_str(&format!("  {} → {}{by}: {:.1} ms\n", arc.from, arc.to, arc.ms));
    }
    text.push_str(&format!("digest of the state: {}\n", report.state_digest));
    text.push_str(&format!("digest of the file: {}\n", report.file_digest));
    if let Some(again) = &report.again {
        let same = match report.same_state {
            Some(true) => "the same state",
            Some(false) => "ANOTHER STATE than was loaded",
            None => "not comparable with what was loaded, which has data of pre-copy",
        };
        text.push_str(&format!("saved again into {}: {same}\n", again.file));
        text.push_str(&format!("digest of the state: {}\n", again.state_digest));
    }
    text
}
