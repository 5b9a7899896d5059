//! Files that opening a device takes (its own file and the iommufd's where the kernel has both, else its group's and
//! the container's), and the processes that have one open, by procfs: asked before a device is opened, since opening is
//! an act.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::files::{access_both_ways, attribute, list};

/// A file that has to be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct NeededFile {
    /// Path of the file.
    pub path: PathBuf,
    /// The errno with which the caller cannot open it: ENOENT, EACCES and the like.
    pub refusal: Option<Errno>,
}

/// The files to open for a device with these files of its own, in the order of opening. Empty where it has none.
pub(super) fn needed(dev: &Path, cdev: Option<&Path>, group: Option<&Path>) -> Vec<NeededFile> {
    let (iommufd, container) = (dev.join("iommu"), dev.join("vfio/vfio"));
    let route = match (cdev, group) {
        (Some(cdev), group) if group.is_none() || iommufd.exists() => vec![cdev.to_owned(), iommufd],
        (_, Some(group)) => vec![group.to_owned(), container],
        _ => Vec::new(),
    };
    let file = |path: PathBuf| NeededFile { refusal: access_both_ways(&path).err(), path };
    route.into_iter().map(file).collect()
}

/// A process that has a device open.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct User {
    /// Id of the process.
    pub pid: u32,
    /// Name of the process; `None` when procfs does not have it.
    pub command: Option<String>,
}

/// Everybody who has a file under `dev/vfio` open, by file. What the caller may not see (other users' processes) is not
/// in it.
pub(super) fn users(proc: &Path, dev: &Path) -> BTreeMap<PathBuf, Vec<User>> {
    let vfio = dev.join("vfio");
    let mut users: BTreeMap<PathBuf, Vec<User>> = BTreeMap::new();
    for name in list(proc).unwrap_or_default() {
        let Ok(pid) = name.parse::<u32>() else { continue };
        let dir = proc.join(&name);
        for fd in list(&dir.join("fd")).unwrap_or_default() {
            let Ok(file) = std::fs::read_link(dir.join("fd").join(fd)) else { continue };
            if file.starts_with(&vfio) {
                let user = User { pid, command: attribute(&dir.join("comm")) };
                let of_file = users.entry(file).or_default();
                if !of_file.contains(&user) {
                    of_file.push(user);
                }
            }
        }
    }
    users
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dev: &Path, cdev: bool, group: bool) -> Vec<(String, bool)> {
        let path = |there: bool, name: &str| there.then(|| dev.join(name));
        let (cdev, group) = (path(cdev, "vfio/devices/vfio0"), path(group, "vfio/7"));
        let shown = |file: NeededFile| {
            (file.path.strip_prefix(dev).unwrap().display().to_string(), file.refusal.is_none())
        };
        needed(dev, cdev.as_deref(), group.as_deref()).into_iter().map(shown).collect()
    }

    #[test]
    fn a_file_of_its_own_is_of_use_with_an_iommufd_alone() {
        let top = tempfile::tempdir().unwrap();
        let dev = top.path();
        std::fs::create_dir_all(dev.join("vfio/devices")).unwrap();
        for file in ["vfio/devices/vfio0", "vfio/7", "vfio/vfio"] {
            std::fs::write(dev.join(file), "").unwrap();
        }
        let by_group = [("vfio/7".to_owned(), true), ("vfio/vfio".to_owned(), true)];
        assert_eq!(names(dev, true, true), by_group);
        assert_eq!(names(dev, false, true), by_group);
        let own = "vfio/devices/vfio0".to_owned();
        assert_eq!(names(dev, true, false), [(own.clone(), true), ("iommu".into(), false)]);
        std::fs::write(dev.join("iommu"), "").unwrap();
        assert_eq!(names(dev, true, true), [(own, true), ("iommu".into(), true)]);
        assert_eq!(names(dev, false, false), []);
    }
}
