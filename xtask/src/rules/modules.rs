//! The modules of one crate: which file defines what, what each imports and names, and where a path leads.

use std::collections::{BTreeMap, BTreeSet};

use super::tokens::{closing, is_word, tokens};
use super::tree::Tree;

/// Re-exports that a path may pass; more are taken for a path that bites its own tail.
const MOST_HOPS: usize = 32;

/// The modules of one crate, the root first. Modules that exist in tests alone are left out.
pub(crate) struct Modules {
    all: Vec<Module>,
}

struct Module {
    file: String,
    parent: Option<usize>,
    children: BTreeMap<String, usize>,
    defined: BTreeSet<String>,
    imports: Vec<Import>,
    /// Paths of two words or more outside imports.
    paths: BTreeSet<Vec<String>>,
    /// Every word outside imports.
    words: BTreeSet<String>,
}

struct Import {
    /// The name that it binds; none for `*`.
    name: Option<String>,
    path: Vec<String>,
    /// Passed on to others: no use of its own.
    public: bool,
}

/// One file's use of a name that another file of the crate defines.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Use {
    /// The file that uses the name.
    pub(crate) by: String,
    /// The file that defines it.
    pub(crate) of: String,
    /// The name.
    pub(crate) name: String,
    /// Whether the path goes through a re-export of the crate's root.
    pub(crate) through_root: bool,
}

/// Where a path leads.
#[derive(Clone)]
enum Found {
    Module(usize),
    /// A name that this module defines.
    Item(usize, String),
    /// Another crate's, or no path of modules at all.
    Outside,
}

impl Modules {
    /// The crate whose root is the file `root`.
    pub(crate) fn of(tree: &Tree, root: &str) -> Self {
        let mut modules = Self { all: Vec::new() };
        if let Some(text) = tree.text(root) {
            let folder = root.rsplit_once('/').map_or("", |(folder, _)| folder);
            let module = modules.add(root, None);
            modules.read(tree, module, folder, &without_tests(tokens(text)));
        }
        modules
    }

    /// Every use of another file's names. A `mod.rs` is a file like any other: naming what it defines is a use.
    pub(crate) fn uses(&self) -> BTreeSet<Use> {
        let mut uses = BTreeSet::new();
        for (index, module) in self.all.iter().enumerate() {
            let bodies = module.paths.iter().map(|path| (path, false));
            let imports = module.imports.iter().filter(|import| {
                !import.public || import.name.as_ref().is_some_and(|name| module.words.contains(name))
            });
            for (path, glob) in bodies.chain(imports.map(|import| (&import.path, import.name.is_none()))) {
                let mut through_root = false;
                let (of, name) = match self.find(index, path, &mut through_root, 0) {
                    Found::Item(of, name) => (of, name),
                    Found::Module(of) if glob => (of, "*".to_string()),
                    Found::Module(_) | Found::Outside => continue,
                };
                let (by, of) = (module.file.clone(), self.all[of].file.clone());
                through_root &= by != self.all[0].file;
                if by != of || through_root {
                    uses.insert(Use { by, of, name, through_root });
                }
            }
        }
        uses
    }

    fn add(&mut self, file: &str, parent: Option<usize>) -> usize {
        self.all.push(Module {
            file: file.into(),
            parent,
            children: BTreeMap::new(),
            defined: BTreeSet::new(),
            imports: Vec::new(),
            paths: BTreeSet::new(),
            words: BTreeSet::new(),
        });
        self.all.len() - 1
    }

    /// Reads the items of a module, whose child modules have their files in `folder`.
    fn read(&mut self, tree: &Tree, module: usize, folder: &str, tokens: &[&str]) {
        let (mut at, mut depth, mut public) = (0, 0_usize, false);
        while let Some(token) = tokens.get(at) {
            let next = tokens.get(at + 1).copied().unwrap_or_default();
            match *token {
                "#" if next == "[" => at = closing(tokens, at + 1),
                "pub" => {
                    public = true;
                    if next == "(" {
                        at = closing(tokens, at + 1);
                    }
                    at += 1;
                    continue;
                }
                "use" => {
                    at += 1;
                    let tree_of_names = ImportReader { tokens, at: &mut at, public };
                    tree_of_names.read(&mut self.all[module].imports);
                }
                "mod" if depth == 0 && is_word(next) => {
                    let inline = tokens.get(at + 2) == Some(&"{");
                    let end = if inline { closing(tokens, at + 2) } else { at + 2 };
                    let below = format!("{folder}/{next}");
                    if inline {
                        let file = self.all[module].file.clone();
                        let child = self.add(&file, Some(module));
                        self.all[module].children.insert(next.into(), child);
                        self.read(tree, child, &below, tokens.get(at + 3..end).unwrap_or_default());
                    } else {
                        self.read_file(tree, module, next, &below);
                    }
                    at = end;
                }
                "{" | "(" | "[" => depth += 1,
                "}" | ")" | "]" => depth = depth.saturating_sub(1),
                _ => at = self.read_words(module, depth, tokens, at),
            }
            public = false;
            at += 1;
        }
    }

    fn read_file(&mut self, tree: &Tree, parent: usize, name: &str, below: &str) {
        let files = [format!("{below}.rs"), format!("{below}/mod.rs")];
        let Some((file, text)) = files.iter().find_map(|file| Some((file, tree.text(file)?))) else { return };
        let child = self.add(file, Some(parent));
        self.all[parent].children.insert(name.into(), child);
        self.read(tree, child, below, &without_tests(tokens(text)));
    }

    /// Takes the word or path at `at` into the module; returns its last token.
    fn read_words(&mut self, module: usize, depth: usize, tokens: &[&str], at: usize) -> usize {
        let (token, next) = (tokens[at], tokens.get(at + 1).copied().unwrap_or_default());
        let module = &mut self.all[module];
        if !is_word(token) {
            return at;
        }
        let defines = matches!(
            token,
            "fn" | "struct" | "enum" | "union" | "trait" | "type" | "static" | "const" | "macro_rules"
        );
        if defines && depth == 0 {
            let name = tokens[at + 1..].iter().find(|word| !matches!(**word, "!" | "mut"));
            module.defined.extend(name.filter(|name| is_word(name)).map(ToString::to_string));
            return at;
        }
        module.words.insert(token.into());
        if next != "::" {
            return at;
        }
        let (mut path, mut end) = (vec![token.to_string()], at);
        while tokens.get(end + 1) == Some(&"::") && tokens.get(end + 2).is_some_and(|word| is_word(word)) {
            path.push(tokens[end + 2].into());
            end += 2;
        }
        if path.len() > 1 && at.checked_sub(1).is_none_or(|before| tokens[before] != "::") {
            module.paths.insert(path);
        }
        end
    }

    fn find(&self, from: usize, path: &[String], through_root: &mut bool, hops: usize) -> Found {
        let (mut module, mut rest) = match path.first().map(String::as_str) {
            Some("crate") => (0, &path[1..]),
            Some("self") => (from, &path[1..]),
            Some("super") => (from, path),
            Some(first) => match self.step(from, first, path.len() == 1, through_root, hops) {
                Some(Found::Module(module)) => (module, &path[1..]),
                Some(found) => return found,
                None => return Found::Outside,
            },
            None => return Found::Outside,
        };
        while let Some((name, after)) = rest.split_first() {
            if name == "super" {
                module = self.all[module].parent.unwrap_or(0);
            } else {
                match self.step(module, name, after.is_empty(), through_root, hops) {
                    Some(Found::Module(child)) => module = child,
                    Some(found) => return found,
                    // A macro made it.
                    None => return Found::Item(module, name.clone()),
                }
            }
            rest = after;
        }
        Found::Module(module)
    }

    fn step(
        &self,
        module: usize,
        name: &str,
        last: bool,
        through_root: &mut bool,
        hops: usize,
    ) -> Option<Found> {
        let here = &self.all[module];
        let child = here.children.get(name).map(|child| Found::Module(*child));
        // `use crate::codes` of a module and a function of one name means the module.
        if child.is_some() && (!last || module == 0) {
            return child;
        }
        if here.defined.contains(name) {
            return Some(Found::Item(module, name.into()));
        }
        if hops > MOST_HOPS {
            return None;
        }
        for import in here.imports.iter().filter(|import| import.name.as_deref() == Some(name)) {
            if import.path.len() == 1 && import.path[0] == name {
                continue;
            }
            match self.find(module, &import.path, through_root, hops + 1) {
                Found::Outside if child.is_some() => {}
                found => {
                    *through_root |= module == 0;
                    return Some(found);
                }
            }
        }
        if child.is_some() {
            return child;
        }
        for import in here.imports.iter().filter(|import| import.name.is_none()) {
            let Found::Module(target) = self.find(module, &import.path, through_root, hops + 1) else {
                continue;
            };
            if target == module {
                continue;
            }
            if let Some(found) = self.step(target, name, last, through_root, hops + 1) {
                *through_root |= module == 0;
                return Some(found);
            }
        }
        None
    }
}

/// Reads one tree of names after `use`, up to its semicolon.
struct ImportReader<'a, 'b> {
    tokens: &'a [&'a str],
    at: &'b mut usize,
    public: bool,
}

impl ImportReader<'_, '_> {
    fn read(mut self, imports: &mut Vec<Import>) {
        self.branch(&mut Vec::new(), imports);
        while self.token().is_some_and(|token| token != ";") {
            *self.at += 1;
        }
    }

    fn token(&self) -> Option<&str> {
        self.tokens.get(*self.at).copied()
    }

    fn branch(&mut self, before: &mut Vec<String>, imports: &mut Vec<Import>) {
        let kept = before.len();
        loop {
            let token = self.token().map(String::from);
            match token.as_deref() {
                Some("::") if before.is_empty() => before.push("::".into()),
                Some("::" | "$") => {}
                Some("{") => {
                    *self.at += 1;
                    while self.token().is_some_and(|token| !matches!(token, "}" | ";")) {
                        self.branch(before, imports);
                        if self.token() == Some(",") {
                            *self.at += 1;
                        }
                    }
                    *self.at += 1;
                    break;
                }
                Some("*") => {
                    imports.push(Import { name: None, path: before.clone(), public: self.public });
                    *self.at += 1;
                    break;
                }
                Some(word) if is_word(word) && word != "as" => {
                    if word != "self" || before.is_empty() {
                        before.push(word.into());
                    }
                    if self.tokens.get(*self.at + 1) != Some(&"::") {
                        *self.at += 1;
                        let mut name = before.last().cloned();
                        if self.token() == Some("as") {
                            name = self.tokens.get(*self.at + 1).map(ToString::to_string);
                            *self.at += 2;
                        }
                        imports.push(Import { name, path: before.clone(), public: self.public });
                        break;
                    }
                }
                _ => {
                    *self.at += 1;
                    break;
                }
            }
            *self.at += 1;
        }
        before.truncate(kept);
    }
}

/// Leaves out what `#[cfg(test)]` and the like mark.
fn without_tests(tokens: Vec<&str>) -> Vec<&str> {
    let (mut kept, mut at) = (Vec::new(), 0);
    while at < tokens.len() {
        if tokens[at] != "#" || tokens.get(at + 1) != Some(&"[") {
            kept.push(tokens[at]);
            at += 1;
            continue;
        }
        let end = closing(&tokens, at + 1);
        let attribute = tokens.get(at + 2..end).unwrap_or_default();
        let in_tests = attribute.first() == Some(&"cfg")
            && (attribute.contains(&"test") && !attribute.contains(&"not") && !attribute.contains(&"any"));
        if in_tests {
            at = after_item(&tokens, end + 1);
        } else {
            kept.extend(tokens.get(at..=end).unwrap_or_default());
            at = end + 1;
        }
    }
    kept
}

/// The token after the item, field or arm that begins at `at`.
fn after_item(tokens: &[&str], mut at: usize) -> usize {
    while tokens.get(at) == Some(&"#") {
        at = closing(tokens, at + 1) + 1;
    }
    let import = tokens.get(at) == Some(&"use");
    let mut first = at + usize::from(tokens.get(at) == Some(&"pub"));
    if first > at && tokens.get(first) == Some(&"(") {
        first = closing(tokens, first) + 1;
    }
    let field = tokens.get(first + 1) == Some(&":");
    while let Some(token) = tokens.get(at) {
        match *token {
            ";" => return at + 1,
            "," if field => return at + 1,
            "}" | ")" | "]" => return at,
            "{" if !import => return closing(tokens, at) + 1,
            "{" | "(" | "[" => at = closing(tokens, at),
            _ => {}
        }
        at += 1;
    }
    at
}

#[cfg(test)]
mod tests {
    use super::Modules;
    use crate::rules::tree::Tree;

    fn uses(files: &[(&str, &str)]) -> Vec<String> {
        let uses = Modules::of(&Tree::of(files), "src/lib.rs").uses();
        let short = |path: &str| path.trim_start_matches("src/").trim_end_matches(".rs").to_string();
        uses.iter().map(|found| format!("{}>{}:{}", short(&found.by), short(&found.of), found.name)).collect()
    }

    #[test]
    fn a_name_is_followed_to_the_file_that_defines_it() {
        let files = [
            ("src/lib.rs", "pub mod a;\nmod b;\nmod c;\npub use b::deep::Deep;"),
            (
                "src/a.rs",
                "use crate::{b::{self, Deep as D,\n  deep::{Other, make}}};\nfn x() { b::deep::free() }",
            ),
            ("src/b/mod.rs", "pub mod deep;\npub use self::deep::Deep;\npub use crate::c::top;\nfn up() {}"),
            (
                "src/b/deep.rs",
                "pub struct Deep; pub enum Other {} thing! { make } pub(crate) fn free() { super::up(); super::top() }",
            ),
            ("src/c.rs", "pub fn top() {}"),
        ];
        let expected = [
            "a>b/deep:Deep",
            "a>b/deep:Other",
            "a>b/deep:free",
            "a>b/deep:make",
            "b/deep>b/mod:up",
            "b/deep>c:top",
        ];
        assert_eq!(uses(&files), expected);
    }

    #[test]
    fn declaring_passing_on_and_testing_are_no_uses() {
        let files = [
            ("src/lib.rs", "mod a; mod b; #[cfg(test)] mod planted; pub use a::A;"),
            (
                "src/a.rs",
                "pub struct A; #[cfg(test)] mod tests { use crate::b::B; } #[cfg(test)] use crate::b::{B, C};",
            ),
            ("src/b.rs", "// use crate::a::A;\npub struct B; const TEXT: &str = \"crate::a::A\";"),
            ("src/planted.rs", "use crate::a::A;"),
        ];
        assert_eq!(uses(&files), [""; 0]);
    }

    #[test]
    fn a_name_passed_on_and_used_is_a_use() {
        let files = [("src/lib.rs", "mod a; pub use a::A; pub fn x(_: A) {}"), ("src/a.rs", "pub struct A;")];
        assert_eq!(uses(&files), ["lib>a:A"]);
    }
}
