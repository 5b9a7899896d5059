//! The clients of a control socket: who they are, what they are sent unasked, and who goes when there is no place.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::net::SendFlags;
use vfio_migration_types::error_chain;

use super::event::ControlEvent;

/// Most clients at a time.
const CLIENTS_MAX: usize = 32;
/// A client that does not read for this long loses its connection rather than hold up an event.
const WRITE_TIMEOUT: Duration = Duration::from_secs(2);

/// One client's connection.
#[derive(Debug)]
pub(super) struct Client {
    stream: UnixStream,
    /// Held while a line is written, so that lines stay whole.
    writing: Mutex<()>,
    heard: Mutex<Heard>,
}

#[derive(Debug)]
struct Heard {
    /// When it came, last asked for something, or was last answered.
    last: Instant,
    /// It waits for an answer.
    waits: bool,
}

impl Client {
    fn new(stream: UnixStream) -> std::io::Result<Self> {
        stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
        let heard = Heard { last: Instant::now(), waits: false };
        Ok(Self { stream, writing: Mutex::default(), heard: heard.into() })
    }

    /// A second handle of the connection, to read from.
    pub(super) fn reader(&self) -> std::io::Result<UnixStream> {
        self.stream.try_clone()
    }

    pub(super) fn write_line(&self, line: &str) -> std::io::Result<()> {
        let _one_line = lock(&self.writing);
        (&self.stream).write_all(format!("{line}\n").as_bytes())
    }

    /// Notes that it asked for something, and waits for the answer.
    pub(super) fn asks(&self) {
        *lock(&self.heard) = Heard { last: Instant::now(), waits: true };
    }

    /// Notes that it has its answer.
    pub(super) fn answered(&self) {
        *lock(&self.heard) = Heard { last: Instant::now(), waits: false };
    }

    /// Since when it has asked for nothing; `None` while it waits for an answer.
    fn silent_since(&self) -> Option<Instant> {
        let heard = lock(&self.heard);
        (!heard.waits).then_some(heard.last)
    }

    /// Closes the connection. It is told why, if it takes that at once: a line that is stuck half written cannot be followed
    /// by another.
    fn close(&self, why: &str) {
        let told = self.writing.try_lock();
        if told.is_ok()
            && let Ok(line) = serde_json::to_string(&ControlEvent::of_disconnection(why))
        {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            if let Err(error) = rustix::net::send(&self.stream, format!("{line}\n").as_bytes(), flags) {
                tracing::debug!(%error, why, "a client was disconnected and could not be told");
            }
        }
        self.end();
    }

    fn end(&self) {
        // Fails only if the client is gone.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// Hands events to every client.
#[derive(Clone, Debug, Default)]
pub(crate) struct Publisher {
    clients: Arc<Mutex<Vec<Arc<Client>>>>,
}

impl Publisher {
    /// Sends `event` to every client; one that cannot take it is disconnected.
    pub(crate) fn publish(&self, event: &ControlEvent) {
        let Ok(line) = serde_json::to_string(event) else { return };
        let clients = lock(&self.clients).clone();
        for client in clients {
            if client.write_line(&line).is_err() {
                self.forget(&client);
            }
        }
    }

    /// Greets a client and takes it in. Where there is no place, the one goes that has been silent longest; a new one is
    /// turned away only while all others wait for answers. `serve` is what it is given to then; it fails where nobody could
    /// serve it. Who goes is told why.
    pub(super) fn admit(
        &self,
        stream: UnixStream,
        greeting: &str,
        serve: impl FnOnce(Arc<Client>) -> std::io::Result<()>,
    ) {
        let Ok(client) = Client::new(stream).map(Arc::new) else { return };
        if let Err(why) = self.make_room() {
            return client.close(why);
        }
        if client.write_line(greeting).is_err() {
            return;
        }
        lock(&self.clients).push(client.clone());
        if let Err(error) = serve(client.clone()) {
            client.close(&format!("it cannot be served: {}", error_chain(&error)));
            self.forget(&client);
        }
    }

    fn make_room(&self) -> Result<(), &'static str> {
        let longest = {
            let mut clients = lock(&self.clients);
            if clients.len() < CLIENTS_MAX {
                return Ok(());
            }
            let silent = clients.iter().enumerate();
            let silent = silent.filter_map(|(at, client)| Some((client.silent_since()?, at)));
            let (_, at) = silent.min().ok_or("there are 32 clients, and all of them wait for answers")?;
            clients.swap_remove(at)
        };
        longest.close("there are 32 clients, a new one came, and this one was silent longest");
        Ok(())
    }

    /// Ends a client's connection, if it has not ended.
    pub(super) fn forget(&self, client: &Arc<Client>) {
        lock(&self.clients).retain(|other| !Arc::ptr_eq(other, client));
        client.end();
    }

    /// Ends all connections. What there is to say to the clients was said.
    pub(super) fn end(&self) {
        for client in lock(&self.clients).drain(..) {
            client.end();
        }
    }
}

/// A panic elsewhere must not take the control socket along.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
