//! `demo`: a running guest and its devices move live between processes, and the guest judges.

mod processes;
pub(crate) mod report;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use report::{CaughtBy, DemoBytes, DemoOutcome, Pids};
use serde_json::{Value, json};
use vfio_migration_vmm::machine::kvm_answers;

use self::processes::Process;
pub(crate) use report::{Counts, DemoReport};

use crate::args::serve::{Break, DemoCommand, DemoTransport};
use crate::control::client::{ControlClient, ControlError};
use crate::control::guest::{GuestInfo, STAGE_RUNNING};
use crate::control::protocol::{ControlVerb, MigrateArguments, MigrationInfo, MigrationStatus, StatusReport};
use crate::exit::{CliError, Exit};
use crate::interrupt::UserInterrupt;
use crate::move_options::{MoveOptions, SwitchoverOptions};
use crate::output::{WaitingDisplay, eprintln_line, print, print_json};
use crate::progress_display::ProgressDisplay;
use crate::units::milliseconds;
use crate::verbs::tls::make::throw_away;
use crate::words::check_memory;

/// Longest pause of the guest with up to 8 devices, where nobody says another.
const PAUSE: Duration = Duration::from_millis(300);
/// Longest wait for the guest to boot and to have something worth moving, with up to 8 devices.
const WARM_UP: Duration = Duration::from_secs(60);
/// Longest wait for the guest to have looked at everything once it has moved, with up to 8 devices.
const JUDGEMENT: Duration = Duration::from_secs(120);
/// Time that the guest must have run at the destination: an interrupt counts as lost after one second.
const INTERRUPT_PATIENCE: Duration = Duration::from_millis(1600);

/// The folder of the demo's certificates, in its own.
const CERTIFICATES: &str = "certificates";

/// How long to wait with so many devices: the more there are, the more one guest and its VM have to look at.
fn patience(with_eight: Duration, devices: u8) -> Duration {
    with_eight * u32::from(devices.div_ceil(8))
}

/// Runs the demo and prints its report.
pub(crate) fn run(options: &DemoCommand, interrupt: &UserInterrupt) -> Result<Exit, CliError> {
    let kvm = !options.software && kvm_answers().is_ok();
    let guest = if kvm { "kvm" } else { "software" };
    let mut report = DemoReport::begun(options.transport, guest);
    let played = check(options)
        .and_then(|()| Stage::set(options, interrupt, &mut report.pids))
        .and_then(|stage| stage.play(&mut report));
    let exit = match played {
        Ok(exit) => exit,
        // A program that asked for JSON gets JSON, whatever happened.
        Err(failure) if options.json => {
            eprintln_line(format_args!("vfio-migrate: {failure}"));
            report.outcome = DemoOutcome::Failed;
            report.verified = false;
            report.error = Some(failure.text);
            failure.exit
        }
        Err(failure) => return Err(failure),
    };
    if options.json {
        print_json(&report)?;
    } else {
        print(report.text())?;
    }
    Ok(exit)
}

/// Refuses sizes that cannot be, before anything is started.
fn check(options: &DemoCommand) -> Result<(), CliError> {
    check_memory(options.memory)?;
    let device = vfio_migration_sim::Options {
        state_size: options.device_state,
        state_dirty_rate: options.device_dirty_rate,
        precopy: !options.no_precopy,
        ..Default::default()
    };
    device.check().map_err(|error| CliError::new(Exit::Usage, format!("--device-state: {error}")))
}

/// Everything that a demo set up.
struct Stage<'a> {
    options: &'a DemoCommand,
    interrupt: &'a UserInterrupt,
    source: (Process, ControlClient),
    destination: (Process, ControlClient),
    devices: Vec<Process>,
    // Last, so that the processes have left before their sockets go.
    _dir: tempfile::TempDir,
}

/// The VMs first: a VM whose device has left has lost it. Those of one kind leave side by side.
impl Drop for Stage<'_> {
    fn drop(&mut self) {
        let mut vms = [&mut self.source.0, &mut self.destination.0];
        vms.iter_mut().for_each(|vm| vm.leave());
        vms.into_iter().for_each(Process::end);
        self.devices.iter_mut().for_each(Process::leave);
    }
}

impl<'a> Stage<'a> {
    /// Starts everything. `pids` gets each process as it starts.
    fn set(
        options: &'a DemoCommand,
        interrupt: &'a UserInterrupt,
        pids: &mut Pids,
    ) -> Result<Self, CliError> {
        let dir = tempfile::Builder::new()
            .prefix("vfio-migrate-demo-")
            .tempdir()
            .map_err(|error| CliError::caused("cannot make a folder for the sockets", &error))?;
        let sides = ["source", "destination"].map(|name| Side::new(options, dir.path(), name));
        if options.transport == DemoTransport::Tcp {
            throw_away(&dir.path().join(CERTIFICATES), &sides.each_ref().map(|side| side.name))?;
        }
        let mut devices = Vec::new();
        for side in &sides {
            for (name, socket) in &side.devices {
                let mut process =
                    Process::start(&format!("{} device {name}", side.name), &side.device(name, socket))?;
                pids.devices.push(process.pid());
                process.listening(socket)?;
                devices.push(process);
            }
        }
        let uuid = uuid::Uuid::new_v4().to_string();
        let [source, destination] = sides.map(|side| -> Result<_, CliError> {
            let mut process = Process::start(&format!("{} VM", side.name), &side.vm(&uuid))?;
            let pid = if side.is_source() { &mut pids.source } else { &mut pids.destination };
            *pid = process.pid();
            let control = process.control(&side.control, patience(processes::PATIENCE, options.devices))?;
            Ok((process, control))
        });
        Ok(Self { options, interrupt, source: source?, destination: destination?, devices, _dir: dir })
    }

    fn play(mut self, report: &mut DemoReport) -> Result<Exit, CliError> {
        let status = query(&mut self.source.1)?.vm;
        report.guest.clone_from(&status.guest);
        if status.guest == "software" && !self.options.software {
            eprintln_line(
                "NO KVM: /dev/kvm does not answer on this host, so the software guest runs the same driver and the same \
                 checks instead.",
            );
        }
        self.warm_up()?;
        let before = guest(&mut self.source.1)?;
        let uri = query(&mut self.destination.1)?
            .vm
            .incoming
            .ok_or_else(|| CliError::failed("the destination VM does not wait for a guest"))?;
        let outgoing = self.migrate(&uri)?;
        report.security.clone_from(&outgoing.security);
        report.total_ms = outgoing.total_ms;
        report.downtime_ms = outgoing.downtime_ms;
        report.verify_ms = outgoing.verify_ms;
        report.iterations = outgoing.iterations;
        report.bytes = DemoBytes {
            ram: outgoing.transferred.ram,
            device_precopy: outgoing.transferred.device_precopy,
            device_stopcopy: outgoing.transferred.device_stopcopy,
        };
        report.ram_digest_match = outgoing.ram_digest_match;
        report.device_digest_match = outgoing.device_digest_match;
        report.phases.clone_from(&outgoing.phases);
        report.error.clone_from(&outgoing.error);
        match outgoing.status {
            MigrationStatus::Completed => self.judge_arrival(&before, report)?,
            MigrationStatus::Cancelled | MigrationStatus::Failed => self.judge_return(&outgoing, report)?,
            MigrationStatus::NotStarted | MigrationStatus::Unknown => {
                report.outcome = DemoOutcome::NotStarted
            }
            MigrationStatus::Unresolved
            | MigrationStatus::Active
            | MigrationStatus::PreSwitchover
            | MigrationStatus::Cancelling
            | MigrationStatus::Failing
            | MigrationStatus::Rehearsed => {}
        }
        // A VM that dies afterwards, or a digest that differs, is no success whatever the guest says.
        report.verified = report.outcome == DemoOutcome::Completed
            && !report.lost.any()
            && report.error.is_none()
            && report.ram_digest_match != Some(false)
            && report.device_digest_match != Some(false)
            && self.destination.0.alive();
        // What moved, and was not verified, failed.
        Ok(match outgoing.exit() {
            Exit::Done if !report.verified => Exit::Failed,
            exit => exit,
        })
    }

    /// Until the driver runs, every page area has been walked once, and blocks flow.
    fn warm_up(&mut self) -> Result<(), CliError> {
        let options = self.options;
        let waiting = WaitingDisplay::new(!options.json, "the guest boots and starts its work");
        until(self.interrupt, patience(WARM_UP, options.devices), "the guest to start its work", || {
            waiting.tick();
            let info = guest(&mut self.source.1)?;
            if info.stage > STAGE_RUNNING || info.failure != 0 {
                return Err(CliError::failed(format!(
                    "the guest failed to start (code {:#x}, detail {:#x})",
                    info.failure, info.failure_detail
                )));
            }
            let writes = options.dirty_rate == 0 || info.pages_written > 2000.min(options.dirty_rate / 4096);
            Ok(info.stage == STAGE_RUNNING && writes && info.dma_blocks >= 64 * u64::from(options.devices))
        })
    }

    fn migrate(&mut self, uri: &str) -> Result<MigrationInfo, CliError> {
        // Digests would notice a sabotage before the guest can: it is to act below them, unless asked otherwise.
        let verify = self.options.sabotage.is_none() || self.options.strict;
        // A sabotage needs something to spoil: the guest is to write what the first copy cannot have held.
        let spoil = self.options.sabotage.is_some();
        let arguments = MigrateArguments {
            uri: uri.to_owned(),
            options: MoveOptions {
                downtime_limit: Some(
                    self.options.downtime_limit.unwrap_or_else(|| patience(PAUSE, self.options.devices)),
                ),
                ..MoveOptions::default()
            },
            switchover: SwitchoverOptions {
                verify,
                pause_before_switchover: spoil,
                ..SwitchoverOptions::default()
            },
        };
        self.source
            .1
            .call(ControlVerb::Migrate, json!(arguments))
            .map_err(|error| CliError::caused("the source VM refused to migrate", &error))?;
        let mut progress = ProgressDisplay::new(!self.options.json);
        let mut copied: Option<GuestInfo> = None;
        let begun = query(&mut self.source.1)?.latest();
        let mut info =
            begun.ok_or_else(|| CliError::failed("the source VM knows of no migration"))?.migration;
        loop {
            progress.update(&info);
            if !info.status.is_under_way() {
                return Ok(info);
            }
            if spoil && info.status == MigrationStatus::PreSwitchover {
                let now = guest(&mut self.source.1)?;
                let then = copied.get_or_insert(now);
                // A refusal says that it does not wait this very moment: asked again if it does once more.
                if self.has_worked(then, &now)
                    && let Err(error) = self.source.1.call(ControlVerb::MigrateContinue, Value::Null)
                    && !matches!(error, ControlError::Refused(_))
                {
                    return Err(CliError::caused("lost the source VM", &error));
                }
            }
            self.interrupt.check()?;
            let news = self.source.1.next_migration(Duration::from_millis(100));
            if let Some(news) = news.map_err(|error| CliError::caused("lost the source VM", &error))? {
                info = news;
            }
        }
    }

    /// Whether the guest has written enough since `then` for a sabotage to be felt.
    fn has_worked(&self, then: &GuestInfo, now: &GuestInfo) -> bool {
        let pages = if self.options.dirty_rate == 0 { 0 } else { 512 };
        let blocks = 64 * u64::from(self.options.devices);
        now.pages_written >= then.pages_written + pages && now.dma_blocks >= then.dma_blocks + blocks
    }

    /// The guest has moved: let it look at everything, then read what it found.
    fn judge_arrival(&mut self, before: &GuestInfo, report: &mut DemoReport) -> Result<(), CliError> {
        report.outcome = DemoOutcome::Completed;
        let arrived = guest(&mut self.destination.1)?;
        let began = Instant::now();
        let devices = self.options.devices;
        let waiting =
            WaitingDisplay::new(!self.options.json, "the guest, moved, checks everything it ever wrote");
        let verdict = until(
            self.interrupt,
            patience(JUDGEMENT, devices),
            "the guest to check everything after the move",
            || {
                waiting.tick();
                let now = guest(&mut self.destination.1)?;
                // Two more full walks: the first may have begun before the move.
                let pages = self.options.dirty_rate == 0 || now.page_passes >= arrived.page_passes + 2;
                let blocks = now.block_passes >= arrived.block_passes + 2
                    && now.dma_blocks >= arrived.dma_blocks + 64 * u64::from(devices);
                let enough = pages && blocks && began.elapsed() >= INTERRUPT_PATIENCE;
                // A guest that has lost something may well be stuck with it.
                Ok(enough || (Counts::lost(&now).any() && began.elapsed() >= 3 * INTERRUPT_PATIENCE))
            },
        );
        drop(waiting);
        let after = guest(&mut self.destination.1)?;
        report.checked = Counts::checked(&after);
        report.lost = Counts::lost(&after);
        report.spurious_interrupts = after.spurious;
        report.guest_gap_ms = Some(milliseconds(Duration::from_nanos(after.longest_gap_ns)));
        if Counts::lost(&after).any() && !Counts::lost(before).any() {
            report.caught_by = Some(CaughtBy::Guest);
        }
        if let Err(failure) = verdict
            && report.caught_by.is_none()
        {
            self.interrupt.check()?;
            report.error = Some(failure.to_string());
        }
        if after.stage != STAGE_RUNNING || after.failure != 0 {
            report.error = Some(format!("the guest failed after the move (code {:#x})", after.failure));
        }
        if Counts::lost(before).any() {
            report.error = Some("the guest had lost something before the move began".into());
        }
        Ok(())
    }

    /// The migration did not complete: the guest must go on at the source, with nothing lost.
    fn judge_return(&mut self, outgoing: &MigrationInfo, report: &mut DemoReport) -> Result<(), CliError> {
        let back = guest(&mut self.source.1)?;
        let goes_on =
            until(self.interrupt, Duration::from_secs(10), "the guest to go on at the source", || {
                Ok(guest(&mut self.source.1)?.loops > back.loops + 10)
            });
        let now = guest(&mut self.source.1)?;
        report.outcome = if goes_on.is_ok() { DemoOutcome::Aborted } else { DemoOutcome::Failed };
        report.checked = Counts::checked(&now);
        report.lost = Counts::lost(&now);
        report.spurious_interrupts = now.spurious;
        if self.options.sabotage.is_some() && outgoing.status == MigrationStatus::Failed {
            report.caught_by = Some(CaughtBy::Engine);
        }
        Ok(())
    }
}

/// One side of the demo: where its sockets are and how its processes are called.
struct Side<'a> {
    options: &'a DemoCommand,
    name: &'static str,
    control: PathBuf,
    listen: PathBuf,
    state: PathBuf,
    certificates: PathBuf,
    devices: Vec<(String, PathBuf)>,
}

impl<'a> Side<'a> {
    fn new(options: &'a DemoCommand, dir: &Path, name: &'static str) -> Self {
        // The order of two devices can only be got wrong with two devices.
        let count =
            if options.sabotage == Some(Break::P2pOrder) { options.devices.max(2) } else { options.devices };
        let devices =
            (0..count).map(|n| (format!("dev{n}"), dir.join(format!("{name}-dev{n}.sock")))).collect();
        Self {
            options,
            name,
            control: dir.join(format!("{name}.control")),
            listen: dir.join(format!("{name}.migration")),
            state: dir.join(format!("{name}.state")),
            certificates: dir.join(CERTIFICATES).join(name),
            devices,
        }
    }

    fn is_source(&self) -> bool {
        self.name == "source"
    }

    fn device(&self, _name: &str, socket: &Path) -> Vec<String> {
        let options = self.options;
        let mut arguments = strings(&["device", "--exit-with-stdin", "--socket"]);
        arguments.push(socket.display().to_string());
        arguments.extend(["--state-size".into(), options.device_state.to_string()]);
        arguments.extend(["--state-dirty-rate".into(), options.device_dirty_rate.to_string()]);
        // The guest checks each block on one vCPU, which some hosts emulate: all devices together keep one pace.
        // With its log sabotaged a device is slower: the guest is to look at a stale block before the next one heals it.
        let pace = if options.sabotage == Some(Break::DeviceLog) { 8000 } else { 1000 };
        arguments.extend(["--dma-interval".into(), format!("{}us", pace * self.devices.len())]);
        if options.no_precopy {
            arguments.push("--no-precopy".into());
        }
        let fault = match options.sabotage {
            Some(Break::DeviceLog) => Some("ignore-dirty-log:3"),
            Some(Break::DeviceTail) => Some("corrupt-tail"),
            // Of two descriptors one is for the peer: there is always one that is carried out late.
            Some(Break::P2pOrder) => Some("hold-dma:2"),
            _ => None,
        };
        if let (Some(fault), true) = (fault, self.is_source()) {
            arguments.extend(["--fault".into(), fault.into()]);
        }
        arguments
    }

    fn vm(&self, uuid: &str) -> Vec<String> {
        let options = self.options;
        let mut arguments = strings(&["vm", "--exit-with-stdin", "--uuid", uuid, "--memory"]);
        arguments.push(options.memory.to_string());
        arguments.extend(["--dirty-rate".into(), options.dirty_rate.to_string()]);
        arguments.extend(["--control".into(), self.control.display().to_string()]);
        arguments.extend(["--state-dir".into(), self.state.display().to_string()]);
        for (name, socket) in &self.devices {
            arguments.extend(["--device".into(), format!("vfio-user:{},id={name}", socket.display())]);
        }
        if options.software {
            arguments.push("--software".into());
        }
        if options.transport == DemoTransport::Tcp {
            arguments.extend(["--tls-creds".into(), self.certificates.display().to_string()]);
        }
        if !self.is_source() {
            let uri = match options.transport {
                DemoTransport::Tcp => "tcp:127.0.0.1:0".into(),
                DemoTransport::Unix => format!("unix:{}", self.listen.display()),
            };
            arguments.extend(["--incoming".into(), uri]);
        }
        let word = match (options.sabotage, self.is_source()) {
            (Some(Break::DirtyLog), true) => Some("dirty-log"),
            (Some(Break::PageOrder), false) => Some("page-order"),
            (Some(Break::P2pOrder), true) => Some("p2p-order"),
            (Some(Break::Interrupt), false) => Some("interrupt"),
            _ => None,
        };
        if let Some(word) = word {
            arguments.extend(["--sabotage".into(), word.into()]);
        }
        arguments
    }
}

fn strings(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_string()).collect()
}

/// The report of a VM of the demo on itself and its migration.
fn query(client: &mut ControlClient) -> Result<StatusReport, CliError> {
    client.query().map_err(|error| CliError::caused("a VM of the demo is lost", &error))
}

fn guest(client: &mut ControlClient) -> Result<GuestInfo, CliError> {
    let report = client.call(ControlVerb::QueryGuest, Value::Null);
    let report = report.map_err(|error| CliError::caused("a VM of the demo is lost", &error))?;
    serde_json::from_value(report)
        .map_err(|error| CliError::caused("a VM of the demo answers nonsense", &error))
}

/// Polls `done` until it holds.
fn until(
    interrupt: &UserInterrupt,
    patience: Duration,
    what: &str,
    mut done: impl FnMut() -> Result<bool, CliError>,
) -> Result<(), CliError> {
    let deadline = Instant::now() + patience;
    while !done()? {
        interrupt.check()?;
        if Instant::now() > deadline {
            return Err(CliError::failed(format!("waited {} s in vain for {what}", patience.as_secs())));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
