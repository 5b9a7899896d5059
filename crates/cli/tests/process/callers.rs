//! Who may use the control socket of a `vm`: callers of other users and groups, as processes of theirs.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Output;

use serde_json::Value;

use crate::other_users::{
    ALSO_MONITOR, ALSO_OPERATOR, MONITOR, MONITORS, OPERATOR, OPERATORS, Place, STRANGER, said,
};
use crate::support::{PATIENCE, control, run};

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

/// The refusal that a verb with `--json` printed, which has exit code 1 and this class.
fn denied(output: &Output) -> String {
    let printed: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
    assert_eq!(output.status.code(), Some(1), "{printed}");
    assert_eq!(
        (&printed["error"]["class"], &printed["exit"]),
        (&"PermissionDenied".into(), &1.into()),
        "{printed}"
    );
    printed["error"]["desc"].as_str().expect("a sentence").to_owned()
}

#[test]
fn a_socket_has_its_mode_from_the_command_line_and_not_from_the_umask() {
    let place = Place::new();
    let (one, two) = (["--control-group", OPERATORS], ["--control-read-group", MONITORS]);
    for (umask, groups, expected) in
        [("000", &[][..], 0o600), ("277", &[], 0o600), ("000", &one, 0o666), ("077", &two, 0o666)]
    {
        let (vm, _) = place.vm(None, "a", umask, groups);
        assert_eq!(mode(&vm.control), expected, "umask {umask}, {groups:?}");
        assert!(run(&["status", "--control", control(&vm)]).status.success());
        let at = place.path().join("b.sock");
        let allow: &[&str] = if groups.is_empty() { &[] } else { &["--allow-gid", OPERATORS] };
        let uri = format!("unix:{}", at.display());
        let (_receiver, _) = place.vm(None, "b", umask, &[&["--incoming", &uri], allow].concat());
        assert_eq!(mode(&at), expected, "umask {umask}, {allow:?}");
    }
}

/// Also with a loose umask, by which the file was everybody's.
#[test]
fn only_its_own_user_reaches_a_socket_that_nobody_else_was_given() {
    let Some(place) = Place::of_others() else { return };
    for umask in ["000", "022", "277"] {
        let (vm, _) = place.vm(None, "a", umask, &[]);
        assert_eq!(mode(&vm.control), 0o600, "umask {umask}");
        for arguments in [vec!["status"], vec!["quit", "--force"], vec!["stop"]] {
            let output =
                place.run(STRANGER, &[&arguments[..], &["--json", "--control", control(&vm)]].concat());
            let why = denied(&output);
            assert!(
                why.contains("user 54001 may not use the control socket") && why.contains("--control-group"),
                "{why}"
            );
        }
        let text = place.run(OPERATOR, &["status", "--control", control(&vm)]);
        assert!(String::from_utf8_lossy(&text.stderr).contains("may not use"), "{text:?}");
        assert_eq!(vm.status(), "running");
        assert!(run(&["status", "--control", control(&vm)]).status.success());
    }
}

#[test]
fn members_of_a_group_do_all_of_another_only_ask_and_others_nothing() {
    let Some(place) = Place::of_others() else { return };
    let (vm, log) =
        place.vm(None, "a", "077", &["--control-group", OPERATORS, "--control-read-group", MONITORS]);
    let at = control(&vm);
    assert_eq!(mode(&vm.control), 0o666);
    let verbs: [&[&str]; 10] = [
        &["stop"],
        &["cont"],
        &["cancel"],
        &["continue"],
        &["set", "--downtime-limit", "1s"],
        &["migrate", "--detach", "unix:/nowhere"],
        &["rehearse", "--to", "unix:/nowhere"],
        &["save", "-o", "/nowhere/file"],
        &["incoming", "unix:/nowhere"],
        &["quit", "--force"],
    ];
    for user in [MONITOR, ALSO_MONITOR] {
        let status = place.run(user, &["status", "--json", "--control", at]);
        assert!(status.status.success(), "{status:?}");
        let manifest = place.run(user, &["describe", &format!("vm:{at}")]);
        assert!(manifest.status.success(), "{manifest:?}");
        for verb in verbs {
            let why = denied(&place.run(user, &[verb, &["--json", "--control", at]].concat()));
            assert!(why.contains("may only ask here") && why.contains("--control-group"), "{verb:?}: {why}");
        }
        said(&log, &["may only ask", &format!("uid={}", user.0), "pid=", "quit"]);
    }
    for verb in [&["status"][..], &["quit", "--force"], &["stop"]] {
        let why = denied(&place.run(STRANGER, &[verb, &["--json", "--control", at]].concat()));
        assert!(why.contains("user 54001 may not use this control socket"), "{why}");
    }
    said(&log, &["not allowed", "uid=54001", "gid=54001", "pid="]);
    assert_eq!(vm.status(), "running", "nothing of it was done");
    // The controls: whoever may, does.
    for user in [OPERATOR, ALSO_OPERATOR] {
        for (verb, status) in [("stop", "paused"), ("cont", "running")] {
            let output = place.run(user, &[verb, "--json", "--control", at]);
            assert!(output.status.success(), "{user:?} {verb}: {output:?}");
            assert_eq!(vm.status(), status);
        }
    }
    let output = place.run(ALSO_OPERATOR, &["quit", "--force", "--control", at]);
    assert!(output.status.success(), "{output:?}");
}

/// As a program of its own finds it, which knows the protocol and not the command.
#[test]
fn who_may_do_nothing_is_told_in_place_of_the_greeting_and_costs_no_place() {
    let Some(place) = Place::of_others() else { return };
    let (vm, _) = place.vm(None, "a", "022", &["--control-read-group", MONITORS]);
    let mut own = BufReader::new(UnixStream::connect(&vm.control).unwrap());
    own.get_ref().set_read_timeout(Some(PATIENCE)).unwrap();
    let mut line = String::new();
    own.read_line(&mut line).unwrap();
    assert!(line.contains("vfio-migrate"), "{line}");
    for _ in 0..40 {
        denied(&place.run(STRANGER, &["status", "--json", "--control", control(&vm)]));
    }
    // The one client that was there before is there still.
    own.get_mut().write_all(b"{\"execute\":\"query\",\"id\":1}\n").unwrap();
    line.clear();
    own.read_line(&mut line).unwrap();
    assert!(line.contains("\"return\""), "{line}");
}

#[test]
fn a_group_that_is_not_there_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("control");
    for (option, value) in [("--control-group", "no-such-group"), ("--control-read-group", "4294967295")] {
        let output = run(&["vm", "--software", "--control", at.to_str().unwrap(), option, value]);
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{told}");
        assert!(told.contains(&format!("{option}: ")) && told.contains(value), "{told}");
        assert!(!at.exists());
    }
    let output = run(&["vm", "--software", "--control-group", "0"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}
