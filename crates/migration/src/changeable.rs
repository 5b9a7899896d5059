//! Files that decide whom to trust, and that anybody on the host could change, or put another in the place of.

use std::fs::{File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::regular_file::FileError;

const OTHERS_WRITE: u32 = 0o002;
const STICKY: u32 = 0o1000;

/// Refuses a `file`, opened by this path, that anybody may write to, or that lies in a folder where anybody may put another in its
/// place. Links are judged where they lie, and where they lead.
///
/// # Errors
/// What anybody may change.
pub fn refuse_changeable(path: &Path, file: &File) -> Result<(), FileError> {
    let found = file.metadata().map_err(|source| FileError::System {
        doing: "looking at",
        path: path.into(),
        source,
    })?;
    refuse(path, &found, found.mode() & OTHERS_WRITE != 0)?;
    let named = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let led_to = named.canonicalize().unwrap_or_else(|_| named.clone());
    for path in [named, led_to] {
        let Some(folder) = path.parent() else { continue };
        let Ok(of_folder) = folder.metadata() else { continue };
        // In a folder with the sticky bit anybody makes files, and takes away none that are another's.
        let sticky = of_folder.mode() & STICKY != 0;
        let kept = sticky && path.symlink_metadata().is_ok_and(|found| is_trusted(found.uid()));
        refuse(folder, &of_folder, of_folder.mode() & OTHERS_WRITE != 0 && !kept)?;
    }
    Ok(())
}

fn refuse(path: &Path, found: &Metadata, changeable: bool) -> Result<(), FileError> {
    if changeable {
        return Err(FileError::Changeable { path: path.into(), mode: found.mode() & 0o7777 });
    }
    Ok(())
}

fn is_trusted(owner: u32) -> bool {
    owner == 0 || owner == rustix::process::geteuid().as_raw()
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

    #[test]
    fn what_anybody_may_change_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let mode = |path: &Path, mode| std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        let (open, link) = (dir.path().join("open"), dir.path().join("link"));
        let file = open.join("file");
        std::fs::create_dir(&open).unwrap();
        std::fs::write(&file, "text").unwrap();
        symlink(&file, &link).unwrap();
        for (of_folder, of_file, names) in [
            (0o755, 0o644, None),
            (0o775, 0o664, None),
            // By the name that was asked for: chmod goes where a link leads.
            (0o755, 0o646, Some("may be changed by anybody (mode 0646): chmod o-w it")),
            (0o757, 0o644, Some("open may be changed by anybody (mode 0757): chmod o-w it")),
            // Nobody else takes our file away there.
            (0o1777, 0o644, None),
            (0o1777, 0o666, Some("may be changed by anybody (mode 0666)")),
        ] {
            mode(&open, of_folder);
            mode(&file, of_file);
            for path in [&file, &link] {
                match (judged(path), names) {
                    (Ok(()), None) => {}
                    (Err(text), Some(says)) if text.contains(says) => {}
                    other => panic!("{} {of_folder:o} {of_file:o}: {other:?}", path.display()),
                }
            }
        }
    }
}
