//! What the end of a session left to be undone: a device that did not answer, and what becomes of it.

use serde_json::Value;
use vfio_migration::PendingRollback;
use vfio_migration_types::printable;

use super::running::RunningVm;
use super::slot::RollbackEnd;
use crate::control::awaited::{AwaitedInfo, sentence};
use crate::control::event::ControlEvent;
use crate::output::eprintln_line;

/// The answers that what is left to be undone waits for; `None` when nothing is left.
pub(super) fn awaited(pending: &PendingRollback) -> Option<Vec<AwaitedInfo>> {
    match pending {
        PendingRollback::UnderWay(awaited) => Some(awaited.iter().map(AwaitedInfo::from).collect()),
        PendingRollback::None | PendingRollback::Ended { .. } => None,
    }
}

/// Looks after what the last session left to be undone, and says when it is.
#[derive(Debug, Default)]
pub(super) struct RollbackWatch {
    pending: bool,
}

impl RollbackWatch {
    /// Looks once.
    pub(super) fn tend(&mut self, vm: &RunningVm) {
        let awaited = awaited(&vm.state.pending_rollback());
        let before = std::mem::replace(&mut self.pending, awaited.is_some());
        if let Some(awaited) = awaited.filter(|_| !before) {
            eprintln_line(format_args!(
                "vfio-migrate: the session that has ended is still being undone: {}; no other can begin before that",
                sentence(&awaited)
            ));
        }
        let Some(RollbackEnd { failures, last, resumed }) = vm.state.rollback_ended() else { return };
        eprintln_line(match &failures[..] {
            [] if resumed => {
                "vfio-migrate: all that the session had begun is undone, and the guest is as it was"
                    .to_owned()
            }
            [] => "vfio-migrate: all that the session had begun is undone".to_owned(),
            failures => {
                let texts: Vec<_> = failures.iter().map(|failure| printable(&failure.text)).collect();
                let texts = texts.join("; ");
                format!("vfio-migrate: not all that the session had begun could be undone: {texts}")
            }
        });
        vm.publisher.publish(&ControlEvent::of_migration(&last));
        if resumed && vm.state.slot().machine().is_some_and(|machine| machine.is_running()) {
            vm.publisher.publish(&ControlEvent::new("RESUME", Value::Null));
        }
    }
}
