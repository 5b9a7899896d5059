//! What a `vm` expects of those that come, and whom it has refused, as the control socket has it.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use vfio_migration::{RefusedConnection, RefusedConnections};
use vfio_migration_types::{printable, quote, rfc3339};

use super::security::SecurityInfo;
use crate::expect_file::{ExpectDocument, ExpectedEntry, RightWord};
use crate::units::format_size;

/// What a `vm` that waits for a guest was told to expect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "Expected")]
pub(crate) struct ExpectedInfo {
    /// The file of `--expect`, as it was given.
    pub(crate) file: Option<String>,
    /// What is expected now; null while that cannot be told.
    pub(crate) expectation: Option<ExpectDocument>,
    /// Why that cannot be told. Nobody is taken meanwhile.
    pub(crate) error: Option<String>,
    /// Keys of `--tls-pin`: nobody else comes over TCP.
    pub(crate) tls_pins: Vec<String>,
    /// Attempts to move that were let in since the file was changed last.
    pub(crate) attempts: u64,
    /// Guests that have arrived since.
    pub(crate) arrivals: u64,
}

/// Connections that a `vm` which waits for a guest has refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "Refusals")]
pub(crate) struct RefusalsInfo {
    /// Their number since it began to wait. Whoever connected and left without a word is not among them.
    pub(crate) count: u64,
    /// The last of them.
    pub(crate) last: Option<RefusalInfo>,
}

/// A connection that was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "Refusal")]
pub(crate) struct RefusalInfo {
    /// When it was refused, RFC 3339 in UTC.
    pub(crate) at: String,
    /// The address at its other end.
    pub(crate) from: String,
    /// How it was secured, and what its peer had proved to be.
    pub(crate) security: SecurityInfo,
    /// What it came for; null if it did not get as far as to say so.
    pub(crate) wanted: Option<RightWord>,
    /// The VM with which it came.
    pub(crate) vm: Option<String>,
    /// Code of the reason, which `explain` knows; null where there is none.
    pub(crate) code: Option<String>,
    /// Why, in a sentence. Its source was told no more than it may know.
    pub(crate) why: String,
    /// In an event: how many before it were refused, since the one that the event before was of, of which there was none.
    #[serde(default)]
    pub(crate) left_out: u64,
}

impl From<&RefusedConnections> for RefusalsInfo {
    fn from(refused: &RefusedConnections) -> Self {
        Self { count: refused.count, last: refused.last.as_ref().map(RefusalInfo::from) }
    }
}

impl From<&RefusedConnection> for RefusalInfo {
    fn from(refused: &RefusedConnection) -> Self {
        Self {
            at: rfc3339(refused.at),
            from: refused.from.clone(),
            security: SecurityInfo::from(&refused.security),
            wanted: refused.wanted.map(|(right, _)| right.into()),
            vm: refused.wanted.filter(|(_, vm)| vm.names_a_vm()).map(|(_, vm)| vm.to_string()),
            code: refused.why.code().map(|code| code.name().to_owned()),
            why: refused.why.to_string(),
            left_out: refused.left_out,
        }
    }
}

impl fmt::Display for ExpectedInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(expectation) = &self.expectation else {
            let why = self.error.as_deref().unwrap_or("nobody knows why");
            return write!(f, "expects nobody: {}", printable(why));
        };
        let ExpectDocument { vm, sources, may, min_epoch, max_memory, max_attempts, max_arrivals } =
            expectation;
        match vm {
            Some(vm) => write!(f, "expects VM {vm}")?,
            None => f.write_str("expects any VM")?,
        }
        match sources.as_deref() {
            None => f.write_str(" from whoever is trusted")?,
            Some([]) => f.write_str(" from nobody")?,
            Some(sources) => {
                let names: Vec<String> = sources.iter().map(source).collect();
                write!(f, " from {}", names.join(", "))?;
            }
        }
        if !self.tls_pins.is_empty() {
            write!(f, ", over TCP with {}", self.tls_pins.join(" or "))?;
        }
        if let Some(may) = may.as_ref().filter(|may| may.len() < 2) {
            write!(f, "; {}", rights(may))?;
        }
        if let Some(epoch) = min_epoch {
            write!(f, "; from epoch {epoch} on")?;
        }
        if let Some(most) = max_memory {
            write!(f, "; at most {} RAM", format_size(*most))?;
        }
        if let Some(most) = max_attempts {
            write!(f, "; {} of {most} attempts made", self.attempts)?;
        }
        if let Some(most) = max_arrivals {
            write!(f, "; {} of {most} guests arrived", self.arrivals)?;
        }
        Ok(())
    }
}

fn source(entry: &ExpectedEntry) -> String {
    let mut text = match (&entry.name, entry.pin) {
        (Some(name), Some(pin)) => format!("{} with {pin}", quote(name)),
        (Some(name), None) => quote(name),
        (None, pin) => pin.map_or_else(|| "nobody".to_owned(), |pin| pin.to_string()),
    };
    if let Some(may) = &entry.may {
        text.push_str(&format!(" ({})", rights(may)));
    }
    text
}

fn rights(may: &[RightWord]) -> String {
    let words: Vec<&str> = may.iter().map(|right| right.name()).collect();
    if words.is_empty() { "may nothing".to_owned() } else { format!("may {}", words.join(" and ")) }
}

impl fmt::Display for RefusalsInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { count, last } = self;
        write!(f, "{count} connection{} refused", if *count == 1 { "" } else { "s" })?;
        let Some(last) = last else { return Ok(()) };
        let vm = last.vm.as_ref().map_or(String::new(), |vm| format!(", VM {vm}"));
        let (from, why) = (printable(&last.from), printable(&last.why));
        write!(f, ", the last at {} from {from}{}{vm}: {why}", last.at, last.security.text())
    }
}
