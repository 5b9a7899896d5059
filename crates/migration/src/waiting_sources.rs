//! Sources that came while another had the place, and wait for their turn: that one has brought nothing yet, or is being undone.
//!
//! Hosts take turns: whose turn was longest ago is next, and of those the one that came first. So a host that comes again and again
//! keeps no other out.

use std::mem;

use vfio_migration_types::VmId;

use crate::channel::greeting::Accepted;
use crate::channel::source_host::SourceHost;
use crate::expectation::Right;

/// Sources that may wait at once, and of them those of one host.
const MOST: usize = 32;
const MOST_OF_HOST: usize = 8;
/// Hosts that may wait with one source each.
const MOST_HOSTS: usize = 128;
/// Hosts of which it is known when they had their turn.
const MOST_SERVED: usize = 2 * MOST_HOSTS;

#[derive(Debug)]
struct WaitingSource {
    host: SourceHost,
    wants: Right,
    accepted: Box<Accepted>,
}

/// Those who wait, in the order in which they came.
#[derive(Debug, Default)]
pub(crate) struct WaitingSources {
    waiting: Vec<WaitingSource>,
    /// Hosts that had a turn, the latest at the end.
    served: Vec<SourceHost>,
}

impl WaitingSources {
    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether one of them is to move a guest.
    pub(crate) fn has_migration(&self) -> bool {
        self.waiting.iter().any(|waiting| waiting.wants == Right::Move)
    }

    /// Lets a source wait. One for which there is no room is given back: this one, or that of a host that has more, for which this one waits.
    pub(crate) fn add(&mut self, accepted: Box<Accepted>, wants: Right) -> Option<Box<Accepted>> {
        self.forget_ended();
        let host = SourceHost::of(&accepted.link);
        let of_host = |host: &SourceHost| self.waiting.iter().filter(|waiting| waiting.host == *host).count();
        let own = of_host(&host);
        if own >= MOST_OF_HOST {
            return Some(accepted);
        }
        let mut instead = None;
        if self.waiting.len() >= MOST {
            // Of the host that has the most, the one that came last.
            let ranked = self.waiting.iter().enumerate().map(|(at, waiting)| (of_host(&waiting.host), at));
            match ranked.max() {
                Some((most, at)) if most > own + 1 => instead = Some(self.waiting.remove(at).accepted),
                _ if own == 0 && self.waiting.len() < MOST_HOSTS => {}
                _ => return Some(accepted),
            }
        }
        self.waiting.push(WaitingSource { host, wants, accepted });
        instead
    }

    /// Forgets those that have hung up.
    pub(crate) fn forget_ended(&mut self) {
        self.waiting.retain(|waiting| {
            let ended = waiting.accepted.link.has_hung_up();
            if ended {
                tracing::debug!(peer = %waiting.accepted.link.peer(), "a source that waited has left");
            }
            !ended
        });
    }

    /// The source whose turn it is, if one waits.
    pub(crate) fn next(&mut self) -> Option<Box<Accepted>> {
        self.forget_ended();
        let turn = |waiting: &WaitingSource| self.served.iter().position(|served| *served == waiting.host);
        // A host that had none is before all that had one.
        let (at, _) = self.waiting.iter().enumerate().min_by_key(|(_, waiting)| turn(waiting))?;
        Some(self.waiting.remove(at).accepted)
    }

    /// Takes note that a host has its turn.
    pub(crate) fn serve(&mut self, host: SourceHost) {
        self.served.retain(|served| *served != host);
        if self.served.len() >= MOST_SERVED {
            self.served.remove(0);
        }
        self.served.push(host);
    }

    /// Gives back all that wait.
    pub(crate) fn take(&mut self) -> Vec<Accepted> {
        mem::take(&mut self.waiting).into_iter().map(|waiting| *waiting.accepted).collect()
    }

    /// Gives back all that wait but the first one of this host with this VM. Says whether there is one.
    pub(crate) fn keep_only(&mut self, host: &SourceHost, vm: VmId) -> (bool, Vec<Accepted>) {
        self.forget_ended();
        let is_it = |waiting: &WaitingSource| {
            waiting.host == *host && waiting.wants == Right::Move && waiting.accepted.hello.vm == vm
        };
        let Some(at) = self.waiting.iter().position(is_it) else { return (false, Vec::new()) };
        let kept = self.waiting.remove(at);
        let others = self.take();
        self.waiting.push(kept);
        (true, others)
    }
}
