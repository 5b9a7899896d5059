//! What is generated from the code and checked in is what the code generates.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::support::run;

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    entries
        .map(|entry| {
            let path = entry.unwrap().path();
            (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(&path).unwrap())
        })
        .collect()
}

#[test]
fn man_pages_are_written_where_a_user_wants_them() {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("new/man1");
    assert_eq!(run(&["man", to.to_str().unwrap()]).status.code(), Some(0));
    let top = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..");
    assert_eq!(files(&to), files(&top.join("man")));
    // A file is in the way.
    std::fs::write(dir.path().join("file"), "").unwrap();
    let output = run(&["man", dir.path().join("file").to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn man_pages_completions_and_schemas_are_the_codes() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(run(&["generate", &dir.path().display().to_string()]).status.code(), Some(0));
    let top = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..");
    let page = |top: &Path| std::fs::read(top.join("docs/json.md")).unwrap();
    assert!(page(dir.path()) == page(&top), "docs/json.md differs; run 'cargo xtask generate'");
    for part in ["man", "completions", "docs/schemas"] {
        let (fresh, kept) = (files(&dir.path().join(part)), files(&top.join(part)));
        let names: Vec<_> =
            fresh.keys().chain(kept.keys()).filter(|name| fresh.get(*name) != kept.get(*name)).collect();
        assert!(
            !fresh.is_empty() && names.is_empty(),
            "{part}: {names:?} differ; run 'cargo xtask generate'"
        );
    }
}

/// A phase has a name for people, and a code for programs alone.
#[test]
fn man_pages_name_no_phase_by_its_code() {
    let top = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..");
    for (name, page) in files(&top.join("man")) {
        let page = String::from_utf8(page).unwrap();
        let code = |word: &&str| matches!(word.as_bytes(), [b'P', digit] if digit.is_ascii_digit());
        let found = page.split(|c: char| !c.is_ascii_alphanumeric()).find(code);
        assert_eq!(found, None, "{name}");
    }
}
