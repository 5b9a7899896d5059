//! Answers that a session waits for, of a device, the VMM or a disk: whoever cancels, or looks, is told which, by name.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use vfio_migration_types::{DeviceId, Failure, MigrationState, Phase, Side};

use crate::session::lock::lock;

/// A request whose answer is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Request {
    /// To a device: change your migration state.
    Transition {
        /// The state that it was in, as far as is known.
        from: MigrationState,
        /// The state that it is to go to.
        to: MigrationState,
    },
    /// To a device: reset.
    Reset,
    /// To a device: give your next piece of state.
    Read,
    /// To a device: take this piece of state.
    Write,
    /// To a device: what state are you in?
    State,
    /// To a device: how much have you left?
    Progress,
    /// To a device: what are you, and what can you do?
    Capabilities,
    /// To a device's dirty log: start, report, or stop.
    DirtyLog,
    /// To a device's PCI function: give, or take, your config space and interrupts.
    PciState,
    /// To the VMM: a machine for the guest that arrives.
    Machine,
    /// To the VMM: the machine's manifest, for which it may ask its devices.
    Manifest,
    /// To the state directory: give what the journal says, or take a record of it.
    Journal,
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Transition { from, to } => return write!(f, "{from} to {to}"),
            Self::Reset => "its reset",
            Self::Read => "a read of its state",
            Self::Write => "a write of its state",
            Self::State => "a question for the state it is in",
            Self::Progress => "a question how much state it has left",
            Self::Capabilities => "a question what it can do",
            Self::DirtyLog => "a request to its dirty log",
            Self::PciState => "a request to its PCI function",
            Self::Machine => "a request for a machine",
            Self::Manifest => "a request for the machine's manifest",
            Self::Journal => "a request for the journal",
        })
    }
}

/// Time after which an answer is told as one that is waited for: few devices take so long. Somebody who has cancelled
/// wants to know sooner.
const LATE: Duration = Duration::from_secs(1);
const LATE_CANCELLING: Duration = Duration::from_millis(200);

/// An answer that is waited for. Its text is a sentence: `net0 has not answered RUNNING to PRE_COPY for 12 s`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct AwaitedAnswer {
    /// The device that is to answer; `None` where it is the VMM, or the state directory.
    pub device: Option<DeviceId>,
    /// The request.
    pub request: Request,
    /// Time for which it has been waited for.
    #[serde(rename = "waited_ms", with = "crate::millis")]
    pub waited: Duration,
    /// Longest time that it is waited for; `None`: until it comes, as for a driver.
    #[serde(rename = "limit_ms", with = "crate::millis::option")]
    pub limit: Option<Duration>,
}

impl AwaitedAnswer {
    /// The name of whoever is to answer.
    pub fn who(&self) -> String {
        match (&self.device, self.request) {
            (Some(device), _) => device.to_string(),
            (None, Request::Journal) => "the state directory".into(),
            (None, _) => "the VMM".into(),
        }
    }

    /// The same as a failure to undo something by then.
    pub(crate) fn left_undone(&self, side: Side, phase: Phase) -> Failure {
        let arc = match self.request {
            Request::Transition { from, to } => Some((from, to)),
            _ => None,
        };
        let remedy = "what is left is undone when the answer comes; the guest cannot be sent before that";
        let failure = Failure {
            arc,
            errno: Some(Errno::TIMEDOUT.raw_os_error().unsigned_abs()),
            ..Failure::new(side, phase, self.to_string()).with_remedy(remedy)
        };
        match &self.device {
            Some(device) => failure.of_device(device),
            None => failure,
        }
    }
}

impl fmt::Display for AwaitedAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} has not answered {} for {}", self.who(), self.request, Seconds(self.waited))
    }
}

/// A time in seconds, as a person wants to read it.
struct Seconds(Duration);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs_f64();
        if seconds < 10.0 { write!(f, "{seconds:.1} s") } else { write!(f, "{seconds:.0} s") }
    }
}

/// The answers that the threads of a session wait for just now. Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct AwaitedAnswers(Arc<Mutex<Awaited>>);

#[derive(Debug, Default)]
struct Awaited {
    next: u64,
    requests: Vec<Sent>,
    /// Times until which devices are waited for, whatever they are asked meanwhile.
    limits: Vec<(DeviceId, Instant)>,
}

#[derive(Debug)]
struct Sent {
    number: u64,
    device: Option<DeviceId>,
    request: Request,
    at: Instant,
    limit: Option<Duration>,
}

/// A limit over all that a device is asked, until it is dropped.
#[derive(Debug)]
pub(crate) struct DeviceLimit {
    of: AwaitedAnswers,
    device: DeviceId,
}

/// A wait for an answer, until it is dropped.
#[derive(Debug)]
pub(crate) struct Wait {
    of: AwaitedAnswers,
    number: u64,
}

impl AwaitedAnswers {
    /// Takes note that an answer is waited for from now on.
    pub(crate) fn wait(&self, device: Option<&DeviceId>, request: Request, limit: Option<Duration>) -> Wait {
        let mut awaited = lock(&self.0);
        let number = awaited.next;
        awaited.next += 1;
        let (device, at) = (device.cloned(), Instant::now());
        let until = awaited.limits.iter().find(|(limited, _)| Some(limited) == device.as_ref());
        let limit = until.map_or(limit, |(_, until)| Some(until.saturating_duration_since(at)));
        awaited.requests.push(Sent { number, device, request, at, limit });
        Wait { of: self.clone(), number }
    }

    /// Has everything that `device` is asked from now on told with the time that is left until then, in place of a limit of its own.
    pub(crate) fn limit(&self, device: &DeviceId, until: Instant) -> DeviceLimit {
        lock(&self.0).limits.push((device.clone(), until));
        DeviceLimit { of: self.clone(), device: device.clone() }
    }

    /// Those that are to be told of a session that is under way, which is being cancelled or not.
    pub(crate) fn to_tell(&self, cancelling: bool) -> Vec<AwaitedAnswer> {
        self.longer_than(if cancelling { LATE_CANCELLING } else { LATE })
    }

    /// Those that have been waited for at least so long, the longest first.
    pub(crate) fn longer_than(&self, least: Duration) -> Vec<AwaitedAnswer> {
        let awaited = lock(&self.0);
        let late = awaited.requests.iter().map(|sent| AwaitedAnswer {
            device: sent.device.clone(),
            request: sent.request,
            waited: sent.at.elapsed(),
            limit: sent.limit,
        });
        late.filter(|answer| answer.waited >= least).collect()
    }
}

impl Drop for DeviceLimit {
    fn drop(&mut self) {
        lock(&self.of.0).limits.retain(|(device, _)| *device != self.device);
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        lock(&self.of.0).requests.retain(|sent| sent.number != self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_awaited_until_it_has_come() {
        let answers = AwaitedAnswers::default();
        let id = DeviceId::new("net0").unwrap();
        let limit = Some(Duration::from_secs(30));
        let arc = Request::Transition { from: MigrationState::Running, to: MigrationState::PreCopy };
        let first = answers.wait(Some(&id), arc, limit);
        let second = answers.wait(None, Request::Journal, None);
        let late = answers.longer_than(Duration::ZERO);
        assert_eq!(late.len(), 2);
        assert!(
            late[0].to_string().starts_with("net0 has not answered RUNNING to PRE_COPY for 0.0 s"),
            "{late:?}"
        );
        assert!(
            late[1].to_string().starts_with("the state directory has not answered a request"),
            "{late:?}"
        );
        let failure = late[0].left_undone(Side::Source, Phase::Setup);
        assert_eq!((failure.device.as_deref(), failure.errno), (Some("net0"), Some(110)));
        assert_eq!(answers.longer_than(Duration::from_secs(60)), []);
        drop(first);
        assert_eq!(answers.longer_than(Duration::ZERO).len(), 1);
        drop(second);
        assert_eq!(answers.longer_than(Duration::ZERO), []);
    }

    #[test]
    fn one_limit_is_told_of_all_that_a_device_is_asked() {
        let answers = AwaitedAnswers::default();
        let [limited, other] = ["net0", "net1"].map(|name| DeviceId::new(name).unwrap());
        let told =
            |answers: &AwaitedAnswers| answers.longer_than(Duration::ZERO).pop().unwrap().limit.unwrap();
        let (own, all) = (Duration::from_secs(10), Duration::from_secs(100));
        let limit = answers.limit(&limited, Instant::now() + all);
        for request in [Request::State, Request::Reset] {
            let _wait = answers.wait(Some(&limited), request, Some(own));
            assert!(own < told(&answers) && told(&answers) <= all);
        }
        let _other = answers.wait(Some(&other), Request::State, Some(own));
        assert_eq!(told(&answers), own);
        drop(limit);
        let _wait = answers.wait(Some(&limited), Request::State, Some(own));
        assert_eq!(told(&answers), own);
    }
}
