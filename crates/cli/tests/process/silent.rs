//! Questions to sockets that do not answer: each ends soon, and says why.

use std::net::TcpListener;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Output;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};
use rustix::process::{Pid, Signal, kill_process};

use crate::support::{Setup, creds, run};

/// Longest that a question with a patience of 2 s may take on a machine that is busy with something else.
const SOON: Duration = Duration::from_secs(10);

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Asks, and returns what was said. It waits as long as it says, and not much longer.
fn asked(arguments: &[&str], least: Duration) -> (Option<i32>, String) {
    let begun = Instant::now();
    let output: Output = run(arguments);
    let took = begun.elapsed();
    let told =
        String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert!(took < SOON, "{arguments:?} took {took:?}: {told}");
    assert!(took >= least, "{arguments:?} did not wait, {took:?}: {told}");
    assert!(!told.contains("panicked"), "{told}");
    (output.status.code(), told)
}

/// Each way to ask what may be behind a socket.
fn questions<'a>(socket: &'a str, vm: &'a str, other: &'a str) -> Vec<Vec<&'a str>> {
    vec![
        vec!["describe", socket],
        vec!["describe", vm],
        vec!["check", socket, other],
        vec!["check", other, socket],
        vec!["check", vm, other],
        vec!["status", "--control", socket],
        vec!["status", "--watch", "--control", socket],
        vec!["devices", socket],
    ]
}

/// Each question says of the socket that it does not answer within 2 s, once.
fn all_say_so(socket: &Path, manifest: &str) {
    let vm = format!("vm:{}", text(socket));
    for question in questions(text(socket), &vm, manifest) {
        let (exit, told) = asked(&question, Duration::from_millis(1900));
        // A list of devices has the one that does not answer among them.
        assert_eq!(exit, Some(if question[0] == "devices" { 0 } else { 1 }), "{question:?}: {told}");
        let says = format!("{} does not answer within 2 s", text(socket));
        assert_eq!(told.matches(&says).count(), 1, "{question:?}: {told}");
        assert_eq!(
            told.matches("answer").count(),
            if question[0] == "devices" { 3 } else { 1 },
            "{question:?}: {told}"
        );
    }
}

fn manifest(dir: &Path) -> String {
    let file = dir.join("host.json");
    assert!(run(&["describe", "--host", "-o", text(&file)]).status.success());
    text(&file).into()
}

#[test]
fn a_listener_that_accepts_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("silent");
    let _listener = UnixListener::bind(&socket).unwrap();
    all_say_so(&socket, &manifest(dir.path()));
    let (_, told) = asked(&["status", "--control", text(&socket), "--timeout", "300ms"], Duration::ZERO);
    assert!(told.contains("does not answer within 300 ms"), "{told}");
    let (_, told) = asked(&["describe", text(&socket), "--timeout", "300ms"], Duration::ZERO);
    assert!(told.contains("does not answer within 300 ms"), "{told}");
}

#[test]
fn a_listener_that_accepts_and_says_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("silent");
    let listener = UnixListener::bind(&socket).unwrap();
    // Each is kept open until its end has come.
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || std::io::copy(&mut &stream, &mut std::io::sink()));
        }
    });
    all_say_so(&socket, &manifest(dir.path()));
}

#[test]
fn a_listener_whose_queue_is_full() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("silent");
    let address = SocketAddrUnix::new(&socket).unwrap();
    let new = |flags| socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
    let listener = new(SocketFlags::CLOEXEC);
    bind(&listener, &address).unwrap();
    listen(&listener, 0).unwrap();
    let mut waiting = Vec::new();
    loop {
        let client = new(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK);
        match connect(&client, &address) {
            Ok(()) => waiting.push(client),
            Err(Errno::AGAIN) => break,
            Err(errno) => panic!("{errno}"),
        }
    }
    all_say_so(&socket, &manifest(dir.path()));
}

#[test]
fn a_device_that_has_a_client() {
    let dir = tempfile::tempdir().unwrap();
    let vm = Setup::new(dir.path(), "a").start();
    let socket = dir.path().join("a-dev0.sock");
    let host = manifest(dir.path());
    let says = format!("{} has a client already, and does not answer another within 2 s", text(&socket));
    let server = format!("vfio-user:{}", text(&socket));
    for question in [
        &["describe", text(&socket)][..],
        &["describe", &server],
        &["check", text(&socket), &host],
        &["devices", text(&socket)],
    ] {
        let (_, told) = asked(question, Duration::from_millis(1900));
        assert_eq!(told.matches(&says).count(), 1, "{question:?}: {told}");
    }
    // The control: a device whose client has left is described.
    drop(vm.process);
    let (exit, told) = asked(&["describe", text(&socket)], Duration::ZERO);
    assert_eq!(exit, Some(0), "{told}");
}

#[test]
fn a_vm_whose_device_says_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let vm = Setup::new(dir.path(), "a").start();
    let host = manifest(dir.path());
    let name = format!("vm:{}", text(&vm.control));
    let device = Pid::from_raw(i32::try_from(vm.devices[0].pid()).unwrap()).unwrap();
    kill_process(device, Signal::STOP).unwrap();
    for question in [&["describe", &name][..], &["check", &name, &host], &["describe", "--host", &name]] {
        let (exit, told) = asked(question, Duration::from_millis(1900));
        assert_eq!(exit, Some(1), "{question:?}: {told}");
        let says = format!("a device of the `vm` behind {} does not answer within 2 s", text(&vm.control));
        assert_eq!(told.matches(&says).count(), 1, "{question:?}: {told}");
    }
    kill_process(device, Signal::CONT).unwrap();
    // The control: a device that goes on is described again, as soon as it has answered what it was asked before.
    let (exit, told) = asked(&["describe", &name, "--timeout", "9s"], Duration::ZERO);
    assert_eq!(exit, Some(0), "{told}");
}

#[test]
fn a_receiver_that_says_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let vm = Setup { devices: 0, vm_arguments: &["--software"], ..Setup::new(dir.path(), "a") }.start();
    let source = format!("vm:{}", text(&vm.control));
    let path = dir.path().join("receiver");
    let unix = UnixListener::bind(&path).unwrap();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    for receiver in [format!("unix:{}", text(&path)), format!("tcp:{}", tcp.local_addr().unwrap())] {
        let (exit, told) =
            asked(&["check", &source, &receiver, "--tls-creds", creds()], Duration::from_millis(1900));
        assert_eq!(exit, Some(1), "{told}");
        assert_eq!(told.matches("does not answer within 2 s").count(), 1, "{told}");
        assert!(told.contains(&receiver), "{told}");
    }
    drop((unix, UnixStream::connect(&path)));
}

/// A server that refuses whoever comes is a server: nobody asks it whether it is a `vm` too.
#[test]
fn a_server_that_refuses_is_not_asked_for_a_vm() {
    use std::io::{Read, Write};
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("refuses");
    let listener = UnixListener::bind(&socket).unwrap();
    let clients = std::thread::spawn(move || {
        let mut clients = 0;
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut header = [0u8; 16];
            if stream.read_exact(&mut header).is_err() {
                return clients;
            }
            clients += 1;
            let size = u32::from_ne_bytes(header[4..8].try_into().unwrap());
            stream.read_exact(&mut vec![0; size as usize - 16]).unwrap();
            // The same message, as a reply with an error (flags 1 and 1 << 5): EPERM.
            header[4..8].copy_from_slice(&16u32.to_ne_bytes());
            header[8..12].copy_from_slice(&0x21u32.to_ne_bytes());
            header[12..16].copy_from_slice(&1u32.to_ne_bytes());
            stream.write_all(&header).unwrap();
        }
        clients
    });
    for question in [["describe", text(&socket)].as_slice(), &["check", text(&socket), text(&socket)]] {
        let output = run(question);
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{told}");
        assert!(told.contains("refused VERSION") && !told.contains("`vm`"), "{told}");
    }
    // Without a word, which ends the server.
    drop(UnixStream::connect(&socket).unwrap());
    assert!(clients.join().unwrap() >= 2);
}
