//! Scripted faults: what a device does wrong on purpose, as a string on a command line.
//!
//! Each is written `name[:argument]…`, and printing a fault gives back what it parses from.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use rustix::io::Errno;
use vfio_user_peer::MigrationState;

use crate::error::{Name, errno_by_name};

/// A scripted fault.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// `fail-arc:FROM:TO:ERRNO[:TIMES]` or `fail-arc:N:ERRNO`: the arc fails; the device stays where it was.
    FailArc {
        /// Arc at which the fault strikes.
        which: Which,
        /// Errno that the arc answers.
        errno: Errno,
        /// Number of strikes, for an arc given by its ends; always when `None`.
        times: Option<u32>,
    },
    /// `error-arc:FROM:TO`: the arc fails with EIO and leaves the device in ERROR.
    ErrorArc(Which),
    /// `hang-arc:FROM:TO[:TIME]`: the arc does not return for so long; never, without a time. A number without a unit counts
    /// milliseconds.
    HangArc {
        /// Arc at which the fault strikes.
        which: Which,
        /// Time that the arc takes; until the device is dropped when `None`.
        time: Option<Duration>,
    },
    /// `short-read:N`: a read of device state gives at most N bytes.
    ShortRead(usize),
    /// `wrong-size-estimate:PERCENT`: the STOP_COPY size estimate is so many percent of the right one.
    WrongSizeEstimate(u64),
    /// `die-in-read:BYTES`: the server vanishes in the read after so many bytes of device state were read.
    DieInRead(u64),
    /// `enodev-mid-stream:BYTES`: after so many bytes of a session it is gone, as when the guest resets the function:
    /// ENODEV, and the device is RUNNING.
    EnodevMidStream(u64),
    /// `corrupt-tail`: one byte of a bulk-state page in the STOP_COPY data is altered; the record's own checksum fits
    /// the altered bytes, so that only the device at the other end can notice.
    CorruptTail,
    /// `endless-state`: the STOP_COPY data has no end; after the device's state come zeros.
    EndlessState,
    /// `ignore-dirty-log[:N]`: the device's DMA log omits every page whose number is a multiple of N (2 if not given).
    IgnoreDirtyLog(u64),
    /// `lose-raise:VECTOR:N`: the N-th raise of a vector is counted by the device, but no interrupt is sent.
    LoseRaise {
        /// Index of the vector.
        vector: usize,
        /// Number of the raise, from 1.
        nth: u64,
    },
    /// `hang-read[:TIME]`: once the device is stopped, the first read of its state does not return for so long; never, without a
    /// time.
    HangRead(Option<Duration>),
    /// `fail-reset:ERRNO[:N]`: resets fail and change nothing, from the N-th on; all of them without a number.
    FailReset {
        /// Errno that the reset answers.
        errno: Errno,
        /// The first reset that fails, from 1.
        from: Option<u64>,
    },
    /// `hold-dma:N`: the last N descriptors of the ring wait until more follow them, or until the device is told to leave
    /// RUNNING: it carries them out on the way. Allowed to a device, and the worst that its peers can meet: however long
    /// it was idle, it writes to them once more while it stops.
    HoldDma(u64),
}

/// The arc of the state machine that a fault is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// The N-th arc that the device takes, from 1, whatever it is.
    Nth(u64),
    /// Every arc from one state to another.
    Between(MigrationState, MigrationState),
}

impl Which {
    /// Whether the `nth` arc, going `from` there `to` here, is meant.
    pub(crate) fn is(self, nth: u64, from: MigrationState, to: MigrationState) -> bool {
        match self {
            Self::Nth(n) => n == nth,
            Self::Between(a, b) => (a, b) == (from, to),
        }
    }
}

/// A string that names no fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no fault `{text}`: {why}")]
pub struct FaultError {
    text: String,
    why: String,
}

/// The forms that [`Fault`] parses, each with what it does, for a command's help.
pub const FAULT_FORMS: &[(&str, &str)] = &[
    ("fail-arc:FROM:TO:ERRNO[:TIMES]", "this arc fails; the device stays where it was"),
    ("fail-arc:N:ERRNO", "the N-th arc fails, whatever it is"),
    ("error-arc:FROM:TO, error-arc:N", "the arc fails with EIO and leaves the device in ERROR"),
    ("hang-arc:FROM:TO[:TIME]", "the arc takes so long (as 300ms, 15s); for ever, without a time"),
    ("hang-arc:N[:TIME]", "the same of the N-th arc"),
    ("short-read:N", "a read of device state gives at most N bytes"),
    ("wrong-size-estimate:PERCENT", "the size estimate is so many percent of the right one"),
    ("die-in-read:BYTES", "the server vanishes once it gave so many bytes of state"),
    ("enodev-mid-stream:BYTES", "the session is gone after so many bytes, as by a reset"),
    ("corrupt-tail", "a byte of the last state is altered; no checksum tells"),
    ("endless-state", "once the device is stopped, its state has no end"),
    ("hang-read[:TIME]", "once the device is stopped, the first read of its state takes so long"),
    ("ignore-dirty-log[:N]", "the DMA log omits each page with a multiple of N (2)"),
    ("lose-raise:VECTOR:N", "the N-th interrupt of a vector is counted and not sent"),
    ("fail-reset:ERRNO[:N]", "resets fail and change nothing, from the N-th on"),
    ("hold-dma:N", "the last N DMA writes wait for more, or for the stop"),
];

impl FromStr for Fault {
    type Err = FaultError;

    fn from_str(text: &str) -> Result<Self, FaultError> {
        let mut words = Words { rest: text.split(':').collect(), text };
        let name = words.next()?;
        let fault = match name {
            "fail-arc" => {
                let which = words.which()?;
                let errno = words.errno()?;
                let times = match which {
                    Which::Between(..) => words.number_if_any()?,
                    Which::Nth(_) => None,
                };
                Self::FailArc { which, errno, times }
            }
            "error-arc" => Self::ErrorArc(words.which()?),
            "hang-arc" => Self::HangArc { which: words.which()?, time: words.time_if_any()? },
            "short-read" => Self::ShortRead(words.at_least_one()?),
            "wrong-size-estimate" => Self::WrongSizeEstimate(words.number()?),
            "die-in-read" => Self::DieInRead(words.number()?),
            "enodev-mid-stream" => Self::EnodevMidStream(words.number()?),
            "corrupt-tail" => Self::CorruptTail,
            "endless-state" => Self::EndlessState,
            "ignore-dirty-log" => Self::IgnoreDirtyLog(match words.rest.is_empty() {
                true => 2,
                false => words.at_least_one()?,
            }),
            "lose-raise" => Self::LoseRaise { vector: words.number()?, nth: words.at_least_one()? },
            "hang-read" => Self::HangRead(words.time_if_any()?),
            "fail-reset" => Self::FailReset {
                errno: words.errno()?,
                from: if words.rest.is_empty() { None } else { Some(words.at_least_one()?) },
            },
            "hold-dma" => Self::HoldDma(words.at_least_one()?),
            _ => {
                let forms: Vec<&str> = FAULT_FORMS.iter().map(|(form, _)| *form).collect();
                return Err(words.error(format!("want one of {}", forms.join(", "))));
            }
        };
        match words.rest.first() {
            None => Ok(fault),
            Some(word) => Err(words.error(format!("`{word}` is too much"))),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FailArc { which, errno, times } => {
                write!(f, "fail-arc:{which}:{}", Name(*errno))?;
                times.map_or(Ok(()), |times| write!(f, ":{times}"))
            }
            Self::ErrorArc(which) => write!(f, "error-arc:{which}"),
            Self::HangArc { which, time } => {
                write!(f, "hang-arc:{which}")?;
                match time {
                    None => Ok(()),
                    Some(time) if time.subsec_nanos() == 0 => write!(f, ":{}s", time.as_secs()),
                    Some(time) if time.subsec_nanos() % 1_000_000 == 0 => {
                        write!(f, ":{}ms", time.as_millis())
                    }
                    Some(time) => write!(f, ":{}us", time.as_micros()),
                }
            }
            Self::ShortRead(bytes) => write!(f, "short-read:{bytes}"),
            Self::WrongSizeEstimate(percent) => write!(f, "wrong-size-estimate:{percent}"),
            Self::DieInRead(bytes) => write!(f, "die-in-read:{bytes}"),
            Self::EnodevMidStream(bytes) => write!(f, "enodev-mid-stream:{bytes}"),
            Self::CorruptTail => f.write_str("corrupt-tail"),
            Self::EndlessState => f.write_str("endless-state"),
            Self::IgnoreDirtyLog(every) => write!(f, "ignore-dirty-log:{every}"),
            Self::LoseRaise { vector, nth } => write!(f, "lose-raise:{vector}:{nth}"),
            Self::HangRead(time) => {
                f.write_str("hang-read")?;
                time.map_or(Ok(()), |time| write!(f, ":{}", time.as_millis()))
            }
            Self::FailReset { errno, from } => {
                write!(f, "fail-reset:{}", Name(*errno))?;
                from.map_or(Ok(()), |from| write!(f, ":{from}"))
            }
            Self::HoldDma(descriptors) => write!(f, "hold-dma:{descriptors}"),
        }
    }
}

impl fmt::Display for Which {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nth(n) => write!(f, "{n}"),
            Self::Between(from, to) => write!(f, "{from}:{to}"),
        }
    }
}

/// The words of a fault that are not yet read.
struct Words<'a> {
    text: &'a str,
    rest: Vec<&'a str>,
}

impl<'a> Words<'a> {
    fn error(&self, why: String) -> FaultError {
        FaultError { text: self.text.to_owned(), why }
    }

    fn next(&mut self) -> Result<&'a str, FaultError> {
        match self.rest.is_empty() {
            true => Err(self.error("something is missing at its end".to_owned())),
            false => Ok(self.rest.remove(0)),
        }
    }

    fn number<T: FromStr>(&mut self) -> Result<T, FaultError> {
        let word = self.next()?;
        word.parse().map_err(|_| self.error(format!("`{word}` is no number")))
    }

    fn at_least_one<T: FromStr + PartialEq + Default>(&mut self) -> Result<T, FaultError> {
        let number = self.number()?;
        match number == T::default() {
            true => Err(self.error("0 makes no sense here".to_owned())),
            false => Ok(number),
        }
    }

    fn number_if_any<T: FromStr>(&mut self) -> Result<Option<T>, FaultError> {
        if self.rest.is_empty() { Ok(None) } else { self.number().map(Some) }
    }

    /// A number and its unit; milliseconds without one.
    fn time_if_any(&mut self) -> Result<Option<Duration>, FaultError> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let word = self.next()?;
        let end = word.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(word.len());
        let (number, unit) = word.split_at(end);
        let seconds = match unit {
            "us" => Some(1e-6),
            "ms" | "" => Some(1e-3),
            "s" => Some(1.0),
            "m" | "min" => Some(60.0),
            "h" => Some(3600.0),
            _ => None,
        };
        let time = seconds.zip(number.parse::<f64>().ok());
        let time = time.and_then(|(unit, number)| Duration::try_from_secs_f64(number * unit).ok());
        // No finer than a fault is printed.
        let time = time.and_then(|time| u64::try_from(time.as_nanos().div_ceil(1000)).ok());
        match time {
            Some(time) => Ok(Some(Duration::from_micros(time))),
            None => Err(self.error(format!("`{word}` is no time (want a number with us, ms, s, m or h)"))),
        }
    }

    fn errno(&mut self) -> Result<Errno, FaultError> {
        let word = self.next()?;
        errno_by_name(word).ok_or_else(|| self.error(format!("`{word}` is no errno that is known here")))
    }

    fn which(&mut self) -> Result<Which, FaultError> {
        let word = self.next()?;
        if let Ok(n) = word.parse() {
            return Ok(Which::Nth(n));
        }
        let from = self.state(word)?;
        let word = self.next()?;
        Ok(Which::Between(from, self.state(word)?))
    }

    fn state(&self, word: &str) -> Result<MigrationState, FaultError> {
        let found = MigrationState::ALL.into_iter().find(|state| state.to_string() == word);
        found.ok_or_else(|| self.error(format!("`{word}` is no migration state")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_print_what_they_parse_from() {
        for text in [
            "fail-arc:PRE_COPY:STOP_COPY:EIO",
            "fail-arc:PRE_COPY:STOP_COPY:EIO:2",
            "fail-arc:3:ENOMEM",
            "error-arc:RESUMING:STOP",
            "hang-arc:STOP:STOP_COPY",
            "hang-arc:STOP:STOP_COPY:250ms",
            "hang-arc:STOP:STOP_COPY:15s",
            "hang-arc:2:70us",
            "short-read:1",
            "wrong-size-estimate:1000",
            "die-in-read:65536",
            "enodev-mid-stream:0",
            "corrupt-tail",
            "endless-state",
            "ignore-dirty-log:3",
            "lose-raise:1:12",
            "fail-reset:EBUSY",
            "fail-reset:EBUSY:2",
            "hang-read",
            "hang-read:300",
            "hold-dma:2",
        ] {
            let fault: Fault = text.parse().unwrap();
            assert_eq!(fault.to_string(), text);
            let name = text.split(':').next().unwrap();
            assert!(FAULT_FORMS.iter().any(|(form, _)| form.starts_with(name)), "{name} is not in the help");
        }
        for (time, milliseconds) in
            [("7", 7), ("7ms", 7), ("1.5s", 1500), ("2m", 120_000), ("1h", 3_600_000), ("0", 0)]
        {
            let fault =
                Fault::HangArc { which: Which::Nth(1), time: Some(Duration::from_millis(milliseconds)) };
            assert_eq!(format!("hang-arc:1:{time}").parse(), Ok(fault), "{time}");
        }
        assert_eq!("ignore-dirty-log".parse(), Ok(Fault::IgnoreDirtyLog(2)));
    }

    #[test]
    fn nonsense_is_refused_with_a_reason() {
        for text in [
            "",
            "explode",
            "fail-arc",
            "fail-arc:PRE_COPY:EIO",
            "fail-arc:PRE_COPY:STOP_COPY:EWHAT",
            "fail-arc:1:EIO:2",
            "hang-arc:1:",
            "hang-arc:1:s",
            "hang-arc:1:1.5.2s",
            "hang-arc:1:7d",
            "hang-arc:1:-1s",
            "hang-arc:1:1e9s",
            "hang-arc:1:99999999999999999999h",
            "short-read:0",
            "short-read:-1",
            "corrupt-tail:1",
            "ignore-dirty-log:0",
            "fail-reset:EIO:0",
            "die-in-read:99999999999999999999",
        ] {
            assert!(text.parse::<Fault>().is_err(), "{text}");
        }
    }
}
