//! A guest of which nobody here knows whose it is, since the answer to its commit was lost: the one text that tells it, with what its
//! operator can do.

use std::fmt;
use std::path::{Path, PathBuf};

use vfio_migration_types::VmId;

/// The owner of a guest is not known here.
#[derive(Clone, Debug)]
pub(crate) struct UndecidedGuest<'a> {
    /// What is known, as a clause.
    pub(crate) why: &'a str,
    /// Where the commit was sent: an address, or a file.
    pub(crate) peer: &'a str,
    /// The ownership journal, where it is kept on disk.
    pub(crate) journal: Option<PathBuf>,
    /// A process of this host has the guest, paused.
    pub(crate) is_here: bool,
    /// It can ask the peer again.
    pub(crate) can_ask: bool,
}

/// The file of a VM's journal.
pub(crate) fn journal_file(dir: &Path, vm: VmId) -> PathBuf {
    dir.join(format!("{vm}.json"))
}

impl fmt::Display for UndecidedGuest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { why, peer, journal, is_here, can_ask } = self;
        let ask = if *can_ask { ". `cont` asks again" } else { "" };
        let (is, end_it) = match is_here {
            true => ("it is paused here and does not run", "end it here with `quit --force`"),
            false => ("it is not started here", "leave it there"),
        };
        write!(
            f,
            "it is not known whose the guest is: {why}; {is}{ask}. Look at {peer}: if it has the guest, or if the journal of its host says so \
             (`vfio-migrate status --state-dir DIR` there), {end_it}. Only if it surely never will run there, it can be started anew here, \
             without what was in its memory: "
        )?;
        let quit = is_here.then(|| "`quit --force`".to_owned());
        let remove = journal.as_ref().map(|file| format!("remove {}", file.display()));
        let steps: Vec<String> = quit.into_iter().chain(remove).chain(["start `vm` again".into()]).collect();
        f.write_str(&steps.join(", then "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_what_to_do_with_and_without_a_process_and_a_journal() {
        let guest = UndecidedGuest {
            why: "w",
            peer: "tcp:b:1",
            journal: Some("/s/x.json".into()),
            is_here: true,
            can_ask: true,
        };
        let text = guest.to_string();
        assert!(text.ends_with("`quit --force`, then remove /s/x.json, then start `vm` again"), "{text}");
        assert!(
            text.contains("Look at tcp:b:1") && text.contains("end it here with `quit --force`"),
            "{text}"
        );
        assert!(text.contains("does not run. `cont` asks again. Look at"), "{text}");
        let text = UndecidedGuest { journal: None, is_here: false, can_ask: false, ..guest }.to_string();
        assert!(text.ends_with("in its memory: start `vm` again") && !text.contains("quit"), "{text}");
    }
}
