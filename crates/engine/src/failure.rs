//! Failures that the engine itself finds, and the comparison of what was sent with what arrived.

use std::time::Duration;

use vfio_migration_types::{Failure, Phase, Side, milliseconds};
use vfio_migration_wire::{DeviceTotal, FinalEnd, Message, Ready};

use crate::api::DeviceFacts;

/// The errno of an answer that did not come in time, by which an embedder knows it (asm-generic/errno.h).
const ETIMEDOUT: u32 = 110;

/// A failure of no device.
pub(crate) fn failure(side: Side, phase: Phase, text: impl Into<String>, remedy: &str) -> Failure {
    Failure::new(side, phase, text).with_remedy(remedy)
}

/// A message that is not legal now.
pub(crate) fn protocol(side: Side, phase: Phase, message: &Message) -> Failure {
    let text = format!("the {} said {}, which is not legal now: protocol error", side.other(), name(message));
    failure(side, phase, text, "check that both sides run a release that speaks this protocol")
}

/// The answer that the peer must give has not come in time.
pub(crate) fn silence(side: Side, phase: Phase, what: &str, waited: Duration) -> Failure {
    let text = format!("the {} has not said {what} within {} ms", side.other(), milliseconds(waited));
    let silence = failure(side, phase, text, "check the network and the other side, then try again");
    Failure { errno: Some(ETIMEDOUT), ..silence }
}

/// The connection broke, or ended early.
pub(crate) fn link_lost(side: Side, phase: Phase, why: &str) -> Failure {
    failure(
        side,
        phase,
        format!("the connection was lost: {why}"),
        "check the network and the other side, then try again",
    )
}

/// `failure`, as one of the device with this index in the manifest.
pub(crate) fn with_device(devices: &[DeviceFacts], index: usize, mut failure: Failure) -> Failure {
    failure.device = devices.get(index).map(|device| device.id.to_string());
    failure
}

/// The remedy where RAM itself differs.
const LOGS_MISS_WRITES: &str = "suspect the dirty logs of the source first, those of its devices (DMA that they did not report) \
                                before the one of its vCPUs and the VMM's own writes; the network last";

/// Compares what the source sent, by its own count, with what the destination reports to have. Found out on `side`.
/// `devices` may be empty.
pub(crate) fn compare(
    side: Side,
    totals: &FinalEnd,
    ready: &Ready,
    devices: &[DeviceFacts],
) -> Result<(), Failure> {
    let differ = |what: &str, sent: String, got: String| {
        failure(
            side,
            Phase::Ready,
            format!("{what} differ: {sent} sent, {got} at the destination"),
            "try again; if it comes again, it is a defect of one side or of the network between them",
        )
    };
    if totals.ram_pages != ready.ram_pages {
        return Err(differ("RAM pages", totals.ram_pages.to_string(), ready.ram_pages.to_string()));
    }
    if totals.sections != ready.sections {
        return Err(differ(
            "machine-state sections",
            totals.sections.to_string(),
            ready.sections.to_string(),
        ));
    }
    if totals.devices.len() != ready.devices.len() {
        return Err(differ("devices", totals.devices.len().to_string(), ready.devices.len().to_string()));
    }
    for (index, (sent, got)) in totals.devices.iter().zip(&ready.devices).enumerate() {
        if sent != got {
            let what = match devices.get(index) {
                Some(device) => format!("the bytes of device {}", device.id),
                None => format!("the bytes of device number {index}"),
            };
            return Err(with_device(devices, index, differ(&what, describe(sent), describe(got))));
        }
    }
    if let Some(sent) = totals.ram_digest.filter(|sent| Some(*sent) != ready.ram_digest) {
        return Err(ram_differs(side, sent, ready.ram_digest, ""));
    }
    Ok(())
}

/// The failure of RAM whose digest at the destination is not that of the source. `found` ends the sentence: what is known of
/// where it differs, or nothing.
pub fn ram_differs(side: Side, sent: [u8; 32], got: Option<[u8; 32]>, found: &str) -> Failure {
    let text =
        format!("RAM digests differ: {} sent, {} at the destination{found}", hex(Some(sent)), hex(got));
    // The stream is checked on its way; a write that no log reported is not, and a device's log is its own.
    failure(side, Phase::Ready, text, LOGS_MISS_WRITES)
}

fn describe(total: &DeviceTotal) -> String {
    format!("{} (digest {})", total.bytes, hex(Some(total.digest)))
}

/// The first eight bytes: enough to see that two differ.
fn hex(digest: Option<[u8; 32]>) -> String {
    match digest {
        Some(digest) => digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect(),
        None => "none".to_owned(),
    }
}

/// A message's name, as `docs/protocol.md` spells it.
pub(crate) fn name(message: &Message) -> &'static str {
    match message {
        Message::Hello(_) => "HELLO",
        Message::HelloReply(_) => "HELLO_REPLY",
        Message::Offer(_) => "OFFER",
        Message::Accept(_) => "ACCEPT",
        Message::Refuse(_) => "REFUSE",
        Message::Begin { .. } => "BEGIN",
        Message::Begun => "BEGUN",
        Message::InitialSent { .. } => "INITIAL_SENT",
        Message::InitialLoaded { .. } => "INITIAL_LOADED",
        Message::EndIteration { .. } => "END_ITERATION",
        Message::Applied(_) => "APPLIED",
        Message::Credit { .. } => "CREDIT",
        Message::Final(_) => "FINAL",
        Message::LocksFree => "LOCKS_FREE",
        Message::FinalEnd(_) => "FINAL_END",
        Message::Ready(_) => "READY",
        Message::DigestRam { .. } => "DIGEST_RAM",
        Message::RamDigests(_) => "RAM_DIGESTS",
        Message::Commit(_) => "COMMIT",
        Message::Declined(_) => "DECLINED",
        Message::Running(_) => "RUNNING",
        Message::Abort(_) => "ABORT",
        Message::Query { .. } => "QUERY",
        Message::LimitsUnmet(_) => "LIMITS_UNMET",
        Message::EndRehearsal { .. } => "END_REHEARSAL",
        Message::Rehearsed { .. } => "REHEARSED",
        Message::Ping { .. } => "PING",
        Message::Pong { .. } => "PONG",
        _ => "a message of a later version",
    }
}
