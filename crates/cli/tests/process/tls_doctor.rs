//! What `doctor` says of a folder of certificates, and what would mend it: the same as `tls show` and `vm`, which is one judgement.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{BasicConstraints, CertificateParams, IsCa, date_time_ymd};
use serde_json::Value;

use crate::other_users::{Place, STRANGER};
use crate::support::pki::{Ca, Host};
use crate::support::run;
use crate::tls::{Pki, done, pki, words};

/// The check of the folder, and whether `tls show` can use all of it.
fn examined(dir: &Path, more: &[&str]) -> (Value, bool) {
    let output = run(&[&["doctor", "--json", "--tls-creds", words(dir)], more].concat());
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let checks = report["checks"].as_array().unwrap();
    let check = checks.iter().find(|check| check["id"] == "tls-creds").unwrap().clone();
    (check, run(&["tls", "show", words(dir)]).status.success())
}

fn ends_soon(params: &mut CertificateParams) {
    let soon = SystemTime::now() + Duration::from_secs(5 * 24 * 3600);
    params.not_after = date_time_ymd(1970, 1, 1) + soon.duration_since(SystemTime::UNIX_EPOCH).unwrap();
}

/// A host of a CA that is altered.
fn of(alter: fn(&mut CertificateParams)) -> tempfile::TempDir {
    Ca::altered("a CA", alter).host(&Host::named("host-a"))
}

/// A host below a CA that ends soon.
fn below() -> tempfile::TempDir {
    let root = Ca::new();
    let dir = root.host(&Host::named("host-a"));
    let between = root.below("between", ends_soon);
    between.certify(dir.path(), &Host::named("host-a"));
    between.add_to(dir.path());
    dir
}

fn with(change: impl FnOnce(&Path)) -> tempfile::TempDir {
    let dir = of(|_| {});
    change(dir.path());
    dir
}

#[test]
fn each_problem_has_a_fix_of_its_own() {
    let list = |end: SystemTime| {
        let ca = Ca::new();
        let dir = ca.host(&Host::named("host-a"));
        std::fs::write(dir.path().join("ca-crl.pem"), ca.list(&[], end)).unwrap();
        dir
    };
    let y2k = SystemTime::UNIX_EPOCH + Duration::from_secs(1_009_843_200);
    let mode = |path: PathBuf, mode| std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    let new_ca = "vfio-migrate tls init NEW-CA, and for every host vfio-migrate tls host NAME --ca NEW-CA";
    let new_host = "vfio-migrate tls host NAME --force";
    for (found, fix, usable, dir) in [
        ("expires at", "", true, of(|_| {})),
        ("ends at", new_ca, true, of(ends_soon)),
        ("a CA ended at", new_ca, false, of(|params| params.not_after = date_time_ymd(2021, 1, 1))),
        ("is no CA", new_ca, false, of(|params| params.is_ca = IsCa::ExplicitNoCa)),
        (
            "is not valid before",
            "set this host's clock right",
            false,
            of(|params| params.not_before = date_time_ymd(2090, 1, 1)),
        ),
        (
            "which allows 0 CAs below it",
            "get the host's certificate anew from its CA, and behind it",
            false,
            {
                let root =
                    Ca::altered("root", |params| params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0)));
                let dir = root.host(&Host::named("host-a"));
                let between = root.below("between", |_| {});
                between.certify(dir.path(), &Host::named("host-a"));
                between.add_to(dir.path());
                dir
            },
        ),
        (
            "the CA CN=between between the host and",
            "get the host's certificate anew from its CA",
            true,
            below(),
        ),
        ("expired at", "vfio-migrate tls revoke --ca ca, and copy", false, list(y2k)),
        (
            "server-cert.pem expired at",
            new_host,
            false,
            Ca::new().host(&Host { years: (2001, 2002), ..Host::named("host-a") }),
        ),
        (
            "ca-cert.pem failed",
            "copy the ca-cert.pem of the CA",
            false,
            with(|dir| std::fs::remove_file(dir.join("ca-cert.pem")).unwrap()),
        ),
        (
            "server-key.pem failed",
            new_host,
            false,
            with(|dir| std::fs::remove_file(dir.join("server-key.pem")).unwrap()),
        ),
        (
            "is a directory",
            "put a file in the place of",
            false,
            with(|dir| {
                std::fs::remove_file(dir.join("client-cert.pem")).unwrap();
                std::fs::create_dir(dir.join("client-cert.pem")).unwrap();
            }),
        ),
        ("mode 0640", "chmod 600 ", false, with(|dir| mode(dir.join("client-key.pem"), 0o640))),
        ("mode 0777", "chmod o-w ", false, with(|dir| mode(dir.to_owned(), 0o777))),
        (
            "client-cert.pem expires at",
            "",
            true,
            with(|dir| {
                std::fs::remove_file(dir.join("server-cert.pem")).unwrap();
                std::fs::remove_file(dir.join("server-key.pem")).unwrap();
            }),
        ),
        (
            "server-cert.pem failed",
            new_host,
            false,
            with(|dir| std::fs::remove_file(dir.join("server-cert.pem")).unwrap()),
        ),
    ] {
        let (check, shown) = examined(dir.path(), &[]);
        assert_eq!(shown, usable, "{check}");
        assert!(check["found"].as_str().unwrap().contains(found), "{found}: {check}");
        assert_eq!(check["status"], if fix.is_empty() { "ok" } else { "warn" }, "{check}");
        let told = check["fix"].as_str().unwrap_or_default();
        assert!(told.starts_with(fix) && (fix == new_host || !told.contains("--force")), "{found}: {check}");
        assert_eq!(told.is_empty(), fix.is_empty(), "{check}");
    }
    let nowhere = Path::new("/nowhere/at/all");
    let (check, shown) = examined(nowhere, &[]);
    assert!(!shown);
    assert_eq!(check["found"], "there is no folder /nowhere/at/all");
    assert!(check["fix"].as_str().unwrap().ends_with("copy what that makes to /nowhere/at/all"), "{check}");
}

#[test]
fn a_file_that_this_user_may_not_read_is_told_as_that() {
    let Some(place) = Place::of_others() else { return };
    let host = place.path().join("host");
    std::fs::create_dir(&host).unwrap();
    Ca::new().equip(&host, &Host::named("host-a"));
    let output = place.run(STRANGER, &["doctor", "--json", "--tls-creds", words(&host)]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let checks = report["checks"].as_array().unwrap();
    let check = checks.iter().find(|check| check["id"] == "tls-creds").unwrap();
    let fix = check["fix"].as_str().unwrap();
    assert!(fix.contains(&format!("chown 54001 {}", host.join("server-key.pem").display())), "{check}");
    assert!(!fix.contains("--force"), "{check}");
    // What another owns, root has to be given too.
    std::os::unix::fs::chown(&host, Some(54001), None).unwrap();
    let (check, shown) = examined(&host, &[]);
    assert!(!shown);
    assert_eq!(check["fix"], format!("chown 0 {}", host.display()));
    let found = check["found"].as_str().unwrap();
    assert_eq!(found.matches("belongs to user 54001").count(), 1, "{check}");
}

#[test]
fn pinned_keys_need_no_ca_for_the_doctor_either() {
    let dir = with(|dir| std::fs::remove_file(dir.join("ca-cert.pem")).unwrap());
    let pin = format!("sha256:{}", "0".repeat(64));
    assert_eq!(examined(dir.path(), &[]).0["status"], "warn");
    let (check, _) = examined(dir.path(), &["--tls-pin", &pin]);
    assert_eq!(check["status"], "ok", "{check}");
    assert!(check["found"].as_str().unwrap().contains("server-cert.pem expires at"), "{check}");
}

/// Whoever sends is told as whoever receives, and once.
#[test]
fn a_vm_is_told_what_ends_soon_whichever_way_guests_go() {
    let dir = tempfile::tempdir().unwrap();
    let Pki { b, .. } = pki(dir.path());
    let ca = dir.path().join("short");
    done(&["tls", "init", words(&ca), "--days", "5"]);
    done(&["tls", "host", "host-b", "--ca", words(&ca), "--output", words(&b), "--force", "--days", "4"]);
    let old = of(|params| params.not_after = date_time_ymd(2021, 1, 1));
    let texts = [b.join("ca-cert.pem"), old.path().join("ca-cert.pem")];
    let texts = texts.map(|file| std::fs::read_to_string(file).unwrap());
    std::fs::write(b.join("ca-cert.pem"), texts.concat()).unwrap();
    let starts = ["vm", "--software", "--exit-with-stdin", "--tls-creds", words(&b)];
    for more in [&[][..], &["--incoming", "tcp:127.0.0.1:0"]] {
        // It ends as soon as it has started: its stdin is at its end.
        let told = String::from_utf8(run(&[&starts, more].concat()).stderr).unwrap();
        for says in [
            "the CA vfio-migrate CA ",
            "a CA is left out: the CA CN=a CA ended at 2021-01-01",
            "client-cert.pem",
            "server-cert.pem",
        ] {
            let says = says.replace("the CA vfio", "the CA CN=vfio");
            assert_eq!(told.matches(&says).count(), 1, "{says} in {told}");
        }
    }
    let below = below();
    let starts = ["vm", "--software", "--exit-with-stdin", "--tls-creds", words(below.path())];
    let told = String::from_utf8(run(&starts).stderr).unwrap();
    assert_eq!(
        told.matches("the CA CN=between between the host and").count(),
        2,
        "one for each file: {told}"
    );
    let shown = done(&["tls", "show", words(below.path())]);
    assert_eq!(shown.matches("-cert.pem: the CA CN=between between the host and").count(), 2, "{shown}");
}
