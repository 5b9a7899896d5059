//! Packages, by name: what builds and boots, installed; the kernel, only unpacked.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::command::{command, failed};

/// The kernel's series: its newest build is found through Debian's meta packages.
const SERIES: &str = "6.12";
/// Programs that are used, and the packages that hold them.
const TOOLS: [(&str, &str); 6] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("cpio", "cpio"),
    ("xz", "xz-utils"),
    ("make", "build-essential"),
    ("gcc-12", "gcc-12"),
    ("bc", "bc"),
];
/// What the kernel's own build tools are linked with.
const LIBRARY: &str = "libelf1";

/// The kernel's packages, downloaded.
#[derive(Debug)]
pub(super) struct Packages {
    /// `6.12.117+deb12`.
    pub(super) version: String,
    /// Files whose contents are to be unpacked side by side.
    pub(super) kernel: Vec<PathBuf>,
    /// The file with the source.
    pub(super) source: PathBuf,
}

/// What came of asking for packages.
pub(super) enum Fetched {
    There(Packages),
    /// This machine cannot have them.
    CannotBeHad(String),
}

pub(super) fn fetch(cache: &Path) -> Result<Fetched, String> {
    if command("apt-get", &["--version"], cache).is_err() {
        return Ok(Fetched::CannotBeHad(
            "no apt-get: the kernel tests take their kernel from Debian's packages".into(),
        ));
    }
    if let Err(why) = install(cache, &TOOLS, LIBRARY) {
        return Ok(Fetched::CannotBeHad(why));
    }
    let names = match names(cache).or_else(|_| {
        command("apt-get", &["update"], cache)?;
        names(cache)
    }) {
        Ok(names) => names,
        Err(why) => {
            return Ok(Fetched::CannotBeHad(format!("Debian's kernel {SERIES} cannot be had here: {why}")));
        }
    };
    let debs = cache.join("packages");
    std::fs::create_dir_all(&debs).map_err(failed(&debs))?;
    let missing: Vec<&str> = names.all().filter(|name| file_of(&debs, name).is_none()).collect();
    if !missing.is_empty() {
        eprintln!("kernel-test: downloading {} packages (about 280 MB) …", missing.len());
        let arguments: Vec<&str> = ["download", "-q"].into_iter().chain(missing).collect();
        if let Err(why) = command("apt-get", &arguments, &debs) {
            return Ok(Fetched::CannotBeHad(why));
        }
    }
    let find = |name: &str| file_of(&debs, name).ok_or_else(|| format!("{name} was not downloaded"));
    Ok(Fetched::There(Packages {
        kernel: names.kernel.iter().map(|name| find(name)).collect::<Result<_, _>>()?,
        source: find(&names.source)?,
        version: names.version,
    }))
}

/// Names of the newest build's packages.
struct Names {
    version: String,
    kernel: Vec<String>,
    source: String,
}

impl Names {
    fn all(&self) -> impl Iterator<Item = &str> {
        self.kernel.iter().chain([&self.source]).map(String::as_str)
    }
}

fn names(cache: &Path) -> Result<Names, String> {
    let needs = |package: &str| command("apt-cache", &["depends", package], cache);
    let meta = format!("linux-image-{SERIES}-amd64");
    let listed = needs(&meta)?;
    let image = dependency(&listed, "linux-image-").ok_or(format!("{meta} names no image"))?;
    let release = image.trim_start_matches("linux-image-");
    let version = release.trim_end_matches("-amd64").to_owned();
    let headers = format!("linux-headers-{release}");
    let listed = needs(&headers)?;
    let common = dependency(&listed, &format!("linux-headers-{version}-common"));
    let kbuild = dependency(&listed, "linux-kbuild-");
    let (Some(common), Some(kbuild)) = (common, kbuild) else {
        return Err(format!("{headers} does not say what it builds with"));
    };
    Ok(Names {
        version,
        kernel: vec![image, headers, common, kbuild],
        source: format!("linux-source-{SERIES}"),
    })
}

/// The first package that begins with `prefix` in what `apt-cache depends` says.
fn dependency(listed: &str, prefix: &str) -> Option<String> {
    let mut names =
        listed.lines().filter_map(|line| line.trim_start_matches([' ', '|']).strip_prefix("Depends: "));
    names.find(|name| name.starts_with(prefix)).map(str::to_owned)
}

/// The newest file of package `name`.
fn file_of(dir: &Path, name: &str) -> Option<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir).ok()?.flatten().map(|entry| entry.path()).collect();
    files.retain(|file| {
        let file = file.file_name().and_then(|file| file.to_str()).unwrap_or_default();
        file.ends_with(".deb") && file.split('_').next() == Some(name)
    });
    files.sort();
    files.pop()
}

/// Installs those of `tools` (programs, and the packages that hold them) and the library that are missing.
pub(super) fn install(cache: &Path, tools: &[(&str, &str)], library: &str) -> Result<(), String> {
    let there = |tool: &str| command("sh", &["-c", &format!("command -v {tool}")], cache).is_ok();
    let missing: Vec<&str> =
        tools.iter().filter(|(tool, _)| !there(tool)).map(|(_, package)| *package).collect();
    let installed = command("dpkg-query", &["-W", "-f", "${Status}", library], cache)
        .is_ok_and(|status| status.contains("install ok installed"));
    if missing.is_empty() && installed {
        return Ok(());
    }
    let wanted: Vec<&str> = missing.into_iter().chain((!installed).then_some(library)).collect();
    let list = wanted.join(" ");
    eprintln!("kernel-test: installing {list} …");
    let remedy = |why: String| format!("{why}\ninstall these by hand: apt-get install {list}");
    command("apt-get", &["update"], cache).map_err(remedy)?;
    let mut arguments = vec!["install", "-y", "-q", "--no-install-recommends"];
    let backports = if wanted.contains(&TOOLS[0].1) { backports(cache)? } else { None };
    if let Some(suite) = &backports {
        arguments.extend(["-t", suite.as_str()]);
    }
    arguments.extend(&wanted);
    let output = Command::new("apt-get")
        .args(&arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(std::process::Stdio::null())
        .output()
        .map_err(|error| format!("cannot start apt-get: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(remedy(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

/// Debian 12's own QEMU is from before the versions that this was tried with; its backports have a newer one. They are
/// added as a file of their own, from the mirror that this machine uses.
fn backports(cache: &Path) -> Result<Option<String>, String> {
    let release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    if !release.lines().any(|line| line == "VERSION_CODENAME=bookworm") {
        return Ok(None);
    }
    let suite = "bookworm-backports";
    let targets = command("apt-get", &["indextargets", "--format", "$(RELEASE) $(REPO_URI)"], cache)?;
    if !targets.lines().any(|line| line.starts_with(&format!("{suite} "))) {
        let mirror = targets.lines().find_map(|line| line.strip_prefix("bookworm "));
        let mirror = mirror.ok_or("apt knows no mirror of Debian 12")?;
        let text = format!(
            "Types: deb\nURIs: {mirror}\nSuites: {suite}\nComponents: main\n\
             Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
        );
        let file = Path::new("/etc/apt/sources.list.d/vfio-migrate-backports.sources");
        std::fs::write(file, text).map_err(failed(file))?;
        command("apt-get", &["update"], cache)?;
    }
    Ok(Some(suite.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_build_behind_a_meta_package() {
        let listed = "linux-headers-6.12.1+deb12-amd64\n  Depends: linux-base\n  \
            Depends: linux-headers-6.12.1+deb12-common\n |Depends: linux-image-6.12.1+deb12-amd64\n  \
            Depends: linux-kbuild-6.12.1+deb12\n";
        assert_eq!(dependency(listed, "linux-kbuild-").as_deref(), Some("linux-kbuild-6.12.1+deb12"));
        assert_eq!(dependency(listed, "linux-image-").as_deref(), Some("linux-image-6.12.1+deb12-amd64"));
        assert_eq!(dependency(listed, "qemu"), None);
    }
}
