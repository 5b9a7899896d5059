//! Config space that differs, and rules for it: `check`, `rehearse` and `migrate` give one answer.

use serde_json::json;

use crate::support::{Setup, control, creds, run};

/// Bytes of the destination's config space that are its own, the rules of its `vm`, and whether the guest may go there.
type Case = (&'static str, &'static [&'static str], &'static [&'static str], Option<&'static str>);

const CASES: [Case; 9] = [
    ("nothing differs", &[], &[], None),
    ("revision", &["0x8=2"], &[], Some("device-pci-revision")),
    ("revision, left out", &["0x8=2"], &["0x8+1=ignore"], None),
    (
        "revision, left out and asked for",
        &["0x8=2"],
        &["0x0+16=ignore", "8+1=compare"],
        Some("device-pci-revision"),
    ),
    ("subsystem", &["0x2e=7"], &["0x8+1=ignore"], Some("device-pci-identity")),
    ("subsystem and revision, left out", &["0x2e=7", "0x8=2"], &["0x2e+2=ignore", "0x8+1=ignore"], None),
    ("another capability", &["0x50=0xf"], &[], Some("device-capabilities")),
    ("another capability, left out", &["0x50=0xf"], &["0x50+2=ignore"], None),
    ("one capability more", &["0x51=0x60", "0x60=0xf"], &[], None),
];

#[test]
fn check_rehearse_and_migrate_give_one_answer() {
    for (name, bytes, rules, refused) in CASES {
        let dir = tempfile::tempdir().unwrap();
        let uuid = ["--software", "--uuid", "7f1f6f6e-5d3f-4a75-9a0b-0f6e2c9a1d11"];
        let source = Setup { vm_arguments: &uuid, ..Setup::new(dir.path(), "a") }.start();
        let mut device = vec!["--state-size", "4M"];
        device.extend(bytes.iter().flat_map(|byte| ["--config-byte", byte]));
        let mut vm = [&uuid[..], &["--incoming", "tcp:127.0.0.1:0"]].concat();
        vm.extend(rules.iter().flat_map(|rule| ["--config-rule", rule]));
        let there = Setup { device_arguments: &device, vm_arguments: &vm, ..Setup::new(dir.path(), "b") };
        let destination = there.start();
        source.warm();
        let (here, there, at) = (control(&source), control(&destination), destination.incoming());
        let (from, to) = (format!("vm:{here}"), format!("vm:{there}"));
        let expected = if refused.is_some() { 3 } else { 0 };
        let asked: [&[&str]; 4] = [
            &["check", "--live", &from, &to],
            &["check", "--live", &from, &at, "--tls-creds", creds()],
            &["rehearse", "--control", here, "--to", &at],
            &["migrate", "--control", here, &at, "--downtime-limit", "10s"],
        ];
        for arguments in asked {
            let output = run(arguments);
            let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(expected), "{name}: {arguments:?}: {said}");
            // Whoever shows reasons by their codes shows this one.
            if let Some(code) = refused.filter(|_| arguments[0] != "migrate") {
                assert!(said.contains(code), "{name}: {arguments:?}: {said}");
            }
        }
        let stays = refused.is_some();
        assert_eq!(source.status(), if stays { "running" } else { "postmigrate" }, "{name}");
        if !stays {
            destination.assert_runs();
        }
    }
}

#[test]
fn bytes_that_no_manifest_tells_are_named_by_the_question() {
    let dir = tempfile::tempdir().unwrap();
    let arguments = ["--software", "--incoming", "tcp:127.0.0.1:0", "--config-rule", "0x53+5=compare"];
    let source = Setup { vm_arguments: &["--software"], ..Setup::new(dir.path(), "a") }.start();
    let destination = Setup { vm_arguments: &arguments, ..Setup::new(dir.path(), "b") }.start();
    let (from, to) = (format!("vm:{}", control(&source)), destination.incoming());
    let output = run(&["check", "--json", &from, &to, "--tls-creds", creds()]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let untold = report["reasons"].as_array().unwrap().iter();
    let untold: Vec<_> = untold.filter(|reason| reason["code"] == "config-untold").collect();
    assert_eq!((&report["verdict"], untold.len()), (&json!("live"), 1), "{report}");
    assert_eq!(untold[0]["severity"], "note", "{report}");
}
