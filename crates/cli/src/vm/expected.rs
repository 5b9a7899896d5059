//! What a `vm` is told to expect: by `--expect`, whose file is read anew for each source that comes, and by `--uuid`.

use std::io;
use std::path::Path;

use vfio_migration::{Expectation, Expectations, Security, Uri};
use vfio_migration_types::{VmId, error_chain};

use crate::exit::{CliError, Exit};
use crate::expect_file;

/// What `--uuid` and the file of `--expect` say. Both must hold where both are given.
pub(super) fn expectations(uuid: Option<VmId>, file: Option<&Path>) -> Expectations {
    let Some(file) = file.map(Path::to_owned) else {
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
