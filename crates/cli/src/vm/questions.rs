//! Which of the questions and rehearsals of other hosts are said and written down: whoever may ask fills neither a log nor the history.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use vfio_migration::{AttemptInfo, AttemptKind};
use vfio_migration_types::{AttemptId, RateLimit};

/// So many in a minute, as of refusals.
const MOST: u32 = 20;
const INTERVAL: Duration = Duration::from_secs(60);

/// Those that come in.
#[derive(Debug)]
pub(super) struct IncomingQuestions(Mutex<Questions>);

#[derive(Debug)]
struct Questions {
    limit: RateLimit<()>,
    /// The one under way, and whether it is told.
    under_way: Option<(AttemptId, bool)>,
}

impl Default for IncomingQuestions {
    fn default() -> Self {
        Self(Mutex::new(Questions { limit: RateLimit::new(MOST, INTERVAL), under_way: None }))
    }
}

impl IncomingQuestions {
    /// Whether a session that begins is told. A migration always is.
    pub(super) fn begins(&self, attempt: &AttemptInfo) -> bool {
        self.begins_at(attempt, Instant::now())
    }

    /// Whether the end of a session is told: as its beginning was.
    pub(super) fn ends(&self, attempt: &AttemptInfo) -> bool {
        let told = self.begins(attempt);
        self.forget();
        told
    }

    /// The session under way is over.
    pub(super) fn forget(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).under_way = None;
    }

    fn begins_at(&self, attempt: &AttemptInfo, now: Instant) -> bool {
        if !is_question(attempt) {
            return true;
        }
        let mut questions = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, told)) = questions.under_way.filter(|(of, _)| *of == attempt.attempt) {
            return told;
        }
        let taken = questions.limit.take((), now);
        if let Some(left_out) = taken.map(|taken| taken.left_out).filter(|left_out| *left_out > 0) {
            tracing::info!(
                target: super::history::SESSION,
                "{left_out} more questions and rehearsals came in the last minute, which are neither said one by one nor in the history"
            );
        }
        questions.under_way = Some((attempt.attempt, taken.is_some()));
        taken.is_some()
    }
}

/// Whether a session brings nothing that stays.
pub(super) fn is_question(attempt: &AttemptInfo) -> bool {
    matches!(attempt.kind, AttemptKind::Check | AttemptKind::Rehearsal)
}
