//! Findings of a rehearsal: everything up to a point was done for real, and undone.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vfio_migration_compat::{Reason, Report, SessionCode};
use vfio_migration_engine::{self as engine, PartName};
use vfio_migration_types::{DeviceId, Failure};

use crate::reasons;
use crate::report::{Bytes, PhaseTime};

pub use vfio_migration_engine::Rehearse;

/// A rehearsal that was undone: both sides are as they were before.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Rehearsal {
    /// Whether the machine fits, by the rules of both sides, with all that should be known.
    pub report: Report,
    /// The failure that would have kept the migration from its end, if there is one.
    pub obstacle: Option<Failure>,
    /// Iterations of the pre-copy.
    pub iterations: u32,
    /// Rates that were measured.
    pub rates: Rates,
    /// The downtime that is to be expected; `None` when nothing was measured to predict it from.
    #[serde(rename = "predicted_downtime_ms", with = "crate::millis::option")]
    pub predicted_downtime: Option<Duration>,
    /// Parts of the predicted downtime, in order.
    pub parts: Vec<PredictedPart>,
    /// Devices whose state was not tried, because they can only be saved while the guest is paused.
    pub not_rehearsed: Vec<DeviceId>,
    /// Payload moved by the rehearsal.
    pub bytes: Bytes,
    /// Duration of the rehearsal in all.
    #[serde(rename = "total_ms", with = "crate::millis")]
    pub total: Duration,
    /// Time of each phase that was entered.
    pub phases: Vec<PhaseTime>,
    /// What one side could not release by the end: this one, since it was late, or the destination, which may also have failed to say so.
    pub left_undone: Option<Failure>,
}

/// Bytes per second, each `None` where nothing was measured.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rates {
    /// All bytes on the wire.
    pub wire: Option<u64>,
    /// Device state loaded at the destination.
    pub load: Option<u64>,
    /// RAM that became dirty.
    pub ram_dirty: Option<u64>,
    /// State that became dirty, per device that can say.
    pub devices: BTreeMap<String, Option<u64>>,
}

/// A part of the downtime that is to be expected.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PredictedPart {
    /// The part's purpose: `quiesce`, `round-trips`, `ram`, `device NAME`, `final`, `load`, `start`.
    pub name: String,
    /// The part's duration.
    #[serde(rename = "ms", with = "crate::millis")]
    pub took: Duration,
    /// The ground on which the duration is known.
    pub basis: Basis,
}

/// The ground on which a figure is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Basis {
    /// Measured in the rehearsal.
    Measured,
    /// Computed from what the device declares, at a measured rate.
    Declared,
    /// Assumed, or left at zero.
    Unknown,
}

impl Rehearsal {
    pub(crate) fn new(
        found: engine::RehearsalResult,
        report: Report,
        devices: &[DeviceId],
        not_rehearsed: Vec<DeviceId>,
        bytes: Bytes,
        phases: Vec<PhaseTime>,
        total: Duration,
    ) -> Self {
        let predicted = found.parts.iter().fold(Duration::ZERO, |sum, part| sum.saturating_add(part.took));
        let names = devices.iter().map(ToString::to_string);
        Self {
            report,
            obstacle: found.obstacle,
            iterations: found.iterations,
            rates: Rates {
                wire: found.wire,
                load: found.load,
                ram_dirty: found.ram_dirty,
                devices: names.zip(found.devices_dirty.into_iter().chain(std::iter::repeat(None))).collect(),
            },
            predicted_downtime: (!found.parts.is_empty()).then_some(predicted),
            parts: found.parts.into_iter().map(Into::into).collect(),
            not_rehearsed,
            bytes,
            total,
            phases,
            left_undone: found.left_undone,
        }
    }
}

impl Rehearsal {
    /// Why a migration would not come to its end, as both sides tell it.
    pub fn reasons(&self) -> Vec<Reason> {
        self.obstacle.iter().map(reasons::of_obstacle).collect()
    }

    /// The verdict of both sides' rules together with what was found by trying.
    pub fn verdict(&self) -> Report {
        let mut found = self.reasons();
        for device in &self.not_rehearsed {
            let text =
                "its state can only be read while the guest is paused, and was not tried: --pause tries it";
            let device = Some(device.to_string());
            found.push(Reason {
                device,
                field: "flags".into(),
                ..Reason::new(SessionCode::RehearsalNotTried, text)
            });
        }
        reasons::with(self.report.clone(), found)
    }
}

impl From<engine::Part> for PredictedPart {
    fn from(part: engine::Part) -> Self {
        let name = match part.name {
            PartName::Quiesce => "quiesce".into(),
            PartName::RoundTrips => "round-trips".into(),
            PartName::Ram => "ram".into(),
            PartName::Device(device) => format!("device {device}"),
            PartName::Final => "final".into(),
            PartName::Load => "load".into(),
            PartName::Start => "start".into(),
            other => format!("{other:?}"),
        };
        let basis = match part.basis {
            engine::PartBasis::Measured => Basis::Measured,
            engine::PartBasis::Declared => Basis::Declared,
            engine::PartBasis::Unknown => Basis::Unknown,
        };
        Self { name, took: part.took, basis }
    }
}
