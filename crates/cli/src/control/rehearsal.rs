//! The report of a rehearsal, as the control socket and `rehearse --json` have it.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use vfio_migration::{Basis, MigrateError, Rehearsal};
use vfio_migration_compat::{Reason, Report, Verdict};
use vfio_migration_types::as_millis_f64;

use crate::move_options::MoveOptions;

/// Arguments of `rehearse`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct RehearseArguments {
    /// Where to: `unix:PATH`, `tcp:HOST:PORT`, `fd:N`, a connected socket that the `vm` was started with, or `fd:NAME`, one that
    /// was passed to it by `getfd`.
    pub(crate) uri: String,
    #[serde(flatten)]
    pub(crate) options: MoveOptions,
    /// Pause the guest too, for as long as a migration would.
    #[serde(default)]
    pub(crate) pause: bool,
}

/// What a rehearsal found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub(crate) struct RehearsalInfo {
    /// Whether the guest would move, by both sides' rules and by what was tried.
    pub(crate) verdict: Verdict,
    /// Equality of some device was strict.
    pub(crate) strict: bool,
    /// Reasons of both sides' rules, and of what was tried.
    pub(crate) reasons: Vec<Reason>,
    /// Which device of the destination stands for which of the source.
    pub(crate) map: BTreeMap<String, String>,
    /// Bytes per second, as measured.
    pub(crate) rates: RateInfo,
    /// How long the guest would be paused, in milliseconds; `null` when nothing was measured to tell from.
    pub(crate) predicted_downtime_ms: Option<f64>,
    /// What that is made of.
    pub(crate) parts: Vec<PartInfo>,
}

/// Bytes per second; `null` where nothing was measured.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub(crate) struct RateInfo {
    /// Payload that went over the connection.
    pub(crate) wire: Option<u64>,
    /// Device state loaded at the destination.
    pub(crate) load: Option<u64>,
    /// RAM that became dirty.
    pub(crate) ram_dirty: Option<u64>,
    /// Device state that became dirty, per device.
    pub(crate) devices: BTreeMap<String, Option<u64>>,
}

/// A part of the downtime.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub(crate) struct PartInfo {
    /// What it is spent on.
    pub(crate) name: String,
    /// How long, in milliseconds.
    pub(crate) ms: f64,
    /// How this is known.
    #[schemars(with = "String")]
    pub(crate) basis: Basis,
}

impl RehearsalInfo {
    /// Of a rehearsal that came to its end.
    pub(crate) fn of(found: Rehearsal) -> Self {
        let report = found.verdict();
        let rates = found.rates;
        Self {
            rates: RateInfo {
                wire: rates.wire,
                load: rates.load,
                ram_dirty: rates.ram_dirty,
                devices: rates.devices,
            },
            predicted_downtime_ms: found.predicted_downtime.map(as_millis_f64),
            parts: found
                .parts
                .into_iter()
                .map(|part| PartInfo { name: part.name, ms: as_millis_f64(part.took), basis: part.basis })
                .collect(),
            ..Self::refused(report)
        }
    }

    /// The verdict of a rehearsal that found at once, or on the way, that nothing would move; `None` for a failure that
    /// has none.
    pub(crate) fn of_error(error: &MigrateError) -> Option<Self> {
        error.report().map(Self::refused)
    }

    /// The verdict with its reasons.
    pub(crate) fn report(&self) -> Report {
        let Self { verdict, strict, reasons, map, .. } = self.clone();
        Report { verdict, strict, reasons, map }
    }

    fn refused(report: Report) -> Self {
        let Report { verdict, strict, reasons, map } = report;
        let (rates, parts) = (RateInfo::default(), Vec::new());
        Self { verdict, strict, reasons, map, rates, predicted_downtime_ms: None, parts }
    }
}
