//! `check`: whether something can move, and every reason.

pub(crate) mod pool;

use std::time::Duration;

use rustix::io::Errno;
use vfio_migration::{MigrateError, SourceOptions, Uri, probe};
use vfio_migration_compat::{
    DeviceMap, Document, MachineManifest, Manifest, Policy, Report, Verdict, check_device_placement,
    check_devices, check_machines, check_placement,
};
use vfio_migration_types::{Epoch, Side, VmId};

use crate::args::ask::CheckCommand;
use crate::exit::{CliError, Exit};
use crate::inherited::claim;
use crate::output::{print, print_json};
use crate::probe::HostAccess;
use crate::side::{self, CheckSide};
use crate::tls_options::{AskedSecurity, check_chosen};
use crate::units::format_time;
use crate::verdict::text;
use crate::words::{device_map, policy};

pub(crate) fn run(options: &CheckCommand) -> Result<Exit, CliError> {
    let policy = options.policy.as_deref().map_or_else(|| Ok(Policy::default()), policy)?;
    let local = HostAccess { roots: options.root.roots(), probe: options.probe };
    let timeout = options.patience.timeout;
    if options.matrix {
        return pool::matrix(&options.sides, &policy, &local, timeout, options.json);
    }
    if options.baseline {
        return pool::baseline(&options.sides, options.model.as_deref(), &local, timeout, options.json);
    }
    let [source, destination] = options.sides.as_slice() else {
        let text = format!(
            "check takes two sides, what is to move and where to; {} were given",
            options.sides.len()
        );
        return Err(CliError::new(Exit::Usage, text));
    };
    let (source, guest) = match side::resolve(source, None, &local, timeout)? {
        CheckSide::Known(document, guest) => (document, guest),
        CheckSide::Receiver(uri) => {
            let text =
                format!("nothing moves from {uri}, which waits for a guest: name it as the second side");
            return Err(CliError::new(Exit::Usage, text));
        }
    };
    let map = device_map(&options.map)?;
    let report = match side::resolve(destination, None, &local, timeout)? {
        CheckSide::Known(destination, _) => compare(&source, &destination, &map, &policy)?,
        CheckSide::Receiver(uri) => {
            let options = source_options(options, map, policy)?;
            check_chosen(&uri, options.security.as_ref())?;
            ask(&source, guest, &uri, options, timeout)?
        }
    };
    if options.json {
        print_json(&report)?;
    } else {
        print(text(&report))?;
    }
    // A machine that can be saved and restored moves in another way: it is refused when it is asked whether it moves live.
    let worst = if options.live { Verdict::LiveWithWarning } else { Verdict::SnapshotOnly };
    Ok(if report.verdict <= worst { Exit::Done } else { Exit::Incompatible })
}

fn compare(
    source: &Document,
    destination: &Document,
    map: &DeviceMap,
    policy: &Policy,
) -> Result<Report, CliError> {
    Ok(match (&source.manifest, &destination.manifest) {
        (Manifest::Device(source), Manifest::Device(destination)) => {
            check_devices(source, destination, policy)
        }
        (Manifest::Device(source), Manifest::Host(host)) => check_device_placement(source, host, policy),
        (Manifest::Machine(source), Manifest::Machine(destination)) => {
            check_machines(source, &destination.with_ram_of(source), map, policy)
        }
        (Manifest::Machine(source), Manifest::Host(host)) => check_placement(source, host, policy),
        (source, destination) => {
            let (source, destination) = (side::kind(source), side::kind(destination));
            let text = format!(
                "{source} does not go to {destination}: a device goes to a device or a host, a machine to a machine or a \
                 host; hosts among each other are a --matrix"
            );
            return Err(CliError::new(Exit::Usage, text));
        }
    })
}

/// What a receiver is asked with.
fn source_options(command: &CheckCommand, map: DeviceMap, policy: Policy) -> Result<SourceOptions, CliError> {
    let mut options = SourceOptions::default();
    options.device_map = map;
    options.policy = policy;
    let asked = AskedSecurity {
        creds: None,
        hostname: command.tls_hostname.as_ref(),
        pins: &[],
        insecure_plaintext: command.tls.insecure_plaintext,
    };
    options.unix_peers = command.peers.allowed()?;
    options.security = asked.over(command.tls.security())?;
    Ok(options)
}

/// Asks a receiver, which judges by its own rules too.
fn ask(
    source: &Document,
    guest: Option<(VmId, Epoch)>,
    uri: &Uri,
    mut options: SourceOptions,
    timeout: Duration,
) -> Result<Report, CliError> {
    let Manifest::Machine(machine) = &source.manifest else {
        let text = format!("a receiver takes machines, and this is {}", side::kind(&source.manifest));
        return Err(CliError::new(Exit::Usage, text));
    };
    let machine: MachineManifest = (**machine).clone();
    (options.connect_timeout, options.peer_timeout) = (timeout, timeout);
    // As a rehearsal asks. A manifest's file names no VM.
    options.epoch = guest.map_or(Epoch(0), |(_, epoch)| epoch);
    let vm = guest.map(|(vm, _)| vm);
    claim(uri)?.spend();
    // Ctrl-C ends the process: the receiver releases what it reserved when the connection ends.
    probe(machine, vm, uri, options, |_| {}).map_err(|error| {
        let failure = match &error {
            MigrateError::NotBegun(failure) => Some(failure),
            MigrateError::Aborted(aborted) => Some(&aborted.cause),
            _ => None,
        };
        let timed_out = Some(Errno::TIMEDOUT.raw_os_error().unsigned_abs());
        if failure.is_some_and(|failure| failure.errno == timed_out) {
            return CliError::failed(format!("{uri} does not answer within {}", format_time(timeout)));
        }
        // A question has no phases, and no guest whose place is to be told.
        let why = failure.map_or_else(
            || error.sentence_of("the question"),
            |failure| {
                let remedy =
                    if failure.remedy.is_empty() { String::new() } else { format!("; {}", failure.remedy) };
                let side = if failure.side == Side::Destination { "at the destination: " } else { "" };
                format!("{side}{}{remedy}", failure.text)
            },
        );
        CliError::failed(format!("cannot ask {uri}: {why}"))
    })
}
