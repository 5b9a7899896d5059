//! The clients of a control socket: who they are, what they are sent unasked, and who goes when there is no place.

use std::collections::VecDeque;
use std::io::{Error, ErrorKind, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use rustix::net::SendFlags;
use vfio_migration_types::error_chain;

use super::access::Caller;
use super::event::ControlEvent;
use super::verbs::ControlRight;

/// Most clients at a time.
const CLIENTS_MAX: usize = 32;
/// A client that does not read for this long loses its connection rather than hold up an event.
const WRITE_TIMEOUT: Duration = Duration::from_secs(2);
/// Events that may wait for a client that may only ask, while it is sent an answer.
const EVENTS_MAX: usize = 64;
/// What is sent at once or not at all.
const AT_ONCE: SendFlags = SendFlags::DONTWAIT.union(SendFlags::NOSIGNAL);

/// One client's connection.
#[derive(Debug)]
pub(super) struct Client {
    stream: UnixStream,
    caller: Caller,
    /// Held while a line is written, so that lines stay whole.
    writing: Mutex<()>,
    /// Events that wait until who writes has written: only of a client that may only ask.
    events: Mutex<VecDeque<String>>,
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
    fn new(stream: UnixStream, caller: Caller) -> std::io::Result<Self> {
        stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
        let heard = Heard { last: Instant::now(), waits: false };
        let (writing, events) = (Mutex::default(), Mutex::default());
        Ok(Self { stream, caller, writing, events, heard: heard.into() })
    }

    pub(super) fn caller(&self) -> &Caller {
        &self.caller
    }

    /// A second handle of the connection, to read from.
    pub(super) fn reader(&self) -> std::io::Result<UnixStream> {
        self.stream.try_clone()
    }

    /// Sends an answer; the client has [`WRITE_TIMEOUT`] to take it.
    pub(super) fn write_line(&self, line: &str) -> std::io::Result<()> {
        {
            let _one_line = lock(&self.writing);
            (&self.stream).write_all(format!("{line}\n").as_bytes())?;
        }
        self.send_events()
    }

    /// Sends an event. Who may only ask must not hold up whoever publishes it, who may have a guest paused: such a client takes it
    /// at once, or is to go.
    fn tell(&self, line: &str) -> std::io::Result<()> {
        if self.caller.right == ControlRight::Full {
            return self.write_line(line);
        }
        let mut events = lock(&self.events);
        if events.len() >= EVENTS_MAX {
            return Err(ErrorKind::WouldBlock.into());
        }
        events.push_back(format!("{line}\n"));
        drop(events);
        self.send_events()
    }

    /// Sends the events that wait, unless another thread is writing, which does so when it has written.
    fn send_events(&self) -> std::io::Result<()> {
        while !lock(&self.events).is_empty() {
            let _one_line = match self.writing.try_lock() {
                Ok(held) => held,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return Ok(()),
            };
            loop {
                let next = lock(&self.events).pop_front();
                let Some(line) = next else { break };
                let sent = rustix::net::send(&self.stream, line.as_bytes(), AT_ONCE)?;
                if sent < line.len() {
                    return Err(Error::from(ErrorKind::WouldBlock));
                }
            }
        }
        Ok(())
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
            && let Err(error) = rustix::net::send(&self.stream, format!("{line}\n").as_bytes(), AT_ONCE)
        {
            tracing::debug!(%error, why, "a client was disconnected and could not be told");
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
            if client.tell(&line).is_err() {
                self.forget(&client);
            }
        }
    }

    /// Greets a client and takes it in. Where there is no place, the one goes that has been silent longest, of those who may only
    /// ask as long as there are any; nobody else goes for one of them. A new one is turned away only while all who might go
    /// wait for answers. `serve` is what it is given to then; it fails where nobody could serve it. Who goes is told why.
    pub(super) fn admit(
        &self,
        stream: UnixStream,
        caller: Caller,
        greeting: &str,
        serve: impl FnOnce(Arc<Client>) -> std::io::Result<()>,
    ) {
        let right = caller.right;
        let Ok(client) = Client::new(stream, caller).map(Arc::new) else { return };
        if let Err(why) = self.make_room(right) {
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

    fn make_room(&self, comer: ControlRight) -> Result<(), &'static str> {
        let longest = {
            let mut clients = lock(&self.clients);
            if clients.len() < CLIENTS_MAX {
                return Ok(());
            }
            let going = clients.iter().enumerate().filter_map(|(at, client)| {
                let reads = client.caller.right == ControlRight::Read;
                let silent = client.silent_since();
                // One that waits for an answer goes only if it may only ask, and the new one may more.
                let goes = match comer {
                    ControlRight::Read => reads && silent.is_some(),
                    ControlRight::Full => reads || silent.is_some(),
                };
                goes.then_some(((!reads, silent.is_none(), silent), at))
            });
            let (_, at) = going.min().ok_or("there are 32 clients, and all who might go wait for answers")?;
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

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};

    use serde_json::{Value, json};

    use super::*;

    /// The other end of a client's connection.
    struct Other(BufReader<UnixStream>);

    impl Other {
        /// Comes to `publisher`, past the greeting.
        fn of(publisher: &Publisher, right: ControlRight) -> Self {
            let (here, there) = UnixStream::pair().unwrap();
            let caller = Caller::with_right(&here, right);
            publisher.admit(here, caller, "greeting", |_| Ok(()));
            there.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            Self(BufReader::new(there))
        }

        fn line(&mut self) -> String {
            let mut line = String::new();
            self.0.read_line(&mut line).unwrap();
            line.trim_end().to_owned()
        }

        fn greeted(mut self) -> Self {
            assert_eq!(self.line(), "greeting");
            self
        }
    }

    fn event(number: u32) -> ControlEvent {
        ControlEvent::new("STOP", json!(number))
    }

    fn rights(publisher: &Publisher) -> (usize, usize) {
        let clients = lock(&publisher.clients);
        let full = clients.iter().filter(|client| client.caller.right == ControlRight::Full).count();
        (full, clients.len() - full)
    }

    #[test]
    fn who_may_only_ask_takes_no_place_of_one_who_may_more() {
        use ControlRight::{Full, Read};
        let publisher = Publisher::default();
        // The first to come is silent longest.
        let mut operator = Other::of(&publisher, Full).greeted();
        let mut readers: Vec<Other> =
            (0..2 * CLIENTS_MAX).map(|_| Other::of(&publisher, Read).greeted()).collect();
        assert_eq!(rights(&publisher), (1, CLIENTS_MAX - 1));
        assert!(readers[0].line().contains("silent longest"));
        let second = Other::of(&publisher, Full).greeted();
        assert_eq!(rights(&publisher), (2, CLIENTS_MAX - 2));
        // All of them ask and ask, and take no answer.
        for client in lock(&publisher.clients).iter() {
            client.asks();
        }
        assert!(Other::of(&publisher, Read).line().contains("all who might go wait for answers"));
        let mut operators: Vec<Other> =
            (2..CLIENTS_MAX).map(|_| Other::of(&publisher, Full).greeted()).collect();
        assert_eq!(rights(&publisher), (CLIENTS_MAX, 0));
        // Now all are of one kind, and those who wait for answers stay.
        let _last = Other::of(&publisher, Full).greeted();
        assert!(operators[0].line().contains("silent longest"));
        publisher.publish(&event(7));
        assert!(operator.line().contains("STOP"), "the first is there still");
        drop(second);
    }

    #[test]
    fn who_may_only_ask_holds_up_no_event() {
        let publisher = Publisher::default();
        let mut stuck = Other::of(&publisher, ControlRight::Read).greeted();
        let mut other = Other::of(&publisher, ControlRight::Full).greeted();
        let client = lock(&publisher.clients)[0].clone();
        let number = |line: String| serde_json::from_str::<Value>(&line).unwrap()["data"].clone();
        {
            // As while an answer is written that the client does not take.
            let _answering = lock(&client.writing);
            publisher.publish(&event(0));
            publisher.publish(&event(1));
            assert_eq!((number(other.line()), number(other.line())), (json!(0), json!(1)));
        }
        client.write_line("the answer").unwrap();
        assert_eq!(stuck.line(), "the answer");
        assert_eq!((number(stuck.line()), number(stuck.line())), (json!(0), json!(1)));
        // More than a socket and what waits behind it hold: it is to go, and nobody else.
        for round in 2..1_000_000 {
            publisher.publish(&event(round));
            assert_eq!(number(other.line()), json!(round));
            if rights(&publisher) == (1, 0) {
                return;
            }
        }
        panic!("it stays");
    }
}
