//! The vfio-user protocol, client and server, complete for a PCI device that migrates.
//!
//! vfio-user carries the VFIO device interface over a UNIX socket: a *client* (a VMM) drives a device that a
//! *server* (another process) emulates. This crate is both ends:
//!
//! * [`Client`] connects, negotiates, and offers every command as a method with a deadline;
//! * [`Server`] listens and serves a [`Backend`], the trait that a device implements;
//! * [`codec`] is the protocol without any I/O: headers, payloads and the version negotiation. It is for tests and tools that
//!   speak by hand, and no part of what this crate's versions promise.
//!
//! `examples/copier.rs` is a device with DMA, MSI-X, a log of its writes and migration; `examples/migrate.rs` moves it.
//!
//! It speaks version 0.9 of the specification as QEMU (`docs/interop/vfio-user.rst`) and libvfio-user publish it,
//! with migration (`DEVICE_FEATURE`, `MIG_DATA_READ`, `MIG_DATA_WRITE`), DMA logging, server-to-client DMA on one
//! socket or on a twin socket, and an extension for what the specification lacks: peer-to-peer states, a size
//! estimate, pre-copy progress and the device's manifest. The extension is in force only where both ends announce
//! it, and everything works without it; see [`Extension`].
//!
//! # What it does not do
//!
//! It maps no memory: descriptors of regions and of guest RAM are handed out for the embedder to map. It holds no
//! migration policy, starts no thread that outlives its object, and never trusts a number from its peer: lengths
//! are checked against a cap before anything is allocated, and a reply is believed only where it fits the request.
#![forbid(unsafe_code)]

mod client;
pub mod codec;
mod conn;
mod error;
mod event;
mod migration_state;
mod model;
mod server;

pub use client::{Client, ClientOptions, DmaHandler, Negotiated, OnConnect, QuestionLimit, Recovery};
pub use codec::{Command, Extension, Feature, FeatureOp};
pub use error::{ClientError, ServerError};
pub use event::{DropReason, ServerEvent};
pub use migration_state::{ArcError, MigrationFlags, MigrationState, UnknownState};
pub use model::{
    DeviceInfo, DmaMapping, IoFd, IoFdKind, IovaRange, IrqAction, IrqData, IrqInfo, MmapArea, PrecopyInfo,
    Prot, RegionInfo, RegionWrite, irq_index, region_index,
};
/// Error numbers, as they travel in replies.
pub use rustix::io::Errno;
pub use server::{Backend, DmaChannel, IrqRequest, IrqRequestData, Server, ServerOptions, StopHandle};

/// The README's example compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
