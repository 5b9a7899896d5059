//! Guests whose device keeps them from moving, or moves them at a price: they are told why, and run on.

use serde_json::{Value, json};

use crate::check::{Outcome, holds, same};
use crate::command;
use crate::instance::Instance;
use crate::vm::{DOWNTIME_LIMIT_MS, TARGET, VmProcess, count, switch_over};
use crate::{edu, migdev};

/// Asks for a migration that is refused before anything is sent; what it says of itself.
fn refused(vm: &mut VmProcess) -> Outcome<Value> {
    vm.call("migrate", &json!({"uri": TARGET}))?;
    let ended = vm.until("the refusal", "query", |info| info["migration"].is_null())?;
    let ended = ended["last"].clone();
    same("status", ended["status"].as_str(), Some("failed"))?;
    same("incompatible", ended["incompatible"].as_bool(), Some(true))?;
    Ok(ended)
}

/// The guest writes more than it had when it was refused.
fn runs_on(vm: &mut VmProcess) -> Outcome<Value> {
    same("status", vm.call("query", &Value::Null)?["vm"]["status"].as_str(), Some("running"))?;
    let then = vm.call("query-guest", &Value::Null)?;
    vm.until("the guest to go on", "query-guest", |report| {
        count(report, "pages-written") > count(&then, "pages-written")
            && count(report, "page-passes") > count(&then, "page-passes")
    })
}

/// A device of plain vfio-pci, behind an IOMMU, is the guest's; it is what the migration is refused for.
pub(crate) fn vfio_pci() -> Outcome {
    let address = edu::bind()?;
    let device = format!("vfio:{address},id=edu0");
    let mut vm = VmProcess::start("a", &device, &[])?;
    vm.until("the guest to work", "query-guest", |report| count(report, "page-passes") >= 1)?;
    let info = vm.call("query", &Value::Null)?;
    same("devices", &info["vm"]["devices"], &json!(["edu0"]))?;
    let ended = refused(&mut vm)?.to_string();
    for said in ["edu0", "cannot migrate", "plain vfio-pci never has"] {
        holds(ended.contains(said), &format!("'{said}' is said: {ended}"))?;
    }
    let report = runs_on(&mut vm)?;
    same("pages lost", count(&report, "pages-lost"), 0)?;
    let listed = command::run(&["devices"])?.report.to_string();
    holds(listed.contains(&address) && listed.contains("vfio-pci"), &format!("it is listed: {listed}"))
}

/// A device whose DMA nobody logs moves when all memory may be sent again, and not before.
pub(crate) fn all_dirty() -> Outcome {
    let instances = [Instance::new("migdev", "migdev-0")?, Instance::new("migdev", "migdev-0")?];
    for instance in &instances {
        migdev::set(instance, "dma_log", 0)?;
    }
    let [from, to] = instances.each_ref().map(|instance| format!("mdev:{},id=net0", instance.uuid()));
    let mut destination = VmProcess::start("b", &to, &["--incoming", TARGET])?;
    let mut source = VmProcess::start("a", &from, &[])?;
    source.until("the guest to work", "query-guest", |report| count(report, "dma-blocks") >= 16)?;
    destination.until("the destination to wait", "query", |_| true)?;
    let ended = refused(&mut source)?.to_string();
    for said in ["net0", "no log of its DMA writes", "dirty-all"] {
        holds(ended.contains(said), &format!("'{said}' is said: {ended}"))?;
    }
    runs_on(&mut source)?;
    let arguments = json!({
        "uri": TARGET, "downtime-limit": DOWNTIME_LIMIT_MS, "verify": true, "allow-all-dirty": true,
        "pause-before-switchover": true,
    });
    source.call("migrate", &arguments)?;
    switch_over(&mut source)?;
    let arrived =
        destination.until("the guest to arrive", "query-guest", |report| count(report, "loops") > 0)?;
    let lost =
        |report: &Value| ["pages-lost", "blocks-lost", "interrupts-lost"].map(|what| count(report, what));
    let report = destination.until("the guest to check everything", "query-guest", |report| {
        lost(report) != [0, 0, 0]
            || count(report, "page-passes") >= count(&arrived, "page-passes") + 2
                && count(report, "block-passes") >= count(&arrived, "block-passes") + 2
    })?;
    same("pages, blocks and interrupts lost", lost(&report), [0, 0, 0])
}

/// A destination whose host has fewer vectors than the guest has in use answers SET_IRQS with a number, and has enabled
/// none: refused in ready, and the guest goes on at the source, its interrupts too.
pub(crate) fn fewer_vectors() -> Outcome {
    let instances = [Instance::new("migdev", "migdev-0")?, Instance::new("migdev", "migdev-0")?];
    migdev::set(&instances[1], "irqs_possible", 1)?;
    let [from, to] = instances.each_ref().map(|instance| format!("mdev:{},id=net0", instance.uuid()));
    let mut destination = VmProcess::start("b", &to, &["--incoming", TARGET])?;
    let mut source = VmProcess::start("a", &from, &[])?;
    source.until("the guest to work", "query-guest", |report| count(report, "interrupts") >= 16)?;
    destination.until("the destination to wait", "query", |_| true)?;
    source.call("migrate", &json!({"uri": TARGET, "downtime-limit": DOWNTIME_LIMIT_MS}))?;
    let ended = source.until("the refusal", "query", |info| info["migration"].is_null())?["last"].clone();
    same("status", ended["status"].as_str(), Some("failed"))?;
    let ended = ended.to_string();
    for said in ["P6", "net0", "MSI-X", "the host has 1 of the 2 interrupts asked for, and enabled none"] {
        holds(ended.contains(said), &format!("'{said}' is said: {ended}"))?;
    }
    let then = source.call("query-guest", &Value::Null)?;
    let report = source.until("interrupts to go on", "query-guest", |report| {
        count(report, "interrupts") >= count(&then, "interrupts") + 16
            && count(report, "block-passes") > count(&then, "block-passes")
            && count(report, "page-passes") > count(&then, "page-passes")
    })?;
    let lost = ["pages-lost", "blocks-lost", "interrupts-lost"].map(|what| count(&report, what));
    same("pages, blocks and interrupts lost", lost, [0, 0, 0])
}
