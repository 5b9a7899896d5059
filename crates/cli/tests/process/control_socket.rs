//! The control socket of a `vm`, as its clients find it: what is a request, and who has a place.

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Lines, Write};
use std::os::unix::net::UnixStream;

use crate::support::{PATIENCE, Vm, control, fails, run, software};

/// Most clients at a time.
const CLIENTS: usize = 32;

/// A connection, past the greeting.
struct Client {
    stream: UnixStream,
    lines: Lines<BufReader<UnixStream>>,
}

impl Client {
    fn of(vm: &Vm) -> Self {
        let stream = UnixStream::connect(&vm.control).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let lines = BufReader::new(stream.try_clone().unwrap()).lines();
        let mut client = Self { stream, lines };
        assert!(client.line().expect("a greeting")["vfio-migrate"].is_object());
        client
    }

    fn send(&mut self, line: &str) {
        self.stream.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// The next line; `None` at the end.
    fn line(&mut self) -> Option<Value> {
        let line = self.lines.next()?.expect("a line in time");
        Some(serde_json::from_str(&line).expect("JSON"))
    }

    /// The next line as it is.
    fn text(&mut self) -> String {
        self.lines.next().expect("a line").expect("a line in time")
    }

    fn answer(&mut self, line: &str) -> Value {
        self.send(line);
        self.line().expect("an answer")
    }
}

#[test]
fn a_line_that_can_be_read_in_two_ways_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let vm = software(dir.path(), "a", &["--software"]).start();
    let mut client = Client::of(&vm);
    for (line, says) in [
        (r#"{"execute":"query","execute":"quit","id":1}"#, "at execute: named twice"),
        (
            r#"{"execute":"quit","id":1,"arguments":{"force":false,"force":true}}"#,
            "at arguments.force: named twice",
        ),
        (r#"{"execute":"stop","id":1,"arguments":{},"arguments":{}}"#, "at arguments: named twice"),
        (
            r#"{"execute":"migrate","id":1,"arguments":{"uri":"tcp:h:1","device-map":{"a":"b","a":"c"}}}"#,
            "named twice",
        ),
        (r#"{"execute":"migrate","id":1,"arguments":["tcp:127.0.0.1:1"]}"#, "they are no object"),
        (r#"{"execute":"stop","id":1,"arguments":[]}"#, "they are no object"),
    ] {
        let answer = client.answer(line);
        assert!(answer["error"]["desc"].as_str().expect("a refusal").contains(says), "{line}: {answer}");
        assert_eq!(answer["id"], 1, "{line}: {answer}");
    }
    let answer = client.answer("\u{feff}{\"execute\":\"stop\"}");
    assert!(answer["error"]["desc"].as_str().unwrap().contains("byte order mark"), "{answer}");
    for line in [r#"["stop"]"#, r#"["stop",{}]"#] {
        assert_eq!(client.answer(line)["error"]["class"], "CommandNotFound", "{line}");
    }
    assert_eq!(vm.status(), "running");
    // The controls: what is left out may be null.
    assert!(client.answer(r#"{"execute":"query","arguments":null,"id":1.5}"#)["return"].is_object());
    assert_eq!(client.answer(r#"{"execute":"stop","arguments":{}}"#)["event"], "STOP");
}

#[test]
fn an_id_comes_back_as_it_was_sent_and_two_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let vm = software(dir.path(), "a", &["--software"]).start();
    let mut client = Client::of(&vm);
    for id in [
        "18446744073709551617",
        "123456789012345678901234567890",
        "0.10000000000000000555",
        "1e2",
        "-0",
        r#"{"b": 1, "a": 2}"#,
    ] {
        client.send(&format!(r#"{{"execute":"migrate-cancel","id":{id}}}"#));
        let answer = client.text();
        assert!(answer.contains("no migration is under way"), "{answer}");
        assert!(answer.ends_with(&format!(r#","id":{id}}}"#)), "{id}: {answer}");
    }
    client.send(r#"{"execute":"stop","id":1e400}"#);
    let answer = client.text();
    assert!(answer.contains("number out of range") && answer.contains(r#""id":1e400"#), "{answer}");
    for twice in [r#"{"execute":"stop","id":1,"id":2}"#, r#"{"id":1,"execute":"stop","i\u0064":1}"#] {
        let answer = client.answer(twice);
        assert!(answer["error"]["desc"].as_str().unwrap().contains("named twice"), "{twice}: {answer}");
        assert!(answer.get("id").is_none(), "{twice}: {answer}");
    }
    assert_eq!(vm.status(), "running");
}

#[test]
fn idle_clients_lock_nobody_out_and_who_goes_is_told_why() {
    let dir = tempfile::tempdir().unwrap();
    let vm = software(dir.path(), "a", &["--software"]).start();
    let mut clients: Vec<Client> = (0..CLIENTS).map(|_| Client::of(&vm)).collect();
    // The first to come has asked for something since, the second has not.
    assert!(clients[0].answer(r#"{"execute":"query"}"#)["return"].is_object());
    let output = run(&["status", "--json", "--control", control(&vm)]);
    assert!(output.status.success(), "{output:?}");
    let told = clients[1].line().expect("a reason");
    assert_eq!(told["event"], "DISCONNECTED", "{told}");
    let reason = told["data"]["reason"].as_str().unwrap();
    assert!(reason.contains("silent longest"), "{told}");
    assert!(clients[1].line().is_none(), "it is closed");
    assert!(clients[0].answer(r#"{"execute":"query"}"#)["return"].is_object());
    assert!(clients[2].answer(r#"{"execute":"query"}"#)["return"].is_object());
    // However many come, the operator gets through.
    let _many: Vec<Client> = (0..2 * CLIENTS).map(|_| Client::of(&vm)).collect();
    fails(&["cancel", "--control", control(&vm)], 1, "no migration is under way");
    assert!(run(&["quit", "--force", "--control", control(&vm)]).status.success());
    let last: Vec<Value> = std::iter::from_fn(|| clients[2].line()).collect();
    assert_eq!(last.last().expect("a reason")["event"], "DISCONNECTED", "{last:?}");
}

#[test]
fn an_operator_who_is_turned_out_is_told_why() {
    let dir = tempfile::tempdir().unwrap();
    let vm = software(dir.path(), "a", &["--software"]).start();
    let proxy = dir.path().join("proxy");
    let listener = std::os::unix::net::UnixListener::bind(&proxy).unwrap();
    // Says what a `vm` says to one that has to go.
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let told = json!({"event": "DISCONNECTED", "data": {"reason": "for this reason"}, "timestamp": {"seconds": 1, "microseconds": 0}});
            let _ = stream.write_all(format!("{told}\n").as_bytes());
        }
    });
    for verb in ["status", "cancel", "quit"] {
        fails(
            &[verb, "--control", proxy.to_str().unwrap()],
            1,
            "closed this connection to its control socket: for this reason",
        );
    }
    drop(vm);
}

/// A `vm` that ends as it is asked has refused nothing: whether it was taken is what nobody knows.
#[test]
fn a_socket_that_closes_instead_of_answering_is_no_refusal() {
    let dir = tempfile::tempdir().unwrap();
    for verb in ["cancel", "continue", "stop", "cont", "quit"] {
        let path = dir.path().join(verb);
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let serving = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            writeln!(stream, "{}", json!({"vfio-migrate": {"version": "1"}})).unwrap();
            BufReader::new(stream.try_clone().unwrap()).read_line(&mut String::new()).unwrap();
        });
        let output = run(&[verb, "--control", path.to_str().unwrap()]);
        let told = String::from_utf8_lossy(&output.stderr);
        serving.join().unwrap();
        // One that was asked to end has.
        if verb == "quit" {
            assert!(output.status.success(), "{told}");
            continue;
        }
        assert_eq!(output.status.code(), Some(1), "{verb}: {told}");
        assert!(
            told.contains("whether it was taken is not known") && !told.contains("refused"),
            "{verb}: {told}"
        );
    }
}
