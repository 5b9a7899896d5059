//! P4, and the way back from it: vCPUs paused, every device taken to a barrier, all at once.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vfio_migration_device::{ConfigState, PciError, PciFunction, Position, TransitionError};
use vfio_migration_engine::{Barrier, DeviceProgress};
use vfio_migration_types::{Failure, MigrationState, Phase, Side};

use crate::device_state::send::DeviceSender;
use crate::device_state::tracked::ask_pci;
use crate::machine::{MigratableDevice, Paused};
use crate::session::awaited::Request;
use crate::session::fail::InPhase;
use crate::session::host::monotonic_ns;
use crate::session::lock::lock;
use crate::session::parallel::for_each_device_parallel;
use crate::session::work_error::{self, WorkError};

use crate::source::worker::Worker;

impl Worker {
    /// The machine must still be what was offered and judged; asked while the guest runs.
    pub(super) fn unchanged_identity(&self) -> Result<[u8; 32], WorkError> {
        let wait = self.plan.answers.wait(None, Request::Manifest, None);
        let now = self.machine.manifest();
        drop(wait);
        let now = now.map_err(|error| error.in_phase(Side::Source, Phase::Quiesce))?;
        let identity = now.identity_digest();
        if identity != self.plan.manifest.identity_digest() {
            let changed = now.devices.iter().zip(&self.plan.manifest.devices).find(|(now, then)| now != then);
            let text = match changed {
                Some((device, _)) => format!("device {} is not what was offered any more", device.id),
                None => "the machine is not what was offered any more".to_owned(),
            };
            return Err(Failure::new(Side::Source, Phase::Quiesce, text)
                .with_remedy("try again: what it is now is compared then")
                .into());
        }
        Ok(identity)
    }

    /// Pauses the guest. The token is kept until the attempt is undone or committed.
    pub(super) fn pause(&mut self) -> Result<bool, WorkError> {
        {
            // An attempt that was given up until here has not paused the guest, and never will.
            let mut pausing = lock(&self.shared.pausing);
            self.shared.interrupt.check()?;
            *pausing = true;
        }
        // Before, not after: the downtime begins when the first vCPU is paused.
        let now = monotonic_ns();
        let paused =
            Paused::pause(&self.machine).map_err(|error| error.in_phase(Side::Source, Phase::Quiesce))?;
        self.counters.paused_ns.store(now, Ordering::Release);
        let ran = paused.ran();
        self.paused = Some(paused);
        Ok(ran)
    }

    /// Lets the guest go on, on the way back to P3.
    pub(super) fn resume(&mut self) -> Result<(), WorkError> {
        // The token goes only when the guest does: an attempt that fails here must still know that the guest is paused.
        if let Some(paused) = &mut self.paused {
            paused.end().map_err(|error| error.in_phase(Side::Source, Phase::Quiesce))?;
        }
        let ran = self.paused.take().is_some_and(|paused| paused.ran());
        self.counters.pause_ended(monotonic_ns(), ran);
        *lock(&self.shared.pausing) = false;
        Ok(())
    }

    /// Takes every device to `barrier`; it is reached when the slowest is there.
    pub(super) fn take_devices(&mut self, barrier: Barrier) -> Result<Vec<DeviceProgress>, WorkError> {
        if barrier == Barrier::StopCopy {
            self.configs = self.read_configs()?;
        }
        let results = for_each_device_parallel(self.devices.iter_mut(), |device| {
            take(device, barrier)
                .map_err(|error| WorkError::from(error.in_phase(Side::Source, Phase::Quiesce)))
        });
        work_error::worst_of(results)?;
        self.device_progress(Phase::Quiesce)
    }

    /// Config space of every function, while no device refuses to have it read.
    fn read_configs(&self) -> Result<Vec<Option<ConfigState>>, WorkError> {
        let read = |moved: &MigratableDevice| {
            let ask = |pci: &Arc<dyn PciFunction>| ask_pci(&self.plan.answers, moved, || pci.save_config());
            moved.pci.as_ref().map(ask).transpose()
        };
        let configs = self.functions.iter().map(read).collect::<Result<_, PciError>>();
        configs.map_err(|error| error.in_phase(Side::Source, Phase::Quiesce).into())
    }
}

fn take(device: &mut DeviceSender, barrier: Barrier) -> Result<(), TransitionError> {
    let p2p = device.flags().p2p;
    match (&mut device.session, barrier) {
        (Some(session), Barrier::Running) => session.go(Position::PreCopy),
        (Some(session), Barrier::P2p) if p2p => session.go(Position::PreCopyP2p),
        (Some(session), Barrier::StopCopy) => session.go(Position::StopCopy),
        (None, Barrier::Running) => device.device.set_state(MigrationState::Running),
        (None, Barrier::P2p) if p2p => device.device.set_state(MigrationState::RunningP2p),
        // Without P2P states there is nothing between running and stopped.
        (_, Barrier::P2p) => Ok(()),
        (None, Barrier::StopCopy) => {
            device.device.set_state(MigrationState::Stop)?;
            device.session = Some(device.device.begin_stop_copy()?);
            Ok(())
        }
    }
}
