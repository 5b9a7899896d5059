//! Manifests and their rules from outside, a file per subject.

mod bases;
mod documents;
mod foreign_text;
mod largest;
mod pairs;
mod pools;
mod properties;
