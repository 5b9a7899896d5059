//! Files that decide whom to trust, and that another user of the host could change, or put another in the place of.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{File, Metadata};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use crate::regular_file::FileError;

const OTHERS_WRITE: u32 = 0o002;
const STICKY: u32 = 0o1000;
/// Most symbolic links that the kernel follows in one path (path_resolution(7)).
const LINKS_MAX: u32 = 40;

/// Refuses a `file`, opened by this path, that another user owns or anybody may write to, or to which a folder or symbolic link leads
/// of which that is true. In a folder with the sticky bit, as /tmp, anybody makes files, and takes away none that are another's.
///
/// Ours are those of root and of our own user. What a group may write to is its members' affair.
///
/// # Errors
/// What another may change.
pub fn refuse_changeable(path: &Path, file: &File) -> Result<(), FileError> {
    let found = file.metadata().map_err(looking_at(path))?;
    let owners = Owners::now()?;
    owners.judge(path, &found)?;
    writable(path, &found, found.mode() & OTHERS_WRITE != 0)?;
    walk(path, &owners)
}

/// The same of a folder in which files are to be made, as far as there is one.
///
/// # Errors
/// What another may change.
pub fn refuse_changeable_folder(path: &Path) -> Result<(), FileError> {
    walk(&path.join("file"), &Owners::now()?)
}

/// Follows a path as the kernel does, and judges each folder and symbolic link that it goes by. It ends early where nothing is.
fn walk(path: &Path, owners: &Owners) -> Result<(), FileError> {
    let path = std::path::absolute(path).map_err(looking_at(path))?;
    let mut left: VecDeque<OsString> = names(&path).collect();
    let (mut here, mut links) = (PathBuf::from("/"), 0);
    loop {
        let folder = here.metadata().map_err(looking_at(&here))?;
        let Some(name) = left.pop_front() else { return Ok(()) };
        if !folder.is_dir() {
            return Ok(());
        }
        owners.judge(&here, &folder)?;
        writable(&here, &folder, folder.mode() & OTHERS_WRITE != 0 && folder.mode() & STICKY == 0)?;
        if name == ".." {
            here.pop();
            continue;
        }
        let entry = here.join(&name);
        let found = match entry.symlink_metadata() {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            found => found.map_err(looking_at(&entry))?,
        };
        // Whose it is counts where anybody may make one.
        owners.judge(&entry, &found)?;
        if !found.is_symlink() {
            here = entry;
            continue;
        }
        links += 1;
        if links > LINKS_MAX {
            return Err(looking_at(&path)(rustix::io::Errno::LOOP.into()));
        }
        let target = entry.read_link().map_err(looking_at(&entry))?;
        if target.is_absolute() {
            here = PathBuf::from("/");
        }
        for name in names(&target).collect::<Vec<_>>().into_iter().rev() {
            left.push_front(name);
        }
    }
}

fn names(path: &Path) -> impl Iterator<Item = OsString> {
    path.components().filter_map(|part| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    })
}

fn looking_at(path: &Path) -> impl Fn(std::io::Error) -> FileError {
    move |source| FileError::System { doing: "looking at", path: path.into(), source }
}

fn writable(path: &Path, found: &Metadata, writable: bool) -> Result<(), FileError> {
    if writable {
        return Err(FileError::Changeable { path: path.into(), mode: found.mode() & 0o7777 });
    }
    Ok(())
}

/// Users whose files are taken.
struct Owners {
    /// Ours.
    user: u32,
    /// The root folder's: root, or whoever is shown as its owner in a user namespace into which root is not mapped.
    root: u32,
}

impl Owners {
    fn now() -> Result<Self, FileError> {
        let root = Path::new("/").metadata().map_err(looking_at(Path::new("/")))?.uid();
        Ok(Self { user: rustix::process::geteuid().as_raw(), root })
    }

    fn judge(&self, path: &Path, found: &Metadata) -> Result<(), FileError> {
        let owner = found.uid();
        if owner == 0 || owner == self.user || owner == self.root {
            return Ok(());
        }
        Err(FileError::OfAnother { path: path.into(), owner, user: self.user })
    }
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;
    use crate::regular_file::open_regular;

    fn judged(path: &Path) -> Result<(), String> {
        refuse_changeable(path, &open_regular(path).unwrap()).map_err(|error| error.to_string())
    }

    fn mode(path: &Path, mode: u32) {
        std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn what_anybody_may_change_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let (open, link) = (dir.path().join("open"), dir.path().join("link"));
        let inner = open.join("inner");
        let (file, by_folder) = (inner.join("file"), dir.path().join("folder/file"));
        std::fs::create_dir_all(&inner).unwrap();
        std::fs::write(&file, "text").unwrap();
        symlink(&file, &link).unwrap();
        symlink("open/../open/inner", dir.path().join("folder")).unwrap();
        for (of_open, of_inner, of_file, names) in [
            (0o755, 0o755, 0o644, None),
            (0o775, 0o775, 0o664, None),
            // By the name that was asked for: chmod goes where a link leads.
            (0o755, 0o755, 0o646, Some("may be changed by anybody (mode 0646): chmod o-w it")),
            (0o755, 0o757, 0o644, Some("inner may be changed by anybody (mode 0757): chmod o-w it")),
            // Whoever may rename what is in it puts another `inner` there.
            (0o757, 0o700, 0o600, Some("open may be changed by anybody (mode 0757): chmod o-w it")),
            // Nobody else takes ours away there.
            (0o1777, 0o755, 0o644, None),
            (0o1777, 0o1777, 0o644, None),
            (0o1777, 0o755, 0o666, Some("may be changed by anybody (mode 0666)")),
        ] {
            mode(&open, of_open);
            mode(&inner, of_inner);
            mode(&file, of_file);
            for path in [&file, &link, &by_folder] {
                match (judged(path), names) {
                    (Ok(()), None) => {}
                    (Err(text), Some(says)) if text.contains(says) => {}
                    other => panic!("{} {of_open:o} {of_inner:o} {of_file:o}: {other:?}", path.display()),
                }
            }
        }
    }

    /// A link of ours may lie where anybody puts another in its place.
    #[test]
    fn links_are_judged_where_they_lie() {
        let dir = tempfile::tempdir().unwrap();
        let (open, file) = (dir.path().join("open"), dir.path().join("file"));
        std::fs::create_dir(&open).unwrap();
        std::fs::write(&file, "text").unwrap();
        symlink("../file", open.join("link")).unwrap();
        symlink("open/link", dir.path().join("outer")).unwrap();
        for (of_open, taken) in [(0o755, true), (0o777, false), (0o1777, true)] {
            mode(&open, of_open);
            assert_eq!(judged(&dir.path().join("outer")).is_ok(), taken, "{of_open:o}");
        }
    }

    #[test]
    fn a_folder_is_judged_as_far_as_there_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let open = dir.path().join("open");
        std::fs::create_dir(&open).unwrap();
        for (of_open, taken) in [(0o700, true), (0o777, false)] {
            mode(&open, of_open);
            for path in [open.clone(), open.join("to/come")] {
                assert_eq!(refuse_changeable_folder(&path).is_ok(), taken, "{of_open:o} {}", path.display());
            }
        }
    }
}
