//! The verbs of the control socket, as a `vm` answers them.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use serde_json::{Value, json};
use vfio_migration::{AttemptKind, Machine, Progress};
use vfio_migration_compat::Document;
use vfio_migration_types::{Phase, error_chain};

use super::running::RunningVm;
use super::slot::{Slot, Steering};
use super::{ask_again, ending, held, incoming, info, outgoing, saving};
use crate::address::SocketName;
use crate::control::event::ControlEvent;
use crate::control::guest::GuestInfo;
use crate::control::protocol::{
    ControlVerb, FdArguments, IncomingArguments, MigrateArguments, NoArguments, ParameterArguments,
    QuitArguments, SaveArguments,
};
use crate::control::refused::Refused;
use crate::control::rehearsal::RehearseArguments;
use crate::control::server::{Answer, Handler};
use crate::exit::CliError;

/// Answers the control socket of one `vm`.
pub(super) struct VmHandler {
    pub(super) vm: Arc<RunningVm>,
    /// Takes what the process is to end by.
    pub(super) quit: Sender<&'static str>,
}

impl Handler for VmHandler {
    fn call(
        &self,
        verb: ControlVerb,
        arguments: Value,
        descriptor: Option<OwnedFd>,
    ) -> Result<Answer, Refused> {
        if !verb.needs().arguments {
            let NoArguments {} = parse(arguments.clone())?;
        }
        match verb {
            ControlVerb::Query => return to_json(&info::report(&self.vm)).map(Answer::from),
            ControlVerb::QueryGuest => return to_json(&self.guest()?).map(Answer::from),
            ControlVerb::Migrate => outgoing::migrate(&self.vm, &parse::<MigrateArguments>(arguments)?)?,
            ControlVerb::Rehearse => outgoing::rehearse(&self.vm, &parse::<RehearseArguments>(arguments)?)?,
            ControlVerb::QueryManifest => return self.manifest().map(Answer::from),
            ControlVerb::Save => saving::begin(&self.vm, &parse::<SaveArguments>(arguments)?)?,
            ControlVerb::Getfd => {
                let socket =
                    descriptor.ok_or_else(|| Refused::generic("no descriptor came with the request"))?;
                self.vm.passed.keep(socket_name(arguments)?, socket)?;
            }
            ControlVerb::Closefd => self.vm.passed.close(&socket_name(arguments)?)?,
            ControlVerb::MigrateIncoming => {
                incoming::again(&self.vm, &parse::<IncomingArguments>(arguments)?)?;
            }
            ControlVerb::MigrateSetParameters => self.set(&parse(arguments)?)?,
            ControlVerb::MigrateCancel => self.cancel()?,
            ControlVerb::MigrateContinue => self.continue_switchover()?,
            ControlVerb::Stop => self.stop()?,
            ControlVerb::Cont => self.cont()?,
            ControlVerb::Quit => return self.quit(parse(arguments)?),
        }
        Ok(json!({}).into())
    }
}

impl VmHandler {
    /// The manifest of the machine, also of one that waits for its guest.
    fn manifest(&self) -> Result<Value, Refused> {
        let slot = self.vm.state.slot();
        let machine = slot.machine().ok_or_else(|| Refused::generic("there is no machine here"))?;
        let mut manifest = machine.manifest().map_err(|error| Refused::generic(error_chain(&error)))?;
        // What is asked with this manifest is answered as a session would.
        manifest.config_rules.extend(self.vm.policy.config_mask.iter().cloned());
        if matches!(slot, Slot::Awaited { .. }) && self.vm.options.memory.is_none() {
            // The guest brings its own: what the machine was built with for now says nothing.
            manifest.ram.clear();
        }
        let text = Document::from(manifest).to_json();
        serde_json::from_str(&text).map_err(|error| Refused::generic(error_chain(&error)))
    }

    fn guest(&self) -> Result<GuestInfo, Refused> {
        let slot = self.vm.state.slot();
        let machine = slot.machine().ok_or_else(|| Refused::generic("there is no guest here"))?;
        let report = machine.report().map_err(|error| Refused::generic(error_chain(&error)))?;
        Ok(info::guest_info(&report))
    }

    fn set(&self, arguments: &ParameterArguments) -> Result<(), Refused> {
        let Some(Steering::Outgoing(control)) = self.vm.state.steering() else {
            return Err(no_migration());
        };
        if let Some(limit) = arguments.downtime_limit {
            control.set_downtime_limit(std::time::Duration::from_millis(limit.get()));
        }
        if let Some(bandwidth) = arguments.max_bandwidth {
            control.set_bandwidth(bandwidth.cap());
        }
        Ok(())
    }

    fn cancel(&self) -> Result<(), Refused> {
        let steering = self.vm.state.steering().ok_or_else(no_migration)?;
        let under_way = match &steering {
            Steering::Outgoing(control) => Some(control.progress()),
            Steering::Incoming(control) => control.progress(),
        };
        if under_way.is_some_and(|progress| is_committing(&progress)) {
            return Err(Refused::new("TooLate", "the commit is under way; it can no longer be cancelled"));
        }
        match steering {
            Steering::Outgoing(control) => control.cancel(),
            Steering::Incoming(control) => control.cancel(),
        }
        Ok(())
    }

    fn continue_switchover(&self) -> Result<(), Refused> {
        match self.vm.state.steering() {
            Some(Steering::Outgoing(control)) if control.progress().waiting => {
                control.continue_switchover();
                Ok(())
            }
            Some(Steering::Outgoing(_)) => {
                Err(Refused::generic("the migration does not wait to be continued"))
            }
            Some(Steering::Incoming(_)) => {
                Err(Refused::generic("an incoming migration is continued at its source, not here"))
            }
            None => Err(no_migration()),
        }
    }

    fn stop(&self) -> Result<(), Refused> {
        let slot = self.vm.state.slot();
        let Slot::Here { machine, .. } = slot else { return Err(self.vm.state.refusal(&slot, "be paused")) };
        if let Some(why) = machine.failure() {
            return Err(Refused::generic(format!("the guest has stopped by itself: {why}")));
        }
        let ran = machine.is_running();
        machine.stop().map_err(|error| Refused::generic(error_chain(&error)))?;
        self.publish_if(ran, "STOP");
        Ok(())
    }

    fn cont(&self) -> Result<(), Refused> {
        let (machine, was_held) = match self.vm.state.slot() {
            Slot::Here { machine, .. } => (machine, false),
            Slot::OwnedNotStarted { machine, .. } => (machine, true),
            Slot::Unresolved { .. } => return ask_again::ask(&self.vm),
            slot => return Err(self.vm.state.refusal(&slot, "run")),
        };
        if let Some(why) = machine.failure() {
            return Err(Refused::generic(format!("the guest has stopped by itself and cannot go on: {why}")));
        }
        if was_held {
            return held::start(&self.vm);
        }
        let ran = machine.is_running();
        machine.cont().map_err(|error| Refused::generic(error_chain(&error)))?;
        self.publish_if(!ran, "RESUME");
        Ok(())
    }

    /// The process ends once the client has its answer.
    fn quit(&self, arguments: QuitArguments) -> Result<Answer, Refused> {
        if !arguments.force {
            ending::end_without_guest(&self.vm, QUIT)?;
        }
        let (quit, by) = (self.quit.clone(), if arguments.force { "`quit --force`" } else { QUIT });
        let end = move || {
            // The receiver is gone only when the process ends anyway.
            let _ = quit.send(by);
        };
        Ok(Answer { value: json!({}), afterwards: Some(Box::new(end)) })
    }

    fn publish_if(&self, changed: bool, event: &str) {
        if changed {
            self.vm.publisher.publish(&ControlEvent::new(event, Value::Null));
        }
    }
}

/// What a process ends by that its operator ends while no guest is here.
const QUIT: &str = "`quit`";

fn socket_name(arguments: Value) -> Result<SocketName, Refused> {
    parse::<FdArguments>(arguments)?
        .fdname
        .parse()
        .map_err(|failure: CliError| Refused::generic(failure.text))
}

/// Whether the guest may be the destination's already. A rehearsal never comes to that.
fn is_committing(progress: &Progress) -> bool {
    let undone = |kind: AttemptKind| matches!(kind, AttemptKind::Rehearsal | AttemptKind::Check);
    progress.phase >= Phase::Commit && !progress.attempt.as_ref().is_some_and(|attempt| undone(attempt.kind))
}

fn no_migration() -> Refused {
    Refused::new("NoMigration", "no migration is under way")
}

fn parse<T: serde::de::DeserializeOwned>(arguments: Value) -> Result<T, Refused> {
    let arguments = if arguments.is_null() { json!({}) } else { arguments };
    serde_json::from_value(arguments).map_err(|error| Refused::generic(format!("bad arguments: {error}")))
}

fn to_json<T: serde::Serialize>(document: &T) -> Result<Value, Refused> {
    serde_json::to_value(document).map_err(|error| Refused::generic(error.to_string()))
}

#[cfg(test)]
mod tests {
    use vfio_migration::AttemptInfo;
    use vfio_migration_types::{AttemptId, Epoch, VmId};

    use super::*;

    #[test]
    fn only_what_commits_can_be_too_late_to_cancel() {
        for (kind, late) in [
            (AttemptKind::Migration, true),
            (AttemptKind::Save, true),
            (AttemptKind::Restore, true),
            (AttemptKind::Rehearsal, false),
            (AttemptKind::Check, false),
        ] {
            let attempt =
                AttemptInfo::beginning(VmId([1; 16]), AttemptId([2; 16]), Epoch(0), kind, "unix:/x".into());
            for phase in Phase::ALL {
                let mut progress = Progress::default();
                (progress.phase, progress.attempt) = (phase, Some(attempt.clone()));
                assert_eq!(is_committing(&progress), late && phase >= Phase::Commit, "{kind:?} {phase}");
            }
        }
    }
}
