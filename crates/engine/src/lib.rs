//! The deciding half of a migration: state machines without I/O, clock or thread.
//!
//! [`SourceEngine`] and [`DestinationEngine`] take events ([`SourceEvent`], [`DestinationEvent`]), each with its time,
//! and give the next actions ([`SourceAction`], [`DestinationAction`]). A session does those, and reports the result.
//! Bulk data never comes here: the engine orders iteration 3, workers move the bytes and report counts.
//!
//! ```text
//! loop {
//!     while let Some(action) = source.poll_action() { /* start it; its answer is an event later */ }
//!     let event = /* wait for an event, at most until */ source.deadline() /* which is a Tick */;
//!     source.handle(event, now);
//! }
//! ```
//!
//! until the action is `Finish`.
//!
//! A migration, both sides, each answer left out:
//!
//! ```text
//!  P1  Hello ─▶ ◀─ HelloReply   Offer ─▶   [Reserve, journal RESERVED]   ◀─ Accept
//!  P2  [journal SENDING]  Begin ─▶   [SetUp]   [journal LOADING, BeginResuming]   ◀─ Begun
//!  P3  [SendIteration k] ─▶   ◀─ InitialLoaded, Applied                     … again, until the downtime fits
//!  P4  [Pause, Devices(P2p)]   new initial bytes? [Devices(Running), Resume], back to P3   [Devices(StopCopy)]
//!  P5  Final ─▶   [SendFinal, ReleaseLocks]   LocksFree ─▶ [TakeLocks]   FinalEnd ─▶
//!  P6  [Load, journal READY]   ◀─ Ready
//!  P7  watchdog, comparison, [journal COMMITTING]   Commit ─▶   [journal OWNER]
//!  P8  [Start]   ◀─ Running
//!  P9  [journal RELEASED, CleanUp]
//! ```
//!
//! What this crate does *not* do: measure time, touch a socket, a file, a device or memory (`clippy.toml` bans the means), or
//! post-copy, which VFIO devices cannot do: state that is still at the source cannot be faulted in.
#![forbid(unsafe_code)]

mod api;
mod convergence;
mod destination;
mod expected;
mod failure;
pub mod ownership;
mod source;

pub use api::*;
pub use destination::DestinationEngine;
pub use expected::work_timeout;
pub use failure::ram_differs;
pub use source::SourceEngine;
