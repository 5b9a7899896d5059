//! A real guest with a real VFIO device: nested KVM runs the reference VMM's guest, twice, as source and destination, and
//! the guest itself says whether anything was lost.

use serde_json::{Value, json};

use crate::check::{Outcome, holds, same};
use crate::vm::{DOWNTIME_LIMIT_MS, TARGET, VmProcess, count, latest, switch_over};

/// Has a source drop bits of its dirty log.
pub(crate) const SABOTAGE: &[&str] = &["--sabotage", "dirty-log"];

/// Lets a guest work, and moves it to where `ready` says that it is waited for.
pub(crate) fn leaves(
    source: &mut VmProcess,
    sabotaged: bool,
    ready: impl FnOnce() -> Outcome<String>,
) -> Outcome {
    let before = source.until("the guest to work", "query-guest", |report| {
        count(report, "dma-blocks") >= 64
            && count(report, "interrupts") >= 16
            && count(report, "page-passes") >= 1
    })?;
    holds(lost(&before) == [0, 0, 0], &format!("nothing is lost before the move: {before}"))?;
    let arguments = json!({
        "uri": ready()?, "downtime-limit": DOWNTIME_LIMIT_MS, "verify": !sabotaged,
        "pause-before-switchover": true,
    });
    source.call("migrate", &arguments)?;
    source.until("the switchover", "query", |info| latest(info)["status"] != "active")?;
    // More is written after the first copy of everything.
    source.until("the guest to go on", "query-guest", |report| {
        count(report, "dma-blocks") >= count(&before, "dma-blocks") + 64
            && count(report, "pages-written") >= count(&before, "pages-written") + 64
    })?;
    switch_over(source)
}

/// The URI at which a VM waits for a guest.
pub(crate) fn waits(destination: &mut VmProcess) -> Outcome<String> {
    let info =
        destination.until("the destination to wait", "query", |info| info["vm"]["incoming"].is_string())?;
    Ok(info["vm"]["incoming"].as_str().unwrap_or_default().to_owned())
}

/// The report of a guest that arrived and has since gone over everything, with DMA and interrupts going on.
pub(crate) fn arrives(destination: &mut VmProcess) -> Outcome<Value> {
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

/// Moves a guest at work from one instance of migdev to another; its report from where it arrived.
fn moved(sabotage: &[&str]) -> Outcome<Value> {
    let mut destination = VmProcess::with_migdev("b", &["--incoming", TARGET])?;
    let mut source = VmProcess::with_migdev("a", sabotage)?;
    leaves(&mut source, !sabotage.is_empty(), || waits(&mut destination))?;
    arrives(&mut destination)
}

/// Pages, blocks and interrupts that the guest misses.
fn lost(report: &Value) -> [u64; 3] {
    ["pages-lost", "blocks-lost", "interrupts-lost"].map(|what| count(report, what))
}

/// Fails the test unless the guest that gave `report` misses nothing.
pub(crate) fn is_whole(report: &Value) -> Outcome {
    same("pages, blocks and interrupts lost", lost(report), [0, 0, 0])?;
    same("why the guest gave up", count(report, "failure"), 0)
}

/// Fails the test unless the guest that gave `report` misses pages.
pub(crate) fn misses_pages(report: &Value) -> Outcome {
    holds(lost(report)[0] > 0, &format!("lost pages are noticed: {report}"))
}

/// Memory, DMA and interrupts of a guest with a kernel device, on the other side of a move.
pub(crate) fn moves_whole() -> Outcome {
    is_whole(&moved(&[])?)
}

/// The same with bits of the dirty log dropped: the guest that judges is awake here too.
pub(crate) fn notices_what_is_lost() -> Outcome {
    misses_pages(&moved(SABOTAGE)?)
}
