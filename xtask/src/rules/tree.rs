//! The text of every source file of the tree, which the rules read.

use std::collections::BTreeMap;
use std::path::Path;

/// Source files and manifests by path, relative to the top of the tree.
#[derive(Default)]
pub(crate) struct Tree {
    files: BTreeMap<String, String>,
}

impl Tree {
    /// Reads the Rust and C sources and the manifests below `top`.
    pub(crate) fn read(top: &Path) -> Result<Self, String> {
        let mut tree = Self::default();
        tree.read_file(top, "Cargo.toml")?;
        let mut open: Vec<String> = ["crates", "examples", "xtask", "kernel"].map(String::from).into();
        while let Some(folder) = open.pop() {
            let entries =
                std::fs::read_dir(top.join(&folder)).map_err(|error| format!("{folder}: {error}"))?;
            for entry in entries {
                let entry = entry.map_err(|error| format!("{folder}: {error}"))?;
                let path = format!("{folder}/{}", entry.file_name().to_string_lossy());
                if entry.path().is_dir() {
                    open.push(path);
                } else if [".rs", ".c", ".h", "/Cargo.toml"].iter().any(|end| path.ends_with(end)) {
                    tree.read_file(top, &path)?;
                }
            }
        }
        Ok(tree)
    }

    fn read_file(&mut self, top: &Path, path: &str) -> Result<(), String> {
        let text = std::fs::read_to_string(top.join(path)).map_err(|error| format!("{path}: {error}"))?;
        self.files.insert(path.into(), text);
        Ok(())
    }

    /// The text of one file.
    pub(crate) fn text(&self, path: &str) -> Option<&str> {
        self.files.get(path).map(String::as_str)
    }

    /// Paths and texts of the files below a folder; of all for an empty name.
    pub(crate) fn below<'a>(&'a self, folder: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.files
            .iter()
            .map(|(path, text)| (path.as_str(), text.as_str()))
            .filter(move |(path, _)| folder.is_empty() || inside(path, folder).is_some())
    }

    /// The folders of the workspace's members, as the manifest at the top lists them.
    pub(crate) fn members(&self) -> Vec<&str> {
        let manifest = self.text("Cargo.toml").unwrap_or_default();
        let list = manifest.split_once("\nmembers = [").and_then(|(_, rest)| rest.split_once(']'));
        list.map_or(Vec::new(), |(list, _)| list.split('"').skip(1).step_by(2).collect())
    }
}

/// What follows `folder` and a slash in `path`.
pub(crate) fn inside<'a>(path: &'a str, folder: &str) -> Option<&'a str> {
    path.strip_prefix(folder)?.strip_prefix('/')
}

#[cfg(test)]
impl Tree {
    /// A tree of these paths and texts alone.
    pub(crate) fn of(files: &[(&str, &str)]) -> Self {
        Self { files: files.iter().map(|(path, text)| ((*path).into(), (*text).into())).collect() }
    }
}
