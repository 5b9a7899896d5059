//! What one wait for a guest is held to: what the `vm` was started with, and what `incoming` asks for beyond that.

use std::path::PathBuf;

use vfio_migration::{Expectations, Security, Uri};
use vfio_migration_types::{VmId, error_chain};

use super::expected;
use crate::args::serve::VmCommand;
use crate::control::expected::ExpectedInfo;
use crate::exit::{CliError, Exit};
use crate::incoming_options::IncomingOptions;
use crate::tls_options::check_chosen;

/// What one wait is held to.
#[derive(Clone, Debug)]
pub(super) struct WaitSettings {
    /// How what comes is secured; `None`: nobody has said it, and only unix sockets are waited at.
    pub(super) security: Option<Security>,
    /// Who may come, and with what. Clones share the counts.
    pub(super) expect: Expectations,
    /// The file that says it.
    pub(super) expect_file: Option<PathBuf>,
    /// Whether the first session that ends ends the wait.
    pub(super) once: bool,
    /// Whether the guest arrives paused.
    pub(super) paused: bool,
}

impl WaitSettings {
    /// What a process was started with.
    pub(super) fn of_process(options: &VmCommand) -> Self {
        Self {
            security: options.tls.security(),
            expect: expected::expectations(options.uuid, options.expect.as_deref()),
            expect_file: options.expect.clone(),
            once: options.once,
            paused: options.paused,
        }
    }

    /// What this wait `asked` for, over what the process was started with.
    pub(super) fn with(&self, asked: &IncomingOptions, uuid: Option<VmId>) -> Result<Self, CliError> {
        let mut settings = Self {
            security: asked.security(self.security.clone())?,
            once: self.once || asked.once,
            paused: asked.paused,
            ..self.clone()
        };
        if let Some(file) = &asked.expect {
            if !file.is_absolute() {
                let text = format!("expect: {} is no absolute path", file.display());
                return Err(CliError::new(Exit::Usage, text));
            }
            settings.expect = expected::expectations(uuid, Some(file));
            settings.expect_file = Some(file.clone());
        }
        Ok(settings)
    }

    /// Refuses to wait at `uri` where nobody has said how that is secured, or where nobody could be taken.
    pub(super) fn check(&self, uri: &Uri) -> Result<(), CliError> {
        check_chosen(uri, self.security.as_ref())?;
        expected::check(&self.expect, uri, self.security.as_ref())
    }

    /// Whether what comes over TCP comes in plain text.
    pub(super) fn is_plain_text(&self) -> bool {
        matches!(self.security, Some(Security::PlainText))
    }

    /// What is expected now, if anything was said about it.
    pub(super) fn expected(&self, uuid: Option<VmId>) -> Option<ExpectedInfo> {
        let tls_pins: Vec<String> = match &self.security {
            Some(Security::Directory(directory)) => directory.pins.iter().map(ToString::to_string).collect(),
            _ => Vec::new(),
        };
        if self.expect_file.is_none() && uuid.is_none() && tls_pins.is_empty() {
            return None;
        }
        let (expectation, error) = match self.expect.read() {
            Ok(expectation) => (Some(expectation.into()), None),
            Err(error) => (None, Some(error_chain(&error))),
        };
        let counts = self.expect.counts();
        Some(ExpectedInfo {
            file: self.expect_file.as_ref().map(|file| file.display().to_string()),
            expectation,
            error,
            tls_pins,
            attempts: counts.attempts,
            arrivals: counts.arrivals,
        })
    }
}
