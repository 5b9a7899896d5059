//! Nonsense in, one clear error out, within its time, and the guest goes on.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::{Output, Stdio};

use crate::support::{Process, Setup, command, run, until};
use serde_json::json;

fn fails(arguments: &[&str], exit: i32, says: &str) {
    let output: Output = run(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(exit), "{arguments:?}: {stderr}");
    assert!(stderr.contains(says), "{arguments:?} says: {stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    assert!(output.stdout.is_empty(), "{arguments:?} prints on stdout");
}

#[test]
fn nonsense_options_are_usage_errors() {
    fails(&["fly"], 2, "unrecognized");
    fails(&["demo", "--memory", "lots"], 2, "not a size");
    fails(&["demo", "--devices", "0"], 2, "0");
    fails(&["demo", "--downtime-limit", "300"], 2, "not a time");
    fails(&["demo", "--break", "everything"], 2, "everything");
    fails(&["vm", "--uuid", "x"], 2, "UUID");
    fails(&["vm", "--device", "floppy:/dev/fd0", "--memory", "64M"], 2, "vfio-user:SOCKET,id=NAME");
    fails(&["vm", "--device", "vfio-user:/x,id=a/b", "--memory", "64M"], 2, "a/b");
    fails(
        &["vm", "--device", "vfio-user:/x,id=a", "--device", "vfio-user:/y,id=a", "--memory", "64M"],
        2,
        "twice",
    );
    fails(&["vm", "--incoming", "carrier-pigeon:1", "--memory", "64M"], 2, "unix:PATH");
    fails(&["vm", "--memory", "4097"], 2, "memory");
    fails(&["vm", "--memory", "65M"], 2, "2.00 MiB");
    fails(&["vm", "--memory", "1024T"], 2, "128.00 GiB");
    fails(&["demo", "--memory", "1M"], 2, "16.00 MiB");
    fails(&["demo", "--device-state", "4097"], 2, "4096");
    fails(&["migrate", "--control", "/nonexistent", "carrier-pigeon:1"], 2, "unix:PATH");
    fails(&["device", "--socket", "/nonexistent/dir/x.sock"], 1, "/nonexistent/dir/x.sock");
    fails(&["device", "--socket", "/tmp/x.sock", "--fault", "gremlins"], 2, "gremlins");
    fails(&["set", "--control", "/nonexistent"], 2, "--downtime-limit");
}

#[test]
fn what_does_not_exist_is_named() {
    fails(&["status", "--control", "/nonexistent/c"], 1, "/nonexistent/c");
    fails(&["migrate", "--control", "/nonexistent/c", "tcp:127.0.0.1:1"], 1, "/nonexistent/c");
    fails(&["vm", "--memory", "64M", "--device", "vfio-user:/nonexistent/d,id=a"], 1, "/nonexistent/d");
}

#[test]
fn a_control_path_that_is_a_file_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("precious");
    std::fs::write(&path, "data").unwrap();
    let name = path.display().to_string();
    fails(&["vm", "--memory", "64M", "--control", &name], 1, &name);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "data");
}

#[test]
fn a_start_that_fails_leaves_no_listening_socket() {
    let dir = tempfile::tempdir().unwrap();
    let listen = dir.path().join("listen");
    let uri = format!("unix:{}", listen.display());
    fails(&["vm", "--memory", "64M", "--incoming", &uri, "--control", "/nonexistent/c"], 1, "/nonexistent/c");
    assert!(!listen.exists());
}

#[test]
fn output_that_cannot_be_written_is_a_failure_and_a_reader_that_left_is_none() {
    let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    for arguments in [&["completions", "bash"][..], &["explain"]] {
        let output = command(arguments).stdout(full()).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {stderr}");
        assert!(stderr.contains("stdout") && !stderr.contains("panicked"), "{arguments:?}: {stderr}");
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = command(arguments).stdout(writer).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{arguments:?}");
        assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    // Nor is a full stderr a reason to panic.
    let status = command(&["status", "--control", "/nonexistent/c"]).stderr(full()).status().unwrap();
    assert_eq!(status.code(), Some(1));
}

#[test]
fn failures_are_json_for_those_who_asked_for_json() {
    let control = ["--control", "/nonexistent/c", "--json"];
    for (verb, more, exit) in [
        ("status", &[][..], 1),
        ("cancel", &[], 1),
        ("stop", &[], 1),
        ("migrate", &["tcp:127.0.0.1:1"], 1),
        ("migrate", &["carrier-pigeon:1"], 2),
        ("incoming", &["carrier-pigeon:1"], 2),
        ("set", &["--bandwidth", "1M"], 1),
    ] {
        let output = run(&[&[verb], &control[..], more].concat());
        assert_eq!(output.status.code(), Some(exit), "{verb}");
        let document: serde_json::Value = serde_json::from_slice(&output.stdout).expect(verb);
        assert_eq!(document["exit"], exit, "{document}");
        assert_eq!(document["error"]["class"], "GenericError", "{document}");
        assert!(!document["error"]["desc"].as_str().unwrap().is_empty(), "{document}");
    }
}

#[test]
fn a_vm_that_has_a_process_is_not_started_twice() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("new/state").display().to_string();
    let identity =
        ["--uuid", "6f1c7c5e-0d5e-4a39-9a10-5a0b8a3c2d41", "--state-dir", state.as_str(), "--software"];
    let first = Setup { vm_arguments: &identity, devices: 0, ..Setup::new(dir.path(), "a") }.start();
    fails(&[&["vm", "--memory", "64M"], &identity[..]].concat(), 1, "another process has");
    drop(first);
}

#[test]
fn verbs_refuse_what_makes_no_sense_now() {
    let dir = tempfile::tempdir().unwrap();
    let vm = Setup { vm_arguments: &["--software"], devices: 0, ..Setup::new(dir.path(), "a") }.start();
    let control = vm.control.display().to_string();
    assert!(vm.call("query", json!({"colour": "red"})).unwrap_err().contains("colour"));
    let output = run(&["continue", "--control", &control, "--json"]);
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["error"]["class"], "NoMigration", "{document}");
    fails(&["incoming", "--control", &control, "tcp:127.0.0.1:0"], 1, "there is a guest here");
    assert_eq!(run(&["stop", "--control", &control]).status.code(), Some(0));
    assert_eq!(vm.status(), "paused");
    assert_eq!(run(&["cont", "--control", &control]).status.code(), Some(0));
    assert_eq!(vm.status(), "running");
    fails(&["quit", "--control", &control], 1, "a guest runs here, and would end with the process");
    assert_eq!(run(&["quit", "--force", "--control", &control]).status.code(), Some(0));
    until("the socket to go", || (!vm.control.exists()).then_some(()));
}

#[test]
fn a_peer_that_is_not_one_leaves_the_guest_running() {
    let dir = tempfile::tempdir().unwrap();
    let source = Setup::new(dir.path(), "a").start();
    source.warm();
    let answers: [&[u8]; 4] = [
        b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n",
        b"",
        &[0xff; 4096],
        b"SSH-2.0-OpenSSH_9.2\r\n",
    ];
    for answer in answers {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("tcp:{}", listener.local_addr().unwrap());
        let peer = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(answer).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            // Whatever it sends is swallowed until it leaves.
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let info = source.migrate(&uri, json!({}));
        assert_eq!(info["status"], "failed", "{info}");
        assert!(info["error"].as_str().is_some_and(|error| !error.is_empty()), "{info}");
        assert_eq!(source.status(), "running");
        peer.join().unwrap();
    }
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let info = source.migrate(&format!("tcp:{nobody}"), json!({}));
    assert!(info["error"].as_str().unwrap().contains(&nobody.to_string()), "{info}");
    source.assert_whole();
}

#[test]
fn garbage_at_the_destination_does_not_take_it_down() {
    let dir = tempfile::tempdir().unwrap();
    let destination =
        Setup { vm_arguments: &["--incoming", "tcp:127.0.0.1:0"], ..Setup::new(dir.path(), "b") }.start();
    for garbage in [&b"GET / HTTP/1.0\r\n\r\n"[..], &[0xff; 100_000], b""] {
        let uri = destination.incoming();
        let mut stream = std::net::TcpStream::connect(uri.strip_prefix("tcp:").unwrap()).unwrap();
        let _ = stream.write_all(garbage);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    }
    assert_eq!(destination.status(), "inmigrate");
    assert!(destination.process.own_memory_kib() < 200 << 10, "memory is bounded");
}

#[test]
fn another_device_is_refused_with_reasons_and_exit_3() {
    let dir = tempfile::tempdir().unwrap();
    let source = Setup::new(dir.path(), "a").start();
    let destination = Setup {
        device_arguments: &["--state-size", "8M"],
        vm_arguments: &["--incoming", "tcp:127.0.0.1:0"],
        ..Setup::new(dir.path(), "b")
    }
    .start();
    source.warm();
    let control = source.control.display().to_string();
    let output = run(&[
        "migrate",
        "--control",
        &control,
        "--downtime-limit",
        "10s",
        "--json",
        &destination.incoming(),
    ]);
    assert_eq!(output.status.code(), Some(3), "{}", String::from_utf8_lossy(&output.stdout));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let error = report["migration"]["error"].as_str().unwrap();
    assert!(error.contains("dev0") && error.contains("state_size"), "{error}");
    source.assert_whole();
}

#[test]
fn post_copy_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let source = Setup::new(dir.path(), "a").start();
    let refused = source.call("migrate", json!({"uri": "tcp:127.0.0.1:1", "post-copy": true})).unwrap_err();
    assert!(refused.contains("post-copy") && refused.contains("device"), "{refused}");
}

#[test]
fn too_few_descriptors_are_told_as_our_own_lack() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("device.sock");
    let _device = Process::start(&["device", "--socket", socket.to_str().unwrap(), "--state-size", "4M"]);
    until("the device", || socket.exists().then_some(()));
    let device = format!("vfio-user:{},id=dev0", socket.display());
    let vm = env!("CARGO_BIN_EXE_vfio-migrate");
    let mut lacked = 0;
    for limit in 8..48 {
        // It ends as soon as it has begun, with a stdin that has ended.
        let script = format!(
            "ulimit -n {limit}; exec {vm} vm --software --memory 64M --device '{device}' --exit-with-stdin"
        );
        let output =
            std::process::Command::new("sh").args(["-c", &script]).stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!said.contains("broke the protocol") && !said.contains("panicked"), "{limit}: {said}");
        if output.status.success() {
            assert!(limit > 12, "{limit} descriptors are enough?");
            break;
        }
        lacked += usize::from(said.contains("too many open") || said.contains("Too many open files"));
    }
    assert!(lacked > 3, "the lack was named {lacked} times");
}

/// A host's manifest.
fn host_file(dir: &std::path::Path) -> String {
    let file = dir.join("h1.json");
    std::fs::write(&file, r#"{"schema": "vfio-migrate.org/manifest/1", "kind": "host", "name": "h1"}"#)
        .unwrap();
    file.display().to_string()
}

#[test]
fn what_is_wrong_with_a_word_is_named_with_its_bound() {
    let dir = tempfile::tempdir().unwrap();
    let long = dir.path().join("x".repeat(108)).display().to_string();
    let (uri, device) = (format!("unix:{long}"), format!("vfio-user:{long},id=dev0"));
    fails(&["vm", "--software", "--incoming", &uri], 2, "the path is longer than 107 bytes");
    let says = format!("a socket's path has at most 107 bytes, and this one has {}", long.len());
    // Whatever would be asked there.
    let (vm, server, file) = (format!("vm:{long}"), format!("vfio-user:{long}"), host_file(dir.path()));
    for words in [
        ["vm", "--software", "--control", &long].as_slice(),
        &["vm", "--software", "--device", &device],
        &["device", "--socket", &long],
        &["status", "--control", &long],
        &["migrate", "--control", &long, "unix:/nowhere"],
        &["save", "--control", &long, "-o", "/nowhere"],
        &["devices", &long],
        &["describe", &vm],
        &["describe", &server],
        &["check", &vm, &file],
    ] {
        fails(words, 2, &says);
    }
    // One host is no pool, by whatever two names.
    let host = std::path::PathBuf::from(&file);
    let other = dir.path().join("h2.json");
    std::os::unix::fs::symlink(&host, &other).unwrap();
    let (host, other) = (host.display().to_string(), other.display().to_string());
    fails(&["check", "--matrix", &host, &host], 2, "is there twice");
    fails(&["check", "--matrix", &host, &other], 2, "is there twice");
    fails(&["check", "--baseline", &host, &other], 2, "is there twice");
}
