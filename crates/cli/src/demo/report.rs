//! The one JSON object that `demo --json` prints, and the same for people.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::args::serve::DemoTransport;
use crate::control::guest::GuestInfo;
use crate::control::protocol::PhaseInfo;
use crate::control::security::SecurityInfo;
use crate::units::format_size;

/// How a demo went.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct DemoReport {
    /// Where the guest is.
    pub(crate) outcome: DemoOutcome,
    /// The guest moved and lost nothing, and every check that was asked for agrees.
    pub(crate) verified: bool,
    /// What ran the guest's code: `"kvm"` or `"software"`.
    pub(crate) guest: String,
    /// What connected the sides: `"tcp"` or `"unix"`.
    pub(crate) transport: String,
    /// How the connection of the migration was secured; null where there was none.
    pub(crate) security: Option<SecurityInfo>,
    /// Both sides were given certificates that the demo made for this run alone.
    pub(crate) throwaway_certificates: bool,
    /// Which processes the demo ran.
    pub(crate) pids: Pids,
    /// Milliseconds from the request to the end of the migration.
    pub(crate) total_ms: u64,
    /// Milliseconds from the source's vCPUs paused to the destination's vCPUs running, by one clock; `verify_ms` is not in it.
    pub(crate) downtime_ms: Option<u64>,
    /// The longest gap between two looks at the host's clock that the guest itself saw, in milliseconds. Contains the
    /// downtime, the time of the digests, and whatever else kept the guest from running.
    pub(crate) guest_gap_ms: Option<u64>,
    /// Milliseconds spent on digests while the guest was paused.
    pub(crate) verify_ms: u64,
    /// How many iterations pre-copy took: the first sends all RAM.
    pub(crate) iterations: u32,
    /// Payload bytes on the wire.
    pub(crate) bytes: DemoBytes,
    /// What the guest checked after it had moved, and before, all in all.
    pub(crate) checked: Counts,
    /// What it found lost.
    pub(crate) lost: Counts,
    /// Interrupts without a block: legal.
    pub(crate) spurious_interrupts: u64,
    /// RAM at the source's pause equals RAM before the destination ran; null when not compared.
    pub(crate) ram_digest_match: Option<bool>,
    /// Device bytes read at the source equal those written at the destination; null when it did not come to that.
    pub(crate) device_digest_match: Option<bool>,
    /// Who found that something was wrong: null, `"engine"` or `"guest"`.
    pub(crate) caught_by: Option<CaughtBy>,
    /// What each phase took.
    pub(crate) phases: Vec<PhaseInfo>,
    /// What went wrong, in a sentence.
    pub(crate) error: Option<String>,
}

/// How the migration ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "Outcome")]
pub(crate) enum DemoOutcome {
    /// The guest runs at the destination.
    Completed,
    /// It is the destination's, and does not run there, or nobody knows whether it does.
    NotStarted,
    /// It goes on at the source.
    Aborted,
    /// Neither can be said.
    Failed,
}

/// Which of the two checkers found a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum CaughtBy {
    /// The engine refused to commit.
    Engine,
    /// The guest found it after the move.
    Guest,
}

impl fmt::Display for CaughtBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Engine => "engine",
            Self::Guest => "guest",
        })
    }
}

/// Ids of the processes that the demo ran.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub(crate) struct Pids {
    /// Id of the source's `vm`.
    pub(crate) source: u32,
    /// Id of the destination's `vm`.
    pub(crate) destination: u32,
    /// Device servers: the source's, then the destination's.
    pub(crate) devices: Vec<u32>,
}

/// Payload bytes on the wire, by what they carry.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "Bytes")]
pub(crate) struct DemoBytes {
    /// RAM; zero pages not counted.
    pub(crate) ram: u64,
    /// Device state while the guest ran.
    pub(crate) device_precopy: u64,
    /// Device state while it was paused.
    pub(crate) device_stopcopy: u64,
}

/// What the guest counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub(crate) struct Counts {
    /// Pages of RAM that the guest wrote a pattern to.
    pub(crate) pages: u64,
    /// Blocks that devices wrote by DMA.
    pub(crate) dma_blocks: u64,
    /// Interrupts that announced a block.
    pub(crate) interrupts: u64,
}

impl Counts {
    /// What the guest checked.
    pub(crate) fn checked(guest: &GuestInfo) -> Self {
        Self { pages: guest.pages_checked, dma_blocks: guest.blocks_checked, interrupts: guest.interrupts }
    }

    /// What the guest found lost.
    pub(crate) fn lost(guest: &GuestInfo) -> Self {
        Self { pages: guest.pages_lost, dma_blocks: guest.blocks_lost, interrupts: guest.interrupts_lost }
    }

    /// Whether anything was counted.
    pub(crate) fn any(&self) -> bool {
        *self != Self::default()
    }
}

impl DemoReport {
    /// A run that has come to nothing yet.
    pub(crate) fn begun(transport: DemoTransport, guest: &str) -> Self {
        Self {
            outcome: DemoOutcome::Failed,
            verified: false,
            guest: guest.into(),
            transport: transport.name().into(),
            security: None,
            throwaway_certificates: transport == DemoTransport::Tcp,
            pids: Pids::default(),
            total_ms: 0,
            downtime_ms: None,
            guest_gap_ms: None,
            verify_ms: 0,
            iterations: 0,
            bytes: DemoBytes::default(),
            checked: Counts::default(),
            lost: Counts::default(),
            spurious_interrupts: 0,
            ram_digest_match: None,
            device_digest_match: None,
            caught_by: None,
            phases: Vec::new(),
            error: None,
        }
    }

    /// The report for people.
    pub(crate) fn text(&self) -> String {
        let ms = |value: Option<u64>| value.map_or("-".into(), |ms| format!("{ms} ms"));
        let matched = |value: Option<bool>| match value {
            Some(true) => "equal",
            Some(false) => "DIFFERENT",
            None => "not compared",
        };
        let mut text = String::new();
        let mut row = |name: &str, value: String| text.push_str(&format!("  {name:<22}{value}\n"));
        row("guest", format!("{} over {}", self.guest, self.transport));
        if let Some(how) = self.security.as_ref().and_then(SecurityInfo::sentence) {
            let made =
                if self.throwaway_certificates { "; certificates made for this run alone" } else { "" };
            row("connection", format!("{how}{made}"));
        }
        row("total", format!("{} ms, {} iterations", self.total_ms, self.iterations));
        row("downtime", ms(self.downtime_ms));
        row("longest gap (guest)", format!("{}, of it {} ms digests", ms(self.guest_gap_ms), self.verify_ms));
        row(
            "moved",
            format!(
                "{} RAM, {} device state live, {} stopped",
                format_size(self.bytes.ram),
                format_size(self.bytes.device_precopy),
                format_size(self.bytes.device_stopcopy)
            ),
        );
        for (name, counts) in [("checked", &self.checked), ("lost", &self.lost)] {
            row(
                name,
                format!(
                    "{} pages, {} DMA blocks, {} interrupts",
                    counts.pages, counts.dma_blocks, counts.interrupts
                ),
            );
        }
        row("RAM digests", matched(self.ram_digest_match).into());
        row("device digests", matched(self.device_digest_match).into());
        let phases: Vec<String> =
            self.phases.iter().map(|phase| format!("{} {}", phase.name, phase.ms)).collect();
        row("phases, ms", phases.join("  "));
        if let Some(caught) = self.caught_by {
            row("caught by", caught.to_string());
        }
        if let Some(error) = &self.error {
            row("error", error.clone());
        }
        let verdict = match (self.verified, self.outcome) {
            (true, _) => "VERIFIED: the guest moved live and lost nothing",
            (false, DemoOutcome::Completed) => "NOT VERIFIED: the guest moved, and something was lost",
            (false, DemoOutcome::NotStarted) => {
                "NOT STARTED: the guest is the destination's, and does not run there"
            }
            (false, DemoOutcome::Aborted) => "ABORTED: the guest goes on at the source",
            (false, DemoOutcome::Failed) => "FAILED",
        };
        format!("{verdict}\n{text}")
    }
}
