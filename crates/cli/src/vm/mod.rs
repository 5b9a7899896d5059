//! `vm`: the process that runs a guest, or waits for one, and serves its control socket.

mod ask_again;
mod creds;
mod ending;
mod expected;
#[cfg(test)]
mod fault_sweep;
mod faults;
mod handler;
mod held;
mod history;
mod incoming;
mod info;
mod interrupts;
mod outgoing;
mod passed;
mod presence;
mod questions;
mod readiness;
mod rollback;
mod running;
mod saving;
mod slot;
mod wait;

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};

use serde_json::Value;
use vfio_migration::{Snapshot, Uri};
use vfio_migration_types::Epoch;

use self::handler::VmHandler;
use self::readiness::ReadinessWatch;
use self::rollback::RollbackWatch;
use self::running::{LOOK_EVERY, LostDeviceWatch, RunningVm, build, owned_epoch};
use self::slot::Slot;
use crate::accounts::gid;
use crate::address::Address;
use crate::args::serve::VmCommand;
use crate::control::access::ControlAccess;
use crate::control::event::ControlEvent;
use crate::control::server::{Bound, ControlServer};
use crate::exit::{CliError, Exit};
use crate::interrupt::UserInterrupt;
use crate::output::eprintln_line;
use crate::words::uri;

pub(crate) fn run(options: &VmCommand, interrupt: &UserInterrupt) -> Result<Exit, CliError> {
    let (quit, quitted) = mpsc::channel();
    let by_control = quit.clone();
    interrupt.on_end(options.exit_with_stdin, move |by| {
        // The receiver is gone only when the process ends anyway.
        let _ = quit.send(by);
    })?;
    let started = start(options, interrupt, by_control)?;
    let vm = &started.vm;
    let watching = (watch(vm, started.access.clone())?, interrupts::tend(vm)?);
    // Both ends of the channel are held as long as the process may end by it.
    let by = quitted.recv().unwrap_or(FAILED_START);
    drop(watching);
    let exit = ending::end(vm, by);
    // The last event: how a session ended comes before it, whatever the process ends by.
    vm.publisher.publish(&ControlEvent::new("SHUTDOWN", Value::Null));
    eprintln_line(format_args!("vfio-migrate: the VM's process has ended by {by}"));
    Ok(exit)
}

/// Looks after the devices of `vm`, on a thread of its own, until the sender is dropped: a device that is opened anew may
/// keep whoever opens it waiting, and a signal is heard all the same.
fn watch(vm: &Arc<RunningVm>, access: ControlAccess) -> Result<Sender<()>, CliError> {
    let (watching, ended) = mpsc::channel();
    let vm = vm.clone();
    let thread = std::thread::Builder::new().name("devices".into()).spawn(move || {
        let (mut lost, mut readiness) = (LostDeviceWatch::default(), ReadinessWatch::default());
        let mut rollback = RollbackWatch::default();
        while ended.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
            lost.report_new(&vm);
            readiness.tend(&vm);
            rollback.tend(&vm);
            access.say_overdue_refusals();
            vm.questions.say_overdue();
        }
    });
    thread.map_err(|error| CliError::caused("cannot make a thread that looks after devices", &error))?;
    Ok(watching)
}

/// A `vm` that runs a guest or waits for one, and answers its control socket.
struct Started {
    vm: Arc<RunningVm>,
    access: ControlAccess,
    _server: Option<ControlServer>,
}

/// Makes a `vm` and everything that it needs; `quit` is what the control socket ends the process by.
fn start(
    options: &VmCommand,
    interrupt: &UserInterrupt,
    quit: Sender<&'static str>,
) -> Result<Started, CliError> {
    // What files and devices take, no signal can shorten: it is left to itself then.
    let of_thread = options.clone();
    let prepared = interrupt.watch(move || Prepared::new(&of_thread))??;
    let (vm, access) = (prepared.vm.clone(), prepared.access.clone());
    // Bound first, so that a path that cannot be had is known before anything waits for a guest; served last, so that
    // whoever gets an answer finds everything in place.
    let bound = match &options.control {
        Some(path) => {
            let bound = Bound::at(path, access.clone());
            Some(bound.map_err(|error| cannot_listen(path, &error))?)
        }
        None => None,
    };
    interrupt
        .watch(move || prepared.start())
        .inspect_err(|_| {
            ending::end(&vm, interrupt.name().unwrap_or(FAILED_START));
        })
        .and_then(|started| started)?;
    let server = match bound {
        Some(bound) => {
            let handler = Arc::new(VmHandler { vm: vm.clone(), quit });
            let served = bound.serve(handler, vm.publisher.clone());
            Some(served.map_err(|error| {
                ending::end(&vm, FAILED_START);
                CliError::caused("cannot make a thread for the control socket", &error)
            })?)
        }
        None => None,
    };
    Ok(Started { vm, access, _server: server })
}

/// A `vm` whose command line has been judged, and for which nothing has been made yet.
struct Prepared {
    vm: Arc<RunningVm>,
    /// Who may use the control socket.
    access: ControlAccess,
    uri: Option<Uri>,
    snapshot: Option<Snapshot>,
    epoch: Epoch,
}

impl Prepared {
    fn new(options: &VmCommand) -> Result<Self, CliError> {
        let vm = Arc::new(RunningVm::new(options)?);
        let group =
            |option, group: &Option<String>| group.as_deref().map(|group| gid(option, group)).transpose();
        let access = ControlAccess::of_groups(
            group("--control-group", &options.control_group)?,
            group("--control-read-group", &options.control_read_group)?,
        );
        let uri = options.incoming.as_deref().map(uri).transpose()?;
        // Checked whole before anything is made for it.
        let snapshot = options.restore.as_deref().map(saving::open).transpose()?;
        let epoch = if uri.is_none() && snapshot.is_none() { owned_epoch(&vm)? } else { Epoch(0) };
        Ok(Self { vm, access, uri, snapshot, epoch })
    }

    /// Starts the guest, brings it back, or waits for it.
    fn start(self) -> Result<(), CliError> {
        let Self { vm, access: _, uri, snapshot, epoch } = self;
        match (uri, snapshot) {
            (None, Some(snapshot)) => {
                let slot = saving::restore(&vm, snapshot)?;
                drop(vm.state.put_if(|_| true, slot));
            }
            (Some(uri), _) => {
                let machine = build(&vm)?;
                incoming::reserve(&vm)
                    .and_then(|_| incoming::listen(&vm, &Address::Uri(uri), machine, &vm.wait()))
                    .map_err(|refused| CliError::failed(refused.desc))?;
            }
            (None, None) => {
                let machine = build(&vm)?;
                let doing = |error| CliError::caused("cannot start the guest", &error);
                machine.boot(&vm.workload).map_err(doing)?;
                if !vm.options.paused {
                    machine.cont().map_err(doing)?;
                }
                drop(vm.state.put_if(|_| true, Slot::Here { machine, epoch }));
            }
        }
        if let Slot::Here { machine, .. } = vm.state.slot() {
            let (id, is) = (machine.id(), if machine.is_running() { "runs" } else { "is paused" });
            eprintln_line(format_args!("vfio-migrate: VM {id} {is}"));
        }
        Ok(())
    }
}

fn cannot_listen(path: &Path, error: &std::io::Error) -> CliError {
    CliError::caused(&format!("cannot listen at {}", path.display()), error)
}

/// What a process ends by that did not get so far that it could be told to end.
const FAILED_START: &str = "a start that failed";
