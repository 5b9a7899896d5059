//! `rehearse`: everything up to the switchover for real, and undone.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;
use vfio_migration_compat::Verdict;

use crate::args::moves::Rehearse;
use crate::control::protocol::{MigrationState, Verb};
use crate::control::rehearsal::{RehearsalInfo, RehearseArguments};
use crate::exit::{Exit, Failure};
use crate::follow::{OnInterrupt, follow};
use crate::interrupt::Interrupt;
use crate::output::{print, print_json};
use crate::units::show_size;
use crate::verdict;
use crate::words::{device_map, uri};

/// What `rehearse --json` prints.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct RehearseReport {
    #[serde(flatten)]
    pub(crate) found: RehearsalInfo,
}

pub(crate) fn run(options: &Rehearse, interrupt: &Interrupt) -> Result<Exit, Failure> {
    uri(&options.to)?;
    device_map(&options.options.device_map)?;
    let arguments =
        RehearseArguments { uri: options.to.clone(), options: options.options.clone(), pause: options.pause };
    let mut client = options.target.connect()?;
    client.call(Verb::Rehearse, json!(arguments)).map_err(|error| error.failure("refused"))?;
    let goes_on = |state| state == MigrationState::Active;
    let report = follow(&mut client, goes_on, options.target.json, interrupt, OnInterrupt::Cancel)?;
    let Some(found) = report.migration.rehearsal else {
        let why = report.migration.error.unwrap_or_else(|| "it did not say why".into());
        return Err(Failure::failed(format!("the rehearsal failed: {why}")));
    };
    let verdict = found.verdict;
    if options.target.json {
        print_json(&RehearseReport { found })?;
    } else {
        print(text(&found))?;
    }
    // A rehearsal is of a live migration.
    Ok(if verdict <= Verdict::LiveWithWarning { Exit::Done } else { Exit::Incompatible })
}

fn text(found: &RehearsalInfo) -> String {
    let mut text = verdict::text(&found.report());
    if let Some(predicted) = found.predicted_downtime_ms {
        text.push_str(&format!("the guest would stand for about {predicted:.1} ms:\n"));
        for part in &found.parts {
            text.push_str(&format!(
                "  {:24} {:9.1} ms  {}\n",
                part.name,
                part.ms,
                verdict::word(&part.basis)
            ));
        }
    }
    let rate =
        |rate: Option<u64>| rate.map_or("not measured".into(), |rate| format!("{}/s", show_size(rate)));
    text.push_str(&format!(
        "on the wire {}, loaded there {}\n",
        rate(found.rates.wire),
        rate(found.rates.load)
    ));
    text.push_str(&format!("the guest dirties {}\n", rate(found.rates.ram_dirty)));
    for (device, dirty) in &found.rates.devices {
        text.push_str(&format!("device {device} dirties {}\n", rate(*dirty)));
    }
    text
}
