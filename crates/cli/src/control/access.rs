//! Who may use a control socket, and for what.

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vfio_migration::{AllowedUnixPeers, UnixPeer};
use vfio_migration_types::{RateLimit, Told, error_chain};

use super::protocol::ControlVerb;
use super::refused::{PERMISSION_DENIED, Refused};
use super::verbs::ControlRight;

/// Who may use a control socket besides the user of its `vm` and root.
#[derive(Clone, Debug, Default)]
pub(crate) struct ControlAccess {
    /// Those who may do everything.
    full: AllowedUnixPeers,
    /// Those who may only ask.
    read: AllowedUnixPeers,
    refusals: Refusals,
}

/// What is said of callers that are refused: who may not, comes as often as he likes. Apart of those who may ask, so that no stranger
/// keeps these from being said.
#[derive(Clone, Debug)]
struct Refusals(Arc<Mutex<[RateLimit<String>; 2]>>);

/// Refusals that are said one by one, at most, and in what time.
const REFUSALS_SAID: (u32, Duration) = (20, Duration::from_secs(60));

impl Default for Refusals {
    fn default() -> Self {
        let limit = || RateLimit::new(REFUSALS_SAID.0, REFUSALS_SAID.1);
        Self(Arc::new(Mutex::new([limit(), limit()])))
    }
}

impl Refusals {
    /// Of one who may do nothing.
    fn of_stranger(&self, why: String) {
        let [strangers, _] = &mut *self.lock();
        say(strangers.take(why, Instant::now()));
    }

    /// Of one who may ask, and asks for more.
    fn of_reader(&self, why: String) {
        let [_, readers] = &mut *self.lock();
        say(readers.take(why, Instant::now()));
    }

    fn lock(&self) -> MutexGuard<'_, [RateLimit<String>; 2]> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn say(refusal: Option<Told<String>>) {
    match refusal {
        Some(Told { what, left_out: 0 }) => {
            tracing::warn!("a caller of the control socket is refused: {what}");
        }
        Some(Told { what, left_out }) => {
            tracing::warn!(
                "a caller of the control socket is refused: {what} (and {left_out} more before it)"
            );
        }
        None => {}
    }
}

/// Who it is, for the log.
fn ids(peer: &UnixPeer) -> String {
    let pid = peer.pid.map_or_else(|| "unknown".to_owned(), |pid| pid.to_string());
    format!("uid={} gid={} pid={pid}", peer.uid, peer.gid)
}

/// Who has connected to a control socket.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    peer: UnixPeer,
    pub(super) right: ControlRight,
    refusals: Refusals,
}

impl ControlAccess {
    /// Access for the members of these groups.
    pub(crate) fn of_groups(full: Option<u32>, read: Option<u32>) -> Self {
        let mut access = Self::default();
        access.full.gids.extend(full);
        access.read.gids.extend(read);
        access
    }

    /// Says of callers that were refused, and were not said one by one, if it is time.
    pub(crate) fn say_overdue_refusals(&self) {
        let now = Instant::now();
        self.refusals.lock().iter_mut().for_each(|refusals| say(refusals.overdue(now)));
    }

    /// All who may connect.
    pub(super) fn any(&self) -> AllowedUnixPeers {
        let mut any = self.full.clone();
        any.gids.extend(&self.read.gids);
        any
    }

    /// Who is at the other end of a connection; refuses whoever may do nothing.
    pub(super) fn caller(&self, socket: impl AsFd) -> Result<Caller, Refused> {
        let denied = |why: String| Err(Refused::new(PERMISSION_DENIED, why));
        let peer = match UnixPeer::of(socket) {
            Ok(peer) => peer,
            Err(error) => {
                let why = error_chain(&error);
                self.refusals.of_stranger(why.clone());
                return denied(why);
            }
        };
        let right = match (self.full.allows(&peer), self.read.allows(&peer)) {
            (true, _) => ControlRight::Full,
            (false, true) => ControlRight::Read,
            (false, false) => {
                let uid = peer.uid;
                self.refusals.of_stranger(format!("it is not allowed, {}", ids(&peer)));
                return denied(format!("user {uid} may not use this control socket: {WHO}"));
            }
        };
        Ok(Caller { peer, right, refusals: self.refusals.clone() })
    }
}

/// Who may.
const WHO: &str =
    "the user that its `vm` runs as, root, and the members of --control-group and --control-read-group may";

impl Caller {
    /// Refuses a verb that this caller may not use.
    pub(super) fn check(&self, verb: ControlVerb) -> Result<(), Refused> {
        if verb.needs().right <= self.right {
            return Ok(());
        }
        let (uid, name) = (self.peer.uid, verb.name());
        self.refusals.of_reader(format!("it may only ask, and not `{name}`, {}", ids(&self.peer)));
        let why = format!(
            "user {uid} may only ask here, and not `{name}`: that may the user that this `vm` runs as, root, and the \
             members of --control-group"
        );
        Err(Refused::new(PERMISSION_DENIED, why))
    }
}

#[cfg(test)]
impl Caller {
    /// Ourselves at the other end of `socket`, with no more than this right.
    pub(super) fn with_right(socket: impl AsFd, right: ControlRight) -> Self {
        Self { peer: UnixPeer::of(socket).unwrap(), right, refusals: Refusals::default() }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use schemars::schema_for;
    use serde_json::Value;

    use super::*;

    /// Every verb, from its schema.
    fn verbs() -> Vec<ControlVerb> {
        let schema = schema_for!(ControlVerb);
        let listed = schema.as_value()["oneOf"].as_array().expect("an enum").iter();
        listed.map(|verb| serde_json::from_value(verb["const"].clone()).expect("a verb")).collect()
    }

    #[test]
    fn what_asks_is_named_so_and_is_all_that_a_reader_may() {
        let (socket, _other) = UnixStream::pair().unwrap();
        let caller = ControlAccess::default().caller(&socket).unwrap();
        assert_eq!(caller.right, ControlRight::Full, "it is our own");
        let reader = Caller { right: ControlRight::Read, ..caller.clone() };
        let page = include_str!("../../../../docs/control.md");
        assert!(verbs().len() >= 15, "{:?}", verbs());
        for verb in verbs() {
            let name = verb.name();
            caller.check(verb).unwrap();
            let may = reader.check(verb);
            assert_eq!(may.is_ok(), name.starts_with("query"), "{name}");
            let mut rows = page
                .lines()
                .filter(|line| line.starts_with('|'))
                .map(|line| line.split('|').collect::<Vec<_>>());
            let row = rows.find(|cells| cells[1].contains(&format!("`{name}`"))).expect(&name);
            let right = row[2].trim();
            assert_eq!(right == "read", may.is_ok(), "docs/control.md says '{right}' of {name}");
            if let Err(refused) = may {
                assert_eq!(refused.class, "PermissionDenied");
                assert!(refused.desc.contains(&format!("`{name}`")), "{}", refused.desc);
            }
        }
    }

    #[test]
    fn a_class_of_refusals_is_in_its_schema() {
        let schema = schema_for!(Refused);
        let class: &Value = &schema.as_value()["properties"]["class"]["description"];
        assert!(class.as_str().unwrap().contains(PERMISSION_DENIED), "{class}");
    }
}
