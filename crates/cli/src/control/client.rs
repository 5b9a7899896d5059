//! The client of the control socket.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{self, sockopt};
use rustix::process::geteuid;
use serde::Deserialize;
use serde_json::Value;
use vfio_migration::unix_address;

use super::event::{self, ControlEvent};
use super::protocol::{ControlRequest, ControlVerb, MigrationInfo, StatusReport};
use super::refused::{PERMISSION_DENIED, Refused};
use crate::exit::{CliError, Exit};
use crate::interrupt::UserInterrupt;
use crate::output::printable_texts;
use crate::tls_options::TLS_REQUIRED;
use crate::units::format_time;

/// Longest silence of a migration that is followed, before its `vm` is asked: there are no events within an iteration, where
/// what is left changes all the same.
const QUIET: Duration = Duration::from_secs(1);
/// Time that a `vm` has for an answer once the user has asked for the end: one that is only slow says what has begun.
const GRACE: Duration = Duration::from_millis(500);
/// Time after which a wait looks whether the user asks for the end.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Least patience with a `vm` that is followed, whose machine may be taken apart or built just then.
const BUSY: Duration = Duration::from_secs(30);
/// The same once the user has asked for the end: what was asked for is known by then, and how it ends can be asked later.
const LEAVING: Duration = Duration::from_secs(5);

/// A request that got no good answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ControlError {
    #[error("cannot reach the control socket {0}; is that `vm` running?")]
    Connect(String, #[source] std::io::Error),
    #[error(
        "user {uid} may not use the control socket {0}: the user that its `vm` runs as, root, and the members of its \
         --control-group and --control-read-group may",
        uid = geteuid().as_raw()
    )]
    Denied(String, #[source] std::io::Error),
    #[error("the control socket failed")]
    Io(#[source] std::io::Error),
    #[error("the `vm` closed its control socket")]
    Closed,
    #[error("{0} does not answer within {time}", time = format_time(*.1))]
    Timeout(String, Duration),
    #[error("the `vm` closed this connection to its control socket: {0}")]
    Disconnected(String),
    #[error("the control socket speaks something else: {0}")]
    Garbled(String),
    #[error("interrupted by {0}")]
    Interrupted(&'static str),
    #[error("{}", .0.desc)]
    Refused(Refused),
}

impl ControlError {
    /// The failure of a verb that asks for something to be done: what the `vm` refused, or whether it was taken is not known.
    pub(crate) fn not_done(&self) -> CliError {
        match self {
            Self::Refused(_) | Self::Denied(..) => self.failure("refused"),
            Self::Connect(..) => self.failure("no contact"),
            Self::Interrupted(_) => self.failure("given up"),
            Self::Io(_) | Self::Closed | Self::Timeout(..) | Self::Disconnected(_) | Self::Garbled(_) => {
                self.failure("no answer: whether it was taken is not known")
            }
        }
    }

    /// The failure of a verb that asked for something; a refusal keeps its class.
    pub(crate) fn failure(&self, doing: &str) -> CliError {
        let failure = CliError::caused(doing, self);
        match self {
            // It is the command line that lacks something, be it that of the `vm`.
            Self::Refused(refused) if refused.class == TLS_REQUIRED => {
                CliError::new(Exit::Usage, failure.text).of_class(TLS_REQUIRED)
            }
            Self::Refused(refused) => failure.of_class(&refused.class),
            Self::Denied(..) => failure.of_class(PERMISSION_DENIED),
            _ => failure,
        }
    }
}

/// A connection to a control socket.
#[derive(Debug)]
pub(crate) struct ControlClient {
    reader: BufReader<UnixStream>,
    /// Path of the socket, as it is shown.
    path: String,
    timeout: Duration,
    /// What a wait is given up for.
    interrupt: Option<UserInterrupt>,
    events: VecDeque<ControlEvent>,
    partial: Vec<u8>,
    /// Requests whose answers were not waited for, and come before that to the next.
    owed: u32,
    /// Least patience with a `vm` that is followed.
    busy: Duration,
    /// Time at which the state of the migration last came, by event or answer.
    news: Instant,
}

impl ControlClient {
    /// Connects to `path`; the connection, the greeting and each answer may take `timeout`. Once the user has asked for the end by
    /// `interrupt`, what is waited for has [`GRACE`] left.
    pub(crate) fn connect(
        path: &Path,
        timeout: Duration,
        interrupt: Option<&UserInterrupt>,
    ) -> Result<Self, ControlError> {
        let shown = path.display().to_string();
        let address = unix_address(path).map_err(|error| ControlError::Connect(shown.clone(), error))?;
        let mut wait = Wait::of(timeout, interrupt);
        let stream = loop {
            let Some(slice) = wait.slice() else {
                return Err(wait.ended().unwrap_or(ControlError::Timeout(shown, timeout)));
            };
            match connect(&address, slice) {
                Ok(stream) => break stream,
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(errno @ (Errno::ACCESS | Errno::PERM)) => {
                    return Err(ControlError::Denied(shown, errno.into()));
                }
                Err(errno) => return Err(ControlError::Connect(shown, errno.into())),
            }
        };
        let mut client = Self {
            reader: BufReader::new(stream),
            path: shown,
            timeout,
            interrupt: interrupt.cloned(),
            events: VecDeque::new(),
            partial: Vec::new(),
            owed: 0,
            busy: BUSY,
            news: Instant::now(),
        };
        let greeting = client.line(timeout)?.ok_or_else(|| client.silent())?;
        if let Some(Ok(refused)) = greeting.get("error").map(Refused::deserialize) {
            return Err(ControlError::Refused(refused));
        }
        if greeting.get("vfio-migrate").is_none() {
            return Err(ControlError::Garbled(greeting.to_string()));
        }
        Ok(client)
    }

    /// Waits on from here whatever the user asks for, since the request to end has been seen: for as long as the `vm` answers, each
    /// answer within [`LEAVING`].
    pub(crate) fn disregard_interrupt(&mut self) {
        self.interrupt = None;
        self.busy = LEAVING;
        self.timeout = self.timeout.min(LEAVING);
    }

    fn silent(&self) -> ControlError {
        ControlError::Timeout(self.path.clone(), self.timeout)
    }

    /// Asks for `verb` and waits for the answer; events that come in between are kept.
    pub(crate) fn call(&mut self, verb: ControlVerb, arguments: Value) -> Result<Value, ControlError> {
        let request = ControlRequest { execute: verb, arguments };
        let mut line =
            serde_json::to_string(&request).map_err(|error| ControlError::Garbled(error.to_string()))?;
        line.push('\n');
        let written = self.reader.get_mut().write_all(line.as_bytes());
        written.map_err(|error| match error.kind() {
            std::io::ErrorKind::BrokenPipe => self.why_closed(),
            std::io::ErrorKind::WouldBlock => self.silent(),
            _ => ControlError::Io(error),
        })?;
        let deadline = Instant::now() + self.timeout;
        self.owed += 1;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut answer = self.line(left)?.ok_or_else(|| self.silent())?;
            let is_answer = ["return", "error"].iter().any(|field| answer.get(field).is_some());
            if is_answer {
                self.owed -= 1;
                // That of a request that was given up.
                if self.owed > 0 {
                    continue;
                }
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                let refused = serde_json::from_value(error.clone())
                    .map_err(|_| ControlError::Garbled(answer.to_string()))?;
                return Err(ControlError::Refused(refused));
            }
            self.keep_event(answer)?;
        }
    }

    /// Asks for the VM and its migration.
    pub(crate) fn query(&mut self) -> Result<StatusReport, ControlError> {
        let mut answer = self.call(ControlVerb::Query, Value::Null)?;
        printable_texts(&mut answer);
        self.news = Instant::now();
        serde_json::from_value(answer).map_err(|error| ControlError::Garbled(error.to_string()))
    }

    /// The state of the latest migration by the next event, or, where none has come for a second, by an answer; `None` when
    /// `patience` ends first, or there was none.
    pub(crate) fn next_migration(
        &mut self,
        patience: Duration,
    ) -> Result<Option<MigrationInfo>, ControlError> {
        // It has answered before: it is no silent one, and may be busy.
        self.timeout = self.timeout.max(self.busy);
        if let Some(info) = self.next_event(patience)?.and_then(|event| event.migration()) {
            self.news = Instant::now();
            return Ok(Some(info));
        }
        if self.news.elapsed() < QUIET {
            return Ok(None);
        }
        Ok(self.query()?.latest().map(|latest| latest.migration))
    }

    /// The next event, kept or new; `None` when none comes within `patience`.
    pub(crate) fn next_event(&mut self, patience: Duration) -> Result<Option<ControlEvent>, ControlError> {
        if self.events.is_empty()
            && let Some(line) = self.line(patience)?
        {
            self.keep_event(line)?;
        }
        Ok(self.events.pop_front())
    }

    /// What was told of migrations by events that nobody has taken.
    pub(crate) fn told(&mut self) -> Vec<MigrationInfo> {
        self.events.drain(..).filter_map(|event| event.migration()).collect()
    }

    /// The reason why the other end is closed: said before it was, if it was.
    fn why_closed(&mut self) -> ControlError {
        loop {
            match self.line(self.timeout) {
                Ok(Some(line)) if line.get("event").is_some() => {
                    if let Err(error) = self.keep_event(line) {
                        return error;
                    }
                }
                Ok(Some(_)) => {}
                Ok(None) => return ControlError::Closed,
                Err(error) => return error,
            }
        }
    }

    fn keep_event(&mut self, mut line: Value) -> Result<(), ControlError> {
        printable_texts(&mut line);
        let text = line.to_string();
        self.events.push_back(serde_json::from_value(line).map_err(|_| ControlError::Garbled(text))?);
        Ok(())
    }

    /// One line of JSON, or `None` when none comes within `patience`; what came of a line is kept for the next call.
    fn line(&mut self, patience: Duration) -> Result<Option<Value>, ControlError> {
        let mut wait = Wait::of(patience, self.interrupt.as_ref());
        loop {
            let Some(slice) = wait.slice() else { return wait.ended().map_or(Ok(None), Err) };
            self.reader.get_ref().set_read_timeout(Some(slice)).map_err(ControlError::Io)?;
            match self.reader.read_until(b'\n', &mut self.partial) {
                Ok(0) => return Err(ControlError::Closed),
                Ok(_) if self.partial.last() == Some(&b'\n') => {
                    let line = std::mem::take(&mut self.partial);
                    let line: Value = serde_json::from_slice(&line).map_err(|_| {
                        ControlError::Garbled(String::from_utf8_lossy(&line).trim_end().to_string())
                    })?;
                    return match event::reason_of_disconnection(&line) {
                        Some(reason) => Err(ControlError::Disconnected(reason)),
                        None => Ok(Some(line)),
                    };
                }
                Ok(_) => return Err(ControlError::Closed),
                Err(error) => match error.kind() {
                    std::io::ErrorKind::WouldBlock
                    | std::io::ErrorKind::TimedOut
                    | std::io::ErrorKind::Interrupted => {}
                    std::io::ErrorKind::ConnectionReset => return Err(ControlError::Closed),
                    _ => return Err(ControlError::Io(error)),
                },
            }
        }
    }
}

/// A wait with an end, which the user can bring forward.
#[derive(Debug)]
struct Wait {
    end: Instant,
    interrupt: Option<UserInterrupt>,
    /// The signal by which the user asked for the end, while the end is what it was brought forward to.
    interrupted: Option<&'static str>,
}

impl Wait {
    fn of(patience: Duration, interrupt: Option<&UserInterrupt>) -> Self {
        Self { end: Instant::now() + patience, interrupt: interrupt.cloned(), interrupted: None }
    }

    /// Time after which to look again; `None` when the wait is over.
    fn slice(&mut self) -> Option<Duration> {
        if let Some(signal) = self.interrupt.as_ref().and_then(UserInterrupt::name)
            && self.interrupted.is_none()
        {
            let end = Instant::now() + GRACE;
            if end < self.end {
                (self.end, self.interrupted) = (end, Some(signal));
            }
        }
        let left = self.end.saturating_duration_since(Instant::now());
        (!left.is_zero()).then(|| left.min(LOOK_EVERY))
    }

    /// Why it ended, if not by its own end.
    fn ended(&self) -> Option<ControlError> {
        self.interrupted.map(ControlError::Interrupted)
    }
}

/// Connects to a listening socket; fails with EAGAIN when its queue has had no place for `timeout`.
fn connect(address: &net::SocketAddrUnix, timeout: Duration) -> Result<UnixStream, Errno> {
    let (stream, close_on_exec) = (net::SocketType::STREAM, net::SocketFlags::CLOEXEC);
    let socket = net::socket_with(net::AddressFamily::UNIX, stream, close_on_exec, None)?;
    // connect(2) waits as long as a send may (SO_SNDTIMEO in socket(7)).
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(timeout))?;
    net::connect(&socket, address)?;
    Ok(socket.into())
}
