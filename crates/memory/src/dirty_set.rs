//! Several dirty sources as one.

use vfio_migration_types::Bitmap;

use crate::dirty::DirtySource;
use crate::error::MemoryError;

/// Starts every source, or none: when one fails, those started before it are stopped again.
///
/// # Errors
/// The failure; [`MemoryError::Several`] when a rollback failed as well, and a log may still run.
pub fn start_all(sources: &[&dyn DirtySource]) -> Result<(), MemoryError> {
    for (started, source) in sources.iter().enumerate() {
        if let Err(failure) = source.start() {
            let rollback = stop_each(&sources[..started]);
            return combine("starting the dirty logs", std::iter::once(failure).chain(rollback).collect());
        }
    }
    Ok(())
}

/// ORs into `into` what any source reports: a page that two of them name is one page.
///
/// # Errors
/// Each source is asked even when an earlier one failed, since what a source has reported it has forgotten; so `into`
/// holds all that the others know. What the failed ones cover is to be treated as dirty, or the migration given up.
pub fn report_all(sources: &[&dyn DirtySource], into: &mut Bitmap) -> Result<(), MemoryError> {
    let failures = sources.iter().filter_map(|source| source.report(into).err()).collect();
    combine("asking what is dirty", failures)
}

/// Stops every source, those too that come after one that fails to.
pub fn stop_all(sources: &[&dyn DirtySource]) -> Result<(), MemoryError> {
    combine("stopping the dirty logs", stop_each(sources))
}

fn stop_each(sources: &[&dyn DirtySource]) -> Vec<MemoryError> {
    sources.iter().rev().filter_map(|source| source.stop().err()).collect()
}

fn combine(doing: &str, mut errors: Vec<MemoryError>) -> Result<(), MemoryError> {
    if errors.len() > 1 {
        return Err(MemoryError::Several { doing: doing.to_owned(), errors });
    }
    errors.pop().map_or(Ok(()), Err)
}
