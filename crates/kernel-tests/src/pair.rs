//! A guest with a kernel device moves from one booted machine to another.
//!
//! Both machines run every test, each its own half, and a test has passed when both halves have. The halves speak over a
//! connection of their own, beside the migration's: neither sleeps to wait for the other.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::check::{Outcome, holds};
use crate::command::PROGRAM;
use crate::guest::{SABOTAGE, arrives, is_whole, leaves, misses_pages, waits};
use crate::vm::{PATIENCE, VmProcess};

/// Word of the kernel's command line that says which of two machines this is.
const ROLE: &str = "ktest.role=";
/// Where the halves of a test meet. Nobody else is on the link.
const PORT: u16 = 7000;

/// One of the two machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Source,
    Destination,
}

impl Role {
    /// The one that the kernel's command line names; a machine that is alone has none.
    pub(crate) fn here() -> Outcome<Option<Self>> {
        let line = fs::read_to_string("/proc/cmdline")?;
        match line.split_whitespace().find_map(|word| word.strip_prefix(ROLE)) {
            None => Ok(None),
            Some("source") => Ok(Some(Self::Source)),
            Some("destination") => Ok(Some(Self::Destination)),
            Some(other) => Err(format!("'{other}' is no role of a machine").into()),
        }
    }

    /// Address of the machine on the link.
    pub(crate) fn address(self) -> Ipv4Addr {
        match self {
            Self::Source => Ipv4Addr::new(10, 77, 0, 1),
            Self::Destination => Ipv4Addr::new(10, 77, 0, 2),
        }
    }
}

/// What one half of a test hears from the other.
struct Other {
    stream: BufReader<TcpStream>,
}

impl Other {
    /// Meets the other half of `test`.
    fn meet(role: Role, test: &str) -> Outcome<Self> {
        let at = SocketAddr::from((Role::Destination.address(), PORT));
        let stream = match role {
            Role::Source => reach(at)?,
            // Nobody is accepted after the first: who comes then wants the next test.
            Role::Destination => TcpListener::bind(at)?.accept()?.0,
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        let mut other = Self { stream: BufReader::new(stream) };
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let boot = boot.trim();
        other.send_line(&format!("{test} {boot}"))?;
        let there = other.expect_line(test)?;
        holds(there != boot, "the other half runs on another machine")?;
        Ok(other)
    }

    fn send_line(&mut self, line: &str) -> Outcome {
        Ok(writeln!(self.stream.get_mut(), "{line}")?)
    }

    /// The rest of the next line, which has to begin with `word`.
    fn expect_line(&mut self, word: &str) -> Outcome<String> {
        let mut line = String::new();
        self.stream
            .read_line(&mut line)
            .map_err(|error| format!("waiting for '{word}' of the other machine: {error}"))?;
        if line.is_empty() {
            return Err(format!("the other machine's half ended before its '{word}'").into());
        }
        let (first, rest) = line.trim_end().split_once(' ').unwrap_or((line.trim_end(), ""));
        holds(first == word, &format!("the other machine says '{word}', and not {line:?}"))?;
        Ok(rest.to_owned())
    }

    /// Waits until the other half has heard everything and left.
    fn until_gone(mut self) -> Outcome {
        let mut rest = String::new();
        self.stream.read_to_string(&mut rest)?;
        holds(rest.is_empty(), &format!("the other machine has no more to say than {rest:?}"))
    }
}

/// Connects to a machine that may not have got so far yet.
fn reach(at: SocketAddr) -> Outcome<TcpStream> {
    let began = Instant::now();
    loop {
        match TcpStream::connect_timeout(&at, PATIENCE) {
            Ok(stream) => return Ok(stream),
            Err(error) if began.elapsed() > PATIENCE => {
                return Err(format!("the other machine, {at}: {error}").into());
            }
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// The folder of this machine's certificates.
const CREDS: &str = "/tmp/tls";

/// Makes the certificates of both machines, of which the one at `role`'s address stays here; what the other needs, as it goes there.
fn make_creds(role: Role) -> Outcome<Value> {
    let other = "/tmp/tls-other";
    for folder in ["/tmp/tls-ca", CREDS, other] {
        if fs::exists(folder)? {
            fs::remove_dir_all(folder)?;
        }
    }
    let tls = |words: &[&str]| -> Outcome {
        let output = Command::new(PROGRAM).arg("tls").args(words).stdin(Stdio::null()).output()?;
        holds(output.status.success(), &format!("tls {words:?}: {}", String::from_utf8_lossy(&output.stderr)))
    };
    tls(&["init", "/tmp/tls-ca"])?;
    let address = role.address().to_string();
    tls(&["host", "destination", "--also", &address, "--ca", "/tmp/tls-ca", "--output", CREDS])?;
    tls(&["host", "source", "--ca", "/tmp/tls-ca", "--output", other])?;
    let mut files = serde_json::Map::new();
    for entry in fs::read_dir(other)? {
        let entry = entry?;
        files.insert(
            entry.file_name().to_string_lossy().into_owned(),
            fs::read_to_string(entry.path())?.into(),
        );
    }
    Ok(files.into())
}

/// Writes what the other machine has made for this one.
fn install_creds(sent: &str) -> Outcome {
    let files: BTreeMap<String, String> = serde_json::from_str(sent)?;
    fs::create_dir_all(CREDS)?;
    for (name, text) in files {
        let path = Path::new(CREDS).join(name);
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    }
    Ok(())
}

/// This machine's half of a move. `judge` sees the report of the guest that arrived.
fn half(test: &str, sabotage: &[&str], judge: fn(&serde_json::Value) -> Outcome) -> Outcome {
    let role = Role::here()?.ok_or("this machine is alone")?;
    let mut other = Other::meet(role, test)?;
    match role {
        Role::Source => {
            install_creds(&other.expect_line("certificates")?)?;
            let mut source = VmProcess::with_migdev("a", &[sabotage, &["--tls-creds", CREDS]].concat())?;
            leaves(&mut source, !sabotage.is_empty(), || other.expect_line("waiting"))?;
            other.send_line("moved")?;
            other.expect_line("judged").map(|_| ())
        }
        Role::Destination => {
            other.send_line(&format!("certificates {}", make_creds(role)?))?;
            // The port is the system's choice; the source is told.
            let uri = format!("tcp:{}:0", role.address());
            let mut destination = VmProcess::with_migdev("b", &["--incoming", &uri, "--tls-creds", CREDS])?;
            let uri = waits(&mut destination)?;
            other.send_line(&format!("waiting {uri}"))?;
            other.expect_line("moved")?;
            judge(&arrives(&mut destination)?)?;
            other.send_line("judged")?;
            other.until_gone()
        }
    }
}

/// Memory, DMA and interrupts of a guest with a kernel device, on another machine.
pub(crate) fn moves_whole() -> Outcome {
    half("moves-whole", &[], is_whole)
}

/// The same with bits of the source's dirty log dropped.
pub(crate) fn notices_what_is_lost() -> Outcome {
    half("notices-what-is-lost", SABOTAGE, misses_pages)
}
