//! Migrations of which nothing is to be said but that they work; and of two devices, which stand still together or not at
//! all.

use std::sync::Arc;

use vfio_migration::InjectedFault;
use vfio_migration_device::Position;

use super::machine::Toy;
use super::pair::{Pair, options, refused};
use super::tap::Tap;
use crate::check::{Outcome, holds, same};
use crate::instance::Instance;
use crate::migdev::{get, set};

/// There, and back again by the same devices, while everything changes.
pub(crate) fn there_and_back() -> Outcome {
    let pair = Pair::new(|_| Ok(()))?;
    let mut options = options();
    options.verify = true;
    let completed = pair.moved(pair.migrate(options.clone())?)?;
    same("RAM's digests agree", completed.ram_digest_match, Some(true))?;
    holds(completed.bytes.device_precopy > 0 && completed.bytes.device_stopcopy > 0, "both kinds of bytes")?;
    same("left undone", completed.left_undone, vec![])?;
    same("damage", get(&pair.to[0], "integrity")?, 0)?;
    let back = pair.turned();
    back.moved(back.migrate(options)?)?;
    same("damage", get(&back.to[0], "integrity")?, 0)?;
    back.close()
}

/// With what the device logged thrown away, the guest finds itself that its writes are lost: it is awake here.
pub(crate) fn a_lost_log_is_noticed() -> Outcome {
    let pair = Pair::new(|_| Ok(()))?.with_fault(InjectedFault::HideDeviceLogs);
    let mut options = options();
    options.verify = false;
    let (ended, _) = pair.migrate_at_work(options)?;
    let why = pair.moved(ended).err().ok_or("a guest arrived whole whose device's writes were not sent")?;
    holds(why.to_string().contains("the guest found that"), &why.to_string())
}

fn two(flags: impl Fn(&Instance) -> Outcome) -> Outcome<(Pair, Arc<Tap>)> {
    let tap = Arc::new(Tap::default());
    let build = |instances: &[Instance]| Toy::shown_as(instances, |device| tap.on(device));
    Ok((Pair::of(2, flags, build)?, tap.clone()))
}

/// Both have stopped their peer-to-peer DMA before either stops.
pub(crate) fn two_devices() -> Outcome {
    let (pair, tap) = two(|_| Ok(()))?;
    pair.moved(pair.migrate(options())?)?;
    quiesced_together(&tap.heard())?;
    pair.close()
}

/// Stopped one by one, they are found out: the check above is awake.
pub(crate) fn two_devices_one_by_one() -> Outcome {
    let (pair, tap) = two(|_| Ok(()))?;
    pair.with_fault(InjectedFault::StopOneByOne).migrate(options())?.source?;
    holds(quiesced_together(&tap.heard()).is_err(), &format!("out of order: {:?}", tap.heard()))
}

fn quiesced_together(heard: &[(String, Position)]) -> Outcome {
    let places: Vec<Position> = heard.iter().map(|(_, position)| *position).collect();
    let wanted = [Position::PreCopy, Position::PreCopyP2p, Position::StopCopy].map(|at| [at, at]).concat();
    same(&format!("places of {heard:?}"), places, wanted)
}

/// A second device that lacks P2P is named, and nothing has begun; said to do no peer-to-peer DMA, both go.
pub(crate) fn one_lacks_p2p() -> Outcome {
    let made = std::sync::atomic::AtomicU64::new(0);
    let (pair, _) = two(|instance| {
        let odd = made.fetch_add(1, std::sync::atomic::Ordering::Relaxed) % 2 == 1;
        set(instance, "mig_flags", if odd { 5 } else { 7 })
    })?;
    let arcs = get(&pair.from[0], "arcs")?;
    let ended = pair.migrate(options())?;
    let reason = refused(ended)?;
    same("code and device", (&*reason.code, reason.device.as_deref()), ("p2p-missing", Some("card1")))?;
    same("arcs taken", get(&pair.from[0], "arcs")?, arcs)?;
    pair.goes_on_here()?;
    let mut options = options();
    options.no_peer_dma = true;
    pair.moved(pair.migrate(options)?)?;
    pair.close()
}
