//! `describe`: a manifest of a device, a machine or this host.

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use schemars::JsonSchema;
use serde::Serialize;
use vfio_migration::AtomicFile;
use vfio_migration_compat::labels::{self, ResourceDevice};
use vfio_migration_compat::{DeviceManifest, Document, HostManifest, Manifest, SiteFacts};
use vfio_migration_device::host::{read_text, scan, version};
use vfio_migration_types::{DeviceId, error_chain};
use vfio_migration_vmm::kvm::offered_features;

use crate::args::ask::{DescribeCommand, Format};
use crate::exit::{CliError, Exit};
use crate::output::{escape_json, print};
use crate::probe::HostAccess;
use crate::side::{self, CheckSide, own_id};
use crate::words::{device_id, read_capped};

/// Longest file of procfs that is read here, in bytes.
const PROC_MAX: u64 = 64 << 10;

/// What `describe --format resource-attributes` prints.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(crate) struct ResourceReport {
    /// The devices, as the `spec.devices` of a Kubernetes `ResourceSlice` has them.
    pub(crate) devices: Vec<ResourceDevice>,
}

pub(crate) fn run(options: &DescribeCommand) -> Result<Exit, CliError> {
    if options.json && options.format == Format::List {
        let text =
            "--format list is lines of KEY=VALUE and no JSON: leave out --json, or take --format manifest";
        return Err(CliError::new(Exit::Usage, text));
    }
    if let Some(path) = &options.output {
        // Before anybody is asked, which may reset a device.
        AtomicFile::create(path, true).map_err(|error| CliError::caused("cannot describe", &error))?;
    }
    let local = HostAccess { roots: options.root.roots(), probe: options.probe };
    let timeout = options.patience.timeout;
    let mut document = if options.host {
        let mut host = host(options.name.as_deref(), &local)?;
        user_devices(&options.devices, &local, timeout, &mut host)?;
        host.into()
    } else {
        one(&options.devices, options.name.as_deref(), &local, timeout)?
    };
    if let Some(path) = &options.site {
        let bytes = read_capped(path, SiteFacts::MAX_BYTES)?;
        let shown = path.display().to_string();
        let facts =
            SiteFacts::parse(&bytes, &shown).map_err(|error| CliError::caused("no site file", &error))?;
        document = facts.fill(&document).map_err(|error| CliError::caused(&shown, &error))?;
    }
    let text = render(&document, options.format)?;
    // Whoever reads it gets the same, whether from a terminal or from a file.
    let text = escape_json(&text);
    match &options.output {
        Some(path) => write(path, &text)?,
        None => print(text)?,
    }
    Ok(Exit::Done)
}

/// What the only word names.
fn one(
    words: &[String],
    name: Option<&str>,
    local: &HostAccess,
    timeout: Duration,
) -> Result<Document, CliError> {
    let [word] = words else {
        let text =
            format!("{} are named, and one is described; several are described with --host", words.len());
        return Err(CliError::new(Exit::Usage, text));
    };
    match side::resolve(word, name, local, timeout)? {
        CheckSide::Known(document, _) => Ok(document),
        CheckSide::Receiver(uri) => {
            let text = format!(
                "{uri} is the address of a receiver: `check` asks it; its `vm:SOCKET` can be described"
            );
            Err(CliError::new(Exit::Usage, text))
        }
    }
}

/// Adds the vfio-user devices that are named, each by its socket, or by a `vm` that uses it. They are called as their sockets are.
fn user_devices(
    words: &[String],
    local: &HostAccess,
    timeout: Duration,
    host: &mut HostManifest,
) -> Result<(), CliError> {
    for word in words {
        let usage = |what: &str| {
            let text = format!(
                "{word} is {what}: with --host name sockets of vfio-user servers, and vm:SOCKET of running VMs"
            );
            Err(CliError::new(Exit::Usage, text))
        };
        if ["vfio:", "mdev:"].iter().any(|kernel| word.starts_with(kernel)) {
            return usage("a device of the kernel's, which is listed anyway");
        }
        let called = called(word);
        let (document, vm) = match side::resolve(word, Some(&called), local, timeout)? {
            CheckSide::Known(document, vm) => (document, vm),
            CheckSide::Receiver(_) => return usage("the address of a receiver"),
        };
        let new = match document.manifest {
            Manifest::Device(device) => vec![*device],
            // The kernel's devices that it uses are listed already.
            Manifest::Machine(machine) if vm.is_some() => {
                let own = machine.devices.into_iter().filter(|device| device.backend == "vfio-user");
                own.map(|device| {
                    let id = device_id(&named(&called, device.id.as_str()))?;
                    // Another guest may have it elsewhere.
                    Ok(DeviceManifest { id, guest_address: None, ..device })
                })
                .collect::<Result<_, CliError>>()?
            }
            other => return usage(&format!("the manifest of {}", side::kind(&other))),
        };
        for device in new {
            let id = free(&device.id, &host.devices)?;
            host.devices.push(DeviceManifest { id, ..device });
        }
    }
    Ok(())
}

/// The name of a socket's or a file's, with what no device's name can have left out.
fn called(word: &str) -> String {
    let path = ["vfio-user:", "vm:"].iter().find_map(|scheme| word.strip_prefix(scheme)).unwrap_or(word);
    let stem = Path::new(path).file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let legal =
        |letter: char| if letter.is_ascii_alphanumeric() || "._-".contains(letter) { letter } else { '-' };
    let name: String = stem.chars().map(legal).take(LONGEST_CALLED).collect();
    if name.is_empty() { "dev".into() } else { name }
}

/// Longest part of a device's name that comes of a socket's, in bytes: something may follow.
const LONGEST_CALLED: usize = 24;

/// The name of a VM's device on its host.
fn named(vm: &str, device: &str) -> String {
    let room = DeviceId::MAX_LEN - LONGEST_CALLED - NUMBER_LEN - 1;
    format!("{vm}-{}", device.chars().take(room).collect::<String>())
}

/// Most digits, and the sign before them, that tell devices of one name apart.
const NUMBER_LEN: usize = 6;

/// A name that no other device has: the given one, or that with a number.
fn free(id: &DeviceId, devices: &[DeviceManifest]) -> Result<DeviceId, CliError> {
    let taken = |id: &DeviceId| devices.iter().any(|device| device.id == *id);
    if !taken(id) {
        return Ok(id.clone());
    }
    let stem: String = id.as_str().chars().take(DeviceId::MAX_LEN - NUMBER_LEN).collect();
    for number in 2..=devices.len() + 2 {
        let id = device_id(&format!("{stem}-{number}"))?;
        if !taken(&id) {
            return Ok(id);
        }
    }
    Err(CliError::failed(format!("there are too many devices called {id}")))
}

fn render(document: &Document, format: Format) -> Result<String, CliError> {
    let json = |value: serde_json::Result<String>| {
        value.map(|text| text + "\n").map_err(|error| CliError::caused("cannot write JSON", &error))
    };
    let needs = |what: &str| {
        let text = format!("this format is of {what}, and this is {}", side::kind(&document.manifest));
        CliError::new(Exit::Usage, text)
    };
    match (format, &document.manifest) {
        (Format::Manifest, _) => Ok(document.to_json()),
        (Format::List, _) => Ok(labels::to_pairs(document)),
        (Format::NodeLabels, Manifest::Host(host)) => {
            json(serde_json::to_string_pretty(&labels::node_labels(host)))
        }
        (Format::NodeLabels, _) => Err(needs("a host")),
        (Format::ResourceAttributes, manifest) => {
            let devices = match manifest {
                Manifest::Device(device) => vec![labels::resource_device(device)],
                Manifest::Machine(machine) => machine.devices.iter().map(labels::resource_device).collect(),
                Manifest::Host(host) => host.devices.iter().map(labels::resource_device).collect(),
            };
            json(serde_json::to_string_pretty(&ResourceReport { devices }))
        }
    }
}

/// The manifest of this host, with what VFIO drivers have of its devices.
fn host(name: Option<&str>, local: &HostAccess) -> Result<HostManifest, CliError> {
    let roots = &local.roots;
    let found = scan(roots);
    for problem in &found.problems {
        tracing::warn!("not looked at: {problem}");
    }
    let devices = found
        .devices
        .iter()
        .filter(|device| device.vfio)
        .map(|device| Ok(local.manifest(device, own_id(None, &device.name)?)))
        .collect::<Result<Vec<_>, CliError>>()?;
    let own_name = || {
        let name = read_text(&roots.proc.join("sys/kernel/hostname"), PROC_MAX).ok();
        name.filter(|name| !name.is_empty()).unwrap_or_else(|| "host".into())
    };
    let cpu = offered_features()
        .inspect_err(|error| {
            tracing::warn!("the CPU features that this host can give are not known: {}", error_chain(error))
        })
        .ok();
    Ok(HostManifest {
        name: name.map_or_else(own_name, str::to_owned),
        cpu,
        vcpus: std::thread::available_parallelism().ok().and_then(|count| u32::try_from(count.get()).ok()),
        memory: memory(&roots.proc),
        kernel: version(roots).map(|version| version.release),
        devices,
        ..HostManifest::default()
    })
}

/// Bytes of memory that could be given now (`MemAvailable` in `/proc/meminfo`, proc_meminfo(5)).
fn memory(proc: &Path) -> Option<u64> {
    let text = read_text(&proc.join("meminfo"), PROC_MAX).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Writes the file whole, or not at all.
fn write(path: &Path, text: &str) -> Result<(), CliError> {
    let failed =
        |error: &(dyn std::error::Error + 'static)| CliError::caused(&path.display().to_string(), error);
    let mut file = AtomicFile::create(path, true).map_err(|error| failed(&error))?;
    file.write_all(text.as_bytes()).map_err(|error| failed(&error))?;
    file.finish().map_err(|error| failed(&error))
}
