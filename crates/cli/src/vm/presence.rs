//! The lock that keeps a second process from starting a VM that has a process already.
//!
//! The ownership journal holds what a dead process left. It does not hold whether the process is dead; a lock does, which
//! the kernel takes back with the process. It is shared while a guest is here or on its way here, since both sides of a
//! migration may keep their journals in one folder, and it has to be had alone for a moment to start a guest.

use std::fs::File;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use vfio_migration::open_regular_to_append;
use vfio_migration_types::{VmId, error_chain};

/// The lock of the VM whose guest is here.
#[derive(Debug, Default)]
pub(super) struct Presence(Mutex<Option<File>>);

impl Presence {
    /// Takes the lock to start a guest: alone for a moment, so that nobody else has it.
    pub(super) fn start(&self, dir: &Path, vm: VmId) -> Result<(), String> {
        let file = open(dir, vm)?;
        // Not in one step: between the two another process may come first, and then the second fails.
        for operation in [FlockOperation::NonBlockingLockExclusive, FlockOperation::NonBlockingLockShared] {
            lock(&file, operation, dir, vm)?;
        }
        self.replace(Some(file));
        Ok(())
    }

    /// Takes the lock for a guest that comes in.
    pub(super) fn receive(&self, dir: &Path, vm: VmId) -> Result<(), String> {
        let file = open(dir, vm)?;
        lock(&file, FlockOperation::NonBlockingLockShared, dir, vm)?;
        self.replace(Some(file));
        Ok(())
    }

    /// Gives the lock back: the guest has left, or did not come.
    pub(super) fn end(&self) {
        self.replace(None);
    }

    fn replace(&self, file: Option<File>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = file;
    }
}

/// Makes the folder if it is not there, and finds out now whether a journal can be written there.
pub(super) fn prepare(dir: &Path) -> Result<(), String> {
    let failed = |error: std::io::Error| {
        format!("the state folder {} cannot be used: {}", dir.display(), error_chain(&error))
    };
    std::fs::create_dir_all(dir).map_err(failed)?;
    tempfile::tempfile_in(dir).map_err(failed)?;
    Ok(())
}

fn open(dir: &Path, vm: VmId) -> Result<File, String> {
    let path = dir.join(format!("{vm}.vm.lock"));
    open_regular_to_append(&path).map_err(|error| format!("the lock cannot be used: {}", error_chain(&error)))
}

fn lock(file: &File, operation: FlockOperation, dir: &Path, vm: VmId) -> Result<(), String> {
    flock(file, operation).map_err(|errno| match errno {
        Errno::WOULDBLOCK => {
            format!("another process has VM {vm}, by its lock in {}: end that one first", dir.display())
        }
        errno => format!("VM {vm} cannot be locked in {}: {}", dir.display(), error_chain(&errno)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const VM: VmId = VmId([7; 16]);

    #[test]
    fn a_vm_that_is_here_is_not_started_again() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second, arriving) = (Presence::default(), Presence::default(), Presence::default());
        first.start(dir.path(), VM).unwrap();
        assert!(second.start(dir.path(), VM).unwrap_err().contains("another process has"));
        second.start(dir.path(), VmId([8; 16])).unwrap();
        // The other side of a migration on this host.
        arriving.receive(dir.path(), VM).unwrap();
        first.end();
        assert!(second.start(dir.path(), VM).is_err(), "it is at the other side now");
        arriving.end();
        second.start(dir.path(), VM).unwrap();
    }

    #[test]
    fn a_folder_that_cannot_be_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(prepare(&file.join("state")).unwrap_err().contains("state"));
        prepare(&dir.path().join("a/b")).unwrap();
    }
}
