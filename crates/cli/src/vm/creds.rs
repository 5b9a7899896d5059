//! The certificates that a `vm` is started with, judged before it needs them.

use vfio_migration::{Security, TlsRole, needs_security};

use crate::args::serve::VmCommand;
use crate::exit::CliError;
use crate::words::uri;

/// Refuses a `vm` whose certificates cannot be used for what it is to do first: to leave, or to wait over TCP. What is wrong with
/// those for the other way is a warning, where they are there at all.
pub(super) fn check(options: &VmCommand) -> Result<(), CliError> {
    let Some(Security::Directory(directory)) = options.tls.security() else { return Ok(()) };
    let first = match &options.incoming {
        None => Some(TlsRole::Client),
        Some(text) => needs_security(&uri(text)?).then_some(TlsRole::Server),
    };
    // What it listens with it warns of itself.
    let mut told =
        if first == Some(TlsRole::Server) { directory.warnings(TlsRole::Server) } else { Vec::new() };
    for warning in [TlsRole::Client, TlsRole::Server].into_iter().flat_map(|role| directory.warnings(role)) {
        if !told.contains(&warning) {
            tracing::warn!(file = %warning.file.display(), "{}", warning.text);
            told.push(warning);
        }
    }
    for role in [TlsRole::Client, TlsRole::Server] {
        let Err(error) = directory.check(role) else { continue };
        if first == Some(role) {
            return Err(CliError::caused("--tls-creds", &error));
        }
        if directory.path.join(role.certificate_file()).exists() {
            let way = if role == TlsRole::Client { "leave" } else { "arrive" };
            tracing::warn!("--tls-creds: no guest can {way} over TCP: {error}");
        }
    }
    Ok(())
}
