//! The error of a document that a stranger sent.

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
    pub(crate) fn new(origin: &str, path: impl Into<String>, rule: impl Into<String>) -> Self {
        Self { origin: origin.to_owned(), path: path.into(), rule: rule.into() }
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
