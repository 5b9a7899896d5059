//! No circle between the files of a crate, nor of the kernel module, and no import through a crate's own face.
//!
//! A file uses what it imports and what it names by a path. A call of a method names no file: an `impl` that is spread
//! over files is not seen.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::modules::Modules;
use super::tokens::{closing, is_word, tokens};
use super::tree::Tree;

/// What each file uses: file, file used, names.
type Uses = BTreeMap<String, BTreeMap<String, BTreeSet<String>>>;

/// Checks every crate of the workspace and the kernel module.
pub(crate) fn check(tree: &Tree, breaches: &mut Vec<String>) {
    for member in tree.members() {
        for root in ["lib.rs", "main.rs"].map(|root| format!("{member}/src/{root}")) {
            let mut uses = Uses::new();
            for found in Modules::of(tree, &root).uses() {
                if found.through_root {
                    let (by, name, of) = (&found.by, &found.name, &found.of);
                    breaches.push(format!("{by} imports {name} through {root}; {of} defines it"));
                }
                if found.by != found.of {
                    add(&mut uses, found.by, found.of, found.name);
                }
            }
            breaches.extend(circles(&uses));
        }
    }
    breaches.extend(circles(&calls(tree, "kernel/migdev")));
}

fn add(uses: &mut Uses, by: String, of: String, name: String) {
    uses.entry(by).or_default().entry(of).or_default().insert(name);
}

/// The shortest circle through each file, each once.
fn circles(uses: &Uses) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for start in uses.keys() {
        let Some(mut circle) = shortest(uses, start) else { continue };
        let least = circle.iter().enumerate().min_by_key(|(_, file)| **file).map_or(0, |(at, _)| at);
        circle.rotate_left(least);
        let mut text = format!("circle: {}", circle[0]);
        for (at, by) in circle.iter().enumerate() {
            let of = circle[(at + 1) % circle.len()];
            let names: Vec<&str> = uses[*by][of].iter().map(String::as_str).collect();
            text += &format!(" -> {of} ({})", names.join(", "));
        }
        found.insert(text);
    }
    found
}

fn shortest<'a>(uses: &'a Uses, start: &'a String) -> Option<Vec<&'a String>> {
    let mut came_from: BTreeMap<&String, &String> = BTreeMap::new();
    let mut open = VecDeque::from([start]);
    while let Some(file) = open.pop_front() {
        for next in uses.get(file).into_iter().flat_map(BTreeMap::keys) {
            if next == start {
                let mut circle = vec![file];
                while let Some(before) = circle.last().and_then(|file| came_from.get(*file)) {
                    circle.push(before);
                }
                circle.reverse();
                return Some(circle);
            }
            if !came_from.contains_key(next) {
                came_from.insert(next, file);
                open.push_back(next);
            }
        }
    }
    None
}

/// Which C file names which other file's functions.
fn calls(tree: &Tree, folder: &str) -> Uses {
    let sources: Vec<(&str, Vec<&str>)> = tree
        .below(folder)
        .filter(|(path, _)| path.ends_with(".c"))
        .map(|(path, text)| (path, tokens(text)))
        .collect();
    let mut defined: BTreeMap<&str, &str> = BTreeMap::new();
    for (path, tokens) in &sources {
        defined.extend(functions(tokens).into_iter().map(|name| (name, *path)));
    }
    let mut uses = Uses::new();
    for (path, tokens) in &sources {
        for word in tokens {
            if let Some(of) = defined.get(word).filter(|of| *of != path) {
                add(&mut uses, (*path).into(), (*of).into(), (*word).into());
            }
        }
    }
    uses
}

/// The functions that a C file defines for others.
fn functions<'a>(tokens: &[&'a str]) -> Vec<&'a str> {
    let (mut found, mut at, mut hidden) = (Vec::new(), 0, false);
    while at < tokens.len() {
        match tokens[at] {
            "static" => hidden = true,
            ";" => hidden = false,
            "(" => {
                let end = closing(tokens, at);
                if tokens.get(end + 1) == Some(&"{") && !hidden && at > 0 && is_word(tokens[at - 1]) {
                    found.push(tokens[at - 1]);
                }
                at = end;
            }
            "{" => {
                at = closing(tokens, at);
                hidden = false;
            }
            _ => {}
        }
        at += 1;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::{Tree, check};

    const WORKSPACE: (&str, &str) = ("Cargo.toml", "[workspace]\nmembers = [\"crates/one\"]\n");

    fn breaches(files: &[(&str, &str)]) -> Vec<String> {
        let mut breaches = Vec::new();
        check(&Tree::of(&[&[WORKSPACE], files].concat()), &mut breaches);
        breaches
    }

    #[test]
    fn files_that_use_one_another_downwards_are_no_circle() {
        let files = [
            ("crates/one/src/lib.rs", "mod a; mod b; pub use a::A;"),
            ("crates/one/src/a.rs", "use crate::b::B; pub struct A(B);"),
            ("crates/one/src/b.rs", "pub struct B;"),
            ("kernel/migdev/a.c", "int a(void)\n{\n\treturn b();\n}\nstatic void c(void) {}\n"),
            (
                "kernel/migdev/b.c",
                "int b(void)\n{\n\treturn 0;\n}\nstatic void c(void) {}\nvoid d(void) { c(); }\n",
            ),
        ];
        assert_eq!(breaches(&files), [""; 0]);
    }

    #[test]
    fn a_planted_circle_is_reported_with_its_names() {
        let files = [
            ("crates/one/src/main.rs", "mod a; mod b; mod c;"),
            ("crates/one/src/a.rs", "use super::b::{self, B};\npub fn a() {}"),
            ("crates/one/src/b.rs", "pub struct B; impl B { fn c() { crate::c::C::new() } }"),
            ("crates/one/src/c.rs", "use crate::{\n    a::{\n        a,\n    },\n};\npub struct C;"),
        ];
        let circle = "circle: crates/one/src/a.rs -> crates/one/src/b.rs (B) -> crates/one/src/c.rs (C) \
                      -> crates/one/src/a.rs (a)";
        assert_eq!(breaches(&files), [circle]);
    }

    #[test]
    fn a_planted_circle_through_a_folder_s_face_is_reported() {
        let files = [
            ("crates/one/src/lib.rs", "mod a; mod b;"),
            ("crates/one/src/a/mod.rs", "mod inner;\npub(crate) use inner::Inner;"),
            ("crates/one/src/a/inner.rs", "use crate::b::B; pub struct Inner;"),
            ("crates/one/src/b.rs", "use crate::a::Inner; pub struct B;"),
        ];
        let circle = "circle: crates/one/src/a/inner.rs -> crates/one/src/b.rs (B) \
                      -> crates/one/src/a/inner.rs (Inner)";
        assert_eq!(breaches(&files), [circle]);
    }

    #[test]
    fn a_planted_circle_of_a_folder_s_file_and_its_mod_rs_is_reported() {
        let files = [
            ("crates/one/src/lib.rs", "mod a;"),
            ("crates/one/src/a/mod.rs", "mod inner;\npub(crate) struct A;\nfn a() { inner::inner() }"),
            ("crates/one/src/a/inner.rs", "use super::A; pub(super) fn inner() -> A { A }"),
        ];
        let circle = "circle: crates/one/src/a/inner.rs -> crates/one/src/a/mod.rs (A) \
                      -> crates/one/src/a/inner.rs (inner)";
        assert_eq!(breaches(&files), [circle]);
    }

    #[test]
    fn a_mod_rs_that_only_passes_names_on_is_in_no_circle() {
        let files = [
            ("crates/one/src/lib.rs", "mod a;"),
            ("crates/one/src/a/mod.rs", "mod inner; mod other;\npub(crate) use self::inner::inner;"),
            ("crates/one/src/a/inner.rs", "use super::other::A; pub(crate) fn inner() -> A { A }"),
            ("crates/one/src/a/other.rs", "pub(crate) struct A;"),
        ];
        assert_eq!(breaches(&files), [""; 0]);
    }

    #[test]
    fn a_planted_import_through_the_face_is_reported() {
        let files = [
            ("crates/one/src/lib.rs", "mod a; mod b; pub use b::B;"),
            ("crates/one/src/a.rs", "use crate::B;"),
            ("crates/one/src/b.rs", "pub struct B;"),
        ];
        let expected =
            "crates/one/src/a.rs imports B through crates/one/src/lib.rs; crates/one/src/b.rs defines it";
        assert_eq!(breaches(&files), [expected]);
    }

    #[test]
    fn a_planted_circle_of_calls_in_the_kernel_module_is_reported() {
        let files = [
            ("kernel/migdev/a.c", "int a(void)\n{\n\treturn 0; /* b() */\n}\nvoid end(void) { b(); }\n"),
            ("kernel/migdev/b.c", "int b(void)\n{\n\treturn a();\n}\n"),
        ];
        assert_eq!(
            breaches(&files),
            ["circle: kernel/migdev/a.c -> kernel/migdev/b.c (b) -> kernel/migdev/a.c (a)"]
        );
    }
}
