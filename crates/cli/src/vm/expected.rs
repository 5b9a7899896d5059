//! What a `vm` is told to expect: by `--expect`, whose file is read anew for each source that comes, and by `--uuid`.

use std::io;

use vfio_migration::{Expectation, Expectations, Security, Uri};
use vfio_migration_types::error_chain;

use crate::args::serve::VmCommand;
use crate::control::expected::ExpectedInfo;
use crate::exit::{CliError, Exit};
use crate::expect_file;

/// What `options` say. Both must hold where both are given.
pub(super) fn expectations(options: &VmCommand) -> Expectations {
    let uuid = options.uuid;
    let Some(file) = options.expect.clone() else {
        return Expectation { vm: uuid, ..Expectation::default() }.into();
    };
    Expectations::read_by(move || {
        let document = expect_file::read(&file).map_err(|failure| io::Error::other(failure.text))?;
        let mut expectation = Expectation::from(document);
        if let (Some(own), Some(expected)) = (uuid, expectation.vm)
            && own != expected
        {
            let text = format!("{} expects VM {expected}, and --uuid says VM {own}", file.display());
            return Err(io::Error::other(text).into());
        }
        expectation.vm = expectation.vm.or(uuid);
        Ok(expectation)
    })
}

/// Refuses a `vm` that could never hold to what it is told to expect at `uri`. A file that cannot be read now may be there later.
pub(super) fn check(
    expectations: &Expectations,
    uri: &Uri,
    security: Option<&Security>,
) -> Result<(), CliError> {
    let Ok(expectation) = expectations.read() else { return Ok(()) };
    expectation
        .check(uri, security)
        .map_err(|error| CliError::new(Exit::Usage, format!("--expect: {}", error_chain(&error))))
}

/// What is expected now, if anything was said about it.
pub(super) fn info(options: &VmCommand, expectations: &Expectations) -> Option<ExpectedInfo> {
    let tls_pins: Vec<String> = options.tls.tls_pins.iter().map(ToString::to_string).collect();
    if options.expect.is_none() && options.uuid.is_none() && tls_pins.is_empty() {
        return None;
    }
    let (expectation, error) = match expectations.read() {
        Ok(expectation) => (Some(expectation.into()), None),
        Err(error) => (None, Some(error_chain(&error))),
    };
    let counts = expectations.counts();
    Some(ExpectedInfo {
        file: options.expect.as_ref().map(|file| file.display().to_string()),
        expectation,
        error,
        tls_pins,
        attempts: counts.attempts,
        arrivals: counts.arrivals,
    })
}
