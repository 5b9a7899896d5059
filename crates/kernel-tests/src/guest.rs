//! A real guest with a real VFIO device: nested KVM runs the reference VMM's guest, twice, as source and destination, and
//! the guest itself says whether anything was lost.

use serde_json::{Value, json};

use crate::check::{Outcome, holds, same};
use crate::instance::Instance;
use crate::vm::{DOWNTIME_LIMIT_MS, TARGET, Vm, count, switch_over};

/// Moves a guest at work from one instance of migdev to another; its report from where it arrived.
fn moved(sabotage: &[&str]) -> Outcome<Value> {
    let instances = [Instance::new("migdev", "migdev-1M")?, Instance::new("migdev", "migdev-1M")?];
    let [from, to] = instances.each_ref().map(|instance| format!("mdev:{},id=net0", instance.uuid()));
    let mut destination = Vm::start("b", &to, &["--incoming", TARGET])?;
    let mut source = Vm::start("a", &from, sabotage)?;
    let before = source.until("the guest to work", "query-guest", |report| {
        count(report, "dma-blocks") >= 64
            && count(report, "interrupts") >= 16
            && count(report, "page-passes") >= 1
    })?;
    holds(lost(&before) == [0, 0, 0], &format!("nothing is lost before the move: {before}"))?;
    destination.until("the destination to wait", "query-status", |_| true)?;
    let arguments = json!({
        "uri": TARGET, "downtime-limit": DOWNTIME_LIMIT_MS, "verify": sabotage.is_empty(),
        "pause-before-switchover": true,
    });
    source.call("migrate", &arguments)?;
    source.until("the switchover", "query-migrate", |info| info["status"] != "active")?;
    // More is written after the first copy of everything.
    source.until("the guest to go on", "query-guest", |report| {
        count(report, "dma-blocks") >= count(&before, "dma-blocks") + 64
            && count(report, "pages-written") >= count(&before, "pages-written") + 64
    })?;
    switch_over(&mut source)?;
    let arrived =
        destination.until("the guest to arrive", "query-guest", |report| count(report, "loops") > 0)?;
    destination.until("the guest to check everything", "query-guest", |report| {
        lost(report) != [0, 0, 0]
            || count(report, "page-passes") >= count(&arrived, "page-passes") + 2
                && count(report, "block-passes") >= count(&arrived, "block-passes") + 2
                && count(report, "dma-blocks") >= count(&arrived, "dma-blocks") + 64
                && count(report, "interrupts") >= count(&arrived, "interrupts") + 16
    })
}

fn lost(report: &Value) -> [u64; 3] {
    ["pages-lost", "blocks-lost", "interrupts-lost"].map(|what| count(report, what))
}

/// Memory, DMA and interrupts of a guest with a kernel device, on the other side of a move.
pub(crate) fn moves_whole() -> Outcome {
    let report = moved(&[])?;
    same("pages, blocks and interrupts lost", lost(&report), [0, 0, 0])?;
    same("why the guest gave up", count(&report, "failure"), 0)
}

/// The same with bits of the dirty log dropped: the guest that judges is awake here too.
pub(crate) fn notices_what_is_lost() -> Outcome {
    let report = moved(&["--sabotage", "dirty-log"])?;
    holds(lost(&report)[0] > 0, &format!("lost pages are noticed: {report}"))
}
