//! A test that does not end is ended, and what it was doing is told: a ring that hangs tells nothing.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

/// How the process that is a test ended.
pub(crate) enum End {
    Status(ExitStatus),
    /// It was ended, and this is what it and its processes were doing.
    Hung(String),
}

/// Waits for `child`; after `bound` it is killed, and with it every process that it started.
pub(crate) fn wait(mut child: Child, bound: Duration) -> std::io::Result<End> {
    let pid = child.id();
    let (tell, told) = mpsc::channel();
    let waiting = std::thread::spawn(move || {
        let status = child.wait();
        // Who does not listen any more has killed it.
        let _ = tell.send(());
        status
    });
    let hung = match told.recv_timeout(bound) {
        Err(RecvTimeoutError::Timeout) => {
            let processes = family(pid);
            let doing = processes.iter().fold(String::new(), |text, process| text + &describe(*process));
            kill(&processes);
            Some(doing)
        }
        Ok(()) | Err(RecvTimeoutError::Disconnected) => None,
    };
    let status = waiting.join().map_err(|_| std::io::Error::other("the wait for a test panicked"))??;
    Ok(hung.map_or(End::Status(status), End::Hung))
}

/// `first` and all that descend from it, parents before their children. Who lost its parent is found no more.
fn family(first: u32) -> Vec<u32> {
    let mut children: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for entry in entries(Path::new("/proc")) {
        let number = entry.file_name().and_then(|name| name.to_str()?.parse().ok());
        if let Some((number, parent)) = number.and_then(|number| Some((number, parent(&entry)?))) {
            children.entry(parent).or_default().push(number);
        }
    }
    let mut found = vec![first];
    let mut next = 0;
    while let Some(process) = found.get(next) {
        found.extend(children.remove(process).unwrap_or_default());
        next += 1;
    }
    found
}

fn parent(process: &Path) -> Option<u32> {
    let stat = std::fs::read_to_string(process.join("stat")).ok()?;
    // The name, in brackets, may hold anything.
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// The process's words, and of each thread its name, its system call and what that waits for.
fn describe(process: u32) -> String {
    let folder = PathBuf::from(format!("/proc/{process}"));
    let words = std::fs::read(folder.join("cmdline")).unwrap_or_default();
    let words = String::from_utf8_lossy(&words).replace('\0', " ");
    let mut text = format!("process {process}: {words}\n");
    for thread in entries(&folder.join("task")) {
        let read = |name| {
            let text = std::fs::read_to_string(thread.join(name)).unwrap_or_default();
            text.lines().next().unwrap_or("?").to_owned()
        };
        let (name, call, at) = (read("comm"), read("syscall"), read("wchan"));
        // A text that is written to never fails.
        let _ = writeln!(text, "    {name:<16} call {call}, in {at}");
    }
    text
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(folder)
        .map(|all| all.filter_map(|entry| Some(entry.ok()?.path())).collect())
        .unwrap_or_default()
}

fn kill(processes: &[u32]) {
    // Who ended meanwhile is no error.
    let _ = Command::new("kill")
        .arg("-9")
        .args(processes.iter().map(u32::to_string))
        .stderr(Stdio::null())
        .status();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn started(script: &str) -> Child {
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdin(Stdio::null()).stdout(Stdio::piped());
        command.spawn().unwrap()
    }

    #[test]
    fn one_that_ends_is_told_by_its_status() {
        let end = wait(started("exit 3"), Duration::from_secs(60)).unwrap();
        assert!(matches!(end, End::Status(status) if status.code() == Some(3)));
    }

    #[test]
    fn one_that_hangs_is_ended_with_its_children() {
        let mut child = started("sleep 1000 & echo $!; wait");
        let mut said = std::io::BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        std::io::BufRead::read_line(&mut said, &mut line).unwrap();
        let end = wait(child, Duration::from_millis(10)).unwrap();
        let End::Hung(doing) = end else { panic!("it ended") };
        assert!(doing.contains("sleep 1000") && doing.contains("call "), "{doing}");
        // Its end of the pipe is closed too: nobody holds it any more.
        assert_eq!(std::io::Read::read(&mut said, &mut [0]).unwrap(), 0);
    }
}
