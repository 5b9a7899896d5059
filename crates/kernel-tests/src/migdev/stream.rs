//! State that moves while it changes.

use std::os::fd::AsFd;

use rustix::io::Errno;
use vfio_migration_guest_driver::registers::offset;
use vfio_migration_types::MigrationState;
use vfio_migration_uapi::{device_state, precopy_info, reset, set_device_state, stop_copy_size};

use super::dma::by_group;
use super::driver::Job;
use super::{Ended, get, go, open_data, read_all, save, set, small, write_all};
use crate::check::{Outcome, holds, same};
use crate::instance::Instance;

/// A header, and a record of one page.
const HEADER: u64 = 32;
const RECORD: u64 = 24 + 4096;
const PAGES: u64 = 64;

/// Pre-copy while the state changes, switchover, and the same contents on the other side, which goes on.
pub(crate) fn contents_move() -> Outcome {
    let (from, to) = (small()?, small()?);
    for instance in [&from, &to] {
        set(instance, "state_size", PAGES * 4096)?;
        set(instance, "dirty_rate", 0)?;
    }
    let (mut source, destination) = (by_group(&from)?, by_group(&to)?);
    source.enable()?;
    source.write(2, 5000, b"in the mailbox")?;
    source.post(Job { at: 0x4_0000, len: 4096, flags: 0 })?;
    source.wait(0, 1)?;
    let device = source.fd()?;
    let saving = open_data(device, MigrationState::PreCopy)?;
    let loading = open_data(destination.fd()?, MigrationState::Resuming)?;
    let info = precopy_info(saving.as_fd())?;
    same("at first", (info.initial_bytes, info.dirty_bytes), (HEADER + PAGES * RECORD, 0))?;
    let mut early = Vec::new();
    same("pre-copy ends", read_all(&saving, &mut early)?, Ended::NoMessage)?;
    same("initial bytes", early.len() as u64, HEADER + PAGES * RECORD)?;
    same("left", precopy_info(saving.as_fd())?.initial_bytes, 0)?;
    set(&from, "dirty_rate", 2000)?;
    while precopy_info(saving.as_fd())?.dirty_bytes < 8 * RECORD {
        std::thread::yield_now();
    }
    read_all(&saving, &mut early)?;
    holds(early.len() as u64 >= HEADER + (PAGES + 8) * RECORD, "changed pages came")?;
    write_all(&loading, &early)?;
    while precopy_info(saving.as_fd())?.dirty_bytes < 2 * RECORD {
        std::thread::yield_now();
    }
    holds(go(device, MigrationState::PreCopyP2p)?.is_none(), "the same descriptor")?;
    holds(go(device, MigrationState::StopCopy)?.is_none(), "the same descriptor")?;
    let size = stop_copy_size(device)?;
    let mut late = Vec::new();
    same("stop-copy ends", read_all(&saving, &mut late)?, Ended::Zero)?;
    same("the estimate, standing still", size, late.len() as u64)?;
    same("the end again", rustix::io::read(&saving, &mut [0; 8]), Ok(0))?;
    let refused = precopy_info(saving.as_fd()).err().and_then(|error| error.errno());
    same("progress in STOP_COPY", refused, Some(Errno::INVAL))?;
    write_all(&loading, &late)?;
    go(destination.fd()?, MigrationState::Stop)?;
    same("a session that ended", rustix::io::write(&loading, &[0]), Err(Errno::NODEV))?;
    go(device, MigrationState::Stop)?;
    let (ours, theirs) = (save(device)?, save(destination.fd()?)?);
    holds(ours == theirs, "both hold the same")?;
    // Not by looking away: another state gives another stream.
    go(device, MigrationState::Running)?;
    source.post(Job { at: 0x4_0000, len: 128, flags: 0 })?;
    source.wait(0, 2)?;
    go(source.fd()?, MigrationState::Stop)?;
    holds(save(source.fd()?)? != theirs, "the source went on, and is another now")?;
    let mut text = [0; 14];
    destination.read(2, 5000, &mut text)?;
    same("mailbox", &text, b"in the mailbox")?;
    same("blocks", destination.read64(offset::BLOCKS0)?, 1)?;
    go(destination.fd()?, MigrationState::Running)?;
    same("damage", get(&to, "integrity")?, 0)
}

/// 64 MiB, twice the same.
pub(crate) fn large() -> Outcome {
    let instance = Instance::new("migdev", "migdev-64M")?;
    set(&instance, "dirty_rate", 0)?;
    let opened = instance.open()?;
    let device = opened.device()?;
    go(device, MigrationState::Stop)?;
    let size = stop_copy_size(device)?;
    let (first, second) = (save(device)?, save(device)?);
    same("the estimate", size, first.len() as u64)?;
    holds(first.len() > 64 << 20 && first == second, "twice the same")
}

/// State of a newer version is refused with its header, of an older one taken.
pub(crate) fn versions() -> Outcome {
    let (old, new) = (small()?, small()?);
    set(&new, "version", 2)?;
    for (from, to, wanted) in [(&old, &new, Ok(())), (&new, &old, Err(Errno::OPNOTSUPP))] {
        let bytes = save(from.open()?.device()?)?;
        let opened = to.open()?;
        let loading = open_data(opened.device()?, MigrationState::Resuming)?;
        let header = bytes.get(..32).ok_or("no header")?;
        same("a header", write_all(&loading, header), wanted)?;
        if wanted.is_err() {
            same("what follows", write_all(&loading, &bytes[32..]), Err(Errno::INVAL))?;
            holds(set_device_state(opened.device()?, MigrationState::Stop).is_err(), "not taken")?;
            same("where it is", device_state(opened.device()?)?, MigrationState::Resuming)?;
        }
    }
    Ok(())
}

/// Any one altered byte is found, and any missing end; the whole stream, cut anywhere, is taken.
pub(crate) fn damage() -> Outcome {
    let instance = small()?;
    set(&instance, "state_size", 8192)?;
    set(&instance, "dirty_rate", 0)?;
    let opened = instance.open()?;
    let device = opened.device()?;
    let bytes = save(device)?;
    let taken = |bytes: &[u8], cut: usize| -> Outcome<bool> {
        reset(device)?;
        let loading = open_data(device, MigrationState::Resuming)?;
        let (first, second) = bytes.split_at(cut.min(bytes.len()));
        let written = write_all(&loading, first).and_then(|()| write_all(&loading, second));
        Ok(written.is_ok() && set_device_state(device, MigrationState::Stop).is_ok())
    };
    for cut in [0, 1, 31, 32, 33, 55, 56, 57, bytes.len() - 1] {
        holds(taken(&bytes, cut)?, &format!("whole, written in two at {cut}"))?;
    }
    for at in (0..bytes.len()).step_by(61).chain(0..64).chain(bytes.len() - 240..bytes.len()) {
        let mut wrong = bytes.clone();
        wrong[at] ^= 4;
        holds(!taken(&wrong, 4096)?, &format!("byte {at} of {} altered", bytes.len()))?;
    }
    for len in [0, 1, 32, 56, 4152, 8272, bytes.len() - 40, bytes.len() - 1] {
        holds(!taken(&bytes[..len], 4096)?, &format!("only {len} of {} bytes", bytes.len()))?;
    }
    let longer = [bytes.as_slice(), &[0]].concat();
    holds(!taken(&longer, 4096)?, "a byte after the end")
}
