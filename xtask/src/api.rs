//! The public interfaces of the published crates, each as a listing beside its manifest: what others depend on changes only where a
//! listing changes with it.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run::{Outcome, finish};

/// A crate whose interface is listed, in the file `api.txt` of its folder.
struct Listed {
    package: &'static str,
    folder: &'static str,
    /// Modules that are no part of what its versions promise: their items are left out.
    unstable: &'static [&'static str],
}

const fn listed(package: &'static str, folder: &'static str) -> Listed {
    Listed { package, folder, unstable: &[] }
}

/// Every crate that has a listing: those that may be published and are libraries.
const LISTED: [Listed; 14] = [
    listed("vfio-migration-types", "crates/types"),
    listed("vfio-migration-uapi", "crates/uapi"),
    Listed { package: "vfio-user-peer", folder: "crates/vfio-user", unstable: &["codec"] },
    listed("vfio-migration-guest-driver", "crates/guest-driver"),
    listed("vfio-migration-guest-image", "crates/guest-image"),
    listed("vfio-migration-wire", "crates/wire"),
    listed("vfio-migration-compat", "crates/compat"),
    listed("vfio-migration-memory", "crates/memory"),
    listed("vfio-migration-engine", "crates/engine"),
    listed("vfio-migration-device", "crates/device"),
    listed("vfio-migration-pci", "crates/pci"),
    listed("vfio-migration", "crates/migration"),
    listed("vfio-migration-sim", "crates/sim"),
    listed("vfio-migration-vmm", "crates/vmm"),
];

/// A rustdoc that writes JSON, though it is stable's. Whoever sets this variable for cargo itself has it build everything anew.
const RUSTDOC: (&str, &str) = (
    "target/api/rustdoc",
    "#!/bin/sh\nRUSTC_BOOTSTRAP=1 exec rustdoc -Zunstable-options --output-format json \"$@\"\n",
);

/// What the first line of a listing begins with; the toolchain follows that made it.
const MADE_BY: &str = "# Made by `cargo xtask api` with ";

/// Writes every listing again.
pub(crate) fn write(top: &Path) -> Result<(), String> {
    for listed in &LISTED {
        let file = listed.file(top);
        let text = listed.make(top)?;
        std::fs::write(&file, text).map_err(|error| format!("{}: {error}", file.display()))?;
    }
    Ok(())
}

/// Compares every listing with the code. Skipped where another toolchain made them: it may say the same in other words.
pub(crate) fn check(top: &Path) -> Result<Outcome, String> {
    let toolchain = toolchain()?;
    let mut drifted = Vec::new();
    for listed in &LISTED {
        let file = listed.file(top);
        let old = std::fs::read_to_string(&file).map_err(|error| format!("{}: {error}", file.display()))?;
        let made_by = old.lines().next().and_then(|line| line.strip_prefix(MADE_BY)).unwrap_or_default();
        if made_by != toolchain {
            let (file, own) = (file.display(), &toolchain);
            return Ok(Outcome::Skipped(format!(
                "{file} was made with '{made_by}', and this is {own}: its interface was not compared"
            )));
        }
        let differences = differences(&old, &listed.make(top)?);
        if !differences.is_empty() {
            drifted.push(format!("{}:\n    {}", listed.package, differences.join("\n    ")));
        }
    }
    if drifted.is_empty() {
        return Ok(Outcome::Passed(None));
    }
    Err(format!(
        "public interfaces differ from their listings (`cargo xtask api` writes these again):\n  {}",
        drifted.join("\n  ")
    ))
}

impl Listed {
    fn file(&self, top: &Path) -> PathBuf {
        top.join(self.folder).join("api.txt")
    }

    fn make(&self, top: &Path) -> Result<String, String> {
        let mut command = Command::new(env!("CARGO"));
        command.current_dir(top).args([
            "rustdoc",
            "--quiet",
            "--release",
            "--package",
            self.package,
            "--lib",
        ]);
        command.env("RUSTDOC", rustdoc(top)?).env("RUSTDOCFLAGS", "--cfg=api_listing");
        finish(command, &format!("rustdoc of {}", self.package))?;
        let library = self.package.replace('-', "_");
        let json = top.join("target/doc").join(format!("{library}.json"));
        let interface = public_api::Builder::from_rustdoc_json(&json)
            .omit_blanket_impls(true)
            .omit_auto_trait_impls(true)
            .build()
            .map_err(|error| format!("{}: {error}", json.display()))?;
        let items: Vec<String> = interface.items().map(ToString::to_string).collect();
        Ok(listing(&items, &library, self.unstable, &toolchain()?))
    }
}

/// Puts [`RUSTDOC`] in its place.
fn rustdoc(top: &Path) -> Result<PathBuf, String> {
    let (place, text) = RUSTDOC;
    let path = top.join(place);
    let made =
        std::fs::create_dir_all(path.parent().unwrap_or(top)).and_then(|()| std::fs::write(&path, text));
    made.and_then(|()| std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)))
        .map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(path)
}

/// The text of a listing.
fn listing(items: &[String], library: &str, unstable: &[&str], toolchain: &str) -> String {
    let modules: Vec<String> = unstable.iter().map(|module| format!("{library}::{module}")).collect();
    let stable = items.iter().filter(|item| !modules.iter().any(|module| is_of(item, library, module)));
    let left_out: Vec<String> = unstable.iter().map(|module| format!("`{module}`")).collect();
    let note = if left_out.is_empty() {
        String::new()
    } else {
        format!("# Left out, as nothing is promised of it: {}\n", left_out.join(", "))
    };
    let items: String = stable.map(|item| format!("{item}\n")).collect();
    format!("{MADE_BY}{toolchain}\n{note}{items}")
}

/// Whether an item, as it is listed, is `module` or one of its own: the first path of the library that it names is the item's.
fn is_of(item: &str, library: &str, module: &str) -> bool {
    let own = item.find(&format!("{library}::")).and_then(|at| item.get(at..)).unwrap_or_default();
    own.strip_prefix(module)
        .is_some_and(|rest| !rest.starts_with(|next: char| next.is_alphanumeric() || next == '_'))
}

/// The lines that one listing has and the other has not, as `- old` and `+ new`. Their order is rustdoc's, and theirs alone.
fn differences(old: &str, new: &str) -> Vec<String> {
    let only = |these: &str, those: &str, sign: &str| -> Vec<String> {
        let those: Vec<&str> = those.lines().collect();
        these.lines().filter(|line| !those.contains(line)).map(|line| format!("{sign} {line}")).collect()
    };
    let found = [only(old, new, "-"), only(new, old, "+")].concat();
    // Twice the same line, or another order.
    if found.is_empty() && old != new { vec!["the same lines otherwise".into()] } else { found }
}

/// The compiler's name and version, which are rustdoc's.
fn toolchain() -> Result<String, String> {
    let compiler = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(compiler).arg("--version").output();
    let output = output.map_err(|error| format!("cannot ask rustc for its version: {error}"))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ITEMS: [&str; 4] = [
        "pub mod it::codec",
        "pub fn it::codec::read(&[u8]) -> it::Error",
        "pub fn it::Error::command(&self) -> it::codec::Command",
        "pub fn it::codecs()",
    ];

    #[test]
    fn items_of_unstable_modules_are_left_out_and_no_others() {
        let items = ITEMS.map(String::from);
        let text = listing(&items, "it", &["codec"], "rustc 1");
        let left: Vec<&str> = text.lines().skip(2).collect();
        assert_eq!(left, &ITEMS[2..]);
        assert_eq!(text.lines().next(), Some("# Made by `cargo xtask api` with rustc 1"));
        assert_eq!(listing(&items, "it", &[], "rustc 1").lines().count(), 5);
    }

    #[test]
    fn every_drift_is_told() {
        assert_eq!(differences("a\nb\n", "a\nb\n"), [""; 0]);
        assert_eq!(differences("a\nb\n", "a\nc\n"), ["- b", "+ c"]);
        assert_eq!(differences("a\na\n", "a\n"), ["the same lines otherwise"]);
    }
}
