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

    /// Says how many were left out, when their minute is over: nobody may ask after them.
    pub(super) fn say_overdue(&self) {
        self.say_at(Some(Instant::now()));
    }

    /// The same, whether it is over or not: nobody asks any more.
    pub(super) fn say_rest(&self) {
        self.say_at(None);
    }

    fn say_at(&self, now: Option<Instant>) -> Option<u64> {
        let limit = &mut self.0.lock().unwrap_or_else(PoisonError::into_inner).limit;
        let told = match now {
            Some(now) => limit.overdue(now),
            None => limit.rest(),
        };
        let left_out = told?.left_out.saturating_add(1);
        say(left_out);
        Some(left_out)
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
            say(left_out);
        }
        questions.under_way = Some((attempt.attempt, taken.is_some()));
        taken.is_some()
    }
}

fn say(left_out: u64) {
    tracing::info!(
        target: super::history::SESSION,
        "{left_out} more questions and rehearsals came in the last minute, which are neither said one by one nor in the history"
    );
}

/// Whether a session brings nothing that stays.
pub(super) fn is_question(attempt: &AttemptInfo) -> bool {
    matches!(attempt.kind, AttemptKind::Check | AttemptKind::Rehearsal)
}

#[cfg(test)]
mod tests {
    use vfio_migration::AttemptKind;
    use vfio_migration_types::{Epoch, VmId};

    use super::*;

    fn question(number: u8) -> AttemptInfo {
        let attempt = AttemptId([number; 16]);
        AttemptInfo::beginning(VmId([7; 16]), attempt, Epoch(0), AttemptKind::Check, "tcp:a:1".into())
    }

    #[test]
    fn those_that_were_left_out_are_counted_when_none_comes_after_them() {
        let questions = IncomingQuestions::default();
        let now = Instant::now();
        let told = |from: u8, to: u8, now| {
            (from..to).filter(|number| questions.begins_at(&question(*number), now)).count()
        };
        assert_eq!(told(0, 25, now), 20);
        assert_eq!(questions.say_at(Some(now + INTERVAL / 2)), None, "their minute is not over");
        assert_eq!(questions.say_at(Some(now + INTERVAL)), Some(5));
        assert_eq!(questions.say_at(Some(now + 3 * INTERVAL)), None, "once");
        assert_eq!(questions.say_at(None), None);
        // That was one of the next minute's.
        assert_eq!(told(25, 50, now + INTERVAL), 19);
        assert_eq!(questions.say_at(None), Some(6), "the process ends");
    }
}
