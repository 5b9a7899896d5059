//! The server of the control socket: one thread per client, events to all of them.

use std::io::{BufRead, BufReader, Error, ErrorKind, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};

use super::event::ControlEvent;
use super::protocol::{ControlRequest, ControlVerb};
use super::refused::Refused;

/// Longest request line: a client that sends more is refused and dropped.
const LINE_MAX: u64 = 64 << 10;
/// Most clients at a time.
const CLIENTS_MAX: usize = 32;
/// A client that does not read for this long loses its connection rather than hold up an event.
const WRITE_TIMEOUT: Duration = Duration::from_secs(2);

/// The answers to requests.
pub(crate) trait Handler: Send + Sync {
    fn call(&self, verb: ControlVerb, arguments: Value) -> Result<Value, Refused>;
}

/// Hands events to every client.
#[derive(Clone, Debug, Default)]
pub(crate) struct Publisher {
    clients: Arc<Mutex<Vec<Arc<Mutex<UnixStream>>>>>,
}

impl Publisher {
    /// Sends `event` to every client; one that cannot take it is dropped.
    pub(crate) fn publish(&self, event: &ControlEvent) {
        let Ok(line) = serde_json::to_string(event) else { return };
        let clients = lock(&self.clients).clone();
        for client in clients {
            if write_line(&client, &line).is_err() {
                self.forget(&client);
            }
        }
    }

    fn forget(&self, client: &Arc<Mutex<UnixStream>>) {
        lock(&self.clients).retain(|other| !Arc::ptr_eq(other, client));
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
}

impl Bound {
    /// Binds `path`. A socket file that nobody listens on any more is replaced; any other file is left alone.
    pub(crate) fn at(path: &Path) -> std::io::Result<Self> {
        let (place, listener) = Place::bind(path)?;
        Ok(Self { place, listener })
    }

    pub(crate) fn serve(
        self,
        handler: Arc<dyn Handler>,
        publisher: Publisher,
    ) -> std::io::Result<ControlServer> {
        let Self { place, listener } = self;
        let server = ControlServer { _place: place, publisher: publisher.clone() };
        std::thread::Builder::new().name("control".into()).spawn(move || {
            for stream in listener.incoming().flatten() {
                admit(stream, &handler, &publisher);
            }
        })?;
        Ok(server)
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        for client in lock(&self.publisher.clients).drain(..) {
            let _ = lock(&client).shutdown(std::net::Shutdown::Both);
        }
    }
}

fn admit(stream: UnixStream, handler: &Arc<dyn Handler>, publisher: &Publisher) {
    if lock(&publisher.clients).len() >= CLIENTS_MAX || stream.set_write_timeout(Some(WRITE_TIMEOUT)).is_err()
    {
        return;
    }
    let Ok(read_side) = stream.try_clone() else { return };
    let client = Arc::new(Mutex::new(stream));
    let greeting = json!({"vfio-migrate": {"version": env!("CARGO_PKG_VERSION")}});
    if write_line(&client, &greeting.to_string()).is_err() {
        return;
    }
    lock(&publisher.clients).push(client.clone());
    let (handler, of_thread) = (handler.clone(), publisher.clone());
    let spawned = std::thread::Builder::new().name("control-client".into()).spawn({
        let client = client.clone();
        move || {
            serve(read_side, &client, &*handler);
            of_thread.forget(&client);
        }
    });
    if spawned.is_err() {
        publisher.forget(&client);
    }
}

fn serve(stream: UnixStream, client: &Mutex<UnixStream>, handler: &dyn Handler) {
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        match reader.by_ref().take(LINE_MAX).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let whole = line.last() == Some(&b'\n');
        let reply = if whole || (line.len() as u64) < LINE_MAX {
            answer(&line, handler)
        } else {
            refusal(
                &Refused::new("GenericError", format!("the request is longer than {LINE_MAX} bytes")),
                None,
            )
        };
        if write_line(client, &reply.to_string()).is_err() || !whole {
            return;
        }
    }
}

fn answer(line: &[u8], handler: &dyn Handler) -> Value {
    let not_a_request = |why: &dyn std::fmt::Display, id: Option<&Value>| {
        refusal(&Refused::new("CommandNotFound", format!("not a request: {why}")), id)
    };
    let mut line: Value = match serde_json::from_slice(line) {
        Ok(line) => line,
        Err(error) => return not_a_request(&error, None),
    };
    // The id comes back whatever it is and whatever the rest of the line is worth.
    let id = line.as_object_mut().and_then(|members| members.remove("id"));
    let request: ControlRequest = match serde_json::from_value(line) {
        Ok(request) => request,
        Err(error) => return not_a_request(&error, id.as_ref()),
    };
    match handler.call(request.execute, request.arguments) {
        Ok(value) => with_id(json!({"return": value}), id.as_ref()),
        Err(refused) => refusal(&refused, id.as_ref()),
    }
}

fn refusal(refused: &Refused, id: Option<&Value>) -> Value {
    with_id(json!({"error": {"class": refused.class, "desc": refused.desc}}), id)
}

fn with_id(mut reply: Value, id: Option<&Value>) -> Value {
    if let Some(id) = id {
        reply["id"] = id.clone();
    }
    reply
}

fn write_line(client: &Mutex<UnixStream>, line: &str) -> std::io::Result<()> {
    let mut stream = lock(client);
    stream.write_all(format!("{line}\n").as_bytes())
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
    fn bind(path: &Path) -> std::io::Result<(Self, UnixListener)> {
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                clear(path)?;
                UnixListener::bind(path)
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

/// A panic elsewhere must not take the control socket along.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::client::ControlClient;

    struct Echo;

    impl Handler for Echo {
        fn call(&self, verb: ControlVerb, arguments: Value) -> Result<Value, Refused> {
            match verb {
                ControlVerb::Query => Ok(arguments),
                _ => Err(Refused::new("GenericError", "no")),
            }
        }
    }

    fn bind(path: &Path, publisher: Publisher) -> std::io::Result<ControlServer> {
        Bound::at(path)?.serve(Arc::new(Echo), publisher)
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
        let mut client = ControlClient::connect(&path, Duration::from_secs(5)).unwrap();
        assert_eq!(client.call(ControlVerb::Query, json!({"a": 1})).unwrap(), json!({"a": 1}));
        assert!(client.call(ControlVerb::Quit, Value::Null).unwrap_err().to_string().contains("no"));
        publisher.publish(&ControlEvent::new("STOP", Value::Null));
        assert_eq!(client.next_event(Duration::from_secs(5)).unwrap().unwrap().event, "STOP");
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
        stream.write_all(&vec![b'x'; usize::try_from(LINE_MAX).unwrap()]).unwrap();
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
        let error = Place::bind(&path).unwrap_err();
        assert!(error.to_string().contains("left alone"), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "data");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(Place::bind(&link).is_err());
        assert!(link.exists() && path.exists());
    }

    #[test]
    fn only_our_own_socket_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let (place, listener) = Place::bind(&path).unwrap();
        std::fs::rename(&path, dir.path().join("kept")).unwrap();
        let (_other, _) = Place::bind(&path).unwrap();
        drop((place, listener));
        assert!(path.exists(), "the file that took the path is not ours");
    }
}
