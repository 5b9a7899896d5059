//! QEMU's vfio-user client at the sample device: a QEMU that has one is fetched from Debian and unpacked beside the project.
//!
//! Nothing of it is installed, and no repository is added to the host's: apt works on lists of its own, checks their
//! signatures as ever, and what it downloads is run with the loader and the C library that it comes with.

use std::path::{Path, PathBuf};

use crate::command::{command, failed, text};

/// Where QEMU's vfio-user client is new enough, and what QEMU's libraries are from.
const SUITES: [&str; 2] = ["trixie", "trixie-backports"];
const PACKAGE: &str = "qemu-system-x86";
/// What is unpacked besides libraries: of what QEMU depends on, the rest is for its installation and for other devices.
const OTHERS: [&str; 4] = [PACKAGE, "qemu-system-common", "seabios", "zlib1g"];
/// Debian's keys, as its own hosts and debian-archive-keyring have them.
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Where QEMU is unpacked: fetched now, or found there from the last time. An error says why it cannot be had.
pub(crate) fn fetch(top: &Path) -> Result<PathBuf, String> {
    let cache = top.join("target/qemu-peer");
    let unpacked = cache.join("unpacked");
    if unpacked.is_dir() {
        return Ok(unpacked);
    }
    let packages = cache.join("packages");
    std::fs::create_dir_all(&packages).map_err(failed(&packages))?;
    command("apt-get", &["--version"], &cache)?;
    let config = configure(&cache)?;
    let apt = |words: &[&str], dir: &Path| {
        let arguments = [&["-c", text(&config)?], words].concat();
        command("apt-get", &arguments, dir)
    };
    eprintln!("qemu-peer: downloading {PACKAGE} of {} and its libraries (about 50 MB) …", SUITES[1]);
    apt(&["update", "-q"], &cache)?;
    let simulated = ["install", "-s", "-y", "-q", "--no-install-recommends", "-t", SUITES[1], PACKAGE];
    let wanted = wanted(&apt(&simulated, &cache)?);
    let words: Vec<&str> = ["download", "-q"].into_iter().chain(wanted.iter().map(String::as_str)).collect();
    apt(&words, &packages)?;
    // Under another name until it is whole.
    let begun = cache.join("unpacking");
    if begun.exists() {
        std::fs::remove_dir_all(&begun).map_err(failed(&begun))?;
    }
    let mut unpacked_packages = 0;
    for file in std::fs::read_dir(&packages).map_err(failed(&packages))? {
        let file = file.map_err(failed(&packages))?.path();
        command("dpkg", &["-x", text(&file)?, text(&begun)?], &cache)?;
        unpacked_packages += 1;
    }
    if unpacked_packages < wanted.len() {
        return Err(format!("{unpacked_packages} of {} packages were downloaded", wanted.len()));
    }
    std::fs::rename(&begun, &unpacked).map_err(failed(&unpacked))?;
    // What was unpacked is kept, and is enough.
    std::fs::remove_dir_all(&packages).map_err(failed(&packages))?;
    Ok(unpacked)
}

/// Writes apt's configuration: lists, cache and a record of installed packages, which is empty, all of its own. What the host
/// has configured besides, such as a proxy, holds.
fn configure(cache: &Path) -> Result<PathBuf, String> {
    let apt = cache.join("apt");
    for folder in ["lists/partial", "archives/partial", "parts"] {
        let folder = apt.join(folder);
        std::fs::create_dir_all(&folder).map_err(failed(&folder))?;
    }
    let sources: String = SUITES
        .iter()
        .map(|suite| format!("deb [arch=amd64 signed-by={KEYS}] http://deb.debian.org/debian {suite} main\n"))
        .collect();
    let at = text(&apt)?;
    let config = format!(
        "APT::Architecture \"amd64\";\n\
         APT::Sandbox::User \"\";\n\
         Acquire::Languages \"none\";\n\
         Dir::State::lists \"{at}/lists\";\n\
         Dir::State::status \"{at}/status\";\n\
         Dir::State::extended_states \"{at}/extended\";\n\
         Dir::Cache \"{at}\";\n\
         Dir::Etc::sourcelist \"{at}/sources.list\";\n\
         Dir::Etc::sourceparts \"{at}/parts\";\n\
         Dir::Etc::preferences \"{at}/preferences\";\n\
         Dir::Etc::preferencesparts \"{at}/parts\";\n"
    );
    for (name, contents) in [("sources.list", sources.as_str()), ("status", ""), ("apt.conf", &config)] {
        let file = apt.join(name);
        std::fs::write(&file, contents).map_err(failed(&file))?;
    }
    Ok(apt.join("apt.conf"))
}

/// The packages to unpack, each as `NAME=VERSION`, of what apt says it would install: `Inst NAME (VERSION SUITE [ARCH])`.
fn wanted(simulated: &str) -> Vec<String> {
    simulated
        .lines()
        .filter_map(|line| {
            let (name, rest) = line.strip_prefix("Inst ")?.split_once(" (")?;
            let version = rest.split(' ').next()?;
            let library = name.starts_with("lib") && !name.ends_with("-data");
            (library || OTHERS.contains(&name)).then(|| format!("{name}={version}"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_and_qemu_are_picked_with_their_versions() {
        let said = "Reading package lists...\n\
                    Inst libc6 (2.41-12 Debian:13.8/stable [amd64])\n\
                    Inst adduser (3.152 Debian:13.8/stable [all])\n\
                    Inst libasound2-data (1.2.16 Debian Backports:stable-backports [all])\n\
                    Inst qemu-system-x86 (1:11.1.3+ds-1~bpo13+1 Debian Backports:stable-backports [amd64])\n\
                    Conf libc6 (2.41-12 Debian:13.8/stable [amd64])\n";
        assert_eq!(wanted(said), ["libc6=2.41-12", "qemu-system-x86=1:11.1.3+ds-1~bpo13+1"]);
    }
}
