//! Schemas of every JSON document that the command prints or the control socket carries.

use schemars::{Schema, schema_for};
use vfio_migration_compat::{
    DeviceManifest, Explanation, HostManifest, MachineManifest, Matrix, Policy, Report,
};

use crate::control::GuestInfo;
use crate::control::{
    Event, IncomingArguments, MigrateArguments, MigrationInfo, ParameterArguments, Refused,
    RehearseArguments, SaveArguments, StatusInfo,
};
use crate::demo::DemoReport;
use crate::exit::FailureReport;
use crate::verbs::check::BaselineReport;
use crate::verbs::device_file::DeviceFileReport;
use crate::verbs::devices::DevicesReport;
use crate::verbs::doctor::DoctorReport;
use crate::verbs::rehearse::RehearseReport;
use crate::verbs::{Acknowledged, StatusReport};

/// Every schema, by the name of its file in `docs/schemas`.
pub(crate) fn all() -> Vec<(&'static str, Schema)> {
    vec![
        ("demo", schema_for!(DemoReport)),
        ("status", schema_for!(StatusReport)),
        ("device-file", schema_for!(DeviceFileReport)),
        ("devices", schema_for!(DevicesReport)),
        ("doctor", schema_for!(DoctorReport)),
        ("failure", schema_for!(FailureReport)),
        ("acknowledged", schema_for!(Acknowledged)),
        ("query-status", schema_for!(StatusInfo)),
        ("query-guest", schema_for!(GuestInfo)),
        ("query-migrate", schema_for!(MigrationInfo)),
        ("migrate-arguments", schema_for!(MigrateArguments)),
        ("rehearse", schema_for!(RehearseReport)),
        ("rehearse-arguments", schema_for!(RehearseArguments)),
        ("save-arguments", schema_for!(SaveArguments)),
        ("migrate-incoming-arguments", schema_for!(IncomingArguments)),
        ("migrate-set-parameters-arguments", schema_for!(ParameterArguments)),
        ("event", schema_for!(Event)),
        ("error", schema_for!(Refused)),
        ("manifest-device", schema_for!(DeviceManifest)),
        ("manifest-machine", schema_for!(MachineManifest)),
        ("manifest-host", schema_for!(HostManifest)),
        ("policy", schema_for!(Policy)),
        ("check", schema_for!(Report)),
        ("check-matrix", schema_for!(Matrix)),
        ("check-baseline", schema_for!(BaselineReport)),
        ("explain", schema_for!(Explanation)),
    ]
}
