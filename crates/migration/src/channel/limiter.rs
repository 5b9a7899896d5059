//! The bandwidth cap, a token bucket that all senders of a session share, and what else each of them needs.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::channel::link::Link;
use crate::session::interrupt::{Interrupt, Interrupted};
use crate::session::lock::lock;

/// Longest stretch for which unused bandwidth is saved up, and so the length of a burst.
const BURST: Duration = Duration::from_millis(50);
/// Longest sleep in one piece, so that an interrupt and a changed rate are noticed.
const SLICE: Duration = Duration::from_millis(20);

/// The session's part in sending: limits, and the interrupt of whoever sends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SendContext<'a> {
    pub(crate) link: &'a Link,
    pub(crate) limiter: &'a Limiter,
    pub(crate) interrupt: &'a Interrupt,
    /// Time that the destination may grant a device nothing.
    pub(crate) patience: Duration,
}

/// Hands out leave to send. Off while the guest is paused.
#[derive(Debug)]
pub(crate) struct Limiter {
    bucket: Mutex<Bucket>,
}

#[derive(Debug)]
struct Bucket {
    rate: Option<u64>,
    /// May go below zero: who finds it above zero sends, however much, and the next one waits longer.
    tokens: f64,
    at: Instant,
}

impl Limiter {
    pub(crate) fn new(rate: Option<u64>) -> Self {
        Self { bucket: Mutex::new(Bucket { rate, tokens: 0.0, at: Instant::now() }) }
    }

    /// Changes the cap. A cap of nothing would be a hang: the least is one page a second.
    pub(crate) fn set_rate(&self, rate: Option<u64>) {
        let mut bucket = lock(&self.bucket);
        bucket.refill();
        bucket.rate = rate.map(|rate| rate.max(4096));
        bucket.tokens = bucket.tokens.max(0.0);
    }

    /// Most bytes that one frame should carry, so that a slow cap does not come in bursts.
    pub(crate) fn frame_size(&self, most: u64) -> u64 {
        lock(&self.bucket).rate.map_or(most, |rate| (rate / 20).clamp(4096, most))
    }

    /// Waits until `bytes` may be sent.
    pub(crate) fn take(&self, bytes: u64, interrupt: &Interrupt) -> Result<(), Interrupted> {
        loop {
            let wait = lock(&self.bucket).take(bytes);
            let Some(wait) = wait else { return Ok(()) };
            interrupt.check()?;
            std::thread::sleep(wait.min(SLICE));
        }
    }
}

impl Bucket {
    /// Takes `bytes`, or returns how long to wait before asking again.
    #[expect(clippy::cast_precision_loss, reason = "byte counts of a second are far below 2^52")]
    fn take(&mut self, bytes: u64) -> Option<Duration> {
        let rate = self.rate?;
        self.refill();
        if self.tokens < 0.0 {
            return Some(Duration::from_secs_f64((-self.tokens / rate as f64).clamp(0.000_1, 1.0)));
        }
        self.tokens -= bytes as f64;
        None
    }

    #[expect(clippy::cast_precision_loss, reason = "byte counts of a second are far below 2^52")]
    fn refill(&mut self) {
        let now = Instant::now();
        let since = now.duration_since(self.at);
        self.at = now;
        if let Some(rate) = self.rate {
            let rate = rate as f64;
            self.tokens = (self.tokens + rate * since.as_secs_f64()).min(rate * BURST.as_secs_f64());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cap_is_kept_and_can_be_lifted() {
        let limiter = Limiter::new(Some(10 << 20));
        let interrupt = Interrupt::default();
        let start = Instant::now();
        for _ in 0..32 {
            limiter.take(64 << 10, &interrupt).unwrap();
        }
        // 2 MiB at 10 MiB/s are 200 ms, less the burst and the last piece.
        assert!(start.elapsed() > Duration::from_millis(120), "{:?}", start.elapsed());
        limiter.set_rate(None);
        let start = Instant::now();
        limiter.take(1 << 30, &interrupt).unwrap();
        limiter.take(1 << 30, &interrupt).unwrap();
        assert!(start.elapsed() < Duration::from_millis(100));
    }

    #[test]
    fn an_interrupt_ends_the_wait() {
        let limiter = Limiter::new(Some(4096));
        let interrupt = Interrupt::default();
        limiter.take(1 << 20, &interrupt).unwrap();
        interrupt.raise();
        assert!(limiter.take(1, &interrupt).is_err());
    }
}
