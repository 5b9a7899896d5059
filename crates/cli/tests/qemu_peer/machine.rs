//! A QEMU whose guest is the test, and the device servers that it plugs.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Longest wait for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// Guest RAM in bytes.
const RAM: &str = "64M";

/// Whose memory the guest's is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ram {
    /// A memory file, of which device servers get the descriptor: they reach it by mapping.
    Shared,
    /// QEMU's alone: device servers ask for each access, by message.
    Private,
}

/// The folder where QEMU and its libraries are unpacked.
pub(crate) fn unpacked() -> Option<PathBuf> {
    let at = std::env::var_os("VFIO_MIGRATE_QEMU");
    if at.is_none() {
        eprintln!("SKIPPED: VFIO_MIGRATE_QEMU does not say where QEMU is; `cargo xtask test qemu-peer` does");
    }
    at.map(PathBuf::from)
}

/// A sample device's server, ended by its stdin.
#[derive(Debug)]
pub(crate) struct Server {
    child: Child,
    pub(crate) socket: PathBuf,
}

impl Server {
    pub(crate) fn start(dir: &Path, name: &str) -> Self {
        let socket = dir.join(format!("{name}.sock"));
        let child = Command::new(env!("CARGO_BIN_EXE_vfio-migrate"))
            .args(["device", "--state-size", "64K", "--exit-with-stdin", "--socket"])
            .arg(&socket)
            .stdin(Stdio::piped())
            .spawn()
            .expect("the command starts");
        let server = Self { child, socket };
        // QEMU does not try twice.
        until("the server's socket", || server.socket.exists().then_some(()));
        server
    }

    /// Names of the memory files that the server has mapped.
    pub(crate) fn mapped(&self) -> String {
        std::fs::read_to_string(format!("/proc/{}/maps", self.child.id())).expect("it runs")
    }

    /// The mailbox, as the server itself has it open.
    pub(crate) fn mailbox(&self) -> Vec<u8> {
        let fds = std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).expect("it runs");
        let mailbox = fds.flatten().find(|fd| {
            std::fs::read_link(fd.path()).is_ok_and(|to| to.to_string_lossy().contains("sample-mailbox"))
        });
        std::fs::read(mailbox.expect("it has a mailbox").path()).expect("a mailbox can be read")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// A machine.
#[derive(Debug)]
pub(crate) struct Machine {
    child: Child,
    qtest: BufReader<UnixStream>,
    monitor: BufReader<UnixStream>,
}

impl Machine {
    /// Plugs the device of each server, the first into slot 4, and waits until all are realized.
    pub(crate) fn start(unpacked: &Path, ram: Ram, servers: &[&Server]) -> Self {
        let libraries = unpacked.join("usr/lib/x86_64-linux-gnu");
        // With its own loader and libraries, since the host's C library may be older.
        let mut command = Command::new(libraries.join("ld-linux-x86-64.so.2"));
        command.arg("--library-path").arg(&libraries).arg(unpacked.join("usr/bin/qemu-system-x86_64"));
        command.env("QEMU_MODULE_DIR", libraries.join("qemu"));
        command.arg("-L").arg(unpacked.join("usr/share/seabios"));
        command.args(["-nodefaults", "-display", "none", "-accel", "qtest", "-m", RAM]);
        match ram {
            Ram::Shared => {
                let backend = format!("memory-backend-memfd,id=ram,size={RAM},share=on");
                command.args(["-object", &backend, "-machine", "q35,memory-backend=ram"]);
            }
            Ram::Private => {
                command.args(["-machine", "q35"]);
            }
        }
        // Its two sockets are its stdin and stdout: no name that another could take, and they end with it.
        command.args(["-chardev", "socket,id=qtest,fd=0", "-qtest", "chardev:qtest", "-qtest-log", "none"]);
        command.args(["-chardev", "socket,id=monitor,fd=1", "-qmp", "chardev:monitor"]);
        for (slot, server) in (4..).zip(servers) {
            let socket = json!({"type": "unix", "path": server.socket});
            let device = json!({"driver": "vfio-user-pci", "addr": format!("{slot}.0"), "socket": socket});
            command.args(["-device", &device.to_string()]);
        }
        let pair = || UnixStream::pair().expect("a socket pair");
        let ((qtest, its_qtest), (monitor, its_monitor)) = (pair(), pair());
        let fd = |stream: UnixStream| Stdio::from(OwnedFd::from(stream));
        let child = command.stdin(fd(its_qtest)).stdout(fd(its_monitor)).stderr(Stdio::piped()).spawn();
        drop(command);
        for stream in [&qtest, &monitor] {
            stream.set_read_timeout(Some(PATIENCE)).expect("a socket has a timeout");
        }
        let mut machine = Self {
            child: child.expect("QEMU starts"),
            qtest: BufReader::new(qtest),
            monitor: BufReader::new(monitor),
        };
        // The monitor greets when every device is realized.
        if machine.hear().is_err() {
            panic!("QEMU ended: {}", machine.last_words());
        }
        machine.send("qmp_capabilities");
        // The greeting may come before the devices are realized, the answer does not.
        if machine.hear().is_err() {
            panic!("QEMU ended: {}", machine.last_words());
        }
        machine
    }

    /// What it said on stderr until its end.
    fn last_words(&mut self) -> String {
        let mut said = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            let _ = self.child.kill();
            let _ = std::io::Read::read_to_string(&mut stderr, &mut said);
        }
        said
    }

    /// A qtest command, and the word after its `OK`.
    fn qtest(&mut self, words: &str) -> String {
        let mut answer = String::new();
        let sent = self.qtest.get_mut().write_all(format!("{words}\n").as_bytes());
        let heard = sent.and_then(|()| self.qtest.read_line(&mut answer));
        match answer.trim_end().strip_prefix("OK") {
            Some(value) => value.trim().to_owned(),
            None => panic!("qtest {words}: {answer:?} {heard:?}; QEMU said: {}", self.last_words()),
        }
    }

    fn number(&mut self, words: &str) -> u64 {
        let said = self.qtest(words);
        let digits = said.strip_prefix("0x").unwrap_or_else(|| panic!("qtest {words}: {said}"));
        u64::from_str_radix(digits, 16).expect("a number")
    }

    pub(crate) fn read(&mut self, at: u64, into: &mut [u8]) {
        let said = self.qtest(&format!("read {at:#x} {:#x}", into.len()));
        let digits = said.strip_prefix("0x").expect("bytes");
        assert_eq!(digits.len(), into.len() * 2, "qtest read");
        for (n, byte) in into.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&digits[n * 2..n * 2 + 2], 16).expect("a byte");
        }
    }

    pub(crate) fn write(&mut self, at: u64, from: &[u8]) {
        let digits: String = from.iter().map(|byte| format!("{byte:02x}")).collect();
        self.qtest(&format!("write {at:#x} {:#x} 0x{digits}", from.len()));
    }

    pub(crate) fn read_u32(&mut self, at: u64) -> u32 {
        u32::try_from(self.number(&format!("readl {at:#x}"))).expect("four bytes")
    }

    pub(crate) fn write_u32(&mut self, at: u64, value: u32) {
        self.qtest(&format!("writel {at:#x} {value:#x}"));
    }

    pub(crate) fn read_u64(&mut self, at: u64) -> u64 {
        self.number(&format!("readq {at:#x}"))
    }

    pub(crate) fn write_u64(&mut self, at: u64, value: u64) {
        self.qtest(&format!("writeq {at:#x} {value:#x}"));
    }

    /// Config space of a function on bus 0, by the ports that PCs have for it.
    pub(crate) fn config_read(&mut self, slot: u32, at: u32) -> u32 {
        self.qtest(&format!("outl 0xcf8 {:#x}", 1 << 31 | slot << 11 | at));
        u32::try_from(self.number("inl 0xcfc")).expect("four bytes")
    }

    pub(crate) fn config_write(&mut self, slot: u32, at: u32, value: u32) {
        self.qtest(&format!("outl 0xcf8 {:#x}", 1 << 31 | slot << 11 | at));
        self.qtest(&format!("outl 0xcfc {value:#x}"));
    }

    /// Resets the machine and waits until that is done.
    pub(crate) fn reset(&mut self) {
        self.send("system_reset");
        // In either order.
        let (mut answered, mut done) = (false, false);
        while !(answered && done) {
            let heard = self.hear().expect("an answer and an event");
            answered |= !heard["return"].is_null();
            done |= heard["event"] == "RESET";
        }
    }

    /// Has QEMU quit, and waits for its end, which has to be a good one.
    pub(crate) fn quit(mut self) {
        self.send("quit");
        let status = until("QEMU to quit", || self.child.try_wait().expect("it is ours"));
        assert!(status.success(), "{status}: {}", self.last_words());
        // What QEMU has to say against a device it says on stderr.
        let said = self.last_words();
        let harmless = |line: &str| line.contains("Could not enable error recovery");
        let against: Vec<&str> = said.lines().filter(|line| !harmless(line)).collect();
        assert!(against.is_empty(), "QEMU says: {said}");
    }

    /// Asks the monitor for something without waiting for an answer.
    fn send(&mut self, verb: &str) {
        let request = json!({"execute": verb});
        // An answer that does not come says why.
        let _ = self.monitor.get_mut().write_all(format!("{request}\n").as_bytes());
    }

    /// The monitor's next message.
    fn hear(&mut self) -> Result<Value, String> {
        let mut line = String::new();
        self.monitor.read_line(&mut line).map_err(|error| error.to_string())?;
        serde_json::from_str(&line).map_err(|error| format!("{line:?}: {error}"))
    }

    /// The memory files that QEMU has mapped.
    pub(crate) fn mapped(&self) -> String {
        std::fs::read_to_string(format!("/proc/{}/maps", self.child.id())).expect("it runs")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks until there is an answer.
pub(crate) fn until<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
