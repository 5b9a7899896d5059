//! The client of the control socket.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::event::ControlEvent;
use super::protocol::{ControlRequest, ControlVerb, MigrationInfo, StatusReport};
use super::refused::Refused;
use crate::exit::CliError;
use crate::output::printable_texts;

/// Longest silence of a migration that is followed, before its `vm` is asked: there are no events within an iteration, where
/// what is left changes all the same.
const QUIET: Duration = Duration::from_secs(1);

/// A request that got no good answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ControlError {
    #[error("cannot reach the control socket {0}; is that `vm` running?")]
    Connect(String, #[source] std::io::Error),
    #[error("the control socket failed")]
    Io(#[source] std::io::Error),
    #[error("the `vm` closed its control socket")]
    Closed,
    #[error("the `vm` did not answer in time")]
    Timeout,
    #[error("the control socket speaks something else: {0}")]
    Garbled(String),
    #[error("{}", .0.desc)]
    Refused(Refused),
}

impl ControlError {
    /// The failure of a verb that asked for something; a refusal keeps its class.
    pub(crate) fn failure(&self, doing: &str) -> CliError {
        let failure = CliError::caused(doing, self);
        match self {
            Self::Refused(refused) => failure.of_class(&refused.class),
            _ => failure,
        }
    }
}

/// A connection to a control socket.
#[derive(Debug)]
pub(crate) struct ControlClient {
    reader: BufReader<UnixStream>,
    timeout: Duration,
    events: VecDeque<ControlEvent>,
    partial: Vec<u8>,
    /// Time at which the state of the migration last came, by event or answer.
    news: Instant,
}

impl ControlClient {
    /// Connects to `path`; an answer may take `timeout`.
    pub(crate) fn connect(path: &Path, timeout: Duration) -> Result<Self, ControlError> {
        let stream = UnixStream::connect(path)
            .map_err(|error| ControlError::Connect(path.display().to_string(), error))?;
        stream.set_write_timeout(Some(timeout)).map_err(ControlError::Io)?;
        let mut client = Self {
            reader: BufReader::new(stream),
            timeout,
            events: VecDeque::new(),
            partial: Vec::new(),
            news: Instant::now(),
        };
        let greeting = client.line(Instant::now() + timeout)?.ok_or(ControlError::Timeout)?;
        if greeting.get("vfio-migrate").is_none() {
            return Err(ControlError::Garbled(greeting.to_string()));
        }
        Ok(client)
    }

    /// Asks for `verb` and waits for the answer; events that come in between are kept.
    pub(crate) fn call(&mut self, verb: ControlVerb, arguments: Value) -> Result<Value, ControlError> {
        let request = ControlRequest { execute: verb, arguments };
        let mut line =
            serde_json::to_string(&request).map_err(|error| ControlError::Garbled(error.to_string()))?;
        line.push('\n');
        self.reader.get_mut().write_all(line.as_bytes()).map_err(|error| match error.kind() {
            std::io::ErrorKind::BrokenPipe => ControlError::Closed,
            _ => ControlError::Io(error),
        })?;
        let deadline = Instant::now() + self.timeout;
        loop {
            let mut answer = self.line(deadline)?.ok_or(ControlError::Timeout)?;
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
            && let Some(line) = self.line(Instant::now() + patience)?
        {
            self.keep_event(line)?;
        }
        Ok(self.events.pop_front())
    }

    fn keep_event(&mut self, mut line: Value) -> Result<(), ControlError> {
        printable_texts(&mut line);
        let text = line.to_string();
        self.events.push_back(serde_json::from_value(line).map_err(|_| ControlError::Garbled(text))?);
        Ok(())
    }

    /// One line of JSON, or `None` when the deadline passes first; what came of a line is kept for the next call.
    fn line(&mut self, deadline: Instant) -> Result<Option<Value>, ControlError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.reader.get_ref().set_read_timeout(Some(left)).map_err(ControlError::Io)?;
            match self.reader.read_until(b'\n', &mut self.partial) {
                Ok(0) => return Err(ControlError::Closed),
                Ok(_) if self.partial.last() == Some(&b'\n') => {
                    let line = std::mem::take(&mut self.partial);
                    return serde_json::from_slice(&line).map(Some).map_err(|_| {
                        ControlError::Garbled(String::from_utf8_lossy(&line).trim_end().to_string())
                    });
                }
                Ok(_) => return Err(ControlError::Closed),
                Err(error) => match error.kind() {
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => return Ok(None),
                    std::io::ErrorKind::Interrupted => {}
                    std::io::ErrorKind::ConnectionReset => return Err(ControlError::Closed),
                    _ => return Err(ControlError::Io(error)),
                },
            }
        }
    }
}
