//! The rate of a count that grows, for a person to see.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Time over which the rate is taken.
const WINDOW: Duration = Duration::from_secs(1);
/// Shortest time between two samples, and from which there is a rate at all.
const SAMPLE_EVERY: Duration = Duration::from_millis(50);

/// The rate of a count over the last second.
#[derive(Debug, Default)]
pub(crate) struct RateMeter {
    /// Oldest first: the first is the last before the window, the others are in it.
    samples: VecDeque<(Instant, u64)>,
    rate: u64,
}

impl RateMeter {
    /// Forgets what was counted. The rate stays what it was until there is another.
    pub(crate) fn restart(&mut self) {
        self.samples.clear();
    }

    /// The rate per second, `total` being the count at `now`.
    pub(crate) fn at(&mut self, now: Instant, total: u64) -> u64 {
        while self.samples.get(1).is_some_and(|(at, _)| now.saturating_duration_since(*at) >= WINDOW) {
            self.samples.pop_front();
        }
        if let Some((at, before)) = self.samples.front() {
            let since = now.saturating_duration_since(*at);
            if since >= SAMPLE_EVERY {
                let counted = u128::from(total.saturating_sub(*before));
                self.rate =
                    u64::try_from(counted * 1_000_000_000 / since.as_nanos().max(1)).unwrap_or(u64::MAX);
            }
        }
        let due =
            self.samples.back().is_none_or(|(at, _)| now.saturating_duration_since(*at) >= SAMPLE_EVERY);
        if due {
            self.samples.push_back((now, total));
        }
        self.rate
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_last_second() {
        let (mut meter, begun) = (RateMeter::default(), Instant::now());
        let at = |ms: u64| begun + Duration::from_millis(ms);
        assert_eq!(meter.at(at(0), 159), 0, "nothing to compare with");
        // A slow beginning is forgotten a second later.
        for ms in (200..=1000).step_by(200) {
            meter.at(at(ms), 159);
        }
        for ms in (1200..=3000).step_by(200) {
            meter.at(at(ms), 159 + (ms - 1000) * 12_000);
        }
        assert_eq!(meter.at(at(3200), 159 + 2200 * 12_000), 12_000_000);
        // Nothing more comes: the rate falls to nothing within a second or so.
        let total = 159 + 2200 * 12_000;
        assert!(meter.at(at(3700), total) < 12_000_000);
        meter.at(at(4300), total);
        assert_eq!(meter.at(at(5500), total), 0);
    }

    #[test]
    fn another_kind_of_traffic_is_measured_by_itself() {
        let (mut meter, begun) = (RateMeter::default(), Instant::now());
        let at = |ms: u64| begun + Duration::from_millis(ms);
        meter.at(at(0), 0);
        assert_eq!(meter.at(at(500), 50), 100);
        meter.restart();
        assert_eq!(meter.at(at(501), 50), 100, "as it was");
        assert_eq!(meter.at(at(601), 1_000_050), 10_000_000);
    }
}
