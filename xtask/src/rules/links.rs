//! What the pages point to is there: files and headings that they link, paths of the tree that they name, and the tests that
//! [`PROVEN`] say prove a sentence.

use std::path::{Component, Path, PathBuf};

use super::tree::Tree;

/// Folders with pages, beside the top.
const FOLDERS: [&str; 5] = ["docs", "docs/decisions", "kernel/migdev", ".github", "crates"];

/// Pages in whose tables names like `it_does_this` are tests'.
const PROVEN: [&str; 1] = ["docs/cancel.md"];

/// Folders of the tree: a code span that begins so is a path.
const ROOTS: [&str; 4] = ["crates/", "docs/", "kernel/", "xtask/"];

/// Checks every page.
pub(crate) fn check(top: &Path, tree: &Tree, breaches: &mut Vec<String>) {
    for page in pages(top) {
        let Ok(text) = std::fs::read_to_string(top.join(&page)) else { continue };
        for link in links(&text) {
            if let Some(why) = broken(top, &page, &text, link) {
                breaches.push(format!("{}: the link {link} leads nowhere: {why}", page.display()));
            }
        }
        for path in spans(&text).filter(|span| is_path(span)).filter(|path| !top.join(path).exists()) {
            breaches.push(format!("{} names {path}, which is not there", page.display()));
        }
        if PROVEN.iter().any(|proven| Path::new(proven) == page) {
            for name in spans(&text).filter(|span| is_test(span)).filter(|name| !is_defined(tree, name)) {
                breaches.push(format!("{} names the test {name}, which is not there", page.display()));
            }
        }
    }
}

/// The pages, relative to the top. Links to pages are pages of where they lead.
fn pages(top: &Path) -> Vec<PathBuf> {
    let mut pages = Vec::new();
    for folder in std::iter::once("").chain(FOLDERS) {
        let entries = std::fs::read_dir(top.join(folder)).into_iter().flatten().flatten();
        for entry in entries {
            let path = Path::new(folder).join(entry.file_name());
            let readme = path.join("README.md");
            let page = if folder == "crates" { readme } else { path };
            let regular = top.join(&page).symlink_metadata().is_ok_and(|file| file.is_file());
            // CHANGELOG.md tells of what is gone, too.
            if regular && page.extension().is_some_and(|end| end == "md") && page != Path::new("CHANGELOG.md")
            {
                pages.push(page);
            }
        }
    }
    pages
}

/// Targets of links and pictures.
fn links(text: &str) -> impl Iterator<Item = &str> {
    let inline = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    let pictures = text.split("src=\"").skip(1).filter_map(|rest| rest.split('"').next());
    inline.chain(pictures)
}

/// Code spans, outside of fenced blocks.
fn spans(text: &str) -> impl Iterator<Item = &str> {
    let prose = text.split("\n```").step_by(2);
    prose.flat_map(|prose| prose.split('`').skip(1).step_by(2))
}

fn is_path(span: &str) -> bool {
    let plain = !span.contains(|c: char| c.is_whitespace() || "*{}<>…".contains(c));
    plain && ROOTS.iter().any(|root| span.starts_with(root))
}

fn is_test(span: &str) -> bool {
    span.matches('_').count() >= 2
        && span.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

fn is_defined(tree: &Tree, name: &str) -> bool {
    let definition = format!("fn {name}(");
    tree.below("").any(|(_, text)| text.contains(&definition))
}

/// Why a link leads nowhere; `None` if it does not, or leads out of the tree.
fn broken(top: &Path, page: &Path, text: &str, link: &str) -> Option<String> {
    if link.contains("://") || link.starts_with("mailto:") {
        return None;
    }
    let (file, heading) = link.split_once('#').map_or((link, None), |(file, heading)| (file, Some(heading)));
    let target = normal(&page.parent()?.join(file));
    if !file.is_empty() && !top.join(&target).exists() {
        return Some(format!("{} is not there", target.display()));
    }
    let heading = heading?;
    let other =
        if file.is_empty() { Some(text.to_owned()) } else { std::fs::read_to_string(top.join(&target)).ok() };
    let there = other.is_some_and(|text| text.lines().any(|line| anchor(line).as_deref() == Some(heading)));
    (!there).then(|| format!("there is no heading #{heading}"))
}

/// The name by which a heading is linked, as GitHub makes it.
fn anchor(line: &str) -> Option<String> {
    let heading = line.strip_prefix('#')?.trim_start_matches('#').trim();
    let kept = heading.to_lowercase().replace(' ', "-");
    Some(kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, '-' | '_')).collect())
}

/// The path without `..`.
fn normal(path: &Path) -> PathBuf {
    path.components().fold(PathBuf::new(), |mut path, part| {
        match part {
            Component::ParentDir => {
                path.pop();
            }
            part => path.push(part),
        }
        path
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{broken, check, is_path, is_test};
    use crate::rules::tree::Tree;

    #[test]
    fn a_link_that_leads_nowhere_is_found() {
        let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let page = Path::new("docs/drain.md");
        let text = "# A host's `end`\n";
        for good in
            ["json.md", "../README.md", "#a-hosts-end", "https://example.org", "../README.md#use-it-by-hand"]
        {
            assert_eq!(broken(&top, page, text, good), None, "{good}");
        }
        for bad in ["gone.md", "README.md", "#the-end", "../README.md#gone", "../crates/gone"] {
            assert!(broken(&top, page, text, bad).is_some(), "{bad}");
        }
    }

    #[test]
    fn paths_and_tests_are_told_from_other_code() {
        assert!(
            is_path("crates/cli/tests/process") && !is_path("crates/*/README.md") && !is_path("vm --once")
        );
        assert!(is_test("a_stalled_wire_does_not") && !is_test("peer_timeout") && !is_test("VFIO_A_B"));
        let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut breaches = Vec::new();
        check(&top, &Tree::default(), &mut breaches);
        assert!(
            breaches.iter().any(|breach| breach.contains("names the test")),
            "without any test: {breaches:?}"
        );
    }
}
