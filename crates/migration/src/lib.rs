//! Live migration for guests that own VFIO devices: the face a VMM embeds.
//!
//! A VMM implements [`Machine`] (its RAM, its dirty sources, its devices, pause and resume, save and load of machine
//! state, storage locks) and calls one of three functions, each of which blocks until the migration has ended:
//!
//! * [`Source::migrate_to`]: `Ok` means that the guest runs at the destination and this machine is spent; `Err` means
//!   that the guest runs here, or the error says exactly why not.
//! * [`Destination::accept`]: `Ok` means that this machine owns the guest and runs it; `Err` means that nothing ran here,
//!   and every device is reset and released ([`IncomingError::OwnedNotStarted`] is the one exception, and says so).
//! * [`Source::rehearse_to`] does the first part of a migration for real, and undoes it: `Ok` means that nothing moved, and
//!   holds whether a migration would come to its end, and how long the guest would be paused.
//!
//! Other threads watch and steer through [`Control`] and [`IncomingControl`].
//!
//! # A toy VMM
//!
//! ```
//! use std::collections::BTreeMap;
//! use std::os::unix::net::UnixStream;
//! use std::sync::{Arc, Mutex};
//!
//! use vfio_migration::*;
//! use vfio_migration::compat::{MachineManifest, RamRegion};
//! use vfio_migration::device::IrqRouter;
//! use vfio_migration::memory::{DirtySource, GuestRam, RamSpec, WriteLog};
//! use vfio_migration::types::{Gpa, RamOffset, VmId};
//!
//! /// One register, some RAM, no devices. A real VMM has vCPU threads; this one has a flag that says that they run.
//! struct Toy {
//!     ram: Arc<GuestRam>,
//!     writes: Arc<WriteLog>,
//!     register: Mutex<u64>,
//!     running: Mutex<bool>,
//! }
//!
//! impl Toy {
//!     fn new() -> Self {
//!         let ram = GuestRam::new("toy", &[RamSpec { gpa: Gpa(0), len: 1 << 20 }]).unwrap();
//!         let writes = WriteLog::new("toy", ram.size());
//!         Self { ram: Arc::new(ram), writes: Arc::new(writes), register: Mutex::new(0), running: Mutex::new(false) }
//!     }
//!
//!     fn guest_writes(&self, at: RamOffset, value: u64) {
//!         self.ram.write_u64(at, value).unwrap();
//!         self.writes.mark(at, 8); // after the write, never before
//!     }
//! }
//!
//! impl Machine for Toy {
//!     fn id(&self) -> VmId { VmId([7; 16]) }
//!     fn manifest(&self) -> Result<MachineManifest, MachineError> {
//!         Ok(MachineManifest {
//!             machine: "toy/1".into(),
//!             accelerator: "software".into(),
//!             vcpus: 1,
//!             ram: vec![RamRegion { gpa: Gpa(0), len: 1 << 20 }],
//!             cpu: vec![],
//!             sections: BTreeMap::from([("toy.register".into(), 1)]),
//!             devices: vec![],
//!             ..MachineManifest::default()
//!         })
//!     }
//!     fn ram(&self) -> Arc<GuestRam> { Arc::clone(&self.ram) }
//!     fn dirty_sources(&self) -> Vec<Arc<dyn DirtySource>> { vec![self.writes.clone()] }
//!     fn devices(&self) -> Vec<MigratableDevice> { vec![] }
//!     fn irq_router(&self) -> Arc<dyn IrqRouter> { Arc::new(NoInterrupts) }
//!     fn pause(&self) -> Result<bool, MachineError> {
//!         Ok(std::mem::replace(&mut *self.running.lock().unwrap(), false))
//!     }
//!     fn resume(&self, run: bool) -> Result<(), MachineError> {
//!         *self.running.lock().unwrap() = run;
//!         Ok(())
//!     }
//!     fn save(&self, _: &Paused) -> Result<Vec<Section>, MachineError> {
//!         let bytes = self.register.lock().unwrap().to_le_bytes().to_vec();
//!         Ok(vec![Section { name: "toy.register".into(), version: 1, bytes }])
//!     }
//!     fn load(&self, sections: Vec<Section>) -> Result<(), MachineError> {
//!         let refuse = || MachineError::new("loading the machine", "the sections are not those of a toy");
//!         let [section] = sections.as_slice() else { return Err(refuse()) };
//!         if (section.name.as_str(), section.version) != ("toy.register", 1) { return Err(refuse()) }
//!         let bytes = section.bytes.as_slice().try_into().map_err(|_| refuse())?;
//!         *self.register.lock().unwrap() = u64::from_le_bytes(bytes);
//!         Ok(())
//!     }
//!     fn release_locks(&self) -> Result<(), LockError> { Ok(()) } // it has no storage
//!     fn take_locks(&self) -> Result<(), LockError> { Ok(()) }
//! }
//!
//! #[derive(Debug)]
//! struct NoInterrupts;
//! impl IrqRouter for NoInterrupts {
//!     fn commit(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> { Ok(()) }
//! }
//!
//! let here = Arc::new(Toy::new());
//! here.guest_writes(RamOffset(4096), 42);
//! *here.register.lock().unwrap() = 43;
//! here.resume(true)?;
//!
//! // Two processes in life, two threads here; `Destination::listen` and `Source::migrate_to` take addresses. What is no unix socket
//! // is refused unless both sides' options have a `security`.
//! let (one_end, other_end) = UnixStream::pair()?;
//! let arriving = std::thread::spawn(move || {
//!     let mut destination = Destination::over(other_end.into(), DestinationOptions::default())?;
//!     let there = Arc::new(Toy::new());
//!     let built = there.clone();
//!     destination.accept(|offer| {
//!         assert_eq!(offer.manifest.machine, "toy/1");
//!         Ok(built as Arc<dyn Machine>)
//!     })?;
//!     Ok::<_, IncomingError>(there)
//! });
//! let completed = Source::new(here.clone(), SourceOptions::default())
//!     .migrate_over(one_end.into(), |progress| println!("{} {}", progress.phase, progress.remaining))?;
//! let there = arriving.join().unwrap()?;
//!
//! assert!(*there.running.lock().unwrap() && !*here.running.lock().unwrap());
//! assert_eq!(there.ram.read_u64(RamOffset(4096))?, 42);
//! assert_eq!(*there.register.lock().unwrap(), 43);
//! // Moved is not yet running: a guest that could not be started is the destination's too.
//! assert!(completed.guest.is_success());
//! println!("it was paused for {:?}", completed.downtime);
//! # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
//! ```
//!
//! There is no global state, no async runtime, no thread that outlives a call
//! (but those that wait for a device, a disk or a name server which does not answer, after a cancel:
//! [`Control::pending_rollback`]), and no logging set-up: events go to `tracing`, whoever listens. This crate decides nothing: `vfio-migration-engine` does. It knows no hypervisor and no
//! device: those are behind [`Machine`] and [`Device`](vfio_migration_device::Device).
#![forbid(unsafe_code)]

mod admission;
mod bridge;
mod changeable;
mod channel;
mod connection_factory;
mod control;
mod destination;
mod device_file;
mod device_state;
mod error;
mod expectation;
#[cfg(feature = "fault-injection")]
mod fault_injection;
mod held;
#[cfg(any(test, feature = "fault-injection"))]
mod held_file;
mod incoming_machine;
mod machine;
mod millis;
mod offer;
mod options;
mod ownership;
mod probe;
mod ram;
mod reasons;
mod refused;
mod regular_file;
mod rehearsal;
mod report;
mod session;
mod snapshot;
mod source;
mod thread_setup;
mod tls;
mod unix_listener;
mod unix_peer;
mod unresolved;
mod uri;
mod waiting_sources;

pub use bridge::{ByteStream, bridge};
pub use changeable::{refuse_changeable, refuse_changeable_folder};
pub use channel::connect::needs_security;
pub use channel::handed::{IncomingConnections, NotHandedOver};
pub use connection_factory::ConnectionFactory;
pub use control::{Control, IncomingControl, NotReady, PendingRollback};
pub use destination::Destination;
pub use device_file::{
    DeviceArc, DeviceControl, DeviceFate, DeviceFileError, DeviceReport, RestoreDeviceOptions,
    SaveDeviceOptions, restore_device, save_device,
};
pub use error::{Aborted, IncomingError, MigrateError, OwnedNotStarted, RehearsedHere};
pub use expectation::{
    Expectation, ExpectationCounts, ExpectationError, Expectations, ExpectedSource, Right, Unexpected,
};
#[cfg(feature = "fault-injection")]
pub use fault_injection::{HeldFile, InjectedFault, inject, leave_threads};
pub use held::start_held;
pub use incoming_machine::{IncomingDevice, IncomingFunction, IncomingMachine, MachineState};
pub use machine::{LockError, Machine, MachineError, MigratableDevice, Paused, Section};
pub use offer::{Arrived, IncomingOffer, NotBuilt};
pub use options::{DestinationOptions, SourceOptions};
pub use ownership::journal::{JournalError, JournalFile, JournalNote, read_journal};
pub use ownership::status::{VmOwnership, ownership_at};
pub use probe::probe;
pub use refused::{RefusalCause, RefusedConnection, RefusedConnections};
pub use regular_file::{AtomicFile, FileError, open_regular, open_regular_to_append};
pub use rehearsal::{Basis, PredictedPart, Rates, Rehearsal, Rehearse};
pub use report::{
    ArrivalReport, AttemptInfo, AttemptKind, Bytes, Completed, DeviceStatus, PhaseTime, Progress, StepTime,
};
pub use rustls;
pub use session::awaited::{AwaitedAnswer, AwaitedNote, Request};
pub use snapshot::{
    DeviceState, GuestNotResumed, SaveError, SaveOptions, Saved, Snapshot, SnapshotError, save,
};
pub use source::Source;
pub use thread_setup::ThreadSetup;
pub use tls::authorities::{TrustedAuthority, trusted_authorities};
pub use tls::config::{ALPN, Security, TlsDirectory, own_identity};
pub use tls::crl::{RevocationList, RevokedCertificate, former_revocation_lists, revocation_lists};
pub use tls::error::TlsError;
pub use tls::examination::{TlsExamination, TlsWarning};
pub use tls::files::{IssuedCertificate, issued_certificates, private_key_file};
pub use tls::identity::{EXPIRES_SOON, NotAPin, PeerIdentity, Pin};
pub use tls::layout::{CA_FILE, CRL_FILE, TlsRole};
pub use tls::remedy::TlsRemedy;
pub use tls::security::{ConnectionSecurity, SecurityKind, SocketKind};
pub use unix_listener::{bind_unix, unix_address};
pub use unix_peer::{AllowedUnixPeers, UnixPeer, UnixPeerError};
pub use unresolved::{Resolution, UnresolvedMigration};
pub use uri::{Uri, UriError};
pub use vfio_migration_types::{CancelCause, Failure, GuestOutcome, PauseCause, Side};
pub use {
    vfio_migration_compat as compat, vfio_migration_device as device, vfio_migration_memory as memory,
    vfio_migration_types as types,
};

/// The code of the guide for VMMs compiles.
#[cfg(doctest)]
#[doc = include_str!("../embedding.md")]
struct EmbeddingGuide;
