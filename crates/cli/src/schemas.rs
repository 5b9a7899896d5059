//! The JSON documents of the command: their schemas, and which verb prints which.

use schemars::{Schema, schema_for};
use vfio_migration_compat::{DeviceManifest, HostManifest, MachineManifest, Matrix, Policy, Report};

use crate::control::event::ControlEvent;
use crate::control::guest::GuestInfo;
use crate::control::protocol::{
    FdArguments, IncomingArguments, MigrateArguments, MigrationInfo, ParameterArguments, QuitArguments,
    SaveArguments, StatusReport,
};
use crate::control::refused::Refused;
use crate::control::rehearsal::RehearseArguments;
use crate::demo::report::DemoReport;
use crate::exit::FailureReport;
use crate::expect_file::ExpectDocument;
use crate::history::HistoryRecord;
use crate::verbs::check::pool::BaselineReport;
use crate::verbs::describe::ResourceReport;
use crate::verbs::device_file::DeviceFileReport;
use crate::verbs::devices::report::DevicesReport;
use crate::verbs::doctor::DoctorReport;
use crate::verbs::explain::{ExplainedCode, ExplanationList};
use crate::verbs::history::HistoryReport;
use crate::verbs::moves::{ActionReply, EndedReport, RehearseReport};
use crate::verbs::state_dir::StateDirReport;
use crate::verbs::tls::report::{TlsMadeReport, TlsPinReport, TlsShowReport};

/// What a verb prints with `--json`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Answer {
    pub(crate) verb: &'static str,
    /// The case, where a verb has several documents; empty otherwise.
    pub(crate) when: &'static str,
    /// Name of the schema's file in `docs/schemas`, without its ending.
    pub(crate) schema: &'static str,
}

/// The schema of what any verb prints with `--json` when it cannot do what it was asked for.
pub(crate) const FAILURE: &str = "failure";

const fn answer(verb: &'static str, when: &'static str, schema: &'static str) -> Answer {
    Answer { verb, when, schema }
}

/// Every document that a verb prints with `--json` when it does what it was asked for.
pub(crate) const ANSWERS: [Answer; 31] = [
    answer("demo", "also when it fails", "demo"),
    answer(
        "migrate",
        "also when it began and did not complete: `error` and `exit` tell how it ended",
        "migrate",
    ),
    answer("rehearse", "also when the verdict is no, exit 3", "rehearse"),
    answer("describe", "a device", "manifest-device"),
    answer("describe", "a `vm`", "manifest-machine"),
    answer("describe", "`--host`", "manifest-host"),
    answer("describe", "`--format node-labels`", "node-labels"),
    answer("describe", "`--format resource-attributes`", "resource-attributes"),
    answer("check", "also when the verdict is no, exit 3", "check"),
    answer("check", "`--matrix`", "check-matrix"),
    answer("check", "`--baseline`, also when there is none, exit 3", "check-baseline"),
    answer("explain", "of a code", "explain"),
    answer("explain", "of all codes", "explain-list"),
    answer("save", "`--control`, also when it began and did not complete", "migrate"),
    answer("save", "`--device`", "device-file"),
    answer("restore", "", "device-file"),
    answer("status", "`--control`", "status"),
    answer("status", "`--state-dir`", "status-state-dir"),
    answer("history", "", "history"),
    answer("cancel", "", "acknowledged"),
    answer("continue", "", "acknowledged"),
    answer("set", "", "acknowledged"),
    answer("stop", "", "acknowledged"),
    answer("cont", "", "acknowledged"),
    answer("quit", "", "acknowledged"),
    answer("incoming", "", "acknowledged"),
    answer("devices", "", "devices"),
    answer("doctor", "also when something is missing, exit 1", "doctor"),
    answer("tls", "`init`, `host`, `revoke`", "tls-made"),
    answer("tls", "`show`, also when something cannot be used, exit 1", "tls-show"),
    answer("tls", "`pin`", "tls-pin"),
];

/// The documents of a verb.
pub(crate) fn of_verb(verb: &str) -> impl Iterator<Item = Answer> {
    ANSWERS.into_iter().filter(move |answer| answer.verb == verb)
}

/// The page of the documentation that lists them.
pub(crate) fn page() -> String {
    let mut text = String::from(
        "# JSON\n\n\
         With `--json` a verb prints one JSON object on stdout and nothing else there, whether it does what it was asked for or not.\n\
         Texts that strangers wrote stand in it with their control characters as `\\u` escapes. `describe -o FILE` writes the object\n\
         into the file. A field that is not known to a reader may come with a later version and is to be left alone.\n\n\
         | verb | when | schema |\n|---|---|---|\n",
    );
    for Answer { verb, when, schema } in ANSWERS {
        text.push_str(&format!("| `{verb}` | {when} | [{schema}](schemas/{schema}.json) |\n"));
    }
    text.push_str(&format!(
        "| any | it cannot do what it was asked for, also because of its command line | [{FAILURE}](schemas/{FAILURE}.json) |\n\n\
         What a failed verb prints has its exit code in `exit`, and why it failed in `error`: `class` for programs, `desc` for\n\
         people. Documents of the control socket are in [control.md](control.md), among them the [error](schemas/error.json) of a\n\
         refused request; a site's [policy](schemas/policy.json) is read by `check` and `vm`, and what a `vm` is to [expect](schemas/expect.json) by `vm`.\n",
    ));
    text
}

/// Every schema, by the name of its file in `docs/schemas`.
pub(crate) fn by_name() -> Vec<(&'static str, Schema)> {
    vec![
        ("demo", schema_for!(DemoReport)),
        ("status", schema_for!(StatusReport)),
        ("device-file", schema_for!(DeviceFileReport)),
        ("devices", schema_for!(DevicesReport)),
        ("doctor", schema_for!(DoctorReport)),
        ("tls-made", schema_for!(TlsMadeReport)),
        ("tls-show", schema_for!(TlsShowReport)),
        ("tls-pin", schema_for!(TlsPinReport)),
        ("failure", schema_for!(FailureReport)),
        ("acknowledged", schema_for!(ActionReply)),
        ("query", schema_for!(StatusReport)),
        ("status-state-dir", schema_for!(StateDirReport)),
        ("history", schema_for!(HistoryReport)),
        ("history-record", schema_for!(HistoryRecord)),
        ("query-guest", schema_for!(GuestInfo)),
        ("migration", schema_for!(MigrationInfo)),
        ("migrate-arguments", schema_for!(MigrateArguments)),
        ("rehearse", schema_for!(RehearseReport)),
        ("rehearse-arguments", schema_for!(RehearseArguments)),
        ("save-arguments", schema_for!(SaveArguments)),
        ("fd-arguments", schema_for!(FdArguments)),
        ("quit-arguments", schema_for!(QuitArguments)),
        ("migrate-incoming-arguments", schema_for!(IncomingArguments)),
        ("migrate-set-parameters-arguments", schema_for!(ParameterArguments)),
        ("event", schema_for!(ControlEvent)),
        ("error", schema_for!(Refused)),
        ("manifest-device", schema_for!(DeviceManifest)),
        ("manifest-machine", schema_for!(MachineManifest)),
        ("manifest-host", schema_for!(HostManifest)),
        ("policy", schema_for!(Policy)),
        ("expect", schema_for!(ExpectDocument)),
        ("check", schema_for!(Report)),
        ("check-matrix", schema_for!(Matrix)),
        ("check-baseline", schema_for!(BaselineReport)),
        ("explain", schema_for!(ExplainedCode)),
        ("explain-list", schema_for!(ExplanationList)),
        ("migrate", schema_for!(EndedReport)),
        ("node-labels", schema_for!(std::collections::BTreeMap<String, String>)),
        ("resource-attributes", schema_for!(ResourceReport)),
    ]
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::args::Cli;

    #[test]
    fn every_verb_with_json_is_listed_and_every_schema_is_there() {
        let schemas: Vec<&str> = by_name().into_iter().map(|(name, _)| name).collect();
        for verb in Cli::command().get_subcommands() {
            // `tls show`
            let parts = verb.get_subcommands().flat_map(|part| part.get_arguments());
            let json = verb.get_arguments().chain(parts).any(|argument| argument.get_id() == "json");
            assert_eq!(of_verb(verb.get_name()).next().is_some(), json, "{}", verb.get_name());
        }
        for answer in ANSWERS {
            assert!(schemas.contains(&answer.schema), "{answer:?}");
        }
        assert!(schemas.contains(&FAILURE));
    }
}
