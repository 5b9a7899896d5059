//! Every arc for every set of flags, against our own table.

use rustix::io::Errno;
use vfio_migration_types::{MigrationState, path};
use vfio_migration_uapi::{UapiError, device_state, migration_flags, reset, set_device_state};

use super::{go, set, small};
use crate::check::{Outcome, same};

pub(crate) fn every_arc() -> Outcome {
    for bits in [1, 3, 5, 7] {
        let instance = small()?;
        set(&instance, "mig_flags", bits)?;
        let opened = instance.open()?;
        let device = opened.device()?;
        let flags = migration_flags(device)?;
        same("flags", flags.bits(), bits)?;
        let there = |state: &MigrationState| *state != MigrationState::Error && flags.has_state(*state);
        for from in MigrationState::ALL.into_iter().filter(there) {
            for to in MigrationState::ALL {
                reset(device)?;
                let _session = go(device, from)?;
                same("on the way", device_state(device)?, from)?;
                let empty = from == MigrationState::Resuming && to != from;
                let wanted = path(from, to, flags).is_ok() && !empty;
                let answer = set_device_state(device, to);
                let what = format!("flags {bits}: {from} to {to}");
                let errno = answer.as_ref().err().and_then(UapiError::errno);
                same(&what, errno, (!wanted).then_some(Errno::INVAL))?;
                same(&format!("{what}: where it is"), device_state(device)?, if wanted { to } else { from })?;
                let opens =
                    !from.is_saving() && to.is_saving() || from != to && to == MigrationState::Resuming;
                let fd = answer.is_ok_and(|fd| fd.is_some());
                same(&format!("{what}: a descriptor"), fd, wanted && opens)?;
            }
        }
    }
    Ok(())
}
