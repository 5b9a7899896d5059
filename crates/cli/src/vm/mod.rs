//! `vm`: the process that runs a guest, or waits for one, and serves its control socket.

mod faults;
mod handler;
mod history;
mod incoming;
mod info;
mod outgoing;
mod presence;
mod running;
mod saving;
mod slot;

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};

use serde_json::Value;
use vfio_migration_types::Epoch;

use self::handler::VmHandler;
use self::incoming::ReadinessWatch;
use self::running::{LOOK_EVERY, LostDeviceWatch, RunningVm, build, owned_epoch};
use self::slot::Slot;
use crate::args::serve::VmCommand;
use crate::control::event::ControlEvent;
use crate::control::server::Bound;
use crate::exit::{CliError, Exit};
use crate::interrupt::{self, UserInterrupt};
use crate::words::uri;

pub(crate) fn run(options: &VmCommand, interrupt: &UserInterrupt) -> Result<Exit, CliError> {
    let vm = Arc::new(RunningVm::new(options)?);
    let uri = match &options.incoming {
        Some(text) => Some(uri(text)?),
        None => None,
    };
    // Checked whole before anything is made for it.
    let snapshot = match options.restore.clone() {
        Some(path) => Some(interrupt.watch(move || saving::open(&path))??),
        None => None,
    };
    let epoch = if uri.is_none() && snapshot.is_none() { owned_epoch(&vm)? } else { Epoch(0) };
    let (quit, quitted) = mpsc::channel();
    let by_control = quit.clone();
    interrupt::on_end(options.exit_with_stdin, move || {
        // The receiver is gone only when the process ends anyway.
        let _ = quit.send(());
    })?;
    // A signal that came before was heard by nobody else.
    interrupt.check()?;
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
                .map_err(|refused| CliError::failed(refused.desc))?;
        }
        (None, None) => {
            let machine = build(&vm)?;
            let doing = |error| CliError::caused("cannot start the guest", &error);
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
    let (mut watch, mut readiness) = (LostDeviceWatch::default(), ReadinessWatch::default());
    while quitted.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
        watch.report_new(&vm);
        readiness.tend(&vm);
    }
    drop(interrupt.clone());
    vm.publisher.publish(&ControlEvent::new("SHUTDOWN", Value::Null));
    vm.end();
    Ok(Exit::Done)
}

fn cannot_listen(path: &Path, error: &std::io::Error) -> CliError {
    CliError::caused(&format!("cannot listen at {}", path.display()), error)
}
