//! The server of the control socket: one thread for each client.

use std::io::{Error, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::net::SendFlags;
use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use vfio_migration::bind_unix;
use vfio_migration_types::error_chain;

use super::access::{Caller, ControlAccess};
use super::clients::{Client, Publisher};
use super::lines::{LINE_MAX, Line, Lines, Passed};
use super::protocol::ControlVerb;
use super::refused::Refused;
use super::request;

/// Pause after a client could not be accepted. Nothing tells when it could be.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// The answers to requests.
pub(crate) trait Handler: Send + Sync {
    /// `descriptor` came with the request: with [`ControlVerb::Getfd`] always, and with no other.
    fn call(
        &self,
        verb: ControlVerb,
        arguments: Value,
        descriptor: Option<OwnedFd>,
    ) -> Result<Answer, Refused>;
}

/// The answer to a request that is carried out.
pub(crate) struct Answer {
    pub(crate) value: Value,
    /// What is done once the client has been sent it: the end of the process above all.
    pub(crate) afterwards: Option<Box<dyn FnOnce()>>,
}

impl From<Value> for Answer {
    fn from(value: Value) -> Self {
        Self { value, afterwards: None }
    }
}

/// A control socket being served. Dropping it removes the socket file and ends its clients.
#[derive(Debug)]
pub(crate) struct ControlServer {
    _place: Place,
    publisher: Publisher,
}

/// A control socket that is bound and not served yet: who connects waits.
#[derive(Debug)]
pub(crate) struct Bound {
    place: Place,
    listener: UnixListener,
    access: ControlAccess,
}

impl Bound {
    /// Binds `path`, for those who have `access`. A socket file that nobody listens on any more is replaced; any other file is
    /// left alone.
    pub(crate) fn at(path: &Path, access: ControlAccess) -> std::io::Result<Self> {
        let (place, listener) = Place::bind(path, &access)?;
        Ok(Self { place, listener, access })
    }

    pub(crate) fn serve(
        self,
        handler: Arc<dyn Handler>,
        publisher: Publisher,
    ) -> std::io::Result<ControlServer> {
        let Self { place, listener, access } = self;
        let server = ControlServer { _place: place, publisher: publisher.clone() };
        let greeting = json!({"vfio-migrate": {"version": env!("CARGO_PKG_VERSION")}}).to_string();
        std::thread::Builder::new().name("control".into()).spawn(move || {
            let mut short = false;
            for stream in listener.incoming() {
                match stream {
                    Ok(stream) => {
                        short = false;
                        match access.caller(&stream) {
                            Ok(caller) => publisher.admit(stream, caller, &greeting, |client| {
                                begin(client, &handler, &publisher)
                            }),
                            Err(refused) => turn_away(&stream, refused),
                        }
                    }
                    Err(error) => {
                        // Once, until it is over: it is the same each time.
                        if !std::mem::replace(&mut short, true) {
                            let error = error_chain(&error);
                            tracing::warn!(
                                error,
                                "no client of the control socket can be taken in; it is tried until one can"
                            );
                        }
                        // What is short now, descriptors above all, is there again when others have ended.
                        std::thread::sleep(ACCEPT_AGAIN);
                    }
                }
            }
        })?;
        Ok(server)
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.publisher.end();
    }
}

/// Tells somebody who may do nothing why, in place of the greeting.
fn turn_away(stream: &UnixStream, refused: Refused) {
    let line = reply(None, Err(refused));
    // Whoever has just connected has room for a line; nothing is waited for.
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    if let Err(error) = rustix::net::send(stream, format!("{line}\n").as_bytes(), flags) {
        tracing::debug!(%error, "a caller of the control socket was refused and could not be told");
    }
}

/// Gives a client its thread.
fn begin(client: Arc<Client>, handler: &Arc<dyn Handler>, publisher: &Publisher) -> std::io::Result<()> {
    let reader = client.reader()?;
    let no_thread = |error: Error| Error::other(format!("there is no thread for it: {error}"));
    let (handler, publisher) = (handler.clone(), publisher.clone());
    let made = std::thread::Builder::new().name("control-client".into()).spawn(move || {
        serve(reader, &client, &*handler);
        publisher.forget(&client);
    });
    made.map(drop).map_err(no_thread)
}

fn serve(stream: UnixStream, client: &Client, handler: &dyn Handler) {
    let mut lines = Lines::of(stream);
    loop {
        let line = match lines.next() {
            Ok(line) if !line.bytes.is_empty() => line,
            _ => return,
        };
        client.asks();
        let whole = line.is_whole();
        let (reply, afterwards) = if whole || line.bytes.len() < LINE_MAX {
            answer(line, client.caller(), handler)
        } else {
            let long = Refused::generic(format!("the request is longer than {LINE_MAX} bytes"));
            (reply(None, Err(long)), None)
        };
        let sent = client.write_line(&reply);
        // Also if it could not be sent: it was asked for.
        if let Some(afterwards) = afterwards {
            afterwards();
        }
        match sent {
            Ok(()) if whole => {}
            // Who has left counts on what was asked for before, a cancel above all: all of it is here.
            Err(error) if whole && error.kind() == ErrorKind::BrokenPipe => {}
            _ => return,
        }
        client.answered();
    }
}

fn answer(line: Line, caller: &Caller, handler: &dyn Handler) -> (String, Option<Box<dyn FnOnce()>>) {
    let (id, request) = request::read(&line.bytes);
    let answer = request.and_then(|request| {
        caller.check(request.execute)?;
        let descriptor = descriptor(request.execute, line.passed)?;
        handler.call(request.execute, request.arguments, descriptor)
    });
    match answer {
        Ok(Answer { value, afterwards }) => (reply(id.as_deref(), Ok(value)), afterwards),
        Err(refused) => (reply(id.as_deref(), Err(refused)), None),
    }
}

/// The descriptor that came with a request which takes one. Passed with any other, it might be meant for something that is
/// done otherwise without it.
fn descriptor(verb: ControlVerb, mut passed: Passed) -> Result<Option<OwnedFd>, Refused> {
    let refused = |why: &str| Err(Refused::generic(why));
    let lost = passed.lost;
    match (verb, passed.descriptors.pop()) {
        (ControlVerb::Getfd, Some(descriptor)) if passed.descriptors.is_empty() && !lost => {
            Ok(Some(descriptor))
        }
        (ControlVerb::Getfd, Some(_)) => {
            refused("more than one descriptor came with the request, and getfd takes one; all are closed")
        }
        (ControlVerb::Getfd, None) if lost => refused(
            "the descriptor cannot be taken in: this process has no place for one more (RLIMIT_NOFILE: ulimit -n, LimitNOFILE=)",
        ),
        (ControlVerb::Getfd, None) => {
            refused("no descriptor came with the request: it is passed beside the line (SCM_RIGHTS)")
        }
        (_, None) if !lost => Ok(None),
        _ => refused(
            "a descriptor came with the request, which is not carried out: only getfd takes one; it is closed",
        ),
    }
}

/// The line of an answer; `id` is as it was sent.
fn reply(id: Option<&RawValue>, answer: Result<Value, Refused>) -> String {
    #[derive(Serialize)]
    struct Reply<'a> {
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<Refused>,
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<&'a RawValue>,
        #[serde(rename = "return", skip_serializing_if = "Option::is_none")]
        value: Option<Value>,
    }
    let (value, error) = match answer {
        Ok(value) => (Some(value), None),
        Err(refused) => (None, Some(refused)),
    };
    // JSON that was read is written again: nothing of it can fail.
    serde_json::to_string(&Reply { error, id, value }).unwrap_or_default()
}

/// The file of a socket that we bound. Dropping it removes the file, if it is still ours.
#[derive(Debug)]
struct Place {
    path: PathBuf,
    /// Device and inode of the file, by which it is known to be ours.
    identity: (u64, u64),
}

impl Place {
    /// Binds `path`. A socket file that nobody listens on any more is replaced; any other file is left alone.
    fn bind(path: &Path, access: &ControlAccess) -> std::io::Result<(Self, UnixListener)> {
        let callers = access.any();
        let listener = match bind_unix(path, &callers) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                clear(path)?;
                bind_unix(path, &callers)
            }
            other => other,
        }?;
        Ok((Self { path: path.into(), identity: identity(path)? }, listener))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|found| found == self.identity) {
            // Nothing depends on the file being gone: the next bind replaces a dead one.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Removes a socket file whose listener is gone; says what else is in the way.
fn clear(path: &Path) -> std::io::Result<()> {
    let refuse = |why: &str| Err(Error::new(ErrorKind::AddrInUse, why));
    if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
        return refuse("there is a file of another kind, which is left alone");
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        Err(error) => Err(error),
        Ok(_) => refuse("another process listens there"),
    }
}

fn identity(path: &Path) -> std::io::Result<(u64, u64)> {
    let data = std::fs::symlink_metadata(path)?;
    Ok((data.dev(), data.ino()))
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read, Write};

    use super::*;
    use crate::control::client::ControlClient;
    use crate::control::event::ControlEvent;

    struct Echo;

    impl Handler for Echo {
        fn call(&self, verb: ControlVerb, arguments: Value, _: Option<OwnedFd>) -> Result<Answer, Refused> {
            match verb {
                ControlVerb::Query => Ok(arguments.into()),
                _ => Err(Refused::new("GenericError", "no")),
            }
        }
    }

    fn bind(path: &Path, publisher: Publisher) -> std::io::Result<ControlServer> {
        Bound::at(path, ControlAccess::default())?.serve(Arc::new(Echo), publisher)
    }

    fn served() -> (tempfile::TempDir, std::path::PathBuf, ControlServer, Publisher) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let publisher = Publisher::default();
        let server = bind(&path, publisher.clone()).unwrap();
        (dir, path, server, publisher)
    }

    #[test]
    fn answers_refuses_and_publishes() {
        let (_dir, path, _server, publisher) = served();
        let mut client = ControlClient::connect(&path, Duration::from_secs(5), None).unwrap();
        assert_eq!(client.call(ControlVerb::Query, json!({"a": 1})).unwrap(), json!({"a": 1}));
        assert!(client.call(ControlVerb::Quit, Value::Null).unwrap_err().to_string().contains("no"));
        publisher.publish(&ControlEvent::new("STOP", Value::Null));
        assert_eq!(client.next_event(Duration::from_secs(5)).unwrap().unwrap().event, "STOP");
    }

    /// Ends the connections of all clients when it has answered, as a process does that ends.
    struct Ending(Publisher);

    impl Handler for Ending {
        fn call(&self, _: ControlVerb, value: Value, _: Option<OwnedFd>) -> Result<Answer, Refused> {
            let publisher = self.0.clone();
            Ok(Answer { value, afterwards: Some(Box::new(move || publisher.end())) })
        }
    }

    #[test]
    fn a_client_that_ends_the_process_has_its_answer_first() {
        let dir = tempfile::tempdir().unwrap();
        let (path, publisher) = (dir.path().join("control"), Publisher::default());
        let bound = Bound::at(&path, ControlAccess::default()).unwrap();
        let _server = bound.serve(Arc::new(Ending(publisher.clone())), publisher).unwrap();
        let mut client = ControlClient::connect(&path, Duration::from_secs(60), None).unwrap();
        assert_eq!(client.call(ControlVerb::Quit, json!({})).unwrap(), json!({}));
        assert!(client.call(ControlVerb::Query, json!({})).is_err(), "it has ended");
    }

    #[test]
    fn nonsense_gets_an_error_and_the_connection_goes_on() {
        let (_dir, path, _server, _publisher) = served();
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream
            .write_all(b"garbage\n{\"execute\":\"fly\",\"id\":null}\n{\"execute\":\"query\",\"id\":7}\n")
            .unwrap();
        let lines: Vec<String> = BufReader::new(stream).lines().take(4).map(Result::unwrap).collect();
        assert!(lines[1].contains("CommandNotFound") && lines[2].contains("CommandNotFound"), "{lines:?}");
        assert!(!lines[1].contains("\"id\"") && lines[2].contains("\"id\":null"), "{lines:?}");
        assert_eq!(lines[3], r#"{"id":7,"return":null}"#);
    }

    #[test]
    fn an_endless_line_is_refused() {
        let (_dir, path, _server, _publisher) = served();
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream.write_all(&vec![b'x'; LINE_MAX]).unwrap();
        let mut all = String::new();
        BufReader::new(stream).read_to_string(&mut all).unwrap();
        assert!(all.contains("longer than"), "{all}");
    }

    #[test]
    fn a_dead_socket_file_is_replaced_and_a_live_one_is_not() {
        let (_dir, path, server, _publisher) = served();
        assert!(bind(&path, Publisher::default()).is_err());
        // As a killed process leaves it: the file without a listener.
        drop(server);
        drop(UnixListener::bind(&path).unwrap());
        assert!(bind(&path, Publisher::default()).is_ok());
    }

    #[test]
    fn a_file_that_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        std::fs::write(&path, "data").unwrap();
        let own = ControlAccess::default();
        let error = Place::bind(&path, &own).unwrap_err();
        assert!(error.to_string().contains("left alone"), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "data");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(Place::bind(&link, &own).is_err());
        assert!(link.exists() && path.exists());
    }

    #[test]
    fn only_our_own_socket_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let own = ControlAccess::default();
        let (place, listener) = Place::bind(&path, &own).unwrap();
        std::fs::rename(&path, dir.path().join("kept")).unwrap();
        let (_other, _) = Place::bind(&path, &own).unwrap();
        drop((place, listener));
        assert!(path.exists(), "the file that took the path is not ours");
    }
}
