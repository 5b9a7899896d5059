//! Programs that the tests of the command run beside it: shells that complete, and a validator of JSON and two TLS that are not ours.

use std::process::{Command, Stdio};

/// A tool: how it is asked whether it is there, and the Debian package that has it.
const TOOLS: [(&[&str], &str); 5] = [
    (&["zsh", "--version"], "zsh"),
    (&["fish", "--version"], "fish"),
    (&["python3", "-c", "import jsonschema"], "python3-jsonschema"),
    (&["openssl", "version"], "openssl"),
    (&["gnutls-cli", "--version"], "gnutls-bin"),
];

/// Installs what is missing, where that can be done, and says loudly what is not: the tests leave out what needs it.
pub(crate) fn ready() {
    let missing = || TOOLS.into_iter().filter(|(asked, _)| !runs(asked)).map(|(_, package)| package);
    let wanted: Vec<&str> = missing().collect();
    if wanted.is_empty() {
        return;
    }
    install(&wanted);
    for package in missing() {
        eprintln!("SKIPPED: {package} is not there and cannot be installed; apt-get install {package}");
    }
}

/// Whether there is a python3 that the peers in Python can be run by, installed if need be.
pub(crate) fn python() -> bool {
    let there = || runs(&["python3", "-c", "import sys; sys.exit(sys.version_info < (3, 10))"]);
    if !there() {
        install(&["python3"]);
    }
    there()
}

fn install(packages: &[&str]) {
    eprintln!("installing {} …", packages.join(" "));
    let install = ["apt-get", "install", "-y", "-q", "--no-install-recommends"];
    if runs(&["apt-get", "update"]) {
        runs(&[&install[..], packages].concat());
    }
}

fn runs(words: &[&str]) -> bool {
    let [program, arguments @ ..] = words else { return false };
    let mut command = Command::new(program);
    command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}
