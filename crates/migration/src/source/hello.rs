//! P1: the source's own judgement of the destination's manifest. Of two policies the stricter holds.

use vfio_migration_compat::{MachineManifest, Report, check_machines, worse};
use vfio_migration_engine::SourceEvent;
use vfio_migration_types::{Failure, Phase, Side, error_chain};
use vfio_migration_wire::Accept;

use crate::reasons;
use crate::session::lock::lock;
use crate::session::work_error::WorkError;

use crate::source::worker::Worker;

impl Worker {
    pub(super) fn judge(&mut self, accept: Accept) -> Result<SourceEvent, WorkError> {
        let theirs = MachineManifest::from_json(&accept.manifest).map_err(|error| {
            let text = format!("the destination's manifest cannot be read: {}", error_chain(&error));
            Failure::new(Side::Source, Phase::Hello, text)
        })?;
        let own = {
            let (manifest, options) = (&self.plan.manifest, &self.plan.options);
            check_machines(manifest, &theirs, &options.device_map, &options.rules())
        };
        let said = Report { reasons: reasons::from_wire(accept.reasons), ..own.clone() };
        let report = reasons::with_missing(worse(own, said), self.plan.own_reasons.to_vec());
        let permitted = reasons::permits(&report, self.plan.options.to_file);
        let against = reasons::to_wire(&report.reasons);
        *lock(&self.counters.report) = report;
        Ok(if permitted { SourceEvent::Judged } else { SourceEvent::Refused(against) })
    }
}
