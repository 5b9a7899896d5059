//! The image that the kernel boots into: the tests as its first process, and the modules they need.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::command::{command, failed, text};
use crate::run::{BUILT, cargo};

/// The programs that go into the image, and under which names.
const PROGRAMS: [(&str, &str); 2] =
    [("vfio-migration-kernel-tests", "init"), ("vfio-migrate", "vfio-migrate")];

/// Builds the tests, and the command. The folder that they are in.
pub(super) fn programs(top: &Path) -> Result<PathBuf, String> {
    // All that the ring of tests builds: a choice of packages may choose features of what they use, too, and then much would
    // be compiled for this ring alone.
    cargo(top, &[&["build", "--quiet"], BUILT].concat())?;
    Ok(top.join("target/release"))
}

/// Makes the image of set `name`: `modules` are loaded in their order, from `files`. `config` is the kernel's.
pub(super) fn make(
    cache: &Path,
    name: &str,
    programs: &Path,
    config: &Path,
    modules: &[&str],
    files: Vec<PathBuf>,
) -> Result<PathBuf, String> {
    let root = cache.join("image").join(name);
    if root.exists() {
        std::fs::remove_dir_all(&root).map_err(failed(&root))?;
    }
    let home = root.join("modules");
    std::fs::create_dir_all(&home).map_err(failed(&home))?;
    // The kernel wants a console before anything is mounted.
    std::fs::create_dir_all(root.join("dev")).map_err(failed(&root))?;
    // Where the command looks for the kernel's configuration.
    let boot = root.join("boot");
    std::fs::create_dir_all(&boot).map_err(failed(&boot))?;
    let name_of_config = config.file_name().ok_or("a configuration without a name")?;
    std::fs::copy(config, boot.join(name_of_config)).map_err(failed(config))?;
    for (program, name) in PROGRAMS {
        // What they are debugged with is most of what they are, and would be unpacked into the machine's memory.
        command("strip", &["--strip-debug", "-o", text(&root.join(name))?, program], programs)?;
    }
    for library in libraries(programs)? {
        let to = root.join(library.strip_prefix("/").unwrap_or(&library));
        std::fs::create_dir_all(to.parent().unwrap_or(&root)).map_err(failed(&to))?;
        std::fs::copy(&library, &to).map_err(failed(&library))?;
    }
    for (module, file) in modules.iter().zip(&files) {
        let to = home.join(format!("{module}.ko"));
        if file.extension().is_some_and(|kind| kind == "xz") {
            let script = format!("xz -dc '{}' > '{}'", text(file)?, text(&to)?);
            command("sh", &["-c", &script], cache)?;
        } else {
            std::fs::copy(file, &to).map_err(failed(file))?;
        }
    }
    let order = home.join("order");
    let lines: String = modules.iter().map(|module| format!("{module}\n")).collect();
    std::fs::write(&order, lines).map_err(failed(&order))?;
    let image = cache.join("image").join(format!("{name}.cpio.gz"));
    let script = format!("find . | cpio --quiet -o -H newc | gzip -1 > '{}'", text(&image)?);
    command("sh", &["-c", &script], &root)?;
    Ok(image)
}

/// What the programs are linked with, the dynamic linker among it: absolute paths, at which it is found in the image as well.
fn libraries(programs: &Path) -> Result<BTreeSet<PathBuf>, String> {
    let mut libraries = BTreeSet::new();
    for (program, _) in PROGRAMS {
        libraries.extend(linked(&command("ldd", &[program], programs)?));
    }
    if libraries.is_empty() {
        return Err("ldd does not say what the tests are linked with".into());
    }
    Ok(libraries)
}

/// The files that `ldd` lists: `NAME => FILE (ADDRESS)`, or `FILE (ADDRESS)`. What the kernel brings has none.
fn linked(listed: &str) -> impl Iterator<Item = PathBuf> {
    listed.lines().filter_map(|line| {
        let file = line.split_once("=>").map_or(line, |(_, file)| file);
        let file = file.split_whitespace().next()?;
        file.starts_with('/').then(|| file.into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_told_from_names() {
        let listed = "\tlinux-vdso.so.1 (0x7f5c)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x7f5c)\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x7f5c)\n";
        let files: Vec<_> = linked(listed).collect();
        assert_eq!(
            files,
            ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from)
        );
    }
}
