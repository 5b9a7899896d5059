//! What every crate that may be published brings along: who finds it alone must see its licences, what it is, and where more is said.

use std::path::Path;

use super::tree::Tree;

/// Files beside the manifest. They may be links: `cargo package` takes what they point to.
const FILES: [&str; 3] = ["README.md", "LICENSE-APACHE", "LICENSE-BSD-3-CLAUSE"];

/// Keys of the manifest's `[package]`.
const KEYS: [&str; 8] = [
    "description",
    "license",
    "repository",
    "keywords",
    "categories",
    "documentation",
    "readme",
    "rust-version",
];

/// Checks every member of the workspace that does not forbid its publication.
pub(crate) fn check(top: &Path, tree: &Tree, breaches: &mut Vec<String>) {
    for (member, manifest) in manifests(tree).filter(|(_, manifest)| may_be_published(manifest)) {
        for key in missing_keys(manifest) {
            breaches.push(format!("{member}/Cargo.toml has no {key}"));
        }
        for file in FILES.iter().filter(|file| !top.join(member).join(file).is_file()) {
            breaches.push(format!("{member} has no {file}"));
        }
    }
}

/// The names of the packages that may be published, and of the others.
pub(crate) fn publication(tree: &Tree) -> (Vec<String>, Vec<String>) {
    let (published, others): (Vec<_>, Vec<_>) =
        manifests(tree).map(|(_, manifest)| manifest).partition(|manifest| may_be_published(manifest));
    let names = |manifests: Vec<&str>| manifests.into_iter().filter_map(name).map(String::from).collect();
    (names(published), names(others))
}

fn manifests(tree: &Tree) -> impl Iterator<Item = (&str, &str)> {
    let manifest = |member| tree.text(&format!("{member}/Cargo.toml")).unwrap_or_default();
    tree.members().into_iter().map(move |member| (member, manifest(member)))
}

fn may_be_published(manifest: &str) -> bool {
    !manifest.contains("publish = false")
}

fn name(manifest: &str) -> Option<&str> {
    manifest.lines().find_map(|line| line.strip_prefix("name = \"")?.strip_suffix('"'))
}

fn missing_keys(manifest: &str) -> Vec<&'static str> {
    let package = manifest.split("\n[").find(|table| table.trim_start_matches('[').starts_with("package]"));
    let keys: Vec<&str> = package
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(key, _)| key.trim().trim_end_matches(".workspace"))
        .collect();
    KEYS.into_iter().filter(|key| !keys.contains(key)).collect()
}

#[cfg(test)]
mod tests {
    use super::{KEYS, Tree, missing_keys, publication};

    #[test]
    fn a_package_is_published_unless_it_says_that_it_is_not() {
        let tree = Tree::of(&[
            ("Cargo.toml", "[workspace]\nmembers = [\"a\", \"b\"]\n"),
            ("a/Cargo.toml", "[package]\nname = \"one\"\n"),
            ("b/Cargo.toml", "[package]\nname = \"other\"\npublish = false\n"),
        ]);
        assert_eq!(publication(&tree), (vec!["one".into()], vec!["other".into()]));
    }

    #[test]
    fn a_key_that_is_not_there_is_named() {
        let keys: Vec<String> = KEYS[1..].iter().map(|key| format!("{key}.workspace = true\n")).collect();
        let manifest =
            format!("[package]\nname = \"x\"\n{}\n[dependencies]\ndescription = \"1\"\n", keys.concat());
        assert_eq!(missing_keys(&manifest), ["description"]);
        assert_eq!(missing_keys("[dependencies]\n").len(), KEYS.len());
    }
}
