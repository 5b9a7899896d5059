//! A limit on how often things of one kind are told, so that whoever brings them about fills no log.

use std::time::{Duration, Instant};

/// Things of one kind, of which so many are told in each interval. Of those beyond that, the last is told once the interval is over,
/// with the number of the others.
#[derive(Debug)]
pub struct RateLimit<T> {
    most: u32,
    interval: Duration,
    /// Begin of the interval, and how many were told in it.
    interval_began: Option<Instant>,
    told: u32,
    /// The last that was not told, and how many there were.
    last: Option<T>,
    left_out: u64,
}

/// Something that is to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told<T> {
    /// What it is.
    pub what: T,
    /// How many before it, since the one that was told last, were not told.
    pub left_out: u64,
}

impl<T> RateLimit<T> {
    /// At most `most` in an `interval`.
    pub const fn new(most: u32, interval: Duration) -> Self {
        Self { most, interval, interval_began: None, told: 0, last: None, left_out: 0 }
    }

    /// Takes what has happened, `now`, and returns it if it is to be told.
    pub fn take(&mut self, what: T, now: Instant) -> Option<Told<T>> {
        if self.interval_is_over(now) {
            (self.interval_began, self.told) = (Some(now), 0);
        }
        if self.told < self.most {
            self.told += 1;
            self.last = None;
            return Some(Told { what, left_out: std::mem::take(&mut self.left_out) });
        }
        self.last = Some(what);
        self.left_out = self.left_out.saturating_add(1);
        None
    }

    /// The last of those that were left out, if their interval is over: nothing may come after it.
    pub fn overdue(&mut self, now: Instant) -> Option<Told<T>> {
        if !self.interval_is_over(now) {
            return None;
        }
        let rest = self.rest();
        if rest.is_some() {
            (self.interval_began, self.told) = (Some(now), 1);
        }
        rest
    }

    /// The same, whether it is over or not: nothing comes any more.
    pub fn rest(&mut self) -> Option<Told<T>> {
        let what = self.last.take()?;
        Some(Told { what, left_out: std::mem::take(&mut self.left_out).saturating_sub(1) })
    }

    fn interval_is_over(&self, now: Instant) -> bool {
        self.interval_began.is_none_or(|began| now.saturating_duration_since(began) >= self.interval)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(what: u32, left_out: u64) -> Option<Told<u32>> {
        Some(Told { what, left_out })
    }

    #[test]
    fn none_is_lost_however_many_come() {
        let (begun, second) = (Instant::now(), Duration::from_secs(1));
        let mut limit = RateLimit::new(2, 10 * second);
        assert_eq!(limit.overdue(begun), None);
        assert_eq!([limit.take(1, begun), limit.take(2, begun)], [told(1, 0), told(2, 0)]);
        for flood in 3..=1000 {
            assert_eq!(limit.take(flood, begun + second), None);
            assert_eq!(limit.overdue(begun + 9 * second), None);
        }
        // The last, and the 997 before it.
        assert_eq!(limit.overdue(begun + 10 * second), told(1000, 997));
        assert_eq!(limit.overdue(begun + 11 * second), None);
        // What was told late counts in the interval in which it was told.
        assert_eq!(limit.take(1001, begun + 12 * second), told(1001, 0));
        assert_eq!(
            [limit.take(1002, begun + 12 * second), limit.take(1003, begun + 12 * second)],
            [None, None]
        );
        // Somebody comes before anybody has looked for what is overdue.
        assert_eq!(limit.take(1004, begun + 30 * second), told(1004, 2));
        assert_eq!(limit.overdue(begun + 50 * second), None);
    }

    #[test]
    fn what_is_left_at_the_end_is_told_at_once() {
        let now = Instant::now();
        let mut limit = RateLimit::new(1, Duration::from_secs(10));
        assert_eq!(limit.rest(), None);
        assert_eq!([limit.take(1, now), limit.take(2, now), limit.take(3, now)], [told(1, 0), None, None]);
        assert_eq!([limit.rest(), limit.rest()], [told(3, 1), None]);
    }
}
