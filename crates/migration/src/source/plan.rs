//! P0: the source's own preconditions, before anybody is talked to.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vfio_migration_compat::{MachineManifest, Reason, SessionCode};
use vfio_migration_device::{Capabilities, CapabilitiesError};
use vfio_migration_engine::ownership::{SourceRecord, SourceState};
use vfio_migration_engine::{self as engine, DeviceFacts, SourceConfig};
use vfio_migration_memory::RamHold;
use vfio_migration_types::{AttemptId, Epoch, Failure, Phase, Side, VmId, error_chain};
use vfio_migration_wire::{FEATURE_VERIFY, Offer, VERSIONS, limits};

use crate::control::Control;
use crate::device_state::tracked::{all_answer, tracked};
use crate::error::{MigrateError, not_begun, refused_here};
use crate::machine::{Machine, MigratableDevice};
use crate::offer::{digest_of_configuration, names};
use crate::options::SourceOptions;
use crate::ownership::journal::{Journal, JournalFile, JournalSide, read_journal};
use crate::ram::uncovered::of_uncovered;
use crate::reasons::{of_source, permits, with};
use crate::rehearsal::Rehearse;
use crate::report::{AttemptInfo, PhaseTime, Progress};
use crate::session::abandon::{NoThread, Unanswered, answer_unless};
use crate::session::awaited::{AwaitedAnswers, Request};
use crate::session::fail::InPhase;
use crate::session::host::nonce;
use crate::session::threads::no_thread;
use crate::unresolved::UnresolvedMigration;
use crate::uri::Uri;

/// A source whose own preconditions hold: nothing has been touched, nobody has been talked to.
pub(super) struct PlannedMigration {
    pub(super) machine: Arc<dyn Machine>,
    pub(super) options: SourceOptions,
    pub(super) control: Control,
    pub(super) uri: Uri,
    /// What the session is about, for its journal and for whoever watches it.
    pub(super) info: AttemptInfo,
    pub(super) journal: Arc<Journal>,
    pub(super) attempt: AttemptId,
    pub(super) epoch: Epoch,
    pub(super) manifest: MachineManifest,
    /// What was found of it, the devices' own answers included: the destination's word comes on top.
    pub(super) own_reasons: Vec<Reason>,
    pub(super) devices: Vec<(MigratableDevice, Capabilities)>,
    pub(super) begun: Instant,
    /// Time that the plan took.
    pub(super) took: Duration,
    /// What the session waits for.
    pub(super) answers: AwaitedAnswers,
    /// RAM stays as it is, for as long as anybody works on this.
    _ram_hold: RamHold,
}

impl PlannedMigration {
    /// Whether writes to guest RAM may go unseen: what they may have reached is sent once more in the downtime.
    pub(super) fn may_be_unseen(&self) -> bool {
        let judged =
            || self.own_reasons.iter().any(|reason| reason.code == SessionCode::DirtyUncovered.name());
        self.options.allow_all_dirty || self.options.to_file || judged()
    }

    pub(super) fn new(
        machine: Arc<dyn Machine>,
        options: SourceOptions,
        control: Control,
        uri: Uri,
        rehearse: Option<Rehearse>,
    ) -> Result<(Self, engine::SourceEngine), MigrateError> {
        let (begun, watched) = (control.begun(), control.clone());
        Self::begun_at(begun, machine, options, control, uri, rehearse).inspect_err(|_| {
            let (phase, elapsed) = (Phase::Plan, begun.elapsed());
            let phases = vec![PhaseTime { phase, took: elapsed }];
            watched.set_progress(Progress { phase, elapsed, phases, ..watched.progress() });
        })
    }

    fn begun_at(
        begun: Instant,
        machine: Arc<dyn Machine>,
        options: SourceOptions,
        control: Control,
        uri: Uri,
        rehearse: Option<Rehearse>,
    ) -> Result<(Self, engine::SourceEngine), MigrateError> {
        let vm = machine.id();
        if control.waiting_cancel().is_some() {
            return Err(control.cancelled(Phase::Plan));
        }
        let Some(mut info) = control.progress().attempt else {
            return Err(not_begun(Phase::Plan, "the attempt was not begun: a defect of this program"));
        };
        let attempt = info.attempt;
        let ram_hold = machine.ram().hold(format!("a session with {} is under way", info.peer));
        // A rehearsal reads the journal and leaves no trace in it.
        let dir = options.state_dir.as_deref().filter(|_| rehearse.is_none());
        let (dir, asked, answers) = (dir.map(Path::to_owned), options.clone(), control.answers().clone());
        let (journal, epoch) = unless_cancelled(&control, move || {
            let _wait = answers.wait(None, Request::Journal, None);
            let journal = Journal::open(dir.as_deref(), vm, JournalSide::Source)
                .map_err(|error| refused_here(error.in_phase(Side::Source, Phase::Plan)))?;
            let epoch = owned_epoch(known(&journal, &asked, vm)?, &asked)?;
            Ok((journal, epoch))
        })?;
        info.epoch = epoch;
        // Apart from the journal: a device that is still asked when this has ended must not hold the VM's journal.
        let (asked, of_thread, answers) = (options.clone(), Arc::clone(&machine), control.answers().clone());
        let (manifest, configuration, own, devices) = unless_cancelled(&control, move || {
            let devices = of_thread.devices().into_iter();
            let devices: Vec<_> = devices.map(|moved| tracked(moved, &answers)).collect();
            all_answer(&devices).map_err(|error| refused_here(error.in_phase(Side::Source, Phase::Plan)))?;
            let _wait = answers.wait(None, Request::Manifest, None);
            let manifest = of_thread
                .manifest()
                .map_err(|error| refused_here(error.in_phase(Side::Source, Phase::Plan)))?;
            let rules = asked.rules();
            let own = of_source(&manifest, &devices, &rules, asked.device_alone);
            let own = if asked.device_alone {
                own
            } else {
                with(own, of_uncovered(&*of_thread, &manifest, &devices, &rules))
            };
            // Who only asks is told everything at once, when the destination has been asked too.
            if rehearse != Some(Rehearse::Ask) && !permits(&own, asked.to_file) {
                return Err(MigrateError::Refused(own.reasons));
            }
            let configuration = of_thread
                .configuration()
                .map_err(|error| refused_here(error.in_phase(Side::Source, Phase::Plan)))?;
            if configuration.len() > limits::CONFIGURATION {
                let (has, most) = (configuration.len(), limits::CONFIGURATION);
                let text = format!("the VMM's own configuration has {has} bytes, where {most} are the most");
                return Err(not_begun(Phase::Plan, text));
            }
            Ok((manifest, configuration, own, usable_devices(devices)?))
        })?;
        let json = manifest.to_json().map_err(|error| {
            not_begun(Phase::Plan, format!("the manifest cannot be written: {}", error_chain(&error)))
        })?;
        let configuration_digest = digest_of_configuration(&configuration);
        let names = names(&options.device_map);
        let offer = Offer { names, configuration, configuration_digest, manifest: json };
        let facts = devices.iter().map(|(moved, capabilities)| DeviceFacts {
            id: moved.device.id().clone(),
            flags: capabilities.flags,
            precopy_info: capabilities.precopy_info,
        });
        let limit = options.downtime_limit;
        let verify = options.verify;
        let features = if verify { FEATURE_VERIFY } else { 0 };
        let engine = engine::SourceEngine::new(SourceConfig {
            vm,
            attempt,
            epoch,
            versions: VERSIONS,
            features,
            offer,
            devices: facts.collect(),
            downtime_limit: limit,
            // COMMIT, its answer, and the start of the devices there: a tenth of the limit, within reason.
            commit_reserve: options.commit_reserve.unwrap_or(
                (limit / 10).clamp(Duration::from_millis(5), Duration::from_millis(100)).min(limit / 2),
            ),
            give_up_after: options.give_up_after,
            pause_before_switchover: options.pause_before_switchover && rehearse.is_none(),
            suspend: options.suspend,
            verify,
            peer_timeout: options.peer_timeout,
            rehearse,
        });
        let journal = Arc::new(journal);
        let answers = control.answers().clone();
        let plan = Self {
            machine,
            options,
            control,
            uri,
            info,
            journal,
            attempt,
            epoch,
            manifest,
            own_reasons: own.reasons,
            devices,
            answers,
            begun,
            took: begun.elapsed(),
            _ram_hold: ram_hold,
        };
        Ok((plan, engine))
    }
}

/// Does `work`, a question that a disk or a device may not answer, unless the operator cancels meanwhile.
fn unless_cancelled<T: Send + 'static>(
    control: &Control,
    work: impl FnOnce() -> Result<T, MigrateError> + Send + 'static,
) -> Result<T, MigrateError> {
    match answer_unless(|| control.look_around(Phase::Plan, &[]).is_some(), None, work) {
        Ok(answer) => answer,
        Err(Unanswered::NoThread(NoThread(error))) => {
            Err(refused_here(no_thread(Side::Source, Phase::Plan, "plan", &error)))
        }
        Err(Unanswered::GivenUp | Unanswered::Late) => Err(control.cancelled(Phase::Plan)),
    }
}

/// The journal's content on disk, also where none is open.
fn known(journal: &Journal, options: &SourceOptions, vm: VmId) -> Result<JournalFile, MigrateError> {
    let on_disk = match &options.state_dir {
        Some(dir) => read_journal(dir, vm),
        None => Ok(None),
    };
    let known = on_disk.and_then(|file| file.map_or_else(|| journal.read(), Ok));
    known.map_err(|error| refused_here(error.in_phase(Side::Source, Phase::Plan)))
}

/// The epoch under which this side owns the guest, if the journal does not say that it does not.
fn owned_epoch(file: JournalFile, options: &SourceOptions) -> Result<Epoch, MigrateError> {
    let committing = |record: &&SourceRecord| record.state == SourceState::Committing;
    let unanswered = file.source.as_ref().filter(committing);
    if let Some(record) = unanswered.filter(|record| file.owned_epoch() <= Some(record.epoch)) {
        let SourceRecord { vm, attempt, epoch, peer, .. } = record.clone();
        let why =
            format!("the journal says that attempt {attempt} to {peer} was committed to and never answered");
        let unresolved = UnresolvedMigration::of_journal(vm, attempt, epoch.next(), peer, why);
        return Err(MigrateError::Unresolved(Box::new(unresolved)));
    }
    file.epochs().may_send(options.epoch).map_err(|over| {
        let text = format!("{over}: the VM was given away, and nothing says that it came back");
        let remedy = "if it did come back, pass the epoch under which it did";
        refused_here(Failure::new(Side::Source, Phase::Plan, text).with_remedy(remedy))
    })
}

/// The machine's devices, with what each can do. One that cannot migrate does not, even if a policy took it for a warning.
fn usable_devices(
    devices: Vec<MigratableDevice>,
) -> Result<Vec<(MigratableDevice, Capabilities)>, MigrateError> {
    if devices.len() > usize::from(limits::DEVICES) {
        return Err(not_begun(
            Phase::Plan,
            format!("{} devices are more than can migrate at once", devices.len()),
        ));
    }
    let capabilities = |moved: MigratableDevice| match moved.device.capabilities() {
        Ok(capabilities) => Ok((moved, capabilities)),
        Err(CapabilitiesError::Device(error)) => Err(refused_here(error.in_phase(Side::Source, Phase::Plan))),
        Err(CapabilitiesError::NotMigratable(why)) => {
            let id = moved.device.id();
            let reason = Reason::new(
                SessionCode::DeviceNotMigratable,
                format!("device {id} cannot migrate: {}", why.0),
            );
            Err(MigrateError::Refused(vec![Reason { device: Some(id.to_string()), ..reason }]))
        }
    };
    devices.into_iter().map(capabilities).collect()
}

/// A name that no attempt had before.
pub(crate) fn new_attempt_id() -> Result<AttemptId, MigrateError> {
    let drawn = nonce()
        .map_err(|errno| not_begun(Phase::Plan, format!("no random number for the attempt: {errno}")))?;
    Ok(AttemptId(drawn))
}
