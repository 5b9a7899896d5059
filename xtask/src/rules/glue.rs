//! What embedding the library costs a VMM stays small: of `examples/foreign-vmm`, every file that names the library is glue, and all
//! glue together is short.

use super::tokens::tokens;
use super::tree::Tree;

/// The sources of the VMM that embeds the library.
const FOREIGN: &str = "examples/foreign-vmm/src";
/// Lines that its glue may have.
const MOST: usize = 400;

/// Counts the glue.
pub(crate) fn check(tree: &Tree, breaches: &mut Vec<String>) {
    let glue: Vec<_> =
        tree.below(FOREIGN).filter(|(_, text)| tokens(text).contains(&"vfio_migration")).collect();
    let lines: usize = glue.iter().map(|(_, text)| text.lines().count()).sum();
    if glue.is_empty() && tree.below(FOREIGN).next().is_some() {
        breaches.push(format!("no file of {FOREIGN} names the library that it is to embed"));
    }
    if lines > MOST {
        let files: Vec<_> = glue.iter().map(|(path, _)| *path).collect();
        breaches.push(format!("{lines} lines of glue, where {MOST} are the most: {}", files.join(", ")));
    }
}

#[cfg(test)]
mod tests {
    use super::{Tree, check};

    fn breaches(glue: &str, other: &str) -> Vec<String> {
        let mut found = Vec::new();
        let files = [("examples/foreign-vmm/src/a.rs", glue), ("examples/foreign-vmm/src/b.rs", other)];
        check(&Tree::of(&files), &mut found);
        found
    }

    #[test]
    fn files_that_name_the_library_are_counted_and_no_others() {
        let use_it = "use vfio_migration::Source;\n";
        let long = "// vfio_migration::Source is not named here\n".repeat(500);
        assert!(breaches(use_it, &long).is_empty());
        assert_eq!(breaches(&format!("{use_it}{long}"), "").len(), 1);
        assert_eq!(breaches("use vfio_migration_guest_image::Report;\n", "").len(), 1);
    }
}
