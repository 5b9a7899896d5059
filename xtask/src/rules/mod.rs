//! House rules that no lint knows: file length and names, floors, circles, where `unsafe` and printing
//! may be, and what a package brings along.

mod circles;
mod floors;
mod glue;
mod links;
mod modules;
mod names;
mod packages;
mod printing;
mod tokens;
mod tree;

use std::path::Path;

use self::tree::Tree;

/// Lines that a source file may have.
const LONGEST: usize = 650;

/// Crates that may say `unsafe`.
const UNSAFE: [&str; 5] =
    ["crates/uapi", "crates/memory", "crates/vmm", "crates/guest-image", "examples/foreign-vmm"];

/// Checks them all and lists every breach.
pub(crate) fn check(top: &Path) -> Result<(), String> {
    let tree = Tree::read(top)?;
    let mut breaches = Vec::new();
    long_files(&tree, &mut breaches);
    floors::check(&tree, &mut breaches);
    glue::check(&tree, &mut breaches);
    unsafe_code(&tree, &mut breaches);
    names::check(&tree, &mut breaches);
    circles::check(&tree, &mut breaches);
    printing::check(&tree, &mut breaches);
    packages::check(top, &tree, &mut breaches);
    links::check(top, &tree, &mut breaches);
    if breaches.is_empty() { Ok(()) } else { Err(format!("house rules:\n  {}", breaches.join("\n  "))) }
}

/// The names of the workspace's packages: those that may be published, and the others.
pub(crate) fn publication(top: &Path) -> Result<(Vec<String>, Vec<String>), String> {
    Ok(packages::publication(&Tree::read(top)?))
}

fn long_files(tree: &Tree, breaches: &mut Vec<String>) {
    for (path, text) in tree.below("").filter(|(path, _)| path.ends_with(".rs")) {
        let lines = text.lines().count();
        if lines > LONGEST {
            breaches.push(format!("{path} has {lines} lines; one concern per file?"));
        }
    }
}

fn unsafe_code(tree: &Tree, breaches: &mut Vec<String>) {
    for member in tree.members().into_iter().filter(|member| !UNSAFE.contains(member)) {
        for root in ["lib.rs", "main.rs"].map(|root| format!("{member}/src/{root}")) {
            if tree.text(&root).is_some_and(|text| !text.contains("#![forbid(unsafe_code)]")) {
                breaches.push(format!("{root} does not forbid unsafe code"));
            }
        }
    }
}
