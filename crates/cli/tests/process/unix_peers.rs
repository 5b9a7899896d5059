//! Migrations over unix sockets: which users' processes may be at their other end.

use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use serde_json::{Value, json};

use crate::getfd::getfd;
use crate::other_users::{ALSO_OPERATOR, OPERATORS, Place, STRANGER, said};
use crate::support::{Vm, control, run, software, until};

fn address(path: &Path) -> String {
    format!("unix:{}", path.display())
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

/// How the migration of a guest that stays where it is ended.
fn refused(vm: &Vm, uri: &str) -> String {
    let ended = vm.migrate(uri, json!({}));
    assert_eq!(ended["status"], "failed", "{ended}");
    vm.assert_runs();
    ended["error"].as_str().expect("why").to_owned()
}

/// A migration that moves, and who its destination found at the other end.
fn moves(source: &Vm, destination: &Vm, uid: u32) {
    let ended = source.migrate(&destination.incoming(), json!({}));
    assert_eq!(ended["status"], "completed", "{ended}");
    until("the guest", || (destination.status() == "running").then_some(()));
    let arrived = destination.migration();
    let security = &arrived["security"];
    assert_eq!((&security["kind"], &security["socket"]), (&json!("unix"), &json!("unix")), "{arrived}");
    assert_eq!(security["unix-peer"]["uid"], uid, "{arrived}");
    assert_eq!(security["unix-peer"]["pid"], source.process.pid(), "{arrived}");
    assert_eq!(ended["security"]["unix-peer"]["pid"], destination.process.pid(), "{ended}");
    destination.assert_runs();
}

#[test]
fn a_receivers_socket_is_its_users_alone_under_any_umask() {
    let Some(place) = Place::of_others() else { return };
    let at = place.path().join("b.sock");
    let (stranger, _) = place.vm(Some(STRANGER), "a", "022", &[]);
    for umask in ["000", "277"] {
        let (receiver, _) = place.vm(None, "b", umask, &["--incoming", &address(&at)]);
        assert_eq!(mode(&at), 0o600, "umask {umask}");
        let why = refused(&stranger, &address(&at));
        assert!(why.contains("Permission denied"), "{why}");
        assert_eq!(receiver.status(), "inmigrate");
    }
}

#[test]
fn a_source_of_another_user_is_refused_by_name_and_disturbs_nobody() {
    let Some(place) = Place::of_others() else { return };
    let at = place.path().join("b.sock");
    // Somebody else may come: the kernel lets everybody connect.
    let (receiver, log) = place.vm(None, "b", "077", &["--incoming", &address(&at), "--allow-uid", "54099"]);
    assert_eq!(mode(&at), 0o666);
    let (stranger, _) = place.vm(Some(STRANGER), "a", "022", &[]);
    let why = refused(&stranger, &address(&at));
    assert!(why.contains("user 54001") && why.contains("--allow-uid"), "{why}");
    said(&log, &["user 54001", "group 54001", "process"]);
    assert_eq!(receiver.query("query")["last"], Value::Null, "it was no session");
    let counted = || receiver.info()["refused"].clone();
    let told = counted();
    assert_eq!(
        (&told["count"], &told["last"]["security"]["unix-peer"]["uid"]),
        (&1.into(), &54001.into()),
        "{told}"
    );
    assert!(told["last"]["why"].as_str().unwrap().contains("--allow-uid"), "{told}");
    let output = place.run(STRANGER, &["check", &format!("vm:{}", control(&stranger)), &address(&at)]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    // Nor while the rightful one is on its way.
    let own = software(place.path(), "own", &["--software"]).start();
    own.begin(&receiver.incoming(), json!({"pause-before-switchover": true}));
    until("the wait", || (own.migration()["status"] == "pre-switchover").then_some(()));
    refused(&stranger, &address(&at));
    assert_eq!(own.migration()["status"], "pre-switchover");
    assert_eq!(counted()["count"], 3);
    own.query("migrate-continue");
    assert_eq!(own.ended()["status"], "completed");
    until("the guest", || (receiver.status() == "running").then_some(()));
    receiver.assert_runs();
}

#[test]
fn a_user_or_a_group_that_is_allowed_may_come() {
    let Some(place) = Place::of_others() else { return };
    for (user, allow) in
        [(STRANGER, ["--allow-uid", STRANGER.0]), (ALSO_OPERATOR, ["--allow-gid", OPERATORS])]
    {
        let at = place.path().join("b.sock");
        let (receiver, _) =
            place.vm(None, "b", "022", &[&["--incoming", &address(&at)], &allow[..]].concat());
        let (source, _) = place.vm(Some(user), "a", "022", &[]);
        moves(&source, &receiver, user.0.parse().unwrap());
    }
}

#[test]
fn nothing_is_sent_to_a_receiver_of_another_user() {
    let Some(place) = Place::of_others() else { return };
    let at = place.folder(STRANGER).join("b.sock");
    let (receiver, _) = place.vm(Some(STRANGER), "b", "022", &["--incoming", &address(&at)]);
    let source = software(place.path(), "a", &["--software"]).start();
    let why = refused(&source, &address(&at));
    assert!(why.contains("nothing is sent to unix:") && why.contains("user 54001"), "{why}");
    let asked = ["check", &format!("vm:{}", control(&source)), &address(&at)];
    let output = run(&asked);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("user 54001"), "{output:?}");
    assert_eq!(receiver.query("query")["last"], Value::Null, "it heard nothing");
    // The controls: who is allowed is asked, and sent to.
    let output = run(&[&asked[..], &["--allow-uid", STRANGER.0]].concat());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let allowing = software(place.path(), "c", &["--software", "--allow-uid", STRANGER.0]).start();
    moves(&allowing, &receiver, 0);
}

#[test]
fn a_descriptor_says_what_it_is_and_is_judged_by_who_made_it() {
    let dir = tempfile::tempdir().unwrap();
    let own = rustix::process::geteuid().as_raw();
    let source = software(dir.path(), "a", &["--software"]).start();
    let at = address(&dir.path().join("b.sock"));
    let receiver = software(dir.path(), "b", &["--software", "--incoming", &at]).start();
    let wait_again = |uri: &str| {
        receiver.query("migrate-cancel");
        until("the end of the wait", || (receiver.status() != "inmigrate").then_some(()));
        receiver.call("migrate-incoming", json!({"uri": uri})).unwrap();
    };
    if let Some(place) = Place::of_others() {
        let path = place.path().join("listener");
        let listener = UnixListener::bind(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
        let (stranger, _) = place.vm(Some(STRANGER), "s", "022", &[]);
        stranger.begin(&address(&path), json!({}));
        let (theirs, _) = listener.accept().unwrap();
        getfd(&receiver, "theirs", &[theirs.as_fd()]).unwrap();
        drop(theirs);
        wait_again("fd:theirs");
        until("the end of the wait", || (receiver.status() != "inmigrate").then_some(()));
        let ended = receiver.migration();
        let why = ended["error"].as_str().unwrap();
        assert!(why.contains("user 54001"), "{ended}");
        assert_eq!(stranger.ended()["status"], "failed");
        stranger.assert_runs();
        receiver.call("migrate-incoming", json!({"uri": at})).unwrap();
    }
    let (here, there) = UnixStream::pair().unwrap();
    getfd(&source, "mig", &[here.as_fd()]).unwrap();
    getfd(&receiver, "mig", &[there.as_fd()]).unwrap();
    wait_again("fd:mig");
    let ended = source.migrate("fd:mig", json!({}));
    assert_eq!(ended["status"], "completed", "{ended}");
    let security = &ended["security"];
    assert_eq!((&security["kind"], &security["socket"]), (&json!("unix"), &json!("unix")), "{ended}");
    let made_it = json!({"uid": own, "gid": rustix::process::getegid().as_raw(), "pid": std::process::id()});
    assert_eq!(security["unix-peer"], made_it, "{ended}");
}
