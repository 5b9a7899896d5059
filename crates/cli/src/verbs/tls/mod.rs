//! `tls`: certificates for hosts that have no PKI, and what those that are there say.

mod authority;
pub(crate) mod make;
pub(crate) mod remedy;
pub(crate) mod report;
mod revoke;
mod show;

use serde::Serialize;

use crate::args::tls::{TlsCommand, TlsVerb};
use crate::exit::{CliError, Exit};
use crate::output::{print, print_json};

pub(crate) fn run(command: &TlsCommand) -> Result<Exit, CliError> {
    let json = command.json();
    match &command.what {
        TlsVerb::Init { dir, days, .. } => answer(json, make::authority(dir, *days)?)?,
        TlsVerb::Host { name, ca, output, also, days, force, .. } => {
            let directory = output.clone().unwrap_or_else(|| name.into());
            answer(json, make::host(name, also, ca, &directory, *days, *force)?)?;
        }
        TlsVerb::Revoke { host, certificates, ca, days, .. } => {
            answer(json, revoke::revoke(host.as_deref(), certificates, ca, *days)?)?;
        }
        TlsVerb::Show { dir, tls_pins, .. } => {
            let report = show::show(dir, tls_pins);
            let (usable, text) = (report.usable, show::show_text(&report));
            answer(json, (report, text))?;
            return Ok(if usable { Exit::Done } else { Exit::Failed });
        }
        TlsVerb::Pin { dir, .. } => {
            let report = show::pins(dir)?;
            let text = show::pins_text(&report);
            answer(json, (report, text))?;
        }
    }
    Ok(Exit::Done)
}

/// Prints a report, or what it comes to for people.
fn answer(json: bool, (report, text): (impl Serialize, String)) -> Result<(), CliError> {
    if json { print_json(&report) } else { print(text) }
}
