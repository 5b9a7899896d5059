//! A guest with mtty, the kernel's own sample, whose interrupt is a pin: level-triggered, through the emulated interrupt
//! controller, ended by the guest and then unmasked at the device.

use serde_json::{Value, json};

use crate::check::{Outcome, holds, same};
use crate::instance::Instance;
use crate::vm::{DOWNTIME_LIMIT_MS, TARGET, VmProcess, count, switch_over};

/// Moves a guest that drives mtty; its report from where it arrived, once it has seen enough or lost something.
fn moved(at_destination: &[&str]) -> Outcome<Value> {
    let instances = [Instance::new("mtty", "mtty-2")?, Instance::new("mtty", "mtty-2")?];
    let [from, to] = instances.each_ref().map(|instance| format!("mdev:{},id=tty0", instance.uuid()));
    let mut destination = VmProcess::start("b", &to, &[&["--incoming", TARGET], at_destination].concat())?;
    let mut source = VmProcess::start("a", &from, &[])?;
    let before = source.until("the card to be heard", "query-guest", |report| {
        count(report, "serial-interrupts") >= 4 && count(report, "serial-bytes") >= 32
    })?;
    holds(lost(&before) == [0, 0, 0], &format!("nothing is lost before the move: {before}"))?;
    destination.until("the destination to wait", "query", |_| true)?;
    let arguments = json!({
        "uri": TARGET, "downtime-limit": DOWNTIME_LIMIT_MS, "verify": true, "pause-before-switchover": true,
    });
    source.call("migrate", &arguments)?;
    switch_over(&mut source)?;
    let arrived =
        destination.until("the guest to arrive", "query-guest", |report| count(report, "loops") > 0)?;
    destination.until("the card to be heard again", "query-guest", |report| {
        lost(report) != [0, 0, 0]
            || count(report, "serial-interrupts") >= count(&arrived, "serial-interrupts") + 8
                && count(report, "serial-bytes") >= count(&arrived, "serial-bytes") + 64
    })
}

fn lost(report: &Value) -> [u64; 3] {
    ["serial-bytes-lost", "serial-interrupts-lost", "pages-lost"].map(|what| count(report, what))
}

/// The pin is heard on the other side of a move, and every byte that was in the card comes back in order.
pub(crate) fn moves_whole() -> Outcome {
    let report = moved(&[])?;
    same("bytes, interrupts and pages lost", lost(&report), [0, 0, 0])?;
    same("why the guest gave up", count(&report, "failure"), 0)
}

/// The same with the pin left disabled at the destination: the guest waits for it in vain, and says so.
pub(crate) fn notices_a_dead_pin() -> Outcome {
    let report = moved(&["--sabotage", "interrupt"])?;
    same("bytes lost", count(&report, "serial-bytes-lost"), 0)?;
    holds(count(&report, "serial-interrupts-lost") > 0, &format!("a dead pin is noticed: {report}"))
}
