//! `status --state-dir`: who owns each VM that a state directory knows, and how its last session ended, without any `vm`.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use vfio_migration::{JournalFile, JournalNote, VmOwnership, ownership_at, read_journal};
use vfio_migration_types::{VmId, error_chain, printable};

use crate::control::protocol::MigrationStatus;
use crate::exit::{CliError, Exit};
use crate::history::{History, HistoryRecord, SessionKind, text};
use crate::output::{print, print_json};
use crate::undecided::UndecidedGuest;

/// What `status --state-dir --json` prints.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct StateDirReport {
    /// The VMs that the directory knows, by identity.
    pub(crate) vms: Vec<KnownVm>,
    /// Lines of the history that are no records.
    pub(crate) unreadable: u64,
}

/// A VM as a state directory knows it.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct KnownVm {
    /// Identity of the VM.
    pub(crate) uuid: String,
    /// Whose it is by the journal.
    pub(crate) owner: Owner,
    /// The epoch of the owner; of an undecided commit the one that it would begin.
    pub(crate) epoch: Option<u64>,
    /// Where the guest went or came from, or whom the undecided commit was sent to: an address, or `file:` and a path.
    pub(crate) peer: Option<String>,
    /// A `vm` with this directory has the guest, or waits for it to arrive.
    pub(crate) process: bool,
    /// The latest attempt to send it away.
    pub(crate) source: Option<JournalEntry>,
    /// The latest attempt to take it in.
    pub(crate) destination: Option<JournalEntry>,
    /// The last session that ended, by the history.
    pub(crate) last: Option<HistoryRecord>,
    /// Why its journal cannot be read.
    pub(crate) error: Option<String>,
}

impl KnownVm {
    /// Its last session moved it, and it could not be started, nor was since.
    fn is_not_started(&self) -> bool {
        self.last.as_ref().is_some_and(|last| match last.kind {
            SessionKind::Start => last.migration.status != MigrationStatus::Completed,
            _ => last.migration.exit() == Exit::NotStarted,
        })
    }
}

/// Whose a VM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Owner {
    /// This host's.
    Here,
    /// Another host's, or a file's.
    Elsewhere,
    /// COMMIT may have been sent, and the outcome is not known here.
    Undecided,
    /// Nothing is written of it, or what is written cannot be read.
    Unknown,
}

/// A record of the journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct JournalEntry {
    /// The attempt, 32 hexadecimal digits.
    pub(crate) attempt: String,
    /// At the source `"owner"`, `"sending"`, `"committing"`, `"released"`; at the destination `"reserved"`, `"loading"`, `"ready"`,
    /// `"owner"`, `"aborted"`.
    pub(crate) state: String,
    /// The epoch under which the source owned the VM.
    pub(crate) epoch: u64,
    /// The other end.
    pub(crate) peer: String,
    /// When the attempt's first record was written, RFC 3339 in UTC; absent in a journal of layout 1.
    pub(crate) began: Option<String>,
    /// When this record was written.
    pub(crate) written: Option<String>,
    /// Why the attempt was given up, if it was.
    pub(crate) reason: Option<String>,
}

/// Prints what the directory `dir` knows.
pub(crate) fn status(dir: &Path, json: bool) -> Result<Exit, CliError> {
    let history = History::read(dir)?;
    let names: Vec<String> = std::fs::read_dir(dir)
        .map_err(|error| CliError::caused(&format!("cannot read {}", dir.display()), &error))?
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    let named = |suffix: &'static str| {
        names.iter().filter_map(move |name| name.strip_suffix(suffix)?.parse::<VmId>().ok())
    };
    // A lock that nobody holds says nothing.
    let of_locks = named(".vm.lock").filter(|id| has_process(dir, *id));
    let of_journals = named(".json").chain(of_locks);
    let of_history = history.records.iter().filter_map(|record| record.vm.as_ref()?.parse().ok());
    let ids: BTreeSet<VmId> = of_journals.chain(of_history).collect();
    let vms: Vec<_> = ids.into_iter().map(|id| known(dir, id, &history)).collect();
    let exit = if vms.iter().any(|vm| vm.error.is_some()) {
        Exit::Failed
    } else if vms.iter().any(|vm| vm.owner == Owner::Undecided) {
        Exit::Unresolved
    } else if vms.iter().any(KnownVm::is_not_started) {
        Exit::NotStarted
    } else {
        Exit::Done
    };
    let report = StateDirReport { vms, unreadable: history.unreadable };
    if json {
        print_json(&report)?;
    } else {
        print(report.vms.iter().map(|vm| for_people(dir, vm)).collect::<String>())?;
    }
    Ok(exit)
}

fn known(dir: &Path, id: VmId, history: &History) -> KnownVm {
    let mut error = None;
    let mut failed = |why: &dyn std::error::Error| error = Some(error_chain(why));
    let ownership = ownership_at(dir, id).unwrap_or_else(|why| {
        failed(&why);
        VmOwnership::Unknown
    });
    let journal = read_journal(dir, id).ok().flatten();
    let (owner, epoch, peer) = match ownership {
        VmOwnership::Ours(epoch) => (Owner::Here, Some(epoch.0), None),
        VmOwnership::Elsewhere { epoch, peer } => (Owner::Elsewhere, Some(epoch.0), Some(peer)),
        VmOwnership::Undecided { epoch, peer } => (Owner::Undecided, Some(epoch.0), Some(peer)),
        _ => (Owner::Unknown, None, None),
    };
    let uuid = id.to_string();
    let last = history.last_of(&uuid).cloned();
    let (source, destination) = journal.map_or((None, None), entries);
    KnownVm { process: has_process(dir, id), uuid, owner, epoch, peer, source, destination, last, error }
}

fn entries(journal: JournalFile) -> (Option<JournalEntry>, Option<JournalEntry>) {
    let noted = |entry: JournalEntry, note: Option<JournalNote>| match note {
        Some(JournalNote { began, written, reason }) => {
            JournalEntry { began: Some(began), written: Some(written), reason, ..entry }
        }
        None => entry,
    };
    let (began, written, reason) = (None, None, None);
    let source = journal.source.map(|record| JournalEntry {
        attempt: record.attempt.to_string(),
        state: record.state.to_string(),
        epoch: record.epoch.0,
        peer: record.peer,
        began: began.clone(),
        written: written.clone(),
        reason: reason.clone(),
    });
    let destination = journal.destination.map(|record| JournalEntry {
        attempt: record.attempt.to_string(),
        state: record.state.to_string(),
        epoch: record.epoch.0,
        peer: record.peer,
        began,
        written,
        reason,
    });
    (
        source.map(|entry| noted(entry, journal.source_note)),
        destination.map(|entry| noted(entry, journal.destination_note)),
    )
}

/// Whether a process holds the VM's lock, by the kernel's list of locks: to try the lock would keep others from it.
fn has_process(dir: &Path, id: VmId) -> bool {
    let Ok(file) = dir.join(format!("{id}.vm.lock")).metadata() else { return false };
    let inode = format!(":{}", file.ino());
    let locks = std::fs::read_to_string("/proc/locks").unwrap_or_default();
    locks.lines().any(|lock| {
        let mut words = lock.split_whitespace().filter(|word| *word != "->");
        words.nth(1) == Some("FLOCK") && words.any(|word| word.ends_with(&inode))
    })
}

fn for_people(dir: &Path, vm: &KnownVm) -> String {
    let epoch = vm.epoch.map_or(String::new(), |epoch| format!(" (epoch {epoch})"));
    let peer = vm.peer.as_deref().unwrap_or("nobody knows where");
    let owner = match vm.owner {
        Owner::Here => format!("this host's{epoch}"),
        Owner::Elsewhere => format!("elsewhere: {peer}{epoch}"),
        Owner::Undecided => format!("undecided: the commit to {peer}{epoch} was never answered"),
        Owner::Unknown => "not known".into(),
    };
    let process = if vm.process { ", a process has it" } else { "" };
    let mut out = printable(&format!("VM {}: {owner}{process}", vm.uuid)).into_owned() + "\n";
    if vm.owner == Owner::Undecided {
        let why = "the answer to its commit was lost, or is on its way";
        let journal = Some(dir.join(format!("{}.json", vm.uuid)));
        let guest = UndecidedGuest { why, peer, journal, is_here: vm.process, can_ask: vm.process };
        out += &(printable(&format!("  {guest}")).into_owned() + "\n");
    }
    for (side, entry) in [("sent", &vm.source), ("taken in", &vm.destination)] {
        let Some(entry) = entry else { continue };
        let at = entry.written.as_ref().map_or(String::new(), |at| format!(" at {at}"));
        let why = entry.reason.as_ref().map_or(String::new(), |reason| format!(": {reason}"));
        let line = format!("  {side}: {}{at}, attempt {}, {}{why}", entry.state, entry.attempt, entry.peer);
        out += &(printable(&line).into_owned() + "\n");
    }
    if let Some(error) = &vm.error {
        out += &(printable(&format!("  the journal cannot be believed: {error}")).into_owned() + "\n");
    }
    if let Some(last) = &vm.last {
        out += &format!("  last: {}", text(last));
    }
    out
}
