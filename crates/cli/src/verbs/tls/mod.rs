//! `tls`: certificates for hosts that have no PKI, and what those that are there say.

mod make;

use std::path::Path;
use std::time::SystemTime;

use vfio_migration::{CA_FILE, PeerIdentity, TlsError, TlsRole, own_identity, trusted_authorities};
use vfio_migration_types::{printable, rfc3339};

use crate::args::tls::{TlsCommand, TlsVerb};
use crate::exit::{CliError, Exit};
use crate::output::print;

pub(crate) fn run(command: &TlsCommand) -> Result<Exit, CliError> {
    match &command.what {
        TlsVerb::Init { dir, days } => print(make::authority(dir, *days)?)?,
        TlsVerb::Host { name, ca, output, also, days, force } => {
            let directory = output.clone().unwrap_or_else(|| name.into());
            print(make::host(name, also, ca, &directory, *days, *force)?)?;
        }
        TlsVerb::Show { dir } => {
            let (text, usable) = show(dir);
            print(text)?;
            return Ok(if usable { Exit::Done } else { Exit::Failed });
        }
        TlsVerb::Pin { dir } => print(pins(dir)?)?,
    }
    Ok(Exit::Done)
}

/// The end of a connection that a role's certificate is for, for people.
fn part(role: TlsRole) -> &'static str {
    match role {
        TlsRole::Server => "where a guest arrives",
        TlsRole::Client => "where one leaves",
    }
}

/// What a folder has, and whether all of it can be used.
fn show(dir: &Path) -> (String, bool) {
    let mut text = String::new();
    let mut usable = true;
    let mut tell = |file: &str, what: &str, found: Result<Vec<PeerIdentity>, TlsError>| match found {
        Ok(found) => {
            for identity in found {
                text.push_str(&format!("{file}: {what}: {}\n", certificate(&identity)));
                text.push_str(&format!("    {}\n", identity.pin));
            }
        }
        Err(error) => {
            usable = false;
            text.push_str(&format!("{file}: cannot be used: {}\n", printable(&error.to_string())));
        }
    };
    tell(CA_FILE, "the CA that is trusted", trusted_authorities(dir));
    for role in [TlsRole::Server, TlsRole::Client] {
        tell(&role.certificate_file(), part(role), own_identity(dir, role).map(|own| vec![own]));
    }
    (text, usable)
}

fn certificate(identity: &PeerIdentity) -> String {
    let names: Vec<_> = identity.names.iter().map(|name| printable(name)).collect();
    let names = if names.is_empty() { "nobody".to_owned() } else { names.join(", ") };
    let left = identity.not_after.duration_since(SystemTime::now()).unwrap_or_default();
    let days = left.as_secs() / (24 * 3600);
    let soon = if identity.expires_soon() { ": make a new one" } else { "" };
    format!("{names}, until {} ({days} days{soon})", rfc3339(identity.not_after))
}

fn pins(dir: &Path) -> Result<String, CliError> {
    let mut text = String::new();
    let mut failed = None;
    for role in [TlsRole::Server, TlsRole::Client] {
        match own_identity(dir, role) {
            Ok(own) => text.push_str(&format!("{}  {}\n", own.pin, part(role))),
            Err(error) => failed = Some(error),
        }
    }
    match failed {
        // A host that only sends, or only receives, has files for that alone.
        Some(error) if text.is_empty() => Err(CliError::caused("there is no key to pin", &error)),
        _ => Ok(text),
    }
}
