//! The end of a `vm`'s process, and of the session that is under way then.

use super::info;
use super::running::RunningVm;
use super::slot::Slot;
use crate::control::awaited::{AwaitedInfo, sentence};
use crate::control::refused::Refused;
use crate::exit::Exit;
use crate::output::eprintln_line;

/// Ends what is under way `by` this: a session is cancelled and waited for, so that no guest is left without an owner. One that waits for
/// a device is not: it is being undone, and the guest is this side's, or never came. Returns what the process exits with.
pub(super) fn end(vm: &RunningVm, by: &str) -> Exit {
    vm.begin_ending();
    end_sessions(vm, by);
    vm.questions.say_rest();
    vm.passed.end();
    match vm.state.put_if(|_| true, Slot::Ended) {
        // Nobody knows whose the guest is that ends here.
        Ok(Slot::Unresolved { .. }) => Exit::Unresolved,
        Ok(_) | Err(_) => Exit::Done,
    }
}

/// Ends what is under way `by` this, so that no guest can come any more, unless a guest is here that would end with the process.
pub(super) fn end_without_guest(vm: &RunningVm, by: &str) -> Result<(), Refused> {
    vm.refuse_with_guest()?;
    end_sessions(vm, by);
    // The one that was on its way may have arrived first.
    vm.refuse_with_guest()
}

fn end_sessions(vm: &RunningVm, by: &str) {
    vm.state.cancel_at_end(by);
    let awaited: Vec<_> = vm.state.join().iter().map(AwaitedInfo::from).collect();
    if awaited.is_empty() {
        return;
    }
    eprintln_line(format_args!(
        "vfio-migrate: the session that was cancelled is not waited for: {}",
        sentence(&awaited)
    ));
    // Its own end may never come: what is told and kept of it, is now.
    vm.end_session(info::ended_with_process(vm, by, &awaited), None);
}
