//! The state of a `vm` process, which outlives each guest that it serves.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use rustix::io::Errno;
use serde_json::json;
use vfio_migration::{AllowedUnixPeers, NotBuilt, Request, VmOwnership, ownership_at};
use vfio_migration_compat::{MaskPolicy, Policy};
use vfio_migration_memory::MemoryError;
use vfio_migration_types::{AttemptId, DeviceId, Epoch, VmId, error_chain};
use vfio_migration_vmm::VmmError;
use vfio_migration_vmm::machine::{
    Accelerator, DeviceConfig, MachineConfig, OpeningStep, ReferenceMachine, Workload, assign_places,
    kvm_answers,
};

use super::creds;
use super::history;
use super::passed::PassedSockets;
use super::presence::{self, Presence};
use super::questions::IncomingQuestions;
use super::slot::{Slot, Steering, VmState};
use super::wait::WaitSettings;
use crate::args::serve::VmCommand;
use crate::control::clients::Publisher;
use crate::control::event::ControlEvent;
use crate::control::protocol::MigrationInfo;
use crate::control::refused::Refused;
use crate::exit::{CliError, Exit};
use crate::output::eprintln_line;
use crate::undecided::{UndecidedGuest, journal_file};
use crate::units::format_size;
use crate::words::{check_memory, config_rule, policy, uri};

/// A `vm` process: its configuration, and the guest and migration that it has just now.
pub(super) struct RunningVm {
    pub(super) config: MachineConfig,
    pub(super) workload: Workload,
    pub(super) options: VmCommand,
    pub(super) policy: Policy,
    /// Who may be at the other end of a migration's unix socket.
    pub(super) unix_peers: AllowedUnixPeers,
    /// What its waits are held to, but for what one asks for itself.
    pub(super) of_every_wait: WaitSettings,
    /// What the latest wait is held to.
    wait: Mutex<Arc<WaitSettings>>,
    pub(super) publisher: Publisher,
    pub(super) state: VmState,
    pub(super) presence: Presence,
    pub(super) passed: PassedSockets,
    /// Held by whoever builds the machine of a `vm` that waits, or takes it for a session.
    pub(super) building: Mutex<()>,
    /// The machine that the latest session was given, for a guest that comes.
    pub(super) lent: Mutex<Weak<ReferenceMachine>>,
    /// Machines that were given up, whose devices are closed before the next is built.
    pub(super) retired: Mutex<Vec<Slot>>,
    /// Held by whoever starts a guest that a session left paused.
    pub(super) starting: Mutex<()>,
    /// The attempt whose end was told and written down last.
    told: Mutex<Option<AttemptId>>,
    /// Which questions and rehearsals of other hosts are said.
    pub(super) questions: IncomingQuestions,
    ending: AtomicBool,
}

/// Guest RAM where nobody says how much.
const MEMORY: u64 = 512 << 20;

impl RunningVm {
    pub(super) fn new(options: &VmCommand) -> Result<Self, CliError> {
        let usage = |text: String| CliError::new(Exit::Usage, text);
        let id = options.uuid.unwrap_or_else(|| VmId(*uuid::Uuid::new_v4().as_bytes()));
        let mut devices: Vec<DeviceConfig> = Vec::new();
        for text in &options.device {
            let device: DeviceConfig = text.parse().map_err(|error| usage(format!("--device: {error}")))?;
            if devices.iter().any(|other| other.id == device.id) {
                return Err(usage(format!("--device: the id {} is there twice", device.id)));
            }
            devices.push(device);
        }
        assign_places(&devices).map_err(|error| usage(format!("--device: {error}")))?;
        let memory = options.memory.unwrap_or(MEMORY);
        check_memory(memory)?;
        let of_every_wait = WaitSettings::of_process(options);
        if let Some(text) = &options.incoming {
            of_every_wait.check(&uri(text)?)?;
        }
        creds::check(options)?;
        let rules = options.config_rule.iter().map(|text| {
            config_rule(text).ok_or_else(|| {
                usage(format!(
                    "--config-rule: '{text}' is no rule (want OFFSET+LEN=compare or OFFSET+LEN=ignore)"
                ))
            })
        });
        let rules: Vec<_> = rules.collect::<Result<_, _>>()?;
        if let Some(dir) = &options.state_dir {
            presence::prepare(dir).map_err(CliError::failed)?;
        }
        let mut policy = options.policy.as_deref().map_or_else(|| Ok(Policy::default()), policy)?;
        // Last, since later ones win.
        policy.config_mask.extend((!rules.is_empty()).then(|| MaskPolicy::for_all(rules)));
        let unix_peers = options.peers.allowed()?;
        let accelerator = accelerator(options)?;
        let workload = Workload { dirty_rate: options.dirty_rate, ..Workload::default() };
        Ok(Self {
            config: MachineConfig { id, memory, vcpus: 1, accelerator, devices },
            workload,
            options: options.clone(),
            policy,
            unix_peers,
            wait: Mutex::new(Arc::new(of_every_wait.clone())),
            of_every_wait,
            publisher: Publisher::default(),
            state: VmState::default(),
            presence: Presence::default(),
            passed: PassedSockets::default(),
            building: Mutex::default(),
            lent: Mutex::default(),
            retired: Mutex::default(),
            starting: Mutex::default(),
            told: Mutex::default(),
            questions: IncomingQuestions::default(),
            ending: AtomicBool::new(false),
        })
    }

    /// What the latest wait for a guest is held to.
    pub(super) fn wait(&self) -> Arc<WaitSettings> {
        self.wait.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Another wait begins.
    pub(super) fn set_wait(&self, settings: Arc<WaitSettings>) {
        *self.wait.lock().unwrap_or_else(PoisonError::into_inner) = settings;
    }

    /// Ends the session under way: `info` is how, `slot` where the guest is now if that changed. Every client gets it.
    pub(super) fn end_session(&self, info: MigrationInfo, slot: Option<Slot>) {
        let info = self.foreseen(info);
        let event = ControlEvent::of_migration(&info);
        // First, so that who is told of the end finds it in the history.
        self.record_session(&info);
        self.state.end(info, slot);
        self.publisher.publish(&event);
    }

    /// Ends a session of a wait that goes on. Every client gets it.
    pub(super) fn end_attempt(&self, info: MigrationInfo) {
        let info = self.foreseen(info);
        let event = ControlEvent::of_migration(&info);
        self.record_session(&info);
        self.state.end_attempt(info);
        self.publisher.publish(&event);
    }

    /// `info` with what its session has foreseen, so that status, events and history say the same.
    fn foreseen(&self, info: MigrationInfo) -> MigrationInfo {
        match self.state.steering().and_then(|steering| steering.progress()) {
            Some(progress) => history::with_foreseen(info, &progress),
            None => info,
        }
    }

    /// Says how the session that has ended did so, and writes it down: once, and nothing if none was begun.
    fn record_session(&self, info: &MigrationInfo) {
        let Some(progress) = self.state.steering().and_then(|steering| steering.progress()) else { return };
        let attempt = progress.attempt.as_ref().map(|attempt| attempt.attempt);
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::replace(&mut *told, attempt) == attempt {
            return self.questions.forget();
        }
        let comes = info.direction.as_deref() == Some("incoming");
        if !comes || progress.attempt.as_ref().is_none_or(|attempt| self.questions.ends(attempt)) {
            history::session_ended(self.options.state_dir.as_deref(), &progress, info);
        }
    }

    /// Refuses an end of the process while a guest is here that would end with it.
    pub(super) fn refuse_with_guest(&self) -> Result<(), Refused> {
        let is = match self.state.slot() {
            // One that has stopped by itself has nothing left to lose.
            Slot::Here { machine, .. } if machine.failure().is_some() => return Ok(()),
            Slot::Here { machine, .. } if machine.is_running() => "runs here",
            Slot::Here { .. } | Slot::OwnedNotStarted { .. } => "is paused here",
            // What to do says more than what would end.
            slot @ Slot::Unresolved { .. } => return Err(slot.refusal("end")),
            Slot::Preparing
            | Slot::Awaited { .. }
            | Slot::Leaving { .. }
            | Slot::Left { .. }
            | Slot::Empty
            | Slot::Failed
            | Slot::Ended => {
                return Ok(());
            }
        };
        Err(Refused::generic(format!(
            "a guest {is}, and would end with the process; `quit --force`, or {{\"force\": true}}, ends both"
        )))
    }

    /// Whether the process is ending, and a guest that is here with it.
    pub(super) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }

    /// From here on the process is [ending](Self::is_ending).
    pub(super) fn begin_ending(&self) {
        self.ending.store(true, Ordering::Release);
    }
}

/// Makes the machine, and opens its devices.
pub(super) fn build(vm: &RunningVm) -> Result<Arc<ReferenceMachine>, CliError> {
    build_with_memory(vm, None)
}

/// The same with so much `memory`, if its size is for others to say.
pub(super) fn build_with_memory(
    vm: &RunningVm,
    memory: Option<u64>,
) -> Result<Arc<ReferenceMachine>, CliError> {
    try_build(vm, memory).map_err(|error| cannot_build(&error))
}

/// The same for a guest on offer.
pub(super) fn build_for_offer(
    vm: &RunningVm,
    memory: Option<u64>,
) -> Result<Arc<ReferenceMachine>, NotBuilt> {
    try_build(vm, memory).map_err(|error| {
        let text = cannot_build(&error).text;
        match error.of_device() {
            Some(error) => NotBuilt::of_device(error, &text),
            None => NotBuilt::Failed(text),
        }
    })
}

fn try_build(vm: &RunningVm, memory: Option<u64>) -> Result<Arc<ReferenceMachine>, VmmError> {
    let memory = memory.unwrap_or(vm.config.memory);
    let config = MachineConfig { memory, ..vm.config.clone() };
    // A session that waits for the machine says which device keeps it waiting.
    let incoming = match vm.state.steering() {
        Some(Steering::Incoming(control)) => Some(control),
        _ => None,
    };
    ReferenceMachine::build_watched(config, |device, step, limit| {
        let request = match step {
            OpeningStep::Listen { errno } => Request::Listen { refused: errno == Errno::CONNREFUSED },
            OpeningStep::Reset => Request::Reset,
            _ => Request::Open,
        };
        incoming.as_ref().map(|control| control.opening(device, request, limit))
    })
}

fn cannot_build(error: &VmmError) -> CliError {
    match error {
        VmmError::Memory(MemoryError::TooLarge { wanted, available }) => CliError::new(
            Exit::Usage,
            format!(
                "--memory: {} do not fit this host, which has {} of memory and swap",
                format_size(*wanted),
                format_size(*available)
            ),
        ),
        error => CliError::caused("cannot build the VM", error),
    }
}

/// The epoch under which the VM may be started here, by its journal. From here on no other process may start it.
pub(super) fn owned_epoch(vm: &RunningVm) -> Result<Epoch, CliError> {
    let Some(dir) = &vm.options.state_dir else { return Ok(Epoch(0)) };
    let id = vm.config.id;
    vm.presence.start(dir, id).map_err(CliError::failed)?;
    let file = journal_file(dir, id);
    let remedy = format!("if you are sure that it runs nowhere else, remove {}", file.display());
    match ownership_at(dir, id) {
        Ok(VmOwnership::Unknown) => Ok(Epoch(0)),
        Ok(VmOwnership::Ours(epoch)) => Ok(epoch),
        Ok(VmOwnership::Elsewhere { epoch, peer }) if peer.starts_with("file:") => {
            Err(CliError::failed(format!(
                "VM {id} was saved into {peer} (epoch {}) and is not started here: `vm --restore` brings it back; {remedy}",
                epoch.0
            )))
        }
        Ok(VmOwnership::Elsewhere { epoch, peer }) => Err(CliError::failed(format!(
            "VM {id} belongs to another host (epoch {}, {peer}) and is not started here; {remedy}",
            epoch.0
        ))),
        Ok(VmOwnership::Undecided { epoch, peer }) => Err(CliError::new(
            Exit::Unresolved,
            UndecidedGuest {
                why: &format!("the commit of VM {id} to {peer} (epoch {}) is undecided", epoch.0),
                peer: &peer,
                journal: Some(file),
                is_here: false,
                can_ask: false,
            }
            .to_string(),
        )),
        Ok(_) => Err(CliError::failed(format!(
            "VM {id} is not started here: its ownership journal says something that this build does not know; use a newer one"
        ))),
        Err(error) => Err(CliError::caused("the ownership journal cannot be believed", &error)),
    }
}

fn accelerator(options: &VmCommand) -> Result<Accelerator, CliError> {
    if options.software {
        return Ok(Accelerator::Software);
    }
    match kvm_answers() {
        Ok(()) => Ok(Accelerator::Kvm),
        Err(error) if options.require_kvm => Err(CliError::caused("no KVM", &error)),
        Err(error) => {
            eprintln_line(format_args!(
                "vfio-migrate: NO KVM ({}); running the software guest instead",
                error_chain(&error)
            ));
            Ok(Accelerator::Software)
        }
    }
}

/// Interval at which lost devices are looked for.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(250);

/// The devices whose loss was published.
#[derive(Debug, Default)]
pub(super) struct LostDeviceWatch {
    lost: BTreeSet<DeviceId>,
}

impl LostDeviceWatch {
    /// Publishes each device that was lost since the last call, and ends a session that sends its guest, or receives one: it cannot come
    /// to its end, and need not find that out by the next that it reads or writes, which may be never. A guest that is here is left as it
    /// is.
    pub(super) fn report_new(&mut self, vm: &RunningVm) {
        let slot = vm.state.slot();
        let lost = slot.machine().map(|machine| machine.lost_devices()).unwrap_or_default();
        if matches!(slot, Slot::Awaited { .. }) {
            // One that no session has is made anew, and the `vm` says so itself.
            let lent = vm.lent.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
            let is_lent = slot.machine().zip(lent).is_some_and(|(machine, lent)| Arc::ptr_eq(machine, &lent));
            let steering = vm.state.steering().filter(|_| is_lent);
            let Some(Steering::Incoming(control)) = steering else { return };
            for (device, why) in lost {
                control.device_lost(&device, &format!("device {device} was lost: {why}"));
            }
            return;
        }
        for (device, why) in self.new_among(lost) {
            eprintln_line(format_args!(
                "vfio-migrate: device {device} is lost: {why}; the guest cannot be moved any more"
            ));
            let data = json!({"device": device.to_string(), "why": why});
            vm.publisher.publish(&ControlEvent::new("DEVICE_LOST", data));
            if let Some(Steering::Outgoing(control)) = vm.state.steering() {
                control.device_lost(&device, &format!("device {device} was lost: {why}"));
            }
        }
    }

    /// Those of `lost` that are new. Those of a guest that has left are forgotten.
    fn new_among(&mut self, lost: Vec<(DeviceId, String)>) -> Vec<(DeviceId, String)> {
        let ids = lost.iter().map(|(device, _)| device.clone()).collect();
        let known = std::mem::replace(&mut self.lost, ids);
        lost.into_iter().filter(|(device, _)| !known.contains(device)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_loss_is_said_once() {
        let id = |name: &str| (DeviceId::new(name).unwrap(), "its server hung up".to_owned());
        let mut watch = LostDeviceWatch::default();
        assert_eq!(watch.new_among(vec![]), []);
        assert_eq!(watch.new_among(vec![id("b")]), [id("b")]);
        assert_eq!(watch.new_among(vec![id("a"), id("b")]), [id("a")]);
        assert_eq!(watch.new_among(vec![id("a"), id("b")]), []);
        // Another guest came, and its device of that name is lost too.
        assert_eq!(watch.new_among(vec![]), []);
        assert_eq!(watch.new_among(vec![id("a")]), [id("a")]);
    }
}
