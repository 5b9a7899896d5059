//! The events of the control socket.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::expected::RefusalInfo;
use super::protocol::MigrationInfo;

const MIGRATION: &str = "MIGRATION";
const MIGRATION_PASS: &str = "MIGRATION_PASS";
const MIGRATION_REFUSED: &str = "MIGRATION_REFUSED";
const DISCONNECTED: &str = "DISCONNECTED";

/// What a client is sent unasked when something happens.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "Event")]
pub(crate) struct ControlEvent {
    /// `"MIGRATION"`, `"MIGRATION_PASS"`, `"MIGRATION_REFUSED"`, `"DEVICE_LOST"`, `"STOP"`, `"RESUME"`, `"SHUTDOWN"`,
    /// `"DISCONNECTED"`.
    pub(crate) event: String,
    /// What the event announces, as it is from then on.
    #[serde(default)]
    #[schemars(with = "EventData")]
    pub(crate) data: Value,
    /// When it happened, by the host's wall clock.
    pub(crate) timestamp: Timestamp,
}

/// What an event carries, by its name.
#[derive(JsonSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "only its schema is used")]
enum EventData {
    /// `MIGRATION_PASS`: the migration, and the iteration that begins.
    Pass {
        #[serde(flatten)]
        info: Box<MigrationInfo>,
        /// Number of the iteration, from 1.
        pass: u32,
    },
    /// `MIGRATION`: the migration.
    Migration(Box<MigrationInfo>),
    /// `MIGRATION_REFUSED`: the connection that a `vm` which waits has refused.
    Refused(Box<RefusalInfo>),
    /// `DEVICE_LOST`: the device to whose vfio-user server the connection is lost.
    DeviceLost {
        /// Name of the device.
        device: String,
        /// Why the connection is lost: the server hung up, or broke the protocol.
        why: String,
    },
    /// `DISCONNECTED`: why the `vm` closes this connection.
    Disconnected {
        /// Why, in a sentence.
        reason: String,
    },
    /// `STOP`, `RESUME`, `SHUTDOWN`: nothing.
    Nothing(()),
}

/// A wall-clock time, as in QMP.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct Timestamp {
    /// Whole seconds since 1970-01-01 UTC.
    pub(crate) seconds: u64,
    /// Microseconds of the second, below 1,000,000.
    pub(crate) microseconds: u32,
}

impl ControlEvent {
    pub(crate) fn new(event: &str, data: Value) -> Self {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Self {
            event: event.into(),
            data,
            timestamp: Timestamp { seconds: now.as_secs(), microseconds: now.subsec_micros() },
        }
    }

    /// `MIGRATION`: the state of the migration changed.
    pub(crate) fn of_migration(info: &MigrationInfo) -> Self {
        Self::new(MIGRATION, json!(info))
    }

    /// `MIGRATION_PASS`: an iteration begins.
    pub(crate) fn of_pass(info: &MigrationInfo) -> Self {
        let mut data = json!(info);
        data["pass"] = info.iterations.into();
        Self::new(MIGRATION_PASS, data)
    }

    /// `MIGRATION_REFUSED`: somebody came who is not expected, or not now.
    pub(crate) fn of_refusal(refused: &RefusalInfo) -> Self {
        Self::new(MIGRATION_REFUSED, json!(refused))
    }

    /// `DISCONNECTED`: the connection that it goes over is closed after it.
    pub(super) fn of_disconnection(reason: &str) -> Self {
        Self::new(DISCONNECTED, json!({"reason": reason}))
    }

    /// The migration that the event is about, if it is about one.
    pub(crate) fn migration(&self) -> Option<MigrationInfo> {
        match self.event.as_str() {
            MIGRATION | MIGRATION_PASS => serde_json::from_value(self.data.clone()).ok(),
            _ => None,
        }
    }
}

/// The reason why the connection that `line` came over is closed after it, if that is what it says.
pub(super) fn reason_of_disconnection(line: &Value) -> Option<String> {
    let told = line.get("event")? == DISCONNECTED;
    told.then(|| line["data"]["reason"].as_str().unwrap_or_default().to_owned())
}
