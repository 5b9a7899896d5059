//! Answers that a session waits for, of a device, the VMM or a disk: whoever cancels, or looks, is told which, by name.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use vfio_migration_engine::ExpectedWord;
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
    /// To a device: take us for your client, as its VMM opens it.
    Open,
    /// To a device: have somebody listen at your server's socket.
    Listen {
        /// The socket is there, and refuses; otherwise it is not there.
        refused: bool,
    },
    /// To the VMM: a machine for the guest that arrives.
    Machine,
    /// To the VMM: the machine's manifest, for which it may ask its devices.
    Manifest,
    /// To the state directory: give what the journal says, or take a record of it.
    Journal,
    /// To the disk: make room for the file that the guest is saved into.
    File,
    /// To the other side: a connection, and what secures it.
    Connection,
    /// To the other side: what it says to a guest on offer.
    Offer,
    /// To the other side: that it has loaded the guest, whose state it has whole.
    Load,
    /// To the other side: that it runs the guest, which is its own.
    Start,
    /// To the other side, which may run the guest, and to which the connection is gone: whose is it?
    Owner,
    /// To the source of an attempt that is undone: does it ask what became of it?
    Question,
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
            Self::Open => "a request to open it",
            Self::Listen { .. } => "a request to connect",
            Self::Machine => "a request for a machine",
            Self::Manifest => "a request for the machine's manifest",
            Self::Journal => "a request for the journal",
            Self::File => "a request for the file",
            Self::Connection => "a request to connect",
            Self::Offer => "what it was told of the guest",
            Self::Load => "the end of the guest's state, which it loads",
            Self::Start => "the word that the guest is its own",
            Self::Owner => "whose the guest is (the connection is gone, and it is asked anew)",
            Self::Question => "whether it knows that the attempt is undone",
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
    /// The device that is to answer; `None` where it is the VMM, a disk, or the other side.
    pub device: Option<DeviceId>,
    /// The request.
    pub request: Request,
    /// Time for which it has been waited for.
    #[serde(rename = "waited_ms", with = "crate::millis")]
    pub waited: Duration,
    /// Longest time that it is waited for; `None`: until it comes, as for a driver. A session whose guest runs ends without an
    /// answer that is late; one whose guest is paused waits once more as long, and ends without it then.
    #[serde(rename = "limit_ms", with = "crate::millis::option")]
    pub limit: Option<Duration>,
}

impl AwaitedAnswer {
    /// The name of whoever is to answer.
    pub fn who(&self) -> String {
        match (&self.device, self.request) {
            (Some(device), _) => device.to_string(),
            (None, Request::Journal) => "the state directory".into(),
            (None, Request::File) => "the disk".into(),
            (
                None,
                Request::Connection | Request::Offer | Request::Load | Request::Start | Request::Owner,
            ) => "the destination".into(),
            (None, Request::Question) => "the source".into(),
            (None, _) => "the VMM".into(),
        }
    }

    /// A word of the destination, if it is late.
    pub(crate) fn of_peer(word: ExpectedWord, waited: Duration, limit: Duration) -> Option<Self> {
        let request = match word {
            ExpectedWord::Ready => Request::Load,
            ExpectedWord::Running => Request::Start,
            ExpectedWord::Outcome => Request::Owner,
            _ => Request::Offer,
        };
        let late = Self { device: None, request, waited, limit: Some(limit) };
        (waited >= LATE).then_some(late)
    }

    /// The same as a failure to undo something by then, of a guest that is here or has left.
    pub(crate) fn left_undone(&self, side: Side, phase: Phase, has_left: bool) -> Failure {
        let arc = match self.request {
            Request::Transition { from, to } => Some((from, to)),
            _ => None,
        };
        let remedy = match has_left {
            true => "what is left is undone when the answer comes; the guest has left, and does not need it",
            false => {
                "what is left is undone when the answer comes, and until then no session takes the guest away"
            }
        };
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
        let (who, waited) = (self.who(), Seconds(self.waited));
        match self.request {
            Request::Listen { refused: true } => {
                write!(f, "nobody has listened at the socket of {who} for {waited} (Connection refused)")
            }
            Request::Listen { refused: false } => {
                write!(f, "the socket of {who} has not been there for {waited} (No such file or directory)")
            }
            request => write!(f, "{who} has not answered {request} for {waited}"),
        }
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

/// A note that an answer is waited for, until it is dropped.
#[derive(Debug)]
pub struct AwaitedNote {
    pub(crate) _wait: Wait,
}

/// The answers that the threads of a session wait for just now. Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct AwaitedAnswers(Arc<Mutex<Awaited>>);

#[derive(Debug, Default)]
struct Awaited {
    next: u64,
    requests: Vec<Sent>,
    /// They are waited for until they come, whatever their limits say.
    without_limit: bool,
}

#[derive(Debug)]
struct Sent {
    number: u64,
    device: Option<DeviceId>,
    request: Request,
    at: Instant,
    limit: Option<Duration>,
    /// It was not answered in time: it stays until its device answers anything, which it does in order.
    late: bool,
}

impl Awaited {
    fn answer(&self, sent: &Sent) -> AwaitedAnswer {
        AwaitedAnswer {
            device: sent.device.clone(),
            request: sent.request,
            waited: sent.at.elapsed(),
            limit: sent.limit.filter(|_| !self.without_limit),
        }
    }

    fn has_late(&self, device: Option<&DeviceId>) -> bool {
        self.requests.iter().any(|sent| sent.late && sent.device.as_ref() == device)
    }
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
        awaited.requests.push(Sent { number, device, request, at, limit, late: false });
        Wait { of: self.clone(), number }
    }

    /// The answer that `wait` is for did not come in time. It is waited for until its device answers anything, and for `patience`
    /// more where a guest stands still for it.
    pub(crate) fn is_late(&self, wait: &Wait, patience: Option<Duration>) {
        let mut awaited = lock(&self.0);
        let Some(at) = awaited.requests.iter().position(|sent| sent.number == wait.number) else { return };
        let device = awaited.requests.get(at).and_then(|sent| sent.device.clone());
        // What was asked meanwhile waits behind the first.
        if awaited.has_late(device.as_ref()) {
            return;
        }
        if let Some(sent) = awaited.requests.get_mut(at) {
            sent.late = true;
            sent.limit = patience.map(|patience| sent.at.elapsed().saturating_add(patience));
        }
    }

    /// `device` has answered, and with that all that it was asked before.
    pub(crate) fn answered(&self, device: &DeviceId) {
        lock(&self.0).requests.retain(|sent| !sent.late || sent.device.as_ref() != Some(device));
    }

    /// Nobody waits any more for the one that `device` did not give in time.
    pub(crate) fn give_up_late_of(&self, device: &DeviceId) {
        self.answered(device);
    }

    /// The same of all devices.
    pub(crate) fn give_up_late(&self) {
        lock(&self.0).requests.retain(|sent| !sent.late);
    }

    /// From now on each is waited for until it comes.
    pub(crate) fn wait_without_limit(&self) {
        lock(&self.0).without_limit = true;
    }

    /// Those that did not come in time, and have not come since.
    pub(crate) fn late(&self) -> Vec<AwaitedAnswer> {
        let awaited = lock(&self.0);
        awaited.requests.iter().filter(|sent| sent.late).map(|sent| awaited.answer(sent)).collect()
    }

    /// The one that `device` did not give in time, and has not since.
    pub(crate) fn late_of(&self, device: &DeviceId) -> Option<AwaitedAnswer> {
        let awaited = lock(&self.0);
        let late = awaited.requests.iter().find(|sent| sent.late && sent.device.as_ref() == Some(device));
        late.map(|sent| awaited.answer(sent))
    }

    /// Those that are to be told of a session that is under way, which is being cancelled or not.
    pub(crate) fn to_tell(&self, cancelling: bool) -> Vec<AwaitedAnswer> {
        let mut told = self.longer_than(if cancelling { LATE_CANCELLING } else { LATE });
        // The VMM itself waits for them.
        if told.iter().any(|answer| answer.device.is_some()) {
            told.retain(|answer| !matches!(answer.request, Request::Machine | Request::Manifest));
        }
        told
    }

    /// Those that have been waited for at least so long, the longest first.
    pub(crate) fn longer_than(&self, least: Duration) -> Vec<AwaitedAnswer> {
        let awaited = lock(&self.0);
        // A device that is late answers nothing else before.
        let shown = |sent: &&Sent| sent.late || !awaited.has_late(sent.device.as_ref());
        let answers = awaited.requests.iter().filter(shown).map(|sent| awaited.answer(sent));
        answers.filter(|answer| answer.waited >= least).collect()
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        lock(&self.of.0).requests.retain(|sent| sent.number != self.number || sent.late);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_told_instead_of_the_vmm_that_waits_for_it() {
        let answers = AwaitedAnswers::default();
        let id = DeviceId::new("net0").unwrap();
        let _machine = answers.wait(None, Request::Machine, None);
        let late = || {
            lock(&answers.0).requests.iter_mut().for_each(|sent| sent.at -= LATE);
            answers.to_tell(false).iter().map(AwaitedAnswer::who).collect::<Vec<_>>()
        };
        assert_eq!(late(), ["the VMM"]);
        let opened = answers.wait(Some(&id), Request::Open, None);
        assert_eq!(late(), ["net0"]);
        drop(opened);
        assert_eq!(late(), ["the VMM"]);
    }

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
        let failure = late[0].left_undone(Side::Source, Phase::Setup, false);
        assert_eq!((failure.device.as_deref(), failure.errno), (Some("net0"), Some(110)));
        assert_eq!(answers.longer_than(Duration::from_secs(60)), []);
        drop(first);
        assert_eq!(answers.longer_than(Duration::ZERO).len(), 1);
        drop(second);
        assert_eq!(answers.longer_than(Duration::ZERO), []);
    }

    #[test]
    fn an_answer_that_is_late_is_awaited_until_its_device_answers() {
        let answers = AwaitedAnswers::default();
        let [id, other] = ["net0", "net1"].map(|name| DeviceId::new(name).unwrap());
        let limit = Some(Duration::from_secs(30));
        let arc = Request::Transition { from: MigrationState::Running, to: MigrationState::PreCopy };
        let wait = answers.wait(Some(&id), arc, limit);
        answers.is_late(&wait, limit);
        drop(wait);
        let behind = answers.wait(Some(&id), Request::State, limit);
        answers.is_late(&behind, limit);
        let late = answers.longer_than(Duration::ZERO);
        assert_eq!((late.len(), late[0].request), (1, arc), "what waits behind it is not told: {late:?}");
        assert!(late[0].limit > limit && answers.late().len() == 1, "{late:?}");
        assert_eq!(answers.late_of(&id).map(|late| late.request), Some(arc));
        assert_eq!(answers.late_of(&other), None);
        drop(behind);
        answers.wait_without_limit();
        assert_eq!(answers.late()[0].limit, None);
        answers.answered(&other);
        assert_eq!(answers.late().len(), 1);
        answers.answered(&id);
        assert_eq!(answers.longer_than(Duration::ZERO), []);
        let [late, open] = [arc, Request::Open].map(|request| answers.wait(Some(&id), request, limit));
        answers.is_late(&late, limit);
        drop(late);
        answers.give_up_late();
        let shown: Vec<_> = answers.longer_than(Duration::ZERO).iter().map(|answer| answer.request).collect();
        assert_eq!(shown, [Request::Open], "what is waited for is told");
        drop(open);
    }
}
