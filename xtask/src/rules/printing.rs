//! Nothing is printed but through the command's filter for foreign text: no library prints, and of the command's files only
//! those that hold the filter know stdout and stderr.

use super::tokens::tokens;
use super::tree::{Tree, inside};

/// Crates that are no part of the product: the first process of a test machine, whose console is its report.
const EXEMPT: [&str; 1] = ["kernel-tests"];

/// The filter, and the display that draws on the terminal.
const FILTER: [&str; 2] = ["crates/cli/src/output/terminal.rs", "crates/cli/src/progress_display.rs"];

/// Macros that print.
const MACROS: [&str; 5] = ["print", "println", "eprint", "eprintln", "dbg"];

/// Functions that give what can be printed to.
const STREAMS: [&str; 2] = ["stdout", "stderr"];

/// Checks every source file of the product. Tests and examples print as they like.
pub(crate) fn check(tree: &Tree, breaches: &mut Vec<String>) {
    for (path, text) in tree.below("crates").filter(|(path, _)| path.ends_with(".rs")) {
        let Some((member, file)) = inside(path, "crates").and_then(|path| path.split_once('/')) else {
            continue;
        };
        if !file.starts_with("src/") || EXEMPT.contains(&member) || FILTER.contains(&path) {
            continue;
        }
        if let Some(what) = printing(text) {
            breaches.push(format!("{path} uses {what}: only crates/cli/src/output/terminal.rs prints"));
        }
    }
}

/// The first token that prints or gives what can be printed to.
fn printing(text: &str) -> Option<String> {
    let tokens = tokens(text);
    tokens.iter().enumerate().find_map(|(at, _)| match tokens.get(at..)? {
        [name, "!", ..] if MACROS.contains(name) => Some(format!("{name}!")),
        // To ask whether somebody looks is no printing.
        ["io", "::", _, "(", ")", ".", "is_terminal", ..] => None,
        // `Stdio`'s setters of a child process are methods; a stream's function stands behind `io::`.
        ["io", "::", name, ..] if STREAMS.contains(name) => Some((*name).to_owned()),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::{Tree, check};

    fn breaches(path: &str, text: &str) -> usize {
        let mut breaches = Vec::new();
        check(&Tree::of(&[(path, text)]), &mut breaches);
        breaches.len()
    }

    #[test]
    fn who_prints_around_the_filter_is_found() {
        let prints = [
            "fn f() { println!(\"{}\", 1); }",
            "fn f() { eprint!(\"x\") }",
            "fn f() { std::io::stderr().write_all(b\"x\"); }",
            "use std::io::stdout; fn f() { stdout().lock(); }",
        ];
        for text in prints {
            assert_eq!(breaches("crates/cli/src/vm/mod.rs", text), 1, "{text}");
            assert_eq!(breaches("crates/device/src/host/mod.rs", text), 1, "{text}");
            assert_eq!(breaches("crates/cli/src/output/terminal.rs", text), 0, "{text}");
            assert_eq!(breaches("crates/cli/tests/process/main.rs", text), 0, "{text}");
            assert_eq!(breaches("crates/kernel-tests/src/init.rs", text), 0, "{text}");
        }
        for text in [
            "//! println!(\"x\")",
            "fn f() -> bool { std::io::stderr().is_terminal() }",
            "fn f() { child.stdout(Stdio::piped()); }",
            "let text = \"eprintln!\";",
        ] {
            assert_eq!(breaches("crates/cli/src/vm/mod.rs", text), 0, "{text}");
        }
    }
}
