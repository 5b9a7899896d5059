//! `vm`: runs a guest, or waits for one; then does what its control socket asks.

mod handler;
mod incoming;
mod outgoing;
mod presence;
mod rehearsing;
mod saving;
mod slot;
mod watch;

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};

use serde_json::{Value, json};
use vfio_migration::{Standing, Uri, standing};
use vfio_migration_compat::Policy;
use vfio_migration_device::{ConfigRule, ConfigRules};
use vfio_migration_memory::MemoryError;
use vfio_migration_types::{Epoch, VmId};
use vfio_migration_vmm::VmmError;
use vfio_migration_vmm::layout::{RAM_MAX, RAM_MIN};
use vfio_migration_vmm::machine::{
    Accelerator, DeviceConfig, MachineConfig, ReferenceMachine, Workload, kvm_answers,
};

use crate::args::Vm;
use crate::control::{Bound, Event, Publisher};
use crate::exit::{Exit, Failure};
use crate::interrupt::{self, Interrupt};
use crate::output::say;
use crate::units::show_size;
use crate::verbs::check;
use handler::VmHandler;
use presence::Presence;
use slot::Slot;
use watch::Watch;

/// RAM comes in steps of this size.
const RAM_STEP: u64 = 2 << 20;

pub(crate) fn run(options: &Vm, interrupt: &Interrupt) -> Result<Exit, Failure> {
    let vm = Arc::new(RunningVm::new(options)?);
    let uri = match &options.incoming {
        Some(text) => Some(uri(text)?),
        None => None,
    };
    // Checked whole before anything is made for it.
    let snapshot = options.restore.as_deref().map(saving::open).transpose()?;
    let epoch = if uri.is_none() && snapshot.is_none() { owned_epoch(&vm)? } else { Epoch(0) };
    let (quit, quitted) = mpsc::channel();
    let by_control = quit.clone();
    interrupt::on_end(options.exit_with_stdin, move || {
        // The receiver is gone only when the process ends anyway.
        let _ = quit.send(());
    })?;
    // Bound first, so that a path that cannot be had is known before anything waits for a guest; served last, so that
    // whoever gets an answer finds everything in place.
    let bound = match &options.control {
        Some(path) => Some((path, Bound::at(path).map_err(|error| cannot_listen(path, &error))?)),
        None => None,
    };
    match (uri, snapshot) {
        (None, Some(snapshot)) => {
            let slot = saving::restore(&vm, snapshot)?;
            drop(vm.state.put_if(|_| true, slot));
        }
        (Some(uri), _) => {
            let machine = build(&vm)?;
            incoming::reserve(&vm)
                .and_then(|_| incoming::listen(&vm, &uri, machine))
                .map_err(|refused| Failure::failed(refused.desc))?;
        }
        (None, None) => {
            let machine = build(&vm)?;
            let doing = |error| Failure::caused("cannot start the guest", &error);
            machine.boot(&vm.workload).map_err(doing)?;
            if !options.paused {
                machine.cont().map_err(doing)?;
            }
            drop(vm.state.put_if(|_| true, Slot::Here { machine, epoch }));
        }
    }
    let _server = match bound {
        Some((path, bound)) => {
            let handler = Arc::new(VmHandler { vm: vm.clone(), quit: by_control });
            let served = bound.serve(handler, vm.publisher.clone());
            Some(served.map_err(|error| {
                vm.end();
                cannot_listen(path, &error)
            })?)
        }
        None => None,
    };
    // Signals come through `quit`; the flag of a second one ends the process at once.
    let mut watch = Watch::default();
    while quitted.recv_timeout(watch::EVERY) == Err(RecvTimeoutError::Timeout) {
        watch.look(&vm);
    }
    drop(interrupt.clone());
    vm.publisher.publish(&Event::new("SHUTDOWN", Value::Null));
    vm.end();
    Ok(Exit::Done)
}

fn cannot_listen(path: &Path, error: &std::io::Error) -> Failure {
    Failure::caused(&format!("cannot listen at {}", path.display()), error)
}

/// Makes the machine, and opens its devices.
fn build(vm: &RunningVm) -> Result<Arc<ReferenceMachine>, Failure> {
    ReferenceMachine::build(vm.config.clone()).map_err(|error| cannot_build(&error))
}

fn cannot_build(error: &VmmError) -> Failure {
    match error {
        VmmError::Memory(MemoryError::TooLarge { wanted, available }) => Failure::new(
            Exit::Usage,
            format!(
                "--memory: {} do not fit this host, which has {} of memory and swap",
                show_size(*wanted),
                show_size(*available)
            ),
        ),
        error => Failure::caused("cannot build the VM", error),
    }
}

/// Refuses a size of RAM that the machine cannot have on any host.
pub(crate) fn check_memory(memory: u64) -> Result<(), Failure> {
    let usage = |text: String| Err(Failure::new(Exit::Usage, format!("--memory: {text}")));
    if !(RAM_MIN..=RAM_MAX).contains(&memory) {
        let (min, max) = (show_size(RAM_MIN), show_size(RAM_MAX));
        return usage(format!("the machine takes {min} to {max}, not {}", show_size(memory)));
    }
    if !memory.is_multiple_of(RAM_STEP) {
        return usage(format!("{memory} bytes are no multiple of {}", show_size(RAM_STEP)));
    }
    Ok(())
}

/// Everything that outlives one guest in this process.
pub(crate) struct RunningVm {
    pub(super) config: MachineConfig,
    pub(super) workload: Workload,
    pub(super) options: Vm,
    pub(super) rules: ConfigRules,
    pub(super) policy: Policy,
    pub(super) publisher: Publisher,
    pub(super) state: slot::StateCell,
    pub(super) presence: Presence,
}

impl RunningVm {
    fn new(options: &Vm) -> Result<Self, Failure> {
        let usage = |text: String| Failure::new(Exit::Usage, text);
        let id = options.uuid.unwrap_or_else(|| VmId(*uuid::Uuid::new_v4().as_bytes()));
        let mut devices: Vec<DeviceConfig> = Vec::new();
        for text in &options.device {
            let device: DeviceConfig = text.parse().map_err(|error| usage(format!("--device: {error}")))?;
            if devices.iter().any(|other| other.id == device.id) {
                return Err(usage(format!("--device: the id {} is there twice", device.id)));
            }
            devices.push(device);
        }
        check_memory(options.memory)?;
        if let Some(text) = &options.incoming {
            uri(text)?;
        }
        let rules = options.config_rule.iter().map(|text| {
            rule(text).ok_or_else(|| {
                usage(format!(
                    "--config-rule: '{text}' is no rule (want OFFSET+LEN=compare or OFFSET+LEN=ignore)"
                ))
            })
        });
        let rules = ConfigRules { rules: rules.collect::<Result<_, _>>()? };
        if let Some(dir) = &options.state_dir {
            presence::prepare(dir).map_err(Failure::failed)?;
        }
        let policy = options.policy.as_deref().map_or_else(|| Ok(Policy::default()), check::policy)?;
        let accelerator = accelerator(options)?;
        let workload = Workload { dirty_rate: options.dirty_rate, ..Workload::default() };
        Ok(Self {
            config: MachineConfig { id, memory: options.memory, vcpus: 1, accelerator, devices },
            workload,
            options: options.clone(),
            rules,
            policy,
            publisher: Publisher::default(),
            state: slot::StateCell::default(),
            presence: Presence::default(),
        })
    }

    /// Tells every client how the migration stands now.
    pub(super) fn announce(&self, status: crate::control::MigrationState) {
        self.publisher.publish(&Event::new("MIGRATION", json!({"status": status})));
    }

    /// Ends whatever goes on: a session is cancelled and waited for, so that no guest is left without an owner.
    fn end(&self) {
        self.state.cancel();
        self.state.join();
        drop(self.state.put_if(|_| true, Slot::Left));
    }
}

pub(crate) fn uri(text: &str) -> Result<Uri, Failure> {
    text.parse().map_err(|error: vfio_migration::UriError| Failure::new(Exit::Usage, error.to_string()))
}

/// The epoch under which the VM may be started here, by its journal. From here on no other process may start it.
fn owned_epoch(vm: &RunningVm) -> Result<Epoch, Failure> {
    let Some(dir) = &vm.options.state_dir else { return Ok(Epoch(0)) };
    let id = vm.config.id;
    vm.presence.start(dir, id).map_err(Failure::failed)?;
    let file = dir.join(format!("{id}.json"));
    let remedy = format!("if you are sure that it runs nowhere else, remove {}", file.display());
    match standing(dir, id) {
        Ok(Standing::Unknown) => Ok(Epoch(0)),
        Ok(Standing::Ours(epoch)) => Ok(epoch),
        Ok(Standing::Elsewhere { epoch, peer }) => Err(Failure::failed(format!(
            "VM {id} belongs to another host (epoch {}, {peer}) and is not started here; {remedy}",
            epoch.0
        ))),
        Ok(Standing::Undecided { epoch, peer }) => Err(Failure::new(
            Exit::Unresolved,
            format!(
                "the commit of VM {id} to {peer} (epoch {}) is undecided: it may run there, so it is not started here; {remedy}",
                epoch.0
            ),
        )),
        Ok(other) => Err(Failure::failed(format!("VM {id} is not started here: {other:?}"))),
        Err(error) => Err(Failure::caused("the ownership journal cannot be believed", &error)),
    }
}

fn accelerator(options: &Vm) -> Result<Accelerator, Failure> {
    if options.software {
        return Ok(Accelerator::Software);
    }
    match kvm_answers() {
        Ok(()) => Ok(Accelerator::Kvm),
        Err(error) if options.require_kvm => Err(Failure::caused("no KVM", &error)),
        Err(error) => {
            say(format_args!(
                "vfio-migrate: NO KVM ({}); running the software guest instead",
                crate::exit::chain(&error)
            ));
            Ok(Accelerator::Software)
        }
    }
}

/// `OFFSET+LEN=compare|ignore`, numbers decimal or 0x.
fn rule(text: &str) -> Option<ConfigRule> {
    let number = |text: &str| match text.strip_prefix("0x") {
        Some(digits) => u16::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    };
    let (place, what) = text.split_once('=')?;
    let (offset, len) = place.split_once('+')?;
    let compare = match what {
        "compare" => true,
        "ignore" => false,
        _ => return None,
    };
    Some(ConfigRule { offset: number(offset)?, len: number(len)?, compare })
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn config_rules() {
        assert_eq!(rule("0x40+8=ignore"), Some(ConfigRule { offset: 0x40, len: 8, compare: false }));
        assert_eq!(rule("16+1=compare"), Some(ConfigRule { offset: 16, len: 1, compare: true }));
        for bad in ["", "40", "40+8", "40=ignore", "x+1=ignore", "0+1=maybe", "70000+1=ignore"] {
            assert_eq!(rule(bad), None, "{bad}");
        }
    }
}
