//! Limits of nothing: a bandwidth, a time or a size of 0.

use serde_json::{Value, json};

use crate::support::{control, fails, run, software, until};

#[test]
fn limits_of_nothing_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let vm = software(dir.path(), "a", &["--software"]).start();
    for (arguments, says) in [
        (&["migrate", "--control", "/x", "tcp:h:1", "--bandwidth", "0"][..], "\"none\" is no cap"),
        (&["rehearse", "--control", "/x", "--to", "tcp:h:1", "--bandwidth", "0K"], "\"none\" is no cap"),
        (&["set", "--control", "/x", "--bandwidth", "0"], "\"none\" is no cap"),
        (&["set", "--control", "/x", "--downtime-limit", "0ms"], "no time at all"),
        (&["migrate", "--control", "/x", "tcp:h:1", "--downtime-limit", "0s"], "no time at all"),
        (&["migrate", "--control", "/x", "tcp:h:1", "--give-up", "0s"], "no time at all"),
        (&["rehearse", "--control", "/x", "--to", "tcp:h:1", "--give-up", "0s"], "no time at all"),
        (&["demo", "--downtime-limit", "0s"], "no time at all"),
        (&["demo", "--memory", "0"], "the machine takes"),
        (&["device", "--socket", "/x", "--dma-interval", "0s"], "no time at all"),
        (&["vm", "--memory", "0"], "the machine takes"),
        (&["doctor", "--memory", "0"], "is nothing"),
        (&["save", "--control", "/x", "-o", "/x", "--state-limit", "0"], "is nothing"),
        (&["status", "--control", "/x", "--timeout", "0s"], "no time at all"),
        (&["describe", "/x", "--timeout", "0s"], "no time at all"),
        (&["check", "/x", "/x", "--timeout", "0s"], "no time at all"),
        (&["devices", "/x", "--timeout", "0s"], "no time at all"),
    ] {
        fails(arguments, 2, says);
    }
    for (verb, arguments) in [
        ("migrate", json!({"uri": "tcp:127.0.0.1:1", "max-bandwidth": 0})),
        ("migrate", json!({"uri": "tcp:127.0.0.1:1", "downtime-limit": 0})),
        ("migrate", json!({"uri": "tcp:127.0.0.1:1", "give-up-after": 0})),
        ("rehearse", json!({"uri": "tcp:127.0.0.1:1", "max-bandwidth": 0})),
        ("migrate-set-parameters", json!({"max-bandwidth": 0})),
        ("migrate-set-parameters", json!({"downtime-limit": 0})),
        ("save", json!({"path": "/nonexistent/x", "state-limit": 0})),
    ] {
        let refused = vm.call(verb, arguments.clone()).expect_err(verb);
        assert!(refused.contains("bad arguments"), "{verb} {arguments}: {refused}");
    }
    // The controls: no cap has a word, and absent is as null.
    for cap in [json!("none"), Value::Null, json!(1 << 20)] {
        let refused = vm.call("migrate-set-parameters", json!({"max-bandwidth": cap})).unwrap_err();
        assert!(refused.contains("no migration is under way"), "{refused}");
    }
}

#[test]
fn a_cap_is_lifted_by_its_word() {
    let dir = tempfile::tempdir().unwrap();
    let vm = software(dir.path(), "a", &["--software"]).start();
    let destination = software(dir.path(), "b", &["--software", "--incoming", "tcp:127.0.0.1:0"]).start();
    until("the guest to use RAM", || (vm.counter("pages-written") > 500).then_some(()));
    // It would take an hour.
    vm.begin(&destination.incoming(), json!({"max-bandwidth": 4096}));
    until("the first bytes", || (vm.migration()["transferred"]["ram"].as_u64()? > 0).then_some(()));
    assert!(run(&["set", "--bandwidth", "none", "--control", control(&vm)]).status.success());
    assert_eq!(vm.ended()["status"], "completed");
}
