//! What a sample device is told when it is made.

use std::collections::BTreeMap;
use std::time::Duration;

use vfio_migration_types::PAGE_SIZE;
use vfio_user_peer::MigrationFlags;

use crate::error::{SimError, invalid};
use crate::fault::Fault;
use crate::stream::MODEL;

/// The largest bulk state that a device may be asked to hold, in bytes.
pub const MAX_STATE_SIZE: u64 = 64 << 30;

/// Behaviour of a sample device.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes of bulk internal state, a multiple of 4096; 0 for none.
    pub state_size: u64,
    /// Bytes of it that the device changes per second while it runs, in whole pages.
    pub state_dirty_rate: u64,
    /// Time per descriptor; zero for as fast as it goes.
    pub dma_interval: Duration,
    /// Whether it has migration at all.
    pub migration: bool,
    /// Whether it has PRE_COPY.
    pub precopy: bool,
    /// Whether it has the P2P states. Over plain vfio-user, which has none, this counts for nothing.
    pub p2p: bool,
    /// Whether its server speaks the `x-vfio-migrate` extension.
    pub extension: bool,
    /// Whether it logs its DMA writes.
    pub dirty_log: bool,
    /// The model that it claims to be.
    pub model: String,
    /// Parameters of the model that it claims to have, besides `state_size`. They are said, and do nothing.
    pub parameters: BTreeMap<String, String>,
    /// Further fields of its manifest, each JSON or text. They are said, and do nothing.
    pub fields: BTreeMap<String, String>,
    /// Version of the model, major and minor. State of the same major and of no newer minor is taken.
    pub version: (u16, u16),
    /// The third number of the version, which says nothing of the state.
    pub patch: u16,
    /// Contents of the vendor-specific capability after its header: allowed to differ between hosts.
    pub vsc_bytes: [u8; 5],
    /// Bytes of config space that it has otherwise than other sample devices, by their offsets.
    pub config_bytes: BTreeMap<u8, u8>,
    /// Time that each single arc of the state machine takes in addition.
    pub arc_delay: Duration,
    /// Script of faults.
    pub faults: Vec<Fault>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            state_size: 64 << 20,
            state_dirty_rate: 1 << 20,
            dma_interval: Duration::from_micros(500),
            migration: true,
            precopy: true,
            p2p: true,
            extension: true,
            dirty_log: true,
            model: MODEL.to_owned(),
            parameters: BTreeMap::new(),
            fields: BTreeMap::new(),
            version: (1, 0),
            patch: 0,
            vsc_bytes: [0; 5],
            config_bytes: BTreeMap::new(),
            arc_delay: Duration::ZERO,
            faults: Vec::new(),
        }
    }
}

impl Options {
    /// Refuses options that no device can have.
    pub fn check(&self) -> Result<(), SimError> {
        if !self.state_size.is_multiple_of(PAGE_SIZE) {
            return Err(invalid(format!("a state size of {} bytes is no multiple of 4096", self.state_size)));
        }
        if self.state_size > MAX_STATE_SIZE {
            return Err(invalid(format!(
                "a state size of {} bytes is over {MAX_STATE_SIZE}",
                self.state_size
            )));
        }
        Ok(())
    }

    /// Features of migration with these options.
    pub fn flags(&self) -> MigrationFlags {
        MigrationFlags::new(self.p2p && self.extension, self.precopy)
    }

    /// The version as manifests write it.
    pub fn version_string(&self) -> String {
        format!("{}.{}.{}", self.version.0, self.version.1, self.patch)
    }

    /// The first fault for which `pick` finds something.
    pub(crate) fn fault<T>(&self, pick: impl FnMut(&Fault) -> Option<T>) -> Option<T> {
        self.faults.iter().find_map(pick)
    }
}
