//! The queue of a session's events, from its threads to the loop that hands them to the engine.

use std::sync::mpsc::Sender;

/// The way to a session's loop. `E` is the engine's event.
#[derive(Clone, Debug)]
pub(crate) struct Events<E>(Sender<E>);

impl<E> Events<E> {
    pub(crate) fn new(session: Sender<E>) -> Self {
        Self(session)
    }

    pub(crate) fn send(&self, event: E) {
        // Nobody listens any more: the session is at its end.
        let _ = self.0.send(event);
    }
}
