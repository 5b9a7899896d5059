//! Which crate may use which: the floors of ARCHITECTURE.md.

use std::collections::BTreeMap;

use super::tree::Tree;

/// What one crate may name of the others.
struct Floor {
    /// The crate, by the name of its folder.
    name: &'static str,
    uses: &'static [&'static str],
    /// What its tests may name besides.
    tests: &'static [&'static str],
}

const fn floor(name: &'static str, uses: &'static [&'static str], tests: &'static [&'static str]) -> Floor {
    Floor { name, uses, tests }
}

/// Every crate of the workspace, from the ground up; at the end those that stand beside the house.
const FLOORS: [Floor; 18] = [
    floor("types", &[], &[]),
    floor("uapi", &["types"], &[]),
    floor("vfio-user", &[], &[]),
    floor("wire", &["types"], &[]),
    floor("compat", &["types"], &[]),
    floor("memory", &["types", "uapi"], &[]),
    floor("engine", &["types", "wire", "compat"], &[]),
    floor("device", &["types", "compat", "memory", "uapi", "vfio-user"], &["guest-driver", "sim"]),
    floor("migration", &["types", "uapi", "wire", "compat", "memory", "engine", "device"], &["sim"]),
    floor("pci", &["types", "compat", "memory", "device"], &[]),
    floor("guest-driver", &[], &[]),
    floor("guest-image", &[], &[]),
    floor(
        "vmm",
        &["types", "compat", "memory", "device", "pci", "guest-driver", "guest-image", "migration"],
        &["sim"],
    ),
    floor(
        "cli",
        &["types", "compat", "memory", "device", "vfio-user", "migration", "vmm", "sim"],
        &["guest-driver", "wire"],
    ),
    floor("sim", &["types", "vfio-user", "memory", "guest-driver"], &[]),
    floor(
        "kernel-tests",
        &["guest-driver", "types", "uapi", "wire", "compat", "memory", "device", "migration"],
        &[],
    ),
    floor("foreign-vmm", &["migration", "vfio-user", "guest-image"], &["sim"]),
    floor("xtask", &[], &[]),
];

/// Checks the manifest of every member of the workspace.
pub(crate) fn check(tree: &Tree, breaches: &mut Vec<String>) {
    let members = tree.members();
    let mut folders: BTreeMap<String, &str> = BTreeMap::new();
    for member in &members {
        let manifest = tree.text(&format!("{member}/Cargo.toml")).unwrap_or_default();
        match manifest.lines().find_map(|line| value(line, "name")) {
            Some(package) => drop(folders.insert(package, folder(member))),
            None => breaches.push(format!("{member}/Cargo.toml names no package")),
        }
    }
    for floor in FLOORS.iter().filter(|floor| !members.iter().any(|member| folder(member) == floor.name)) {
        breaches.push(format!("{} has a floor and is no member of the workspace", floor.name));
    }
    for member in members {
        let Some(floor) = FLOORS.iter().find(|floor| floor.name == folder(member)) else {
            breaches.push(format!("{member} has no floor: list it in xtask/src/rules/floors.rs"));
            continue;
        };
        let manifest = tree.text(&format!("{member}/Cargo.toml")).unwrap_or_default();
        for (package, in_tests) in dependencies(manifest) {
            let Some(used) = folders.get(&package) else { continue };
            // Its own name: tests ask for a feature of the crate that they test.
            let own = in_tests && *used == floor.name;
            let allowed = own || floor.uses.contains(used) || (in_tests && floor.tests.contains(used));
            if !allowed {
                let where_used = if in_tests { " in its tests" } else { "" };
                breaches
                    .push(format!("{member} may not use {used}{where_used}: that is no lower floor of its"));
            }
        }
    }
}

fn folder(member: &str) -> &str {
    member.rsplit('/').next().unwrap_or(member)
}

/// The packages of a manifest's dependencies, of every kind and target, and whether tests alone use them.
fn dependencies(manifest: &str) -> Vec<(String, bool)> {
    let mut found = Vec::new();
    // The kind of dependency that the section lists, and the one it describes if it is one's own.
    let (mut kind, mut own): (Option<bool>, Option<String>) = (None, None);
    for line in manifest.lines().map(str::trim).chain(["[]"]) {
        if let Some(section) = line.strip_prefix('[') {
            found.extend(own.take().zip(kind));
            let section = section.trim_matches(['[', ']']);
            let parts: Vec<&str> = section.split('.').collect();
            let at = parts.iter().position(|part| part.ends_with("dependencies"));
            kind = at.map(|at| parts[at] == "dev-dependencies");
            own = at.and_then(|at| parts.get(at + 1)).map(|name| bare(name));
        } else if let Some(in_tests) = kind {
            if own.is_some() {
                own = value(line, "package").or(own);
            } else if let Some((key, rest)) = line.split_once('=').filter(|_| !line.starts_with('#')) {
                let renamed = rest.split([',', '{']).find_map(|part| value(part, "package"));
                let key = bare(key.split('.').next().unwrap_or(key));
                found.push((renamed.unwrap_or(key), in_tests));
            }
        }
    }
    found
}

/// The text that `line` gives to `key`.
fn value(line: &str, key: &str) -> Option<String> {
    let (name, value) = line.split_once('=')?;
    (name.trim() == key).then(|| bare(value.trim().trim_end_matches('}')))
}

fn bare(text: &str) -> String {
    text.trim().trim_matches(['"', '\'']).into()
}

#[cfg(test)]
mod tests {
    use super::{FLOORS, Tree, check};

    /// A workspace of every listed crate, with `text` added to the manifest of `planted`.
    fn breaches(planted: &str, text: &str, more: &[&str]) -> Vec<String> {
        let names: Vec<&str> = FLOORS.iter().map(|floor| floor.name).chain(more.iter().copied()).collect();
        let members: Vec<String> = names.iter().map(|name| format!("\"crates/{name}\"")).collect();
        let mut files =
            vec![("Cargo.toml".to_string(), format!("[workspace]\nmembers = [{}]\n", members.join(", ")))];
        for name in names {
            let more = if name == planted { text } else { "" };
            files.push((
                format!("crates/{name}/Cargo.toml"),
                format!("[package]\nname = \"p-{name}\"\n{more}\n"),
            ));
        }
        let files: Vec<(&str, &str)> =
            files.iter().map(|(path, text)| (path.as_str(), text.as_str())).collect();
        let mut breaches = Vec::new();
        check(&Tree::of(&files), &mut breaches);
        breaches
    }

    #[test]
    fn lower_floors_may_be_used() {
        assert_eq!(
            breaches("memory", "[dependencies]\np-types.workspace = true\nserde = \"1\"", &[]),
            [""; 0]
        );
        assert_eq!(breaches("vmm", "[dev-dependencies]\np-sim.workspace = true", &[]), [""; 0]);
    }

    #[test]
    fn a_planted_upward_dependency_is_reported_wherever_it_stands() {
        for text in [
            "[dependencies]\np-vmm.workspace = true",
            "[dependencies]\np-vmm = { path = \"../vmm\" }",
            "[dependencies]\nharmless = { package = \"p-vmm\", path = \"../vmm\" }",
            "[dependencies.p-vmm]\nworkspace = true",
            "[dependencies.harmless]\npackage = \"p-vmm\"\n[features]",
            "[build-dependencies]\np-vmm.workspace = true",
            "[target.'cfg(target_os = \"linux\")'.dependencies]\np-vmm.workspace = true",
        ] {
            let expected = "crates/memory may not use vmm: that is no lower floor of its";
            assert_eq!(breaches("memory", text, &[]), [expected], "{text}");
        }
        for name in ["xtask", "kernel-tests"] {
            assert_eq!(breaches(name, "[dependencies]\np-vmm.workspace = true", &[]).len(), 1, "{name}");
        }
    }

    #[test]
    fn what_tests_may_use_is_listed_too() {
        let expected = "crates/memory may not use vmm in its tests: that is no lower floor of its";
        assert_eq!(breaches("memory", "[dev-dependencies]\np-vmm.workspace = true", &[]), [expected]);
        let expected = "crates/vmm may not use sim: that is no lower floor of its";
        assert_eq!(breaches("vmm", "[dependencies]\np-sim.workspace = true", &[]), [expected]);
    }

    #[test]
    fn a_planted_crate_without_a_floor_is_reported() {
        let expected = "crates/attic has no floor: list it in xtask/src/rules/floors.rs";
        assert_eq!(breaches("", "", &["attic"]), [expected]);
    }
}
