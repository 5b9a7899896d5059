//! Who has a VFIO group or device open, as procfs tells: asked before a device is opened, since opening is an act.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::files::{attribute, list};

/// A process that has a device open.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct User {
    /// Its id.
    pub pid: u32,
    /// Its name; `None` when procfs does not say.
    pub command: Option<String>,
}

/// Everybody who has a file under `dev/vfio` open, by file. What the caller may not see (other users' processes) is not
/// in it.
pub(super) fn all(proc: &Path, dev: &Path) -> BTreeMap<PathBuf, Vec<User>> {
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
