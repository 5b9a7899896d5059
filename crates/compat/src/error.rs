//! The error of a document that a stranger sent.

use vfio_migration_types::printable;

/// Error of a document: which document, where in it, and what rule it breaks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{origin}: {}{rule}", at(.path))]
pub struct ManifestError {
    origin: String,
    path: String,
    rule: String,
}

fn at(path: &str) -> String {
    if path.is_empty() { String::new() } else { format!("at {path}: ") }
}

impl ManifestError {
    /// All three may hold foreign text: names of files, names of fields, and what a parser quotes.
    pub(crate) fn new(origin: &str, path: impl Into<String>, rule: impl Into<String>) -> Self {
        let shown = |text: String| printable(&text).into_owned();
        Self { origin: printable(origin).into_owned(), path: shown(path.into()), rule: shown(rule.into()) }
    }

    /// Name of the document: a file's.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// Path in the document, `devices[0].regions[1].size`; empty for the whole.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The rule that is broken there.
    pub fn rule(&self) -> &str {
        &self.rule
    }
}
