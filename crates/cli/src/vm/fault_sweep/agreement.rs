//! Whether what is said of a migration is what is.

use vfio_migration::VmOwnership;

use super::sides::{Told, UUID};
use crate::control::protocol::{ArrivedGuest, FollowedReport, MigrationStatus, VmStatus};
use crate::exit::Exit;
use crate::follow::{followed_text, text};
use crate::history::History;

impl Told {
    /// Everything that was said agrees with everything that is.
    pub(super) fn check(&self, case: &str) {
        let Self { source, destination, printed, event } = self;
        let (here, there) = (source.report(), destination.report());
        let info = &printed.migration;
        let all = format!("{case}: {info:?}\nsource {here:?}\ndestination {there:?}");
        let last = here.last.as_ref().unwrap();
        // It has none of a migration that ended before it heard of it.
        let arrived = there.last.as_ref();

        // One thing is said everywhere.
        assert_eq!(info, last, "what migrate prints is what status has: {all}");
        assert_eq!(
            (info.status, info.guest, &info.failure, &info.error),
            (event.status, event.guest, &event.failure, &event.error),
            "the event: {all}"
        );
        let said = [followed_text(printed), text(&here), info.error.clone().unwrap_or_default()].concat();
        let runs = [source.progresses(), destination.progresses()];
        assert!(!(runs[0] && runs[1]), "it runs twice: {all}");

        // And it is so.
        let exit = info.exit();
        match info.status {
            MigrationStatus::Completed => {
                assert_eq!((exit, info.guest), (Exit::Done, Some(ArrivedGuest::Running)), "{all}");
                assert_eq!((&info.error, &info.failure, runs), (&None, &None, [false, true]), "{all}");
                assert!(info.downtime_ms.is_some(), "{all}");
                assert_eq!(
                    (here.vm.status, there.vm.status),
                    (VmStatus::Postmigrate, VmStatus::Running),
                    "{all}"
                );
                let arrived = arrived.unwrap();
                assert_eq!((arrived.status, arrived.guest), (info.status, info.guest), "{all}");
            }
            MigrationStatus::NotStarted => {
                assert_eq!([here.exit(), there.exit()], [Exit::NotStarted; 2], "`status` says so too: {all}");
                assert_eq!((exit, info.guest), (Exit::NotStarted, Some(ArrivedGuest::NotStarted)), "{all}");
                assert_eq!((info.downtime_ms, runs), (None, [false, false]), "{all}");
                assert_eq!(
                    (here.vm.status, there.vm.status),
                    (VmStatus::Postmigrate, VmStatus::Paused),
                    "{all}"
                );
                let arrived = arrived.unwrap();
                assert_eq!((arrived.status, &arrived.failure), (info.status, &info.failure), "{all}");
                assert!(info.failure.is_some() && info.error.is_some(), "{all}");
            }
            MigrationStatus::Failed | MigrationStatus::Cancelled => {
                assert!(matches!(exit, Exit::Failed | Exit::Incompatible), "{all}");
                assert!(info.error.is_some() && info.guest.is_none(), "{all}");
                // A guest that stood and goes on here has a downtime too.
                let stood = info.phases.iter().any(|phase| phase.phase == "P4");
                assert!(info.downtime_ms.is_none() || runs[0] && stood, "{all}");
                // One number for one pause.
                let told = info.downtime_ms.map(|ms| format!("was paused for {ms} ms"));
                assert_eq!(told.is_some(), said.contains("was paused for"), "{said}\n{all}");
                assert!(told.is_none_or(|told| said.contains(&told)), "{said}\n{all}");
                assert!(!said.contains("has been paused"), "{said}\n{all}");
                assert!(!runs[1], "{all}");
                assert_eq!(runs[0], here.vm.status == VmStatus::Running, "{all}");
                assert_eq!(runs[0], !said.contains("not resumed"), "{said}\n{all}");
                let (reset, lost) = (&here.vm.reset_devices, &here.vm.lost_devices);
                let whole = runs[0] && reset.is_empty() && lost.is_empty() && info.left_undone.is_empty();
                assert!(whole || !said.contains("as it was before"), "{said}\n{all}");
                let (lost_state, without) =
                    (said.contains("lost its state"), said.contains("without device"));
                assert!(!lost_state || !reset.is_empty(), "it is shown nowhere: {said}\n{all}");
                assert!(!without || !reset.is_empty() || !lost.is_empty(), "{said}\n{all}");
                assert_eq!(!reset.is_empty(), text(&here).contains("\nreset: dev0 ("), "{said}\n{all}");
                // Its operator ends a receiver's wait, and nobody else.
                let waits = [VmStatus::Inmigrate, VmStatus::Idle].contains(&there.vm.status);
                assert!(
                    waits
                        && (there.vm.status == VmStatus::Inmigrate
                            || info.status == MigrationStatus::Cancelled),
                    "{all}"
                );
                assert!(arrived.is_none_or(|arrived| arrived.status == info.status), "{all}");
            }
            other => panic!("{other:?}: {all}"),
        }
        // What is found afterwards is what was said.
        for (side, wanted) in [(source, Some(last)), (destination, arrived)] {
            let history = History::read(&side.state).unwrap();
            let record = history.last_of(UUID);
            let Some(wanted) = wanted else {
                assert!(record.is_none(), "{all}");
                continue;
            };
            let record = record.unwrap_or_else(|| panic!("nothing in the history: {all}"));
            let kept = &record.migration;
            assert_eq!(kept, wanted, "the history: {all}");
            assert_eq!(kept.attempt, record.attempt, "{all}");
        }
        // The journals: the guest has one owner, and it is the one that the texts mean.
        let moved = here.vm.status == VmStatus::Postmigrate;
        assert_eq!(
            matches!(source.owner(), VmOwnership::Elsewhere { .. }),
            moved,
            "{:?} {all}",
            source.owner()
        );
        assert_eq!(
            matches!(destination.owner(), VmOwnership::Ours(_)),
            moved,
            "{:?} {all}",
            destination.owner()
        );
        // A failure by its parts is what the sentence says.
        if let Some(failure) = &info.failure {
            let error = info.error.as_ref().unwrap();
            assert!(error.contains(&failure.text), "{all}");
            assert!(error.matches(&failure.text).count() == 1, "said twice: {all}");
            if let Some(device) = &failure.device {
                assert!(error.contains(device.as_str()), "{all}");
            }
        }
        // The phases are all of the time, each rounded up.
        for told in [Some(info), arrived].into_iter().flatten() {
            let (sum, count) =
                (told.phases.iter().map(|phase| phase.ms).sum::<u64>(), told.phases.len() as u64);
            assert!(
                (told.total_ms..=told.total_ms + count).contains(&sum),
                "{sum} of {}: {all}",
                told.total_ms
            );
        }
        // One downtime was foreseen.
        if let Some((before, _)) = said.split_once(" ms were predicted") {
            let foreseen = before.rsplit('(').next().unwrap();
            assert_eq!(
                Some(foreseen),
                info.expected_downtime_ms.map(|ms| ms.to_string()).as_deref(),
                "{all}"
            );
        }
        // People read names, not codes.
        let word = |word: &&str| matches!(word.as_bytes(), [b'P', digit] if digit.is_ascii_digit());
        let coded = said.split(|c: char| !c.is_ascii_alphanumeric()).find(word);
        assert_eq!(coded, None, "{said}\n{all}");
        // JSON is what its schema's types read.
        let json = serde_json::to_value(printed).unwrap();
        let again: FollowedReport = serde_json::from_value(json).unwrap();
        assert_eq!(again.migration.status, info.status);
    }
}
