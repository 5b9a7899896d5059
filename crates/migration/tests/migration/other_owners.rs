//! Files of another user of the host. Only root can give files away; without it the test says so.

use std::os::unix::fs::chown;

use vfio_migration::{open_regular, refuse_changeable};

#[test]
fn what_another_user_owns_is_refused_by_name() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("NOT TESTED: files of another user. Only root can give files away");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let inner = dir.path().join("inner");
    let file = inner.join("file");
    std::fs::create_dir(&inner).unwrap();
    std::fs::write(&file, "text").unwrap();
    let judged = || refuse_changeable(&file, &open_regular(&file).unwrap());
    judged().unwrap();
    for path in [dir.path(), &inner, &file] {
        chown(path, Some(54001), None).unwrap();
        let text = judged().unwrap_err().to_string();
        assert!(text.contains(&format!("{} belongs to user 54001", path.display())), "{text}");
        chown(path, Some(0), None).unwrap();
    }
    judged().unwrap();
}
