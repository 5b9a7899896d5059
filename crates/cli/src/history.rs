//! The history of a state directory: a record for each session that ended there, of whichever side and of every `vm` that has
//! this directory. Here is how the records are laid out and read; `vm` writes them.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use vfio_migration_types::printable;

use crate::control::protocol::{MigrationInfo, MigrationStatus};
use crate::control::security::SecurityInfo;
use crate::exit::CliError;
use crate::verdict;
use crate::words::read_capped;

/// The file of the records, one JSON object per line, the latest last.
pub(crate) const HISTORY: &str = "history.jsonl";
/// The file that came before it.
pub(crate) const OLDER: &str = "history.jsonl.1";
/// Longest line, in bytes, with its end.
pub(crate) const LINE_MAX: usize = 64 << 10;
/// Most bytes that are read of a file: twice what one that is begun anew in time can have.
const READ_MAX: usize = 2 << 20;
/// Size of the file, in bytes, from which a new one is begun.
pub(crate) const FILE_MAX: u64 = 1 << 20;

/// A session that ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct HistoryRecord {
    /// Layout of the record: 1.
    pub(crate) version: u32,
    /// Identity of the VM; null, where a check named none.
    #[serde(default)]
    pub(crate) vm: Option<String>,
    /// The attempt, 32 hexadecimal digits, the same on both sides; absent if it did not come to one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) attempt: Option<String>,
    /// What was attempted.
    pub(crate) kind: SessionKind,
    /// The other end: an address, or `file:` and a path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) peer: Option<String>,
    /// The epoch under which the source owned the VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) epoch: Option<u64>,
    /// When it began, RFC 3339 in UTC.
    pub(crate) began: String,
    /// When it ended.
    pub(crate) ended: String,
    /// How it ended: as `query` had it then, with the downtime that was last predicted.
    pub(crate) migration: MigrationInfo,
    /// Something was left out, because the line would have been too long.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) truncated: bool,
}

/// What a session attempts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum SessionKind {
    /// To move the guest.
    Migration,
    /// To find out what a migration would come to.
    Rehearsal,
    /// The same, of both sides' rules alone: nothing is tried.
    Check,
    /// To save the guest into a file.
    Save,
    /// To bring the guest back from a file.
    Restore,
    /// To start a guest that the session before had left paused: a `cont`.
    Start,
}

impl SessionKind {
    /// As texts name it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Migration => "migration",
            Self::Rehearsal => "rehearsal",
            Self::Check => "check",
            Self::Save => "save",
            Self::Restore => "restore",
            Self::Start => "start",
        }
    }
}

/// The records of a state directory, the oldest first.
#[derive(Debug, Default)]
pub(crate) struct History {
    pub(crate) records: Vec<HistoryRecord>,
    /// Lines that are no records: torn by a crash, or of a later layout.
    pub(crate) unreadable: u64,
}

impl History {
    /// Reads the records in `dir`. A directory without a history has none.
    pub(crate) fn read(dir: &Path) -> Result<Self, CliError> {
        let mut history = Self::default();
        for name in [OLDER, HISTORY] {
            let path = dir.join(name);
            if !path.exists() {
                continue;
            }
            if !path.is_file() {
                return Err(CliError::failed(format!("{} is no regular file", path.display())));
            }
            let bytes = read_capped(&path, READ_MAX)?;
            if bytes.len() > READ_MAX {
                return Err(CliError::failed(format!(
                    "{} is longer than {READ_MAX} bytes, which no `vm` writes: move it away",
                    path.display()
                )));
            }
            for line in bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
                match parse(line) {
                    Some(record) => history.records.push(record),
                    None => history.unreadable += 1,
                }
            }
        }
        Ok(history)
    }

    /// The last record of each VM.
    pub(crate) fn last_of(&self, vm: &str) -> Option<&HistoryRecord> {
        self.records.iter().rev().find(|record| record.vm.as_deref() == Some(vm))
    }
}

/// A record, also one of an earlier version that lacks members of its migration.
fn parse(line: &[u8]) -> Option<HistoryRecord> {
    let mut record: Value = serde_json::from_slice(line).ok()?;
    if record.get("version") != Some(&json!(1)) {
        return None;
    }
    let mut migration = json!(MigrationInfo::new(MigrationStatus::Failed));
    let written = record.get_mut("migration")?;
    migration.as_object_mut()?.append(written.as_object_mut()?);
    *written = migration;
    serde_json::from_value(record).ok()
}

/// A record for people: one line, and what became of it below.
pub(crate) fn text(record: &HistoryRecord) -> String {
    let vm = record.vm.as_ref().map_or(String::new(), |vm| format!("VM {vm}  "));
    let HistoryRecord { kind, peer, began, migration, .. } = record;
    let way = if migration.direction.as_deref() == Some("incoming") { "from" } else { "to" };
    let peer = peer.as_ref().map_or(String::new(), |peer| format!(" {way} {peer}"));
    let how = migration.security.as_ref().map_or(String::new(), SecurityInfo::text);
    let mut text = format!("{began}  {vm}{}{peer}{how}: {}", kind.name(), ending(migration));
    for line in verdict::why(migration).iter().flat_map(|why| why.lines()) {
        text.push_str(&format!("\n    {line}"));
    }
    for failure in &migration.left_undone {
        text.push_str(&format!("\n    left undone: {}", failure.text));
    }
    text.lines().map(|line| printable(line).into_owned() + "\n").collect()
}

/// How a session ended, in a few words: its status, where it stopped, the times.
pub(crate) fn ending(migration: &MigrationInfo) -> String {
    let status = match migration.status {
        MigrationStatus::Failed | MigrationStatus::Rehearsed if migration.incompatible => {
            "refused".to_owned()
        }
        _ => migration.status_text(),
    };
    let mut text = format!("{status} after {} ms", migration.total_ms);
    let early = matches!(
        migration.status,
        MigrationStatus::Cancelled | MigrationStatus::Failed | MigrationStatus::Unresolved
    );
    if let Some(phase) = migration.phase_name.as_ref().filter(|_| early) {
        text.push_str(&format!(" in the {phase} phase"));
    }
    if let Some(downtime) = migration.downtime_ms {
        text.push_str(&format!(", downtime {downtime} ms"));
    }
    if let Some(predicted) = migration.expected_downtime_ms {
        let limit = migration.downtime_limit_ms.map_or(String::new(), |limit| format!(", limit {limit} ms"));
        text.push_str(&format!(" (predicted {predicted} ms{limit})"));
    }
    text
}

#[cfg(test)]
mod tests {
    use vfio_migration_types::is_control;

    use super::*;

    #[test]
    fn what_is_torn_or_of_another_layout_is_counted_and_skipped() {
        let dir = tempfile::tempdir().unwrap();
        assert!(History::read(dir.path()).unwrap().records.is_empty());
        let record = r#"{"version": 1, "vm": "a", "kind": "migration", "began": "x", "ended": "y",
            "migration": {"status": "completed", "total-ms": 7}}"#
            .replace('\n', " ");
        let later = record.replace(r#""version": 1"#, r#""version": 2"#);
        std::fs::write(dir.path().join(OLDER), format!("{record}\n")).unwrap();
        let newer = record.replace(r#""vm": "a""#, r#""vm": "b""#);
        std::fs::write(dir.path().join(HISTORY), format!("{}\n{later}\n\n{newer}\n", &record[..30])).unwrap();
        let history = History::read(dir.path()).unwrap();
        assert_eq!(history.unreadable, 2);
        let vms: Vec<_> = history.records.iter().map(|record| record.vm.as_deref()).collect();
        assert_eq!(vms, [Some("a"), Some("b")]);
        assert_eq!(history.last_of("a").unwrap().migration.total_ms, 7);
        assert!(history.last_of("c").is_none());
    }

    #[test]
    fn nothing_that_was_said_by_others_reaches_the_terminal_raw() {
        let record = HistoryRecord {
            version: 1,
            vm: Some("a".into()),
            attempt: None,
            kind: SessionKind::Migration,
            peer: Some("unix:/\x1b[2J".into()),
            epoch: None,
            began: "x".into(),
            ended: "y".into(),
            migration: MigrationInfo {
                error: Some("red: \x1b[31m\u{9b}31m".into()),
                ..MigrationInfo::new(MigrationStatus::Failed)
            },
            truncated: false,
        };
        assert!(text(&record).chars().all(|c| c == '\n' || !is_control(c)), "{}", text(&record));
    }
}
