//! Options of an embedder, at the source and at the destination.

use std::path::PathBuf;
use std::time::Duration;

use vfio_migration_compat::{DeviceMap, Policy};
use vfio_migration_types::Epoch;

use crate::connection_factory::ConnectionFactory;
use crate::expectation::Expectations;
use crate::reasons;
use crate::thread_setup::ThreadSetup;
use crate::tls::config::Security;
use crate::unix_peer::AllowedUnixPeers;

/// Options of a source. Begin with `SourceOptions::default()` and change what matters.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SourceOptions {
    /// Longest time the guest may be paused: a ceiling, not a target. 300 ms.
    pub downtime_limit: Duration,
    /// Of the limit, what is kept back for everything after the decision to commit; `None` lets the library choose.
    pub commit_reserve: Option<Duration>,
    /// Most bytes per second while the guest runs; `None`: no cap. Once the guest is paused there is no cap.
    pub bandwidth: Option<u64>,
    /// Give up when the pre-copy has lasted this long; `None`: never. Time in which it only waited for
    /// [`Control::continue_switchover`](crate::Control::continue_switchover) does not count.
    pub give_up_after: Option<Duration>,
    /// Wait for [`Control::continue_switchover`](crate::Control::continue_switchover) before the guest is paused.
    pub pause_before_switchover: bool,
    /// The guest arrives paused, and is its operator's to resume there. If it does not move, it runs on here. Off.
    pub suspend: bool,
    /// Compare digests of all RAM, and abort on a difference. The time it takes is kept out of the downtime. Off.
    pub verify: bool,
    /// No device of this machine maps another's BAR: several devices may go without P2P. Off.
    pub no_peer_dma: bool,
    /// Let a device without a DMA log migrate all the same: all RAM is sent once more in the downtime. Off: refused, as
    /// `dirty-none` or `dirty-all`; but a snapshot takes such devices always.
    pub allow_all_dirty: bool,
    /// Longest wait for the connection. 10 s.
    pub connect_timeout: Duration,
    /// Longest silence of the destination; a COMMIT whose answer was lost is asked after for eight times as long. 30 s.
    pub peer_timeout: Duration,
    /// Checksum RAM while the guest runs too, at the price of a copy; from its pause on everything is checksummed. `None`: where the
    /// connection is in plain text and no unix socket, since nothing but TCP's own checksums would notice what is damaged on the way.
    pub ram_crc: Option<bool>,
    /// Hold the guest paused instead of letting it run, when the way back could save a device only by a reset (its
    /// guest state is gone). Off.
    pub keep_paused_if_reset: bool,
    /// Folder of the journal. `None`: in this process's memory alone, so that a crash leaves no trace of who owned
    /// the guest.
    pub state_dir: Option<PathBuf>,
    /// The epoch under which this side owns the guest: what [`Arrived::epoch`](crate::Arrived) said, or 0 for a guest
    /// that was booted here. A journal that knows a later one wins.
    pub epoch: Epoch,
    /// How the connection is secured. `None`: it is over a unix socket, which stays as it is; anywhere else it is refused, as
    /// [`needs_security`](crate::needs_security) tells.
    pub security: Option<Security>,
    /// Whose process may be at the other end of a unix socket besides this process's own user's and root's. Nobody's. Of a stream
    /// that is [vouched](Security::Vouched) for nobody is asked.
    pub unix_peers: AllowedUnixPeers,
    /// This side's policy: what it allows and asks for. The destination has a policy of its own; the stricter holds.
    pub policy: Policy,
    /// Devices that have another name at the destination.
    pub device_map: DeviceMap,
    /// What every thread that the session makes does first.
    pub thread_setup: Option<ThreadSetup>,
    /// How the destination is reached again from a session over a connection that was handed over. `None`: what became of a COMMIT whose
    /// answer is lost is not asked then.
    pub further_connections: Option<ConnectionFactory>,
    /// What the journal and whoever watches know the other end by. `None`: its address.
    pub peer_name: Option<String>,
    /// The machine goes into a file: what cannot move live may be saved.
    pub(crate) to_file: bool,
    /// The machine is a device and nothing else: what a guest would miss, nobody misses.
    pub(crate) device_alone: bool,
}

impl Default for SourceOptions {
    fn default() -> Self {
        Self {
            downtime_limit: Duration::from_millis(300),
            commit_reserve: None,
            bandwidth: None,
            give_up_after: None,
            pause_before_switchover: false,
            suspend: false,
            verify: false,
            no_peer_dma: false,
            allow_all_dirty: false,
            connect_timeout: Duration::from_secs(10),
            peer_timeout: Duration::from_secs(30),
            ram_crc: None,
            keep_paused_if_reset: false,
            state_dir: None,
            epoch: Epoch(0),
            security: None,
            unix_peers: AllowedUnixPeers::default(),
            policy: Policy::default(),
            device_map: DeviceMap::default(),
            thread_setup: None,
            further_connections: None,
            peer_name: None,
            to_file: false,
            device_alone: false,
        }
    }
}

impl SourceOptions {
    /// The policy that this side's rules are asked with, in P0 and in P1: the caller's, and what the options allow beside it.
    pub(crate) fn rules(&self) -> Policy {
        let mut policy = self.policy.clone();
        if self.allow_all_dirty {
            reasons::allow(&mut policy, &reasons::DIRTY, "all of RAM may be sent while the guest is paused");
        }
        if self.no_peer_dma {
            reasons::allow(&mut policy, &reasons::PEERS, "no device maps another's BAR for DMA");
        }
        policy
    }
}

/// Options of a destination. Begin with `DestinationOptions::default()` and change what matters.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct DestinationOptions {
    /// Longest wait for a source to connect; `None`: for ever (until cancelled).
    pub accept_timeout: Option<Duration>,
    /// Longest silence of the source. 30 s.
    pub peer_timeout: Duration,
    /// Who is let in, and with what: an [`Expectation`](crate::Expectation), or what is read anew for each source that comes. Whatever
    /// comes over a connection that is secured as it must be.
    pub expect: Expectations,
    /// Folder of the journal; as [`SourceOptions::state_dir`].
    pub state_dir: Option<PathBuf>,
    /// How connections are secured; as [`SourceOptions::security`].
    pub security: Option<Security>,
    /// As [`SourceOptions::unix_peers`]. Where it names somebody the file of the socket lets anybody connect, and a connection of
    /// whoever is not named is refused before anything is read from it.
    pub unix_peers: AllowedUnixPeers,
    /// This side's policy: what it allows and asks for. The source has a policy of its own; the stricter holds.
    pub policy: Policy,
    /// The guest arrives paused, whatever its source asks for, and is its operator's to resume. Off.
    pub suspend: bool,
    /// Time for which what was reserved is kept for a source that does not begin. 60 s.
    pub lease: Duration,
    /// Bytes of one device's state that may wait in memory to be loaded. 16 MiB.
    pub device_window: u64,
    /// As [`SourceOptions::thread_setup`].
    pub thread_setup: Option<ThreadSetup>,
    /// The file that the guest comes from, if it does.
    pub(crate) from_file: Option<PathBuf>,
    /// As [`SourceOptions::device_alone`].
    pub(crate) device_alone: bool,
}

impl Default for DestinationOptions {
    fn default() -> Self {
        Self {
            accept_timeout: None,
            peer_timeout: Duration::from_secs(30),
            expect: Expectations::default(),
            state_dir: None,
            security: None,
            unix_peers: AllowedUnixPeers::default(),
            policy: Policy::default(),
            suspend: false,
            lease: Duration::from_secs(60),
            device_window: 16 << 20,
            thread_setup: None,
            from_file: None,
            device_alone: false,
        }
    }
}
