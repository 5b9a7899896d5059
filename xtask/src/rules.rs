//! House rules that no lint knows: file length, floors, and where `unsafe` may be.

use std::path::{Path, PathBuf};

/// Lines that a source file may have.
const LONGEST: usize = 650;

/// What each crate may name of the others: the floors of ARCHITECTURE.md. A crate not listed names none.
const FLOORS: [(&str, &[&str]); 10] = [
    ("uapi", &["types"]),
    ("vfio-user", &["types"]),
    ("wire", &["types"]),
    ("compat", &["types"]),
    ("memory", &["types", "uapi"]),
    ("engine", &["types", "wire", "compat"]),
    ("device", &["types", "compat", "memory", "uapi", "vfio-user"]),
    ("migration", &["types", "wire", "compat", "memory", "engine", "device"]),
    ("sim", &["types", "vfio-user", "memory"]),
    ("vmm", &["types", "compat", "memory", "device", "migration", "sim", "vfio-user"]),
];

/// Crates that may say `unsafe`.
const UNSAFE: [&str; 3] = ["uapi", "memory", "vmm"];

/// Checks them all and lists every breach.
pub(crate) fn check(top: &Path) -> Result<(), String> {
    let mut breaches = Vec::new();
    long_files(top, &mut breaches)?;
    floors(top, &mut breaches)?;
    unsafe_code(top, &mut breaches)?;
    if breaches.is_empty() { Ok(()) } else { Err(format!("house rules:\n  {}", breaches.join("\n  "))) }
}

fn long_files(top: &Path, breaches: &mut Vec<String>) -> Result<(), String> {
    for file in sources(top)? {
        let lines = read(&file)?.lines().count();
        if lines > LONGEST {
            breaches.push(format!("{} has {lines} lines; one concern per file?", file.display()));
        }
    }
    Ok(())
}

fn floors(top: &Path, breaches: &mut Vec<String>) -> Result<(), String> {
    for name in ["types"].into_iter().chain(FLOORS.iter().map(|(name, _)| *name)) {
        let manifest = read(&top.join("crates").join(name).join("Cargo.toml"))?;
        let allowed = FLOORS.iter().find(|(floor, _)| *floor == name).map_or(&[][..], |(_, below)| below);
        let dependencies = manifest.split("[dev-dependencies]").next().unwrap_or_default();
        for line in dependencies.lines() {
            let below = match line.split(['.', ' ', '=']).next() {
                Some("vfio-user-peer") => "vfio-user",
                Some("vfio-migration") => "migration",
                Some(other) => match other.strip_prefix("vfio-migration-") {
                    Some(below) => below,
                    None => continue,
                },
                None => continue,
            };
            if !line.starts_with("name") && !allowed.contains(&below) {
                breaches
                    .push(format!("crates/{name} may not use crates/{below}: it is no lower floor of its"));
            }
        }
    }
    Ok(())
}

fn unsafe_code(top: &Path, breaches: &mut Vec<String>) -> Result<(), String> {
    for entry in std::fs::read_dir(top.join("crates")).map_err(|error| error.to_string())? {
        let path = entry.map_err(|error| error.to_string())?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().to_string()).unwrap_or_default();
        if UNSAFE.contains(&name.as_str()) {
            continue;
        }
        let root =
            ["src/lib.rs", "src/main.rs"].map(|file| path.join(file)).into_iter().find(|file| file.exists());
        let Some(root) = root else { continue };
        if !read(&root)?.contains("#![forbid(unsafe_code)]") {
            breaches.push(format!("{} does not forbid unsafe code", root.display()));
        }
    }
    Ok(())
}

fn sources(top: &Path) -> Result<Vec<PathBuf>, String> {
    let mut found = Vec::new();
    let mut open = vec![top.join("crates"), top.join("xtask")];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(&dir).map_err(|error| format!("{}: {error}", dir.display()))? {
            let path = entry.map_err(|error| error.to_string())?.path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    Ok(found)
}

fn read(path: &Path) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}
