//! What a `vm` writes down of a session that has ended: a line on stderr, and a record in the state directory.
//!
//! The record is written where the session is over and its guest runs again, here or there, so that a slow disk costs
//! nobody's downtime. That it cannot be written is said, and changes nothing else.

use std::fs::File;
use std::io::{Error, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use vfio_migration::{AttemptInfo, AttemptKind, Progress, open_regular_to_append};
use vfio_migration_types::{VmId, error_chain, is_control, printable, rfc3339};

use crate::control::protocol::MigrationInfo;
use crate::control::security::SecurityInfo;
use crate::history::{FILE_MAX, HISTORY, HistoryRecord, LINE_MAX, OLDER, SessionKind, ending};
use crate::units::milliseconds;
use crate::verdict;

/// Target of the lines that are said by default.
pub(super) const SESSION: &str = "session";
/// Longest wait for another process that writes its record.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
/// Longest error that is kept where the line would be too long, in characters; and most reasons.
const LONGEST_ERROR: usize = 2000;
const MOST_REASONS: usize = 16;

/// Says that a session has begun.
pub(super) fn session_began(attempt: &AttemptInfo, direction: &str) {
    let kind = kind(attempt.kind).name();
    let way = if direction == "incoming" { "from" } else { "to" };
    let AttemptInfo { vm, peer, attempt, .. } = attempt;
    let (of, peer) = (of_vm(*vm), printable(peer));
    tracing::info!(target: SESSION, "{kind}{of} {way} {peer} begins (attempt {attempt})");
}

/// Says how the connection of a session is secured.
pub(super) fn session_connected(attempt: &AttemptInfo, direction: &str) {
    let Some(how) = security(attempt).and_then(|security| security.sentence()) else { return };
    let way = if direction == "incoming" { "from" } else { "to" };
    let (kind, of, peer) = (kind(attempt.kind).name(), of_vm(attempt.vm), printable(&attempt.peer));
    tracing::info!(target: SESSION, "{kind}{of} {way} {peer} is connected {how}");
}

/// The VM that a session is about, where one is named.
fn of_vm(vm: VmId) -> String {
    if vm.names_a_vm() { format!(" of VM {vm}") } else { String::new() }
}

fn security(attempt: &AttemptInfo) -> Option<SecurityInfo> {
    attempt.security.as_ref().map(SecurityInfo::from)
}

/// `info`, which says how a session has ended, with the downtime that the session had last predicted and its limit.
pub(super) fn with_foreseen(info: MigrationInfo, progress: &Progress) -> MigrationInfo {
    let kind = progress.attempt.as_ref().map(|attempt| attempt.kind);
    let limited =
        info.direction.as_deref() == Some("outgoing") && kind.is_some_and(|kind| kind != AttemptKind::Save);
    let predicted = info.expected_downtime_ms.or(progress.predicted_downtime.map(milliseconds));
    MigrationInfo {
        attempt: info.attempt.or(progress.attempt.as_ref().map(|attempt| attempt.attempt.to_string())),
        security: info.security.or(progress.attempt.as_ref().and_then(security)),
        expected_downtime_ms: predicted,
        downtime_limit_ms: if limited {
            Some(milliseconds(progress.downtime_limit))
        } else {
            info.downtime_limit_ms
        },
        ..info
    }
}

/// Says how the session of which `progress` is the last has ended, and writes it down in the state directory `dir`. Nothing,
/// if none was begun: nobody came.
pub(super) fn session_ended(dir: Option<&Path>, progress: &Progress, info: &MigrationInfo) {
    let Some(attempt) = &progress.attempt else { return };
    record(dir, attempt, kind(attempt.kind), info.clone());
}

/// Says how a session ended, and writes it down.
pub(super) fn record(dir: Option<&Path>, attempt: &AttemptInfo, kind: SessionKind, info: MigrationInfo) {
    let way = if info.direction.as_deref() == Some("incoming") { "from" } else { "to" };
    let why = verdict::why(&info).unwrap_or_default();
    let mut lines = why.lines();
    let why = lines.next().map_or(String::new(), |why| format!(": {why}"));
    tracing::info!(
        target: SESSION,
        "{}{} {way} {}: {}{why}",
        kind.name(),
        of_vm(attempt.vm),
        printable(&attempt.peer),
        ending(&info)
    );
    // The reasons of a refusal, as everywhere.
    for line in lines {
        tracing::info!(target: SESSION, "{line}");
    }
    for failure in &info.left_undone {
        tracing::info!(target: SESSION, "left undone: {}", printable(&failure.text));
    }
    let Some(dir) = dir else { return };
    let record = HistoryRecord {
        version: 1,
        vm: attempt.vm.names_a_vm().then(|| attempt.vm.to_string()),
        attempt: Some(attempt.attempt.to_string()),
        kind,
        peer: Some(attempt.peer.clone()),
        epoch: Some(attempt.epoch.0),
        began: attempt.began.clone(),
        ended: rfc3339(SystemTime::now()),
        migration: info,
        truncated: false,
    };
    if let Err(error) = append(dir, &record) {
        tracing::warn!(%error, file = %dir.join(HISTORY).display(), "the session is missing in the history");
    }
}

pub(super) fn kind(kind: AttemptKind) -> SessionKind {
    match kind {
        AttemptKind::Rehearsal => SessionKind::Rehearsal,
        AttemptKind::Check => SessionKind::Check,
        AttemptKind::Save => SessionKind::Save,
        AttemptKind::Restore => SessionKind::Restore,
        _ => SessionKind::Migration,
    }
}

/// Appends a record by one write, and has it on disk when it returns.
fn append(dir: &Path, record: &HistoryRecord) -> Result<(), Error> {
    let path = dir.join(HISTORY);
    let _alone = alone(dir)?;
    if path.metadata().is_ok_and(|file| file.len() >= FILE_MAX) {
        std::fs::rename(&path, dir.join(OLDER))?;
    }
    let mut file = open_regular_to_append(&path).map_err(|error| Error::other(error_chain(&error)))?;
    let len = file.metadata()?.len();
    let mut last = [b'\n'];
    if len > 0 {
        file.read_exact_at(&mut last, len - 1)?;
    }
    // What a crash tore stays a line of its own.
    let mut text = if last == *b"\n" { String::new() } else { "\n".to_owned() };
    text.push_str(&line(record)?);
    file.write_all(text.as_bytes())?;
    file.sync_data()?;
    if len == 0 {
        File::open(dir)?.sync_all()?;
    }
    Ok(())
}

/// The lock by which processes write one after the other. Who does not get it in time writes all the same: a line is one
/// write, and at worst a record lands in the older file.
fn alone(dir: &Path) -> Result<Option<File>, Error> {
    let file = open_regular_to_append(&dir.join(format!("{HISTORY}.lock")))
        .map_err(|error| Error::other(error_chain(&error)))?;
    let begun = Instant::now();
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Some(file)),
            Err(Errno::WOULDBLOCK | Errno::INTR) if begun.elapsed() < LOCK_PATIENCE => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(_) => return Ok(None),
        }
    }
}

/// The record's line, of at most [`LINE_MAX`] bytes. Part of it was said by others, who may have said much.
fn line(record: &HistoryRecord) -> Result<String, Error> {
    let whole = written(record)?;
    if whole.len() <= LINE_MAX {
        return Ok(whole);
    }
    let mut short = record.clone();
    short.truncated = true;
    short.migration.rehearsal = None;
    short.migration.reasons.truncate(MOST_REASONS);
    let cut = |text: &str| text.chars().take(LONGEST_ERROR).collect::<String>();
    short.migration.error = short.migration.error.as_deref().map(cut);
    short.peer = short.peer.as_deref().map(cut);
    loop {
        let text = written(&short)?;
        if text.len() <= LINE_MAX {
            return Ok(text);
        }
        if short.migration.reasons.pop().is_none() {
            let migration = MigrationInfo {
                direction: short.migration.direction.clone(),
                total_ms: short.migration.total_ms,
                downtime_ms: short.migration.downtime_ms,
                ..MigrationInfo::new(short.migration.status)
            };
            return written(&HistoryRecord { peer: None, migration, ..short });
        }
    }
}

/// The record as a line. What a terminal would obey is escaped, so that the file can be looked at.
fn written(record: &HistoryRecord) -> Result<String, Error> {
    let text = serde_json::to_string(record)?;
    let escaped = |c: char| match c {
        // As JSON writes what lies beyond four digits: as two.
        c if is_control(c) => {
            c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect()
        }
        c => c.to_string(),
    };
    let mut line: String = text.chars().map(escaped).collect();
    line.push('\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::protocol::MigrationStatus;
    use crate::history::History;

    fn record(error: &str) -> HistoryRecord {
        HistoryRecord {
            version: 1,
            vm: Some("6f1c7c5e-0d5e-4a39-9a10-5a0b8a3c2d41".into()),
            attempt: Some("ab".repeat(16)),
            kind: SessionKind::Migration,
            peer: Some("tcp:127.0.0.1:1".into()),
            epoch: Some(3),
            began: "2026-11-30T00:00:00.000Z".into(),
            ended: "2026-11-30T00:00:01.000Z".into(),
            migration: MigrationInfo {
                error: Some(error.into()),
                ..MigrationInfo::new(MigrationStatus::Failed)
            },
            truncated: false,
        }
    }

    #[test]
    fn a_line_that_was_torn_costs_no_other() {
        let dir = tempfile::tempdir().unwrap();
        append(dir.path(), &record("one")).unwrap();
        let path = dir.path().join(HISTORY);
        let torn = std::fs::read(&path).unwrap();
        std::fs::write(&path, [&torn[..], &torn[..torn.len() / 2]].concat()).unwrap();
        append(dir.path(), &record("two")).unwrap();
        let history = History::read(dir.path()).unwrap();
        assert_eq!(history.unreadable, 1);
        let errors: Vec<_> = history.records.iter().map(|record| record.migration.error.clone()).collect();
        assert_eq!(errors, [Some("one".into()), Some("two".into())]);
    }

    #[test]
    fn lines_are_short_whatever_was_said_and_plain() {
        let dir = tempfile::tempdir().unwrap();
        let said = "\u{9b}31m\x1b[31m\n\u{7f}é\"\\".repeat(20_000);
        append(dir.path(), &record(&said)).unwrap();
        let mut peer = record("short");
        peer.peer = Some(said);
        append(dir.path(), &peer).unwrap();
        let text = std::fs::read_to_string(dir.path().join(HISTORY)).unwrap();
        assert!(text.lines().all(|line| line.len() <= LINE_MAX));
        assert!(text.chars().all(|c| c == '\n' || !is_control(c)));
        let history = History::read(dir.path()).unwrap();
        assert_eq!((history.records.len(), history.unreadable), (2, 0));
        assert!(history.records.iter().all(|record| record.truncated));
        let error = history.records[0].migration.error.as_ref().unwrap();
        assert!(error.starts_with("\u{9b}31m\x1b[31m\n\u{7f}é\"\\"), "it reads back as it was");
    }

    #[test]
    fn a_full_file_makes_room_for_another() {
        let dir = tempfile::tempdir().unwrap();
        let long = "x".repeat(60_000);
        let written = 2 * usize::try_from(FILE_MAX).unwrap() / long.len() + 8;
        for number in 0..written {
            append(dir.path(), &record(&format!("{number} {long}"))).unwrap();
        }
        for name in [HISTORY, OLDER] {
            let len = dir.path().join(name).metadata().unwrap().len();
            assert!(len < FILE_MAX + LINE_MAX as u64, "{name}: {len}");
        }
        let history = History::read(dir.path()).unwrap();
        assert_eq!(history.unreadable, 0);
        let last = history.records.last().unwrap().migration.error.as_ref().unwrap();
        assert!(last.starts_with(&format!("{} ", written - 1)));
    }

    #[test]
    fn processes_that_write_at_once_lose_nothing() {
        const WRITERS: usize = 8;
        for _ in 0..20 {
            let dir = tempfile::tempdir().unwrap();
            // As full as a file gets: each finds that another is due.
            let full = written(&record("before")).unwrap();
            let lines = usize::try_from(FILE_MAX).unwrap() / full.len() + 1;
            std::fs::write(dir.path().join(HISTORY), full.repeat(lines)).unwrap();
            let together = std::sync::Barrier::new(WRITERS);
            std::thread::scope(|scope| {
                for number in 0..WRITERS {
                    let (dir, together) = (dir.path(), &together);
                    scope.spawn(move || {
                        together.wait();
                        append(dir, &record(&format!("{number}"))).unwrap();
                    });
                }
            });
            let history = History::read(dir.path()).unwrap();
            assert_eq!((history.records.len(), history.unreadable), (lines + WRITERS, 0));
        }
    }
}
