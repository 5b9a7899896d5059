//! The sides of `check`, and what `describe` describes: a manifest, wherever it comes from, or the address of a receiver.

use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use serde_json::Value;
use vfio_migration::Uri;
use vfio_migration_compat::{DeviceManifest, Document, Manifest, labels};
use vfio_migration_device::host::scan;
use vfio_migration_device::{Device, VfioUserDevice, VfioUserOptions, is_late, is_out_of_time};
use vfio_migration_memory::{GuestRam, RamSpec};
use vfio_migration_types::{DeviceId, Epoch, Gpa, VmId};

use crate::control::client::{ControlClient, ControlError};
use crate::control::protocol::ControlVerb;
use crate::exit::CliError;
use crate::probe::HostAccess;
use crate::socket_clients::has_client;
use crate::target::for_all;
use crate::units::format_time;
use crate::words::{check_socket_path, device_id, read_capped, uri};

/// A side of `check`, by what its word on the command line names.
#[derive(Debug)]
pub(crate) enum CheckSide {
    /// A device, machine or host with a manifest. A running `vm` has its identity too, and the epoch under which it owns its guest.
    Known(Document, Option<(VmId, Epoch)>),
    /// The address at which a `vm` waits for a guest.
    Receiver(Uri),
}

/// Finds the side that `text` names. `name` is that of a device. A socket that is asked may take `timeout` for each answer.
pub(crate) fn resolve(
    text: &str,
    name: Option<&str>,
    local: &HostAccess,
    timeout: Duration,
) -> Result<CheckSide, CliError> {
    let known = |device: DeviceManifest| Ok(CheckSide::Known(device.into(), None));
    if let Some(socket) = text.strip_prefix("vm:") {
        let (document, vm) = of_vm(Path::new(socket), timeout)?;
        return Ok(CheckSide::Known(document, Some(vm)));
    }
    if let Some(socket) = text.strip_prefix("vfio-user:") {
        return known(of_server(Path::new(socket), name, timeout).map_err(|unasked| unasked.error)?);
    }
    for prefix in ["vfio:", "mdev:"] {
        if let Some(wanted) = text.strip_prefix(prefix) {
            return known(of_host(wanted, name, local)?);
        }
    }
    if ["tcp:", "unix:", "fd:"].iter().any(|scheme| text.starts_with(scheme)) {
        return Ok(CheckSide::Receiver(uri(text)?));
    }
    let path = Path::new(text);
    let kind = std::fs::metadata(path).map_err(|error| CliError::caused(text, &error))?.file_type();
    if kind.is_socket() {
        return of_socket(path, name, timeout);
    }
    let document = read(path)?;
    for unknown in document.unknown() {
        tracing::warn!("{text}: {unknown} is not known to this version, and is not compared");
    }
    Ok(CheckSide::Known(document, None))
}

/// Reads a manifest, or a list of KEY=VALUE, from a file.
pub(crate) fn read(path: &Path) -> Result<Document, CliError> {
    let shown = path.display().to_string();
    let bytes = read_capped(path, Document::MAX_BYTES)?;
    let begins = bytes.iter().copied().find(|byte| !byte.is_ascii_whitespace());
    let document = match begins {
        // JSON, or what begins as a byte order mark does: which JSON has not.
        Some(b'{' | 0xef) => Document::parse(&bytes, &shown),
        _ => {
            let text =
                String::from_utf8(bytes).map_err(|_| CliError::failed(format!("{shown}: it is no text")))?;
            labels::from_pairs(&text, &shown)
        }
    };
    document.map_err(|error| CliError::caused("no manifest", &error))
}

/// The side behind a socket of unknown kind: a device server's, or else a `vm`'s.
fn of_socket(path: &Path, name: Option<&str>, timeout: Duration) -> Result<CheckSide, CliError> {
    match of_server(path, name, timeout) {
        Ok(device) => Ok(CheckSide::Known(device.into(), None)),
        Err(server) if server.no_vm => Err(server.error),
        Err(server) => match of_vm(path, timeout) {
            Ok((document, vm)) => Ok(CheckSide::Known(document, Some(vm))),
            Err(vm) => Err(CliError::failed(format!("{}; and it is no `vm` either: {vm}", server.error))),
        },
    }
}

fn of_vm(socket: &Path, patience: Duration) -> Result<(Document, (VmId, Epoch)), CliError> {
    check_socket_path(socket)?;
    let mut client =
        ControlClient::connect(socket, patience, None).map_err(|error| error.failure("no contact"))?;
    let asked = |error: ControlError| error.failure("no manifest");
    let manifest = client.call(ControlVerb::QueryManifest, Value::Null).map_err(|error| match error {
        // Of what it is asked for a manifest, only its devices can keep it waiting.
        ControlError::Timeout(..) if answers(socket, patience) => CliError::failed(format!(
            "no manifest: a device of the `vm` behind {} does not answer within {}; the `vm` itself does",
            socket.display(),
            format_time(patience)
        )),
        error => asked(error),
    })?;
    let document = Document::parse(manifest.to_string().as_bytes(), &socket.display().to_string())
        .map_err(|error| CliError::caused("no manifest", &error))?;
    let vm = client.query().map_err(asked)?.vm;
    let uuid = vm
        .uuid
        .parse()
        .map_err(|_| CliError::failed(format!("the `vm` says that it is '{}', which is no UUID", vm.uuid)))?;
    Ok((document, (uuid, Epoch(vm.epoch))))
}

/// Whether the `vm` answers what it knows without its devices.
fn answers(socket: &Path, patience: Duration) -> bool {
    ControlClient::connect(socket, patience, None).and_then(|mut client| client.query()).is_ok()
}

/// A device server that could not be asked.
struct Unasked {
    error: CliError,
    /// No `vm` is behind the socket: a server answered, or nobody did, and a `vm` would have greeted.
    no_vm: bool,
}

impl From<CliError> for Unasked {
    fn from(error: CliError) -> Self {
        Self { error, no_vm: false }
    }
}

/// Asks a vfio-user server. It is left in the state it is in.
fn of_server(socket: &Path, name: Option<&str>, timeout: Duration) -> Result<DeviceManifest, Unasked> {
    check_socket_path(socket)?;
    let doing = format!("cannot ask {}", socket.display());
    let id = device_id(name.unwrap_or("dev0"))?;
    let ram = GuestRam::new("asked", &[RamSpec { gpa: Gpa(0), len: 4096 }])
        .map_err(|error| CliError::caused(&doing, &error))?;
    let options = VfioUserOptions {
        timeout,
        open_timeout: for_all(timeout),
        connect_timeout: Duration::ZERO,
        keep_state: true,
        ..VfioUserOptions::default()
    };
    // Looked at before we are one of its clients ourselves.
    let in_use = has_client(socket);
    let mut answered = false;
    let begun = Instant::now();
    let manifest = VfioUserDevice::open(id, socket, Arc::new(ram), &options)
        .inspect(|_| answered = true)
        .and_then(|device| {
            device.limit_all(Some(for_all(timeout).saturating_sub(begun.elapsed())));
            device.manifest()
        })
        .map_err(|error| match error.errno {
            Some(Errno::TIMEDOUT) if is_late(&error) => {
                let error = CliError::failed(silent_server(socket, timeout, in_use));
                Unasked { error, no_vm: true }
            }
            _ => {
                // One that has no time left has answered before.
                let out_of_time = error.errno == Some(Errno::TIMEDOUT);
                let no_vm = answered || out_of_time || error.is_answer_of_server();
                let failed = CliError::caused(&doing, &error);
                let error = match is_out_of_time(&error) {
                    true => CliError::failed(format!("{}; {MORE_TIME}", failed.text)),
                    false => failed,
                };
                Unasked { error, no_vm }
            }
        })?;
    for note in &manifest.notes {
        tracing::warn!("{}: its manifest has {:?}: {}", socket.display(), note.field, note.text);
    }
    Ok(manifest)
}

/// What gives a server that is slow with each answer more time.
pub(crate) const MORE_TIME: &str = "`--timeout`, a fifth of that, gives it longer";

/// Why a device server says nothing: most serve one client at a time.
pub(crate) fn silent_server(socket: &Path, timeout: Duration, in_use: bool) -> String {
    let (socket, time) = (socket.display(), format_time(timeout));
    if in_use {
        format!("{socket} has a client already, and does not answer another within {time}")
    } else {
        format!("{socket} does not answer within {time}")
    }
}

/// A device of this host.
fn of_host(wanted: &str, name: Option<&str>, local: &HostAccess) -> Result<DeviceManifest, CliError> {
    let found = scan(&local.roots);
    let wanted = wanted.to_ascii_lowercase();
    let device = found.devices.iter().find(|device| device.name.to_ascii_lowercase() == wanted);
    let Some(device) = device else {
        let text =
            format!("this host has no device {wanted}; `vfio-migrate devices --all` lists what it has");
        return Err(CliError::failed(text));
    };
    Ok(local.manifest(device, own_id(name, &device.name)?))
}

/// The name of a device of this host: the one asked for, or its address without the colons, which no name can have.
pub(crate) fn own_id(name: Option<&str>, address: &str) -> Result<DeviceId, CliError> {
    name.map_or_else(|| device_id(&address.replace(':', "-")), device_id)
}

/// The kind of a manifest, with an article.
pub(crate) fn kind(manifest: &Manifest) -> &'static str {
    match manifest {
        Manifest::Device(_) => "a device",
        Manifest::Machine(_) => "a machine",
        Manifest::Host(_) => "a host",
    }
}
