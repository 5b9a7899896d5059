//! The image that the kernel boots into: the tests as its first process, and the modules they need.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{command, failed, text};

const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Packages whose programs go into the image, and under which names.
const PROGRAMS: [(&str, &str); 2] =
    [("vfio-migration-kernel-tests", "init"), ("vfio-migrate", "vfio-migrate")];

/// Builds the tests, and the command, as programs that need no libraries. The folder that they are in.
pub(super) fn programs(top: &Path, cache: &Path) -> Result<PathBuf, String> {
    // A folder of its own: other flags would have everything in the usual one built again.
    let target = cache.join("build");
    let packages = PROGRAMS.iter().flat_map(|(package, _)| ["--package", *package]);
    let status = Command::new(env!("CARGO"))
        .current_dir(top)
        .args(["build", "--quiet", "--release", "--target", TARGET])
        .args(packages)
        .arg("--target-dir")
        .arg(&target)
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .stdin(Stdio::null())
        .status()
        .map_err(|error| format!("cannot start cargo: {error}"))?;
    if !status.success() {
        return Err(format!("building the tests: {status}"));
    }
    Ok(target.join(TARGET).join("release"))
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
        let program = programs.join(program);
        std::fs::copy(&program, root.join(name)).map_err(failed(&program))?;
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
