//! A limit on all that one thread asks together: a question of somebody who was told how long its answer may take.

use std::marker::PhantomData;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use crate::conn::deadline;

/// The questions that are under way, of all threads.
#[derive(Debug, Default)]
pub(super) struct Questions(Mutex<Asked>);

#[derive(Debug, Default)]
struct Asked {
    next: u64,
    questions: Vec<Question>,
}

/// A question under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Question {
    number: u64,
    thread: ThreadId,
    /// Time by which it is answered, or is late.
    pub(super) until: Instant,
    /// How long that was when it was asked.
    pub(super) limit: Duration,
}

impl Questions {
    /// The calling thread asks a question.
    pub(super) fn ask(self: &Arc<Self>, limit: Duration) -> QuestionLimit {
        let mut asked = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let number = asked.next;
        asked.next += 1;
        let (thread, until) = (std::thread::current().id(), deadline(limit));
        asked.questions.push(Question { number, thread, until, limit });
        QuestionLimit { questions: Arc::clone(self), number, _thread: PhantomData }
    }

    /// The question that the calling thread asks: of several, one in another, the one that is due first.
    pub(super) fn of_this_thread(&self) -> Option<Question> {
        let this = std::thread::current().id();
        let asked = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mine = asked.questions.iter().filter(|question| question.thread == this);
        mine.min_by_key(|question| question.until).copied()
    }
}

/// The limit of [`Client::limit_question`](crate::Client::limit_question), until it is dropped.
#[derive(Debug)]
pub struct QuestionLimit {
    questions: Arc<Questions>,
    number: u64,
    /// It is the thread's that asks.
    _thread: PhantomData<*const ()>,
}

impl Drop for QuestionLimit {
    fn drop(&mut self) {
        let mut asked = self.questions.0.lock().unwrap_or_else(PoisonError::into_inner);
        asked.questions.retain(|question| question.number != self.number);
    }
}
