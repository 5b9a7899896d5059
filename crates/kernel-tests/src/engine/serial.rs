//! The kernel's sample device between two machines: what it takes as given is not, and what it refuses is named.

use std::sync::Arc;

use rustix::io::Errno;
use vfio_migration::{IncomingError, MigrateError};
use vfio_migration_types::{MigrationState, Phase};

use super::machine::Toy;
use super::meddler::{self, Alter};
use super::pair::{Pair, Wanted, options};
use super::tap::Tap;
use crate::check::{Outcome, holds, same};
use crate::instance::Instance;
use crate::kernel_device::{drain, fill};
use crate::mtty::one_port;

const TEXT: &[u8] = b"kept in flight";
/// Where the first character is: behind the header and the port's registers.
const FIRST: usize = HEADER + 8;
const HEADER: usize = 24;

/// A port that holds a text, and one that is empty.
fn ports(there: impl FnOnce(&[Instance]) -> Outcome<Arc<Toy>>) -> Outcome<Pair> {
    let pair = Pair::between(vec![one_port()?], vec![one_port()?], Toy::new, there)?;
    pair.source.boot()?;
    fill(&pair.source.cards[0], TEXT)?;
    Ok(pair)
}

/// It moves, over a wire that is whole.
pub(crate) fn moves() -> Outcome {
    let pair = ports(Toy::new)?;
    pair.moved(meddler::migrate(&pair, meddler::nothing)?)?;
    same("contents", drain(&pair.destination.cards[0])?, TEXT.to_vec())?;
    pair.close()
}

/// Meddled with on its way, its state is refused, and nothing is lost here.
fn refused(
    alter: Alter,
    phase: Phase,
    errno: Option<Errno>,
    text: &'static str,
    remedy: &'static str,
) -> Outcome {
    let pair = ports(Toy::new)?;
    let wanted = Wanted { phase, device: Some("card0"), arc: None, errno, text, remedy, reset: false };
    pair.aborted(meddler::migrate(&pair, alter)?, wanted)?;
    same("contents there", drain(&pair.destination.cards[0])?, vec![])?;
    same("contents here", drain(&pair.source.cards[0])?, TEXT.to_vec())?;
    pair.close()
}

/// A header that the driver refuses, after which it would take anything: the first refusal is the last.
pub(crate) fn wrong_header() -> Outcome {
    let alter: Alter = |stopped, piece| {
        if let (false, Some(first)) = (stopped, piece.first_mut()) {
            *first ^= 0x10;
        }
    };
    refused(alter, Phase::Iterate, Some(Errno::FAULT), "writing its state failed", "log")
}

/// A state that the driver takes although it was altered: refused by its digest.
pub(crate) fn altered() -> Outcome {
    let alter: Alter = |stopped, piece| {
        if let (true, Some(character)) = (stopped, piece.get_mut(FIRST - HEADER)) {
            *character ^= 0x20;
        }
    };
    refused(alter, Phase::Ready, None, "its state differs from what the source read, by digest", "try again")
}

/// The same below our digest: the driver takes it, so that nobody but the digest would have noticed.
pub(crate) fn altered_unseen() -> Outcome {
    let tap = Arc::new(Tap::altering(FIRST));
    let pair = ports(|instances| Toy::shown_as(instances, |device| tap.on(device)))?;
    pair.moved(pair.migrate(options())?)?;
    let mut wrong = TEXT.to_vec();
    wrong[0] ^= 0x20;
    same("contents", drain(&pair.destination.cards[0])?, wrong)?;
    pair.close()
}

/// A state that was cut short: refused by its length.
pub(crate) fn truncated() -> Outcome {
    let alter: Alter = |stopped, piece| {
        if stopped {
            piece.truncate(20);
        }
    };
    refused(alter, Phase::Ready, None, "44 bytes of state arrived where 60 were sent", "try again")
}

/// Two ports into one: refused before any byte of RAM is sent.
pub(crate) fn other_ports() -> Outcome {
    let two = Instance::new("mtty", "mtty-2")?;
    let pair = Pair::between(vec![two], vec![one_port()?], Toy::new, Toy::new)?;
    pair.source.boot()?;
    let mut sent = 0;
    let ended = pair.migrate_seen(options(), |_, progress| sent = progress.bytes.ram)?;
    let told = match (&ended.source, &ended.destination) {
        (Err(MigrateError::Refused(here)), Err(IncomingError::Refused(there))) if here == there => {
            here.clone()
        }
        other => return Err(format!("both sides refuse, for the same reasons: {other:?}").into()),
    };
    let ports = told.iter().find(|reason| reason.code == "driver-mtty-ports");
    let ports = ports.ok_or_else(|| format!("the ports are a reason: {told:?}"))?;
    same("the device", ports.device.as_deref(), Some("card0"))?;
    same("ports", (ports.source.as_i64(), ports.destination.as_i64()), (Some(2), Some(1)))?;
    holds(ports.text.contains("ports"), &format!("the reason names ports: {}", ports.text))?;
    same("RAM sent", sent, 0)?;
    drop(ended);
    same(
        "where it is",
        vfio_migration_device::Device::state(&pair.source.cards[0])?,
        MigrationState::Running,
    )?;
    pair.goes_on_here()?;
    pair.close()
}
