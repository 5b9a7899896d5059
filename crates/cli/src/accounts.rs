//! Users and groups that an option names: by number, or by a name of this host's own files.

use std::path::Path;

use crate::exit::{CliError, Exit};
use crate::words::read_capped;

/// Where this host's own users are, and its own groups: passwd(5), group(5).
const USERS: &str = "/etc/passwd";
const GROUPS: &str = "/etc/group";
/// Most bytes that are read of either.
const FILE_MAX: usize = 16 << 20;

/// The id of the user that `option` names.
pub(crate) fn uid(option: &str, user: &str) -> Result<u32, CliError> {
    id(option, "user", user, Path::new(USERS))
}

/// The id of the group that `option` names.
pub(crate) fn gid(option: &str, group: &str) -> Result<u32, CliError> {
    id(option, "group", group, Path::new(GROUPS))
}

fn id(option: &str, kind: &str, text: &str, file: &Path) -> Result<u32, CliError> {
    let usage = |text: String| CliError::new(Exit::Usage, format!("{option}: {text}"));
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        // The last one means nobody to the kernel.
        let number = text.parse().ok().filter(|number| *number != u32::MAX);
        return number.ok_or_else(|| usage(format!("{text} is no id of a {kind}")));
    }
    let bytes = read_capped(file, FILE_MAX)?;
    find(&String::from_utf8_lossy(&bytes), text).ok_or_else(|| {
        usage(format!(
            "there is no {kind} '{text}' in {}; one that comes from elsewhere, such as LDAP, is named by its number (`getent`)",
            file.display()
        ))
    })
}

/// The id behind `name`: its line's third field in both files.
fn find(file: &str, name: &str) -> Option<u32> {
    file.lines().find_map(|line| {
        let mut fields = line.split(':');
        let found = fields.next().filter(|found| !found.is_empty() && *found == name);
        found.and(fields.nth(1))?.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_is_a_number_or_a_name_of_the_hosts_files() {
        assert_eq!((uid("--x", "0").unwrap(), uid("--x", "root").unwrap()), (0, 0));
        assert_eq!(gid("--x", "0").unwrap(), 0);
        assert_eq!(gid("--x", "root").unwrap(), 0);
        assert_eq!(gid("--x", "4711").unwrap(), 4711);
        for bad in ["", "4294967295", "99999999999", "-1", "no such group", ":", "#"] {
            let error = gid("--control-group", bad).unwrap_err();
            assert_eq!(error.exit, Exit::Usage, "{bad}");
            assert!(error.text.starts_with("--control-group: "), "{bad}: {}", error.text);
        }
        let file = "root:x:0:\n#note\n:x:1:\nkvm:x:36:qemu,libvirt\nlibvirt:x:broken:\n";
        assert_eq!(find(file, "kvm"), Some(36));
        assert_eq!(find(file, "qemu"), None, "a member is no group");
        assert_eq!(find(file, "libvirt"), None);
        assert_eq!(find(file, ""), None);
    }
}
