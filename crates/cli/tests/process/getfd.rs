//! Descriptors that are passed over the control socket, to be addresses later.

use std::io::{BufRead, BufReader, IoSlice};
use std::mem::MaybeUninit;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use serde_json::{Value, json};

use crate::support::{PATIENCE, Vm, control, fails, run, software, until};

/// Most that one message can pass here.
const MOST: usize = 8;

/// Sends `line` with descriptors beside it, and returns the answer.
fn asked(vm: &Vm, line: &str, passed: &[BorrowedFd<'_>]) -> Result<Value, String> {
    let stream = UnixStream::connect(&vm.control).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    assert!(passed.is_empty() || beside.push(SendAncillaryMessage::ScmRights(passed)));
    sendmsg(&stream, &[IoSlice::new(format!("{line}\n").as_bytes())], &mut beside, SendFlags::empty())
        .unwrap();
    let lines =
        BufReader::new(stream).lines().map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
    let mut answers = lines.filter(|line| line.get("return").is_some() || line.get("error").is_some());
    let mut answer = answers.next().expect("an answer");
    match answer["error"]["desc"].as_str() {
        Some(why) => Err(why.to_owned()),
        None => Ok(answer["return"].take()),
    }
}

pub(crate) fn getfd(vm: &Vm, name: &str, passed: &[BorrowedFd<'_>]) -> Result<Value, String> {
    asked(vm, &json!({"execute": "getfd", "arguments": {"fdname": name}}).to_string(), passed)
}

#[test]
fn a_guest_moves_over_sockets_that_were_passed_to_both_sides() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state").display().to_string();
    let source = software(dir.path(), "a", &["--software", "--state-dir", &state]).start();
    let destination = software(dir.path(), "b", &["--software", "--incoming", "tcp:127.0.0.1:0"]).start();
    destination.query("migrate-cancel");
    until("the end of the wait", || (destination.status() != "inmigrate").then_some(()));
    let before = source.process.holdings().0;
    for (rehearsed, pair) in [(true, "unix"), (false, "tcp")] {
        let (here, there) = (UnixStream::pair().unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
        let tcp = TcpStream::connect(there.local_addr().unwrap()).unwrap();
        let accepted = there.accept().unwrap().0;
        let (here, there) =
            if pair == "unix" { (here.0.as_fd(), here.1.as_fd()) } else { (tcp.as_fd(), accepted.as_fd()) };
        getfd(&source, "mig", &[here]).unwrap();
        getfd(&destination, "mig", &[there]).unwrap();
        destination.call("migrate-incoming", json!({"uri": "fd:mig"})).unwrap();
        assert_eq!(destination.incoming(), "fd:mig");
        if rehearsed {
            source.call("rehearse", json!({"uri": "fd:mig"})).unwrap();
            let info = source.ended();
            assert_eq!(info["status"], "rehearsed", "{info}");
            until("the end of the wait", || (destination.status() != "inmigrate").then_some(()));
        } else {
            let words = ["migrate", "--downtime-limit", "10s", "--control", control(&source), "fd:mig"];
            // By its number nobody is known.
            let output = run(&[&words[..], &["--tls-hostname", "127.0.0.1"]].concat());
            assert!(output.status.success(), "{output:?}");
        }
        for (vm, verb) in [(&source, "migrate"), (&source, "rehearse"), (&destination, "migrate-incoming")] {
            let refused = vm.call(verb, json!({"uri": "fd:mig"})).unwrap_err();
            assert!(
                rehearsed || vm.control == destination.control || refused.contains("no guest here"),
                "{refused}"
            );
            assert!(!rehearsed || refused.contains("no descriptor mig"), "{verb}: {refused}");
        }
    }
    assert_eq!(source.info()["moved-to"], "fd:mig");
    let history = run(&["history", "--json", "--state-dir", &state]);
    let history: Value = serde_json::from_slice(&history.stdout).unwrap();
    assert_eq!(history["records"][1]["peer"], "fd:mig", "{history}");
    destination.assert_runs();
    until("the descriptors to be closed", || (source.process.holdings().0 <= before).then_some(()));
}

#[test]
fn a_session_that_does_not_begin_leaves_the_socket_for_another() {
    let dir = tempfile::tempdir().unwrap();
    let source = software(dir.path(), "a", &["--software"]).start();
    let (here, there) = UnixStream::pair().unwrap();
    getfd(&source, "mig", &[here.as_fd()]).unwrap();
    let other = software(dir.path(), "c", &["--software", "--incoming", "tcp:127.0.0.1:0"]).start();
    source.begin(&other.incoming(), json!({"pause-before-switchover": true}));
    until("the wait", || (source.migration()["status"] == "pre-switchover").then_some(()));
    let refused = source.call("migrate", json!({"uri": "fd:mig"})).unwrap_err();
    assert!(refused.contains("under way"), "{refused}");
    source.query("migrate-cancel");
    assert_eq!(source.ended()["status"], "cancelled");
    other.query("migrate-cancel");
    until("the end of the wait", || (other.status() != "inmigrate").then_some(()));
    getfd(&other, "x", &[there.as_fd()]).unwrap();
    other.call("migrate-incoming", json!({"uri": "fd:x"})).unwrap();
    let info = source.migrate("fd:mig", json!({}));
    assert_eq!(info["status"], "completed", "{info}");
    other.assert_runs();
}

#[test]
fn what_is_not_one_connected_stream_socket_under_a_free_name_is_closed() {
    let dir = tempfile::tempdir().unwrap();
    let vm = software(dir.path(), "a", &["--software"]).start();
    let (socket, _other) = UnixStream::pair().unwrap();
    let datagram = UnixDatagram::pair().unwrap().0;
    let listener = UnixListener::bind(dir.path().join("listener")).unwrap();
    let file = std::fs::File::open("/dev/null").unwrap();
    let socket = socket.as_fd();
    getfd(&vm, "taken", &[socket]).unwrap();
    let before = vm.process.holdings().0;
    let named = |name: &str| format!(r#"{{"execute":"getfd","arguments":{{"fdname":"{name}"}}}}"#);
    let name = "is no name of a descriptor";
    let stream = "not a connected stream socket";
    let cases: &[(String, &[BorrowedFd<'_>], &str)] = &[
        (named("x"), &[], "no descriptor came with the request"),
        (named("x"), &[socket, socket], "more than one descriptor"),
        (named("x"), &[socket; MOST], "more than one descriptor"),
        (named("x"), &[datagram.as_fd()], stream),
        (named("x"), &[listener.as_fd()], stream),
        (named("x"), &[file.as_fd()], stream),
        (named("taken"), &[socket], "there is a descriptor taken already"),
        (named(""), &[socket], name),
        (named("5"), &[socket], name),
        (named("5x"), &[socket], name),
        (named("-x"), &[socket], name),
        (named("a b"), &[socket], name),
        (named("é"), &[socket], name),
        (named(&"x".repeat(65)), &[socket], name),
        (r#"{"execute":"getfd"}"#.into(), &[socket], "bad arguments"),
        (r#"{"execute":"getfd","arguments":{"fdname":"x","a":1}}"#.into(), &[socket], "bad arguments"),
        (r#"{"execute":"query"}"#.into(), &[socket], "only getfd takes one"),
        (r#"{"execute":"stop"}"#.into(), &[socket; MOST], "only getfd takes one"),
        (r#"{"execute":"closefd","arguments":{"fdname":"taken"}}"#.into(), &[socket], "only getfd takes one"),
        (r#"{"execute":"closefd","arguments":{"fdname":"x"}}"#.into(), &[], "no descriptor x"),
        (r#"{"execute":"fly"}"#.into(), &[socket], "unknown variant"),
        ("nonsense".into(), &[socket], "not a request"),
        (r#"{"execute":"migrate","arguments":{"uri":"fd:x"}}"#.into(), &[], "no descriptor x"),
    ];
    for (line, passed, says) in cases {
        let refused = asked(&vm, line, passed).expect_err(line);
        assert!(refused.contains(says), "{line} with {}: {refused}", passed.len());
        let closed = || (vm.process.holdings().0 <= before).then_some(());
        until("the descriptors to be closed", closed);
    }
    assert_eq!(vm.status(), "running");
    // As many as are kept, and no more.
    for n in 1..16 {
        getfd(&vm, &format!("n{n}"), &[socket]).unwrap();
    }
    let refused = getfd(&vm, "x", &[socket]).unwrap_err();
    assert!(refused.contains("16 descriptors are kept"), "{refused}");
    vm.call("closefd", json!({"fdname": "taken"})).unwrap();
    getfd(&vm, "x", &[socket]).unwrap();
    let words = ["vm", "--software", "--memory", "32M", "--incoming", "fd:mig"];
    fails(&words, 2, "is no migration address");
    vm.assert_runs();
}

#[test]
fn a_vm_that_may_open_no_more_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let vm = software(dir.path(), "a", &["--software"]).start();
    let (socket, _other) = UnixStream::pair().unwrap();
    let stream = UnixStream::connect(&vm.control).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    lines.next().unwrap().unwrap();
    // The client has its descriptors by the answer to its first question.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut nothing = SendAncillaryBuffer::new(&mut []);
    sendmsg(&stream, &[IoSlice::new(b"{\"execute\":\"query\"}\n")], &mut nothing, SendFlags::empty())
        .unwrap();
    lines.next().unwrap().unwrap();
    let pid = Pid::from_raw(vm.process.pid().try_into().unwrap());
    let before = getrlimit(Resource::Nofile);
    prlimit(pid, Resource::Nofile, Rlimit { current: Some(3), ..before }).unwrap();
    let mut beside = SendAncillaryBuffer::new(&mut space);
    let passed = [socket.as_fd()];
    assert!(beside.push(SendAncillaryMessage::ScmRights(&passed)));
    let line = b"{\"execute\":\"getfd\",\"arguments\":{\"fdname\":\"x\"}}\n";
    sendmsg(&stream, &[IoSlice::new(line)], &mut beside, SendFlags::empty()).unwrap();
    let answer = lines.next().unwrap().unwrap();
    assert!(answer.contains("RLIMIT_NOFILE"), "{answer}");
    prlimit(pid, Resource::Nofile, before).unwrap();
    getfd(&vm, "x", &[socket.as_fd()]).unwrap();
    vm.assert_runs();
}
