//! The faults of `device --help`, each at both sides.

use serde_json::{Value, json};
use vfio_migration_sim::FAULT_FORMS;

use super::sides::{PATIENT, Side, migrate_between, pair};
use crate::control::protocol::MigrationInfo;
use crate::control::protocol::MigrationStatus::{self, Completed, Failed, NotStarted};
use crate::exit::Exit;

/// The faults of both devices, and how it ends.
struct Case {
    here: Vec<String>,
    there: Vec<String>,
    ends: MigrationStatus,
    options: Value,
    /// What the devices have for a transition.
    timeout: &'static str,
}

fn words(faults: &[&str]) -> Vec<String> {
    faults.iter().map(ToString::to_string).collect()
}

/// Faults of the source's device.
fn here(faults: &[&str], ends: MigrationStatus) -> Case {
    Case { here: words(faults), there: Vec::new(), ends, options: json!({}), timeout: PATIENT }
}

/// Faults of the destination's device.
fn there(faults: &[&str], ends: MigrationStatus) -> Case {
    Case { here: Vec::new(), there: words(faults), ends, options: json!({}), timeout: PATIENT }
}

impl Case {
    /// Devices that outlast this are late.
    fn impatient(self) -> Self {
        Self { timeout: "5s", ..self }
    }

    fn with(self, options: Value) -> Self {
        Self { options, ..self }
    }

    /// With a fault of the other side's device too.
    fn and(mut self, here: &[&str], there: &[&str]) -> Self {
        self.here.extend(words(here));
        self.there.extend(words(there));
        self
    }

    fn run(&self) -> MigrationInfo {
        let Self { here, there, ends, options, timeout } = self;
        let dir = tempfile::tempdir().unwrap();
        let faults = [here, there].map(|faults| faults.iter().map(String::as_str).collect::<Vec<_>>());
        let (source, destination) = pair(dir.path(), &faults[0], &faults[1], timeout);
        let told = migrate_between(source, destination, options, |_, _| {});
        let case = format!("{here:?} {there:?}");
        told.check(&case);
        assert_eq!(told.printed.migration.status, *ends, "{case}: {:?}", told.printed.migration);
        told.printed.migration
    }
}

/// A test for each form of a fault, and the list of them.
macro_rules! sweeps {
    ($($name:ident: $form:literal => $cases:expr;)*) => {
        const SWEPT: &[(&str, fn() -> Vec<Case>)] = &[$(($form, || $cases)),*];
        $(#[test]
        fn $name() {
            let cases: Vec<Case> = $cases;
            cases.iter().for_each(|case| drop(case.run()));
        })*
    };
}

/// The arcs that a source's device takes, the transition that it was asked for then, and how a migration ends if the arc fails.
const SOURCE: [(&str, &str, MigrationStatus); 4] = [
    ("RUNNING:PRE_COPY", "RUNNING:PRE_COPY", Failed),
    ("PRE_COPY:PRE_COPY_P2P", "PRE_COPY:PRE_COPY_P2P", Failed),
    ("PRE_COPY_P2P:STOP_COPY", "PRE_COPY_P2P:STOP_COPY", Failed),
    // The guest has moved: it is left undone.
    ("STOP_COPY:STOP", "STOP_COPY:STOP", Completed),
];

/// The same of a destination's.
const DESTINATION: [(&str, &str, MigrationStatus); 6] = [
    ("RUNNING:RUNNING_P2P", "RUNNING:RESUMING", Failed),
    ("RUNNING_P2P:STOP", "RUNNING:RESUMING", Failed),
    ("STOP:RESUMING", "RUNNING:RESUMING", Failed),
    ("RESUMING:STOP", "RESUMING:STOP", Failed),
    ("STOP:RUNNING_P2P", "STOP:RUNNING_P2P", NotStarted),
    ("RUNNING_P2P:RUNNING", "RUNNING_P2P:RUNNING", NotStarted),
];

/// A fault at each arc: `name:ARC` and what follows.
fn at_each_arc(name: &str, rest: &str) -> Vec<Case> {
    let fault = |arc: &str| format!("{name}:{arc}{rest}");
    let source = SOURCE.iter().map(|(arc, _, ends)| here(&[&fault(arc)], *ends));
    source.chain(DESTINATION.iter().map(|(arc, _, ends)| there(&[&fault(arc)], *ends))).collect()
}

/// A fault at each arc of the way back, which the destination's failure in `ready` makes the source take.
fn on_the_way_back(name: &str, rest: &str) -> Vec<Case> {
    let arcs = ["STOP_COPY:STOP", "STOP:RUNNING_P2P", "RUNNING_P2P:RUNNING"];
    let case = |arc: &&str| {
        here(&[&format!("{name}:{arc}{rest}")], Failed).and(&[], &["fail-arc:RESUMING:STOP:EINVAL"])
    };
    arcs.iter().map(case).collect()
}

fn all(lists: &[fn() -> Vec<Case>]) -> Vec<Case> {
    lists.iter().flat_map(|list| list()).collect()
}

sweeps! {
    arcs_that_fail: "fail-arc:FROM:TO:ERRNO[:TIMES]" => all(&[
        || at_each_arc("fail-arc", ":EIO"),
        || on_the_way_back("fail-arc", ":EBUSY"),
    ]);
    arcs_that_end_in_error: "error-arc:FROM:TO, error-arc:N" => all(&[
        || at_each_arc("error-arc", ""),
        || on_the_way_back("error-arc", ""),
        || vec![here(&["error-arc:1"], Failed), there(&["error-arc:1"], Failed)],
    ]);
    arcs_that_are_slow: "hang-arc:FROM:TO[:TIME]" => all(&[
        || at_each_arc("hang-arc", ":200").into_iter().map(|case| Case { ends: Completed, ..case }).collect(),
    ]);
    the_nth_arc_is_slow: "hang-arc:N[:TIME]" => vec![
        here(&["hang-arc:2:200"], Completed),
        there(&["hang-arc:2:200ms"], Completed),
    ];
    reads_that_are_short: "short-read:N" => vec![
        here(&["short-read:4096"], Completed),
        there(&["short-read:4096"], Completed),
    ];
    estimates_that_are_wrong: "wrong-size-estimate:PERCENT" => vec![
        here(&["wrong-size-estimate:0"], Completed),
        here(&["wrong-size-estimate:1"], Completed),
        here(&["wrong-size-estimate:1000"], Completed),
        there(&["wrong-size-estimate:1000"], Completed),
    ];
    servers_that_die_in_a_read: "die-in-read:BYTES" => vec![
        here(&["die-in-read:0"], Failed),
        here(&["die-in-read:100000"], Failed),
        // A destination's device is not read.
        there(&["die-in-read:0"], Completed),
    ];
    sessions_that_are_gone: "enodev-mid-stream:BYTES" => vec![
        here(&["enodev-mid-stream:0"], Failed),
        here(&["enodev-mid-stream:4096"], Failed),
        there(&["enodev-mid-stream:0"], Failed),
        there(&["enodev-mid-stream:4096"], Failed),
    ];
    tails_that_are_corrupt: "corrupt-tail" => vec![
        // Nothing but the device at the other end can find it, and not before it runs.
        here(&["corrupt-tail"], Completed).with(json!({"verify": true})),
        there(&["corrupt-tail"], Completed).with(json!({"verify": true})),
    ];
    states_without_an_end: "endless-state" => vec![
        here(&["endless-state"], Failed).with(json!({"downtime-limit": 500})),
        there(&["endless-state"], Completed),
    ];
    logs_that_omit_pages: "ignore-dirty-log[:N]" => vec![
        here(&["ignore-dirty-log:1"], Failed).with(json!({"verify": true})),
        there(&["ignore-dirty-log:1"], Completed).with(json!({"verify": true})),
    ];
    interrupts_that_are_lost: "lose-raise:VECTOR:N" => vec![
        here(&["lose-raise:0:40"], Completed),
        there(&["lose-raise:0:1"], Completed),
    ];
    reads_that_hang: "hang-read[:TIME]" => vec![
        here(&["hang-read:200"], Completed),
        // A destination's device is not read.
        there(&["hang-read"], Completed),
    ];
    // The first reset is of the start: a device that refuses it has no `vm`. Only what fails otherwise has it reset again.
    resets_that_fail: "fail-reset:ERRNO[:N]" => vec![
        here(&["fail-reset:EIO:2"], Completed),
        here(&["fail-reset:EIO:2", "error-arc:RUNNING:PRE_COPY"], Failed),
        here(&["fail-reset:EIO:2", "error-arc:PRE_COPY_P2P:STOP_COPY"], Failed),
        here(&["fail-reset:EIO:2", "fail-arc:STOP:RUNNING_P2P:EIO"], Failed).and(&[], &["fail-arc:RESUMING:STOP:EINVAL"]),
        there(&["fail-reset:EIO:2"], Completed),
        there(&["fail-reset:EIO:2", "error-arc:RESUMING:STOP"], Failed),
        there(&["fail-reset:EIO:2", "fail-arc:RESUMING:STOP:EINVAL"], Failed),
        there(&["fail-reset:EIO:2", "error-arc:RUNNING_P2P:RUNNING"], NotStarted),
    ];
    writes_that_are_held: "hold-dma:N" => vec![
        here(&["hold-dma:4"], Completed),
        there(&["hold-dma:4"], Completed),
    ];
    the_nth_arc_fails: "fail-arc:N:ERRNO" => vec![here(&["fail-arc:1:EIO"], Failed), there(&["fail-arc:1:EIO"], Failed)];
}

/// What is new in the help is new here.
#[test]
fn every_fault_that_help_lists_is_swept_at_both_sides() {
    let listed: Vec<&str> = FAULT_FORMS.iter().map(|(form, _)| *form).collect();
    for form in &listed {
        assert!(SWEPT.iter().any(|(swept, _)| swept == form), "{form} is not swept");
    }
    assert_eq!(SWEPT.len(), listed.len());
    for (form, cases) in SWEPT {
        let cases = cases();
        for form in form.split(", ") {
            let (name, _) = form.split_once([':', '[']).unwrap_or((form, ""));
            let of = |faults: &Vec<String>| faults.iter().any(|fault| fault.split(':').next() == Some(name));
            assert!(cases.iter().any(|case| of(&case.here)), "{form} is not swept at the source");
            assert!(cases.iter().any(|case| of(&case.there)), "{form} is not swept at the destination");
        }
    }
}

/// The N-th arc fails, for each N until there is none: the arcs of the tables are those that a device takes.
#[test]
fn the_arcs_that_are_swept_are_all_that_a_device_takes() {
    for (side, table) in [(here as fn(&[&str], MigrationStatus) -> Case, &SOURCE[..]), (there, &DESTINATION)]
    {
        for (n, (_, asked, ends)) in (1..).zip(table) {
            let info = side(&[&format!("fail-arc:{n}:EIO")], *ends).run();
            let failure = info.failure.or(info.left_undone.into_iter().next()).unwrap();
            let arc = failure.arc.unwrap();
            assert_eq!(format!("{}:{}", arc.from, arc.to), *asked, "arc {n}");
        }
        let info = side(&[&format!("fail-arc:{}:EIO", table.len() + 1)], Completed).run();
        assert_eq!(info.left_undone, []);
    }
}

/// A device that cannot be reset is none that a guest is given.
#[test]
fn a_device_that_cannot_be_reset_has_no_vm() {
    let dir = tempfile::tempdir().unwrap();
    let error =
        Side::try_start(dir.path(), "source", &["fail-reset:EIO"], PATIENT, &[]).map(drop).unwrap_err();
    assert_eq!(error.exit, Exit::Failed);
    assert!(error.text.contains("dev0") && error.text.contains("resetting failed"), "{}", error.text);
}

/// Cases of devices that are late, which take long and do nothing.
fn together(cases: Vec<Case>) {
    std::thread::scope(|scope| {
        for case in cases {
            scope.spawn(|| case.impatient().run());
        }
    });
}

/// Late for longer than the device has, or for ever. One that answers in the end stays.
#[test]
fn arcs_that_outlast_the_device_s_time() {
    together(at_each_arc("hang-arc", ":9000"));
}

#[test]
fn arcs_that_never_end() {
    together(at_each_arc("hang-arc", ""));
}

#[test]
fn reads_that_outlast_the_downtime_limit() {
    let info = here(&["hang-read:900"], Failed).with(json!({"downtime-limit": 300})).run();
    assert!(
        info.error.as_ref().unwrap().contains("dev0")
            || info.error.as_ref().unwrap().contains("downtime limit"),
        "{info:?}"
    );
}

/// The limit passes long before the device is given up: what is told is the device all the same, and the time is the true one.
#[test]
fn a_device_that_outlasts_the_downtime_limit_is_named() {
    for fault in ["hang-arc:PRE_COPY:PRE_COPY_P2P:9000", "hang-arc:PRE_COPY_P2P:STOP_COPY:9000"] {
        let info = here(&[fault], Failed).impatient().with(json!({"downtime-limit": 300})).run();
        let failure = info.failure.as_ref().unwrap_or_else(|| panic!("{info:?}"));
        assert_eq!((failure.device.as_deref(), failure.errno), (Some("dev0"), Some(110)), "{info:?}");
        assert!(info.downtime_ms.is_some_and(|paused| paused >= 4900), "{info:?}");
        assert!(failure.text.contains("above the downtime limit of 300 ms"), "{info:?}");
    }
}

/// The downtime that was foreseen is one number, wherever it is told.
#[test]
fn a_destination_that_outlasts_the_downtime_limit() {
    let info = there(&["hang-arc:RESUMING:STOP:700"], Failed).with(json!({"downtime-limit": 300})).run();
    assert!(info.error.as_ref().unwrap().contains("ms were predicted"), "{info:?}");
}
