//! What the packages hold is enough: every crate that may be published is packed as for a registry and compiled out of its package, and a
//! crate outside of the workspace that depends on the packed library alone compiles the guide for VMMs.
//!
//! `cargo package` verifies too, but through a registry of its own, whose crates it unpacks once for each version: after a change that
//! raises no version it compiles against the former text of the crates below. So it packs here, and the packages are unpacked anew.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::command::{command, failed, tail, text};
use crate::rules;
use crate::run::Outcome;

/// Where all is done, below `target`.
const PLACE: &str = "target/packages";
/// The packed library that a VMM embeds, and the guide in it.
const LIBRARY: &str = "vfio-migration";
const GUIDE: &str = "embedding.md";
/// A small crate on which all others are built, and a file of it: with this left out of the package nothing may compile.
const LEFT_OUT: (&str, &str) = ("vfio-migration-types", "src/arcs.rs");
/// The profile in which the lints compile dependencies: those are compiled once.
const PROFILE: &str = "[profile.release]\ndebug = \"line-tables-only\"\noverflow-checks = true\n";
const FENCE: &str = "```";

/// What breaks a migration on purpose, or stands in for a device: none of it is there for who asks for no feature.
const HOOKS: [&str; 6] = [
    "vfio_migration::inject",
    "vfio_migration::InjectedFault",
    "vfio_migration::HeldFile",
    "vfio_migration::leave_threads",
    "vfio_migration::device::testing",
    "vfio_migration::device::BareSpace",
];

/// Packs all, compiles the packages, then the guide, and sees it fail where it has to.
pub(crate) fn check(top: &Path) -> Result<Outcome, String> {
    let place = top.join(PLACE);
    let packed = unpack(top, &place)?;
    let all = place.join("all");
    std::fs::copy(top.join("Cargo.lock"), all.join("Cargo.lock")).map_err(failed(&all))?;
    let members: Vec<String> = packed.iter().map(|(_, folder)| format!("{folder:?}")).collect();
    let members = format!("[workspace]\nresolver = \"3\"\nmembers = [{}]\n", members.join(", "));
    write(&all.join("Cargo.toml"), &format!("{members}{}{PROFILE}", patches(&packed, "")))?;
    compile(top, &all)?;
    guide(top, &place, &packed)?;
    Ok(Outcome::Passed(None))
}

/// Compiles the guide's code in a crate that has no other dependency of ours than the packed library.
fn guide(top: &Path, place: &Path, packed: &[(String, String)]) -> Result<(), String> {
    let scratch = place.join("guide");
    let folder = |package: &str| {
        let found = packed.iter().find(|(name, _)| name == package).map(|(_, folder)| folder);
        found.map(|folder| place.join("all").join(folder)).ok_or(format!("{package} was not packed"))
    };
    let page = folder(LIBRARY)?.join(GUIDE);
    let page = std::fs::read_to_string(&page).map_err(failed(&page))?;
    let code = modules(&page);
    if code.is_empty() {
        return Err(format!("no code was found in {GUIDE}"));
    }
    std::fs::create_dir_all(scratch.join("src")).map_err(failed(&scratch))?;
    std::fs::copy(top.join("Cargo.lock"), scratch.join("Cargo.lock")).map_err(failed(&scratch))?;
    let manifest = std::fs::read_to_string(top.join("Cargo.toml")).map_err(failed(top))?;
    let vm_memory = manifest.lines().find(|line| line.starts_with("vm-memory = ")).unwrap_or_default();
    let head = format!(
        "[package]\nname = \"guide\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\n[dependencies]\n\
         {LIBRARY} = {{ version = \"*\", features = [\"vm-memory\"] }}\n{vm_memory}\n\n[workspace]\nresolver = \"3\"\n"
    );
    write(&scratch.join("Cargo.toml"), &format!("{head}{}{PROFILE}", patches(packed, "../all/")))?;
    let source = scratch.join("src/lib.rs");
    write(&source, &code)?;
    compile(top, &scratch)?;

    let hooks: String = HOOKS.iter().map(|hook| format!("pub use {hook};\n")).collect();
    write(&source, &hooks)?;
    let Err(why) = compile(top, &scratch) else {
        return Err("the library shows its hooks for tests to who asks for no feature".into());
    };
    if let Some(there) = HOOKS.iter().find(|hook| !why.contains(&format!("unresolved import `{hook}`"))) {
        return Err(format!("{there} is there for who asks for no feature:\n{}", tail(&why)));
    }

    write(&source, &code)?;
    let (package, file) = LEFT_OUT;
    let file = folder(package)?.join(file);
    std::fs::remove_file(&file).map_err(failed(&file))?;
    match compile(top, &scratch) {
        Err(why) if why.contains("error[E0583]") && why.contains(package) => Ok(()),
        Err(why) => Err(format!("without a file of {package} something else was found:\n{}", tail(&why))),
        Ok(()) => Err(format!("a package of {package} that lacks a file was found good")),
    }
}

/// Packs every crate that may be published. Returns their names and folders, in the folder `all`.
fn unpack(top: &Path, place: &Path) -> Result<Vec<(String, String)>, String> {
    let all = place.join("all");
    for old in [&all, &place.join("package")] {
        match std::fs::remove_dir_all(old) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(old)(error)),
            _ => {}
        }
    }
    std::fs::create_dir_all(&all).map_err(failed(&all))?;
    let (published, others) = rules::publication(top)?;
    command(env!("CARGO"), &["fetch", "--quiet", "--locked"], top)?;
    let target = format!("--target-dir={}", text(place)?);
    let mut arguments =
        vec!["package", "--workspace", "--no-verify", "--allow-dirty", "--offline", "--quiet", &target];
    arguments.extend(others.iter().flat_map(|other| ["--exclude", other]));
    command(env!("CARGO"), &arguments, top)?;
    let mut packed = Vec::new();
    for name in published {
        let folder = folder_of(&place.join("package"), &name)?;
        let file = place.join("package").join(format!("{folder}.crate"));
        // Files in a package are as old as the format; cargo would take what it compiled of them before for new.
        command("tar", &["--extract", "--touch", "--gzip", "--file", text(&file)?], &all)?;
        packed.push((name, folder));
    }
    Ok(packed)
}

/// The folder in the package of a crate: its name and version.
fn folder_of(packages: &Path, name: &str) -> Result<String, String> {
    let entries = std::fs::read_dir(packages).map_err(failed(packages))?;
    let mut files = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let of_it = |file: &str| -> Option<String> {
        let folder = file.strip_suffix(".crate")?;
        let version = folder.strip_prefix(name)?.strip_prefix('-')?;
        version.starts_with(|digit: char| digit.is_ascii_digit()).then(|| folder.to_owned())
    };
    files.find_map(|file| of_it(&file)).ok_or_else(|| format!("there is no package of {name}"))
}

/// Says that crates of ours come out of their packages, and not from a registry.
fn patches(packed: &[(String, String)], before: &str) -> String {
    let lines = packed.iter().map(|(name, folder)| format!("{name} = {{ path = \"{before}{folder}\" }}\n"));
    format!("\n[patch.crates-io]\n{}\n", lines.collect::<String>())
}

/// The code of a page that says `rust`, each piece in a module of its own.
fn modules(page: &str) -> String {
    let pieces = page.split(FENCE).skip(1).step_by(2).filter_map(|piece| piece.split_once('\n'));
    let rust = pieces.filter(|(kind, _)| kind.split(',').next() == Some("rust"));
    let public = rust.map(|(_, code)| format!("\n{code}").replace("\nfn ", "\npub fn "));
    public.enumerate().map(|(number, code)| format!("pub mod piece_{number} {{{code}}}\n")).collect()
}

fn compile(top: &Path, folder: &Path) -> Result<(), String> {
    let target: PathBuf = top.join("target");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["check", "--workspace", "--release", "--quiet", "--offline", "--target-dir"]).arg(target);
    let output = cargo.current_dir(folder).output().map_err(failed(folder))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("cargo check in {}:\n{}", folder.display(), String::from_utf8_lossy(&output.stderr)))
}

fn write(file: &Path, text: &str) -> Result<(), String> {
    std::fs::write(file, text).map_err(failed(file))
}

#[cfg(test)]
mod tests {
    use super::modules;

    #[test]
    fn code_of_a_page_is_public_and_other_text_is_left_out() {
        let page = "A\n```sh\nls\n```\nB `c`\n```rust,no_run\nuse a::B;\n\nfn b() {}\n```\n```rust\nfn c() {}\n```\n";
        assert_eq!(
            modules(page),
            "pub mod piece_0 {\nuse a::B;\n\npub fn b() {}\n}\npub mod piece_1 {\npub fn c() {}\n}\n"
        );
        assert_eq!(modules("no code"), "");
    }
}
