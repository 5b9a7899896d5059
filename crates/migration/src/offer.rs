//! The source's offer, as the destination's VMM sees it before it builds its machine.

use std::fmt;
use std::sync::Arc;

use vfio_migration_compat::{DeviceMap, MachineManifest, Reason};
use vfio_migration_device::DeviceError;
use vfio_migration_types::{AttemptId, Epoch, Failure, Phase, Side, VmId};

use crate::machine::Machine;
use crate::report::ArrivalReport;
use crate::session::fail::InPhase;

/// A guest that wants to come in.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct IncomingOffer {
    /// The VM that the guest is; nil, where a mere question [names none](VmId::names_a_vm).
    pub vm: VmId,
    /// The source's attempt to move it.
    pub attempt: AttemptId,
    /// The epoch under which the source owns it.
    pub epoch: Epoch,
    /// The manifest of the source's machine.
    pub manifest: MachineManifest,
    /// The [`configuration`](crate::Machine::configuration) of the source's VMM, byte for byte by its digest; foreign text until it is
    /// judged. Empty where it has none.
    pub configuration: Vec<u8>,
    /// The BLAKE3 digest of it, by which two machines are told to be configured alike; `None` where it has none.
    pub configuration_digest: Option<[u8; 32]>,
}

/// The digest of a configuration as an offer carries it.
pub(crate) fn digest_of_configuration(configuration: &[u8]) -> [u8; 32] {
    if configuration.is_empty() { [0; 32] } else { *blake3::hash(configuration).as_bytes() }
}

/// Why there is no machine for a guest on offer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotBuilt {
    /// It is not taken here, and another attempt comes to the same: the source is refused, with this reason.
    #[error("{}", .0.text)]
    Refused(Box<Reason>),
    /// It could not be built now, in a sentence: the attempt fails, and another may not.
    #[error("{0}")]
    Failed(String),
    /// The same, for what a device did.
    #[error("{}", .0.text)]
    OfDevice(Box<Failure>),
}

impl NotBuilt {
    /// A machine that could not be built for `error` of a device, which the VMM tells as `text`.
    pub fn of_device(error: &DeviceError, text: &str) -> Self {
        let failure = error.in_phase(Side::Destination, Phase::Hello);
        let told = Failure::new(Side::Destination, Phase::Hello, text);
        Self::OfDevice(Box::new(Failure { text: told.text, ..failure }))
    }
}

impl From<Reason> for NotBuilt {
    fn from(reason: Reason) -> Self {
        Self::Refused(Box::new(reason))
    }
}

/// A guest that arrived: this machine owns it, and runs it unless it was sent paused.
#[derive(Clone)]
#[non_exhaustive]
pub struct Arrived {
    /// The machine that was built for it.
    pub machine: Arc<dyn Machine>,
    /// The epoch under which it is ours: what the next [`SourceOptions::epoch`](crate::SourceOptions::epoch) needs.
    pub epoch: Epoch,
    /// Times and totals of the arrival.
    pub report: ArrivalReport,
}

impl fmt::Debug for Arrived {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arrived")
            .field("epoch", &self.epoch)
            .field("report", &self.report)
            .finish_non_exhaustive()
    }
}

/// The names of the map, as OFFER carries them.
pub(crate) fn names(map: &DeviceMap) -> Vec<(String, String)> {
    map.0.iter().map(|(from, to)| (from.to_string(), to.to_string())).collect()
}
