//! Snapshots: the guest of this `vm` goes into a file, or comes out of one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use vfio_migration::{
    AttemptInfo, AttemptKind, DestinationOptions, IncomingError, IncomingOffer, Machine, MigrateError,
    NotBuilt, SaveError, Saved, Snapshot, Source, save,
};
use vfio_migration_vmm::machine::ReferenceMachine;

use super::running::{RunningVm, build_with_memory};
use super::slot::Slot;
use super::{history, info, outgoing};
use crate::control::protocol::{MigrationInfo, SaveArguments};
use crate::control::refused::Refused;
use crate::exit::{CliError, Exit};
use crate::history::SessionKind;

/// Begins to save; returns once the session has its thread.
pub(super) fn begin(vm: &Arc<RunningVm>, arguments: &SaveArguments) -> Result<(), Refused> {
    let path = PathBuf::from(&arguments.path);
    if !path.is_absolute() || path.file_name().is_none() {
        return Err(Refused::generic(format!("{} is no absolute path of a file", path.display())));
    }
    let slot = vm.state.slot();
    let Slot::Here { machine, epoch } = slot else { return Err(vm.state.refusal(&slot, "be saved")) };
    if let Some(why) = machine.failure() {
        return Err(Refused::generic(format!("the guest has stopped by itself and cannot be saved: {why}")));
    }
    let (mut options, how) = arguments.options.clone().into_source_options();
    options.policy = vm.policy.clone();
    options.state_dir = vm.options.state_dir.clone();
    options.epoch = epoch;
    let source = Source::new(machine.clone(), options);
    outgoing::begin(vm, machine, source, "migration", move |vm, machine, source| {
        finish(vm, machine, save(source, &path, how, outgoing::publish_changes(vm)), &path);
    })
}

/// What its session is called.
const WHAT: &str = "the save";

fn finish(vm: &RunningVm, machine: Arc<ReferenceMachine>, result: Result<Saved, SaveError>, path: &Path) {
    let to = path.display().to_string();
    match result {
        Ok(Saved { completed: Some(completed), .. }) => {
            outgoing::finish(vm, machine, Ok(completed), &to, WHAT)
        }
        Ok(Saved { stood, left_undone, .. }) => {
            machine.release();
            vm.end_session(info::saved(vm, stood, &left_undone), None);
        }
        Err(SaveError::Session(error)) => outgoing::finish(vm, machine, Err(error), &to, WHAT),
        Err(SaveError::NotResumed(held)) => {
            outgoing::finish(vm, machine, Err(MigrateError::Aborted(held.0)), &to, WHAT);
        }
        Err(error) => {
            machine.release();
            vm.end_session(info::not_saved(vm, &error), None);
        }
    }
}

/// Opens and checks a file before anything is built for it.
pub(super) fn open(path: &Path) -> Result<Snapshot, CliError> {
    let snapshot = Snapshot::open(path)
        .map_err(|error| CliError::caused(&format!("cannot restore {}", path.display()), &error))?;
    match snapshot.device() {
        None => Ok(snapshot),
        Some(device) => Err(CliError::new(
            Exit::Incompatible,
            format!(
                "{} holds the device {} alone, and no guest: `vfio-migrate restore --device … {0}` loads it into a device",
                path.display(),
                device.id
            ),
        )),
    }
}

/// Puts a guest back into a machine that is built once it is known that the guest may be put back: building opens the
/// devices, and opening resets them.
pub(super) fn restore(vm: &RunningVm, snapshot: Snapshot) -> Result<Slot, CliError> {
    let id = snapshot.vm();
    if let Some(other) = vm.options.uuid.filter(|other| *other != id) {
        return Err(CliError::new(
            Exit::Incompatible,
            format!("the snapshot is of VM {id}, and --uuid says {other}"),
        ));
    }
    if let Some(dir) = &vm.options.state_dir {
        vm.presence.start(dir, id).map_err(CliError::failed)?;
    }
    let peer = format!("file:{}", std::path::absolute(snapshot.path()).unwrap_or_default().display());
    let (attempt, epoch) = (snapshot.attempt(), snapshot.epoch());
    let attempt = AttemptInfo::beginning(id, attempt, epoch, AttemptKind::Restore, peer);
    history::session_began(&attempt, "incoming");
    let mut options = DestinationOptions::default();
    options.policy = vm.policy.clone();
    options.state_dir = vm.options.state_dir.clone();
    options.suspend = vm.options.paused;
    let mut machine = None;
    let mut not_built = None;
    let memory = |offer: &IncomingOffer| vm.options.memory.is_none().then(|| offer.manifest.memory());
    let restored = snapshot.restore(options, |offer| match build_with_memory(vm, memory(offer)) {
        Ok(built) => {
            built.adopt(id);
            machine = Some(built.clone());
            Ok::<Arc<dyn Machine>, _>(built)
        }
        Err(failure) => {
            let text = failure.to_string();
            not_built = Some(failure);
            Err(NotBuilt::Failed(text))
        }
    });
    let ended = match &restored {
        Ok(arrived) => info::arrived(vm, &arrived.report),
        Err(error) => info::not_arrived(vm, error, false, AttemptKind::Restore),
    };
    let ended = MigrationInfo { direction: Some("incoming".into()), ..ended };
    vm.state.end_attempt(ended.clone());
    history::record(vm.options.state_dir.as_deref(), &attempt, SessionKind::Restore, ended);
    match (restored, machine, not_built) {
        (_, _, Some(failure)) => Err(failure),
        (Ok(arrived), Some(machine), None) => {
            machine.release();
            Ok(Slot::Here { machine, epoch: arrived.epoch })
        }
        (Ok(_), None, None) => Err(CliError::failed("a guest was restored into no machine")),
        (Err(error), _, None) => {
            let exit = match &error {
                IncomingError::Refused(_) => Exit::Incompatible,
                _ => Exit::Failed,
            };
            Err(CliError::new(
                exit,
                format!("the snapshot was not restored: {}", error.sentence_of("the restore")),
            ))
        }
    }
}
