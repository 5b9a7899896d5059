//! Sizes and times as people write them: `512M`, `1.5G`, `300ms`, `2s`.

use std::num::NonZeroU64;
use std::time::Duration;

/// Bytes: digits, an optional fraction, and a suffix K, M, G or T (powers of two; `KiB`, `MB` and the like mean the same).
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let refuse = || format!("'{text}' is not a size (want a number with K, M, G or T, for example 512M)");
    let (number, suffix) = split(text);
    let shift = match suffix.to_ascii_uppercase().trim_end_matches('B').trim_end_matches('I') {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(refuse()),
    };
    scaled(number, 1 << shift).ok_or_else(refuse)
}

/// A [`size`] that is not 0.
pub(crate) fn some_size(text: &str) -> Result<NonZeroU64, String> {
    NonZeroU64::new(size(text)?)
        .ok_or_else(|| format!("'{text}' is nothing; leave the option out for its default"))
}

/// A time: digits, an optional fraction, and `us`, `ms`, `s`, `m` or `h`.
pub(crate) fn time(text: &str) -> Result<Duration, String> {
    let refuse =
        || format!("'{text}' is not a time (want a number with us, ms, s, m or h, for example 300ms)");
    let (number, suffix) = split(text);
    let nanoseconds = match suffix {
        "us" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        "m" | "min" => 60_000_000_000,
        "h" => 3_600_000_000_000,
        _ => return Err(refuse()),
    };
    scaled(number, nanoseconds).map(Duration::from_nanos).ok_or_else(refuse)
}

/// A [`time`] that is not 0.
pub(crate) fn some_time(text: &str) -> Result<Duration, String> {
    match time(text)? {
        Duration::ZERO => Err(format!("'{text}' is no time at all; leave the option out for its default")),
        time => Ok(time),
    }
}

/// As the control socket has times.
pub(crate) use vfio_migration_types::milliseconds;

/// Times in documents: whole [`milliseconds`], at least one, or nothing.
pub(crate) mod whole_milliseconds {
    use std::num::NonZeroU64;
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use crate::units::milliseconds;

    #[expect(clippy::ref_option, reason = "serde hands out a reference to the field")]
    pub(crate) fn serialize<S: Serializer>(
        time: &Option<Duration>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        time.map(milliseconds).serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Duration>, D::Error> {
        let time: Option<NonZeroU64> = Option::deserialize(deserializer)?;
        Ok(time.map(|time| Duration::from_millis(time.get())))
    }
}

fn split(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    text.split_at(end)
}

/// `number × unit`, exact for up to nine decimals, `None` when it is no number or does not fit.
fn scaled(number: &str, unit: u64) -> Option<u64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.len() > 9 || (number.contains('.') && fraction.is_empty()) {
        return None;
    }
    let whole: u64 = whole.parse().ok()?;
    let mut value = u128::from(whole) * u128::from(unit);
    if !fraction.is_empty() {
        let digits: u128 = fraction.parse().ok()?;
        value += digits * u128::from(unit) / 10u128.pow(u32::try_from(fraction.len()).ok()?);
    }
    u64::try_from(value).ok()
}

/// A time for people: `2 s`, `1.5 s`, `300 ms`.
pub(crate) fn format_time(time: Duration) -> String {
    if time < Duration::from_secs(1) {
        format!("{} ms", milliseconds(time))
    } else {
        format!("{} s", time.as_secs_f64())
    }
}

/// Bytes for people: `1.5 GiB`.
pub(crate) fn format_size(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4K", 4096),
            ("4KiB", 4096),
            ("64MB", 64 << 20),
            ("1.5G", 3 << 29),
            ("512m", 512 << 20),
            ("2T", 2 << 40),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for bad in ["", "M", "-1", "1X", "1.G", ".5G", "1e3", "17179869184G", "99999999999999999999", "1 M"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn times() {
        assert_eq!(time("300ms"), Ok(Duration::from_millis(300)));
        assert_eq!(time("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(time("500us"), Ok(Duration::from_micros(500)));
        for (text, ms) in [("0ms", 0), ("1us", 1), ("500us", 1), ("1ms", 1), ("1.2ms", 2), ("2s", 2000)] {
            assert_eq!(time(text).map(milliseconds), Ok(ms), "{text}");
        }
        for bad in ["", "300", "ms", "1d", "-1s", "18446744074s"] {
            assert!(time(bad).is_err(), "{bad}");
        }
        for (time, shown) in [(2000, "2 s"), (1500, "1.5 s"), (300, "300 ms")] {
            assert_eq!(format_time(Duration::from_millis(time)), shown);
        }
    }

    #[test]
    fn nothing_is_neither_some_size_nor_some_time() {
        assert_eq!(some_size("1K").map(NonZeroU64::get), Ok(1024));
        assert_eq!(some_time("1us"), Ok(Duration::from_micros(1)));
        assert!(some_size("0").is_err() && some_size("0G").is_err());
        assert!(some_time("0s").is_err() && some_time("0.0ms").is_err());
    }
}
