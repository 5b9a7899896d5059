//! Times as numbers, for documents.

use std::time::Duration;

/// The milliseconds of `time`, to the nanosecond: as many digits as that needs and no noise behind them.
pub fn as_millis_f64(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e9).round() / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_no_noise() {
        for (nanos, text) in
            [(208_458, "0.208458"), (504_601_425, "504.601425"), (371_274_797, "371.274797"), (0, "0")]
        {
            assert_eq!(as_millis_f64(Duration::from_nanos(nanos)).to_string(), text);
        }
    }
}
