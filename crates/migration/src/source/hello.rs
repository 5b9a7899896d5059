//! P1: the source's own judgement of the destination's manifest. Of two policies the stricter holds.

use vfio_migration_compat::{MachineManifest, Policy, Report, check_machines, worse};
use vfio_migration_engine::SourceEvent;
use vfio_migration_types::{Failure, Phase, Side, error_chain};
use vfio_migration_wire::Accept;

use crate::options::SourceOptions;
use crate::reasons;
use crate::session::lock::lock;
use crate::session::work_error::WorkError;

use crate::source::worker::Worker;

impl Worker<'_> {
    pub(super) fn judge(&mut self, accept: Accept) -> Result<SourceEvent, WorkError> {
        let theirs = MachineManifest::from_json(&accept.manifest).map_err(|error| {
            let text = format!("the destination's manifest cannot be read: {}", error_chain(&error));
            Failure::new(Side::Source, Phase::Hello, text)
        })?;
        let own = check_machines(self.manifest, &theirs, &self.options.device_map, &policy(self.options));
        let said = Report { reasons: reasons::from_wire(accept.reasons), ..own.clone() };
        let report = worse(own, said);
        let permitted = reasons::permits(&report, self.options.to_file);
        let against = reasons::to_wire(&report.reasons);
        *lock(&self.counters.report) = report;
        Ok(if permitted { SourceEvent::Judged } else { SourceEvent::Refused(against) })
    }
}

/// The caller's policy, and what its options allow beside it.
fn policy(options: &SourceOptions) -> Policy {
    let mut policy = options.policy.clone();
    if options.allow_all_dirty {
        reasons::allow(&mut policy, &reasons::DIRTY, "all of RAM may be sent while the guest is paused");
    }
    if options.no_peer_dma {
        reasons::allow(&mut policy, &reasons::PEERS, "no device maps another's BAR for DMA");
    }
    policy
}
