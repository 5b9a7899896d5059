//! What a change touches: the crates whose files differ from upstream, and those that are built on them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Crates that only think: all their tests are over in seconds.
const PURE: [&str; 4] = ["types", "wire", "compat", "engine"];

/// Tests of this length are run when their own crate was touched, not for one that it is built on.
const LONG: Duration = Duration::from_secs(2);

/// Folders outside the crates whose files are held against the code by the tests of these.
const HELD_BY: [(&str, &str); 4] =
    [("docs", "wire"), ("docs", "cli"), ("man", "cli"), ("completions", "cli")];

/// A change, as folders of crates.
pub(crate) struct Change {
    touched: BTreeSet<String>,
    /// Built on what was touched.
    above: BTreeSet<String>,
}

impl Change {
    /// What differs from the commit at which this branch left upstream's main one, committed or not.
    pub(crate) fn find(top: &Path) -> Result<Self, String> {
        let base =
            ["origin/main", "main"].iter().find_map(|main| git(top, &["merge-base", "HEAD", main]).ok());
        let base = base.as_deref().map_or("HEAD", str::trim);
        let changed = git(top, &["diff", "--name-only", base])?;
        let new = git(top, &["ls-files", "--others", "--exclude-standard"])?;
        let uses = uses(top)?;
        let touched = touched(changed.lines().chain(new.lines()), uses.keys());
        let above = above(&touched, &uses);
        Ok(Self { touched, above })
    }

    /// Whether a test of the crate in folder `home`, which took `last` when it ran last, is run.
    pub(crate) fn wants(&self, home: &str, last: Option<Duration>) -> bool {
        PURE.contains(&home)
            || self.touched.contains(home)
            || self.above.contains(home) && last.is_none_or(|last| last < LONG)
    }

    /// For a person.
    pub(crate) fn text(&self) -> String {
        let list = |set: &BTreeSet<String>| match set.is_empty() {
            true => "none".into(),
            false => set.iter().map(String::as_str).collect::<Vec<_>>().join(", "),
        };
        format!("crates touched: {}; built on them: {}", list(&self.touched), list(&self.above))
    }
}

/// The crates that changed files belong to. What concerns the whole workspace touches all.
fn touched<'a>(
    files: impl Iterator<Item = &'a str>,
    all: impl Iterator<Item = &'a String>,
) -> BTreeSet<String> {
    let all: BTreeSet<String> = all.cloned().collect();
    let mut touched = BTreeSet::new();
    for file in files {
        let mut parts = file.split('/');
        match (parts.next().unwrap_or_default(), parts.next()) {
            ("crates" | "examples", Some(home)) => _ = touched.insert(home.to_owned()),
            ("xtask", _) => _ = touched.insert("xtask".to_owned()),
            ("Cargo.toml" | "Cargo.lock" | ".cargo" | "rust-toolchain.toml", _) => return all,
            (folder, _) => {
                touched.extend(
                    HELD_BY.iter().filter(|(held, _)| *held == folder).map(|(_, by)| (*by).to_owned()),
                );
            }
        }
    }
    touched.retain(|home| all.contains(home));
    touched
}

/// What uses one of `touched`, directly or not, and is none of them.
fn above(touched: &BTreeSet<String>, uses: &BTreeMap<String, BTreeSet<String>>) -> BTreeSet<String> {
    let mut reached = touched.clone();
    loop {
        let more: Vec<String> = uses
            .iter()
            .filter(|(home, below)| !reached.contains(*home) && !below.is_disjoint(&reached))
            .map(|(home, _)| home.clone())
            .collect();
        if more.is_empty() {
            return &reached - touched;
        }
        reached.extend(more);
    }
}

/// Which crates each crate names in its manifest, for its tests too; all as folders.
fn uses(top: &Path) -> Result<BTreeMap<String, BTreeSet<String>>, String> {
    let mut manifests = vec![("xtask".to_owned(), top.join("xtask/Cargo.toml"))];
    for folder in ["crates", "examples"] {
        let crates = std::fs::read_dir(top.join(folder)).map_err(|error| format!("{folder}: {error}"))?;
        for entry in crates {
            let path = entry.map_err(|error| format!("{folder}: {error}"))?.path();
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            manifests.push((name, path.join("Cargo.toml")));
        }
    }
    let mut texts = BTreeMap::new();
    for (home, path) in manifests {
        let text = std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        texts.insert(home, text);
    }
    let homes: BTreeMap<&str, &String> = texts
        .iter()
        .filter_map(|(home, text)| {
            let name = text.lines().find_map(|line| line.strip_prefix("name = \""))?;
            Some((name.trim_end_matches('"'), home))
        })
        .collect();
    let below = |text: &str| -> BTreeSet<String> {
        let names = text.lines().filter_map(|line| line.split(['.', ' ', '=']).next());
        names.filter_map(|name| homes.get(name)).map(|home| (*home).clone()).collect()
    };
    Ok(texts.iter().map(|(home, text)| (home.clone(), below(text))).collect())
}

fn git(top: &Path, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new("git").current_dir(top).args(arguments).output();
    let output = output.map_err(|error| format!("cannot start git: {error}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(format!("git {}: {said}", arguments.join(" ")));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn files_belong_to_crates() {
        let all = set(&["types", "wire", "cli", "xtask"]);
        let of = |files: &[&str]| touched(files.iter().copied(), all.iter());
        assert_eq!(of(&["crates/wire/src/lib.rs", "README.md", "crates/gone/src/lib.rs"]), set(&["wire"]));
        assert_eq!(of(&["docs/protocol.md", "xtask/src/main.rs"]), set(&["cli", "wire", "xtask"]));
        assert_eq!(of(&["Cargo.lock"]), all);
    }

    #[test]
    fn what_is_built_on_them_is_found_in_the_tree() {
        let uses = uses(&Path::new(env!("CARGO_MANIFEST_DIR")).join("..")).unwrap();
        let above = |name: &str| above(&set(&[name]), &uses);
        assert!(above("cli").is_subset(&set(&["kernel-tests"])), "only tests are built on the command");
        assert!(above("wire").is_superset(&set(&["engine", "migration", "cli"])));
        assert!(!above("wire").contains("types") && !above("wire").contains("wire"));
        let alone = ["vfio-user", "guest-driver", "guest-image"];
        assert!(alone.iter().all(|name| !above("types").contains(*name)), "they stand alone");
        assert_eq!(
            above("types").len() + 2 + alone.len(),
            uses.len(),
            "all but itself, those and this program"
        );
    }

    #[test]
    fn long_tests_are_left_out_above_the_change_only() {
        let change = Change { touched: set(&["device"]), above: set(&["cli"]) };
        let (short, long) = (Some(LONG / 2), Some(LONG * 2));
        assert!(change.wants("device", long) && change.wants("cli", short) && change.wants("cli", None));
        assert!(!change.wants("cli", long) && !change.wants("memory", short) && change.wants("engine", long));
    }
}
