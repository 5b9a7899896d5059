//! The outgoing half of a session.
//!
//! Three threads, all ended when [`Source::migrate_to`] returns: the caller's own, which turns what happens into the
//! engine's events and the engine's actions into jobs; a worker, which does the jobs one after another and moves the
//! bulk; a reader, which receives from the destination. An action that must not wait for the one under way (an abort)
//! raises an [`Interrupt`] first.
//!
//! The code of a phase is in the file of its name, from [`plan`] (P0) to [`clean`] (P9), and the way back in [`rollback`].

mod attempt;
mod clean;
mod commit;
mod final_pass;
mod hello;
mod iterate;
pub(crate) mod plan;
mod progress;
mod quiesce;
mod reader;
mod ready;
mod rollback;
mod session;
mod setup;
mod worker;

use std::fmt;
use std::os::fd::{OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vfio_migration_types::Phase;

use crate::channel::connect::{self, ConnectError};
use crate::control::Control;
use crate::error::{MigrateError, not_connected};
use crate::machine::Machine;
use crate::options::SourceOptions;
use crate::rehearsal::{Rehearsal, Rehearse};
use crate::report::{AttemptInfo, AttemptKind, Completed, PhaseTime, Progress};
use crate::session::awaited::Request;
use crate::session::threads::set_up;
use crate::snapshot::file_peer;
use crate::source::attempt::SourceEnd;
use crate::source::plan::{PlannedMigration, new_attempt_id};
use crate::thread_setup::ThreadSetup;
use crate::uri::Uri;

/// A machine about to be sent away.
pub struct Source {
    pub(crate) machine: Arc<dyn Machine>,
    options: SourceOptions,
    control: Control,
    /// The file that the machine goes into, if it does.
    file: Option<PathBuf>,
}

impl Source {
    /// Prepares to migrate `machine`. Nothing is touched yet.
    pub fn new(machine: Arc<dyn Machine>, options: SourceOptions) -> Self {
        let control = Control::new(&options);
        Self { machine, options, control, file: None }
    }

    /// The same, into the file at `path`: by that name its journal and its progress know the other end.
    pub(crate) fn into_file(self, path: &Path) -> Self {
        Self { file: Some(path.into()), ..self }
    }

    /// What the threads of its session do first.
    pub(crate) fn thread_setup(&self) -> Option<&ThreadSetup> {
        self.options.thread_setup.as_ref()
    }

    /// A handle for other threads.
    pub fn control(&self) -> Control {
        self.control.clone()
    }

    /// Migrates to the destination that listens at `uri`; blocks until all is over. `observer` is called on this
    /// thread, several times a second and at each change of phase; it should return soon.
    ///
    /// # Errors
    /// The guest runs here as before (or is paused, if its operator had paused it), or the error says exactly why not.
    pub fn migrate_to(self, uri: &Uri, observer: impl FnMut(&Progress)) -> Result<Completed, MigrateError> {
        self.connect(uri, None, observer)?.completed()
    }

    /// Does what [`migrate_to`](Self::migrate_to) does up to a point, for real and against the real destination, and undoes
    /// it: nothing moves, no journal is written, storage locks stay where they are. Up to
    /// [`Precopy`](Rehearse::Precopy) the guest is never paused; a device without pre-copy reports nothing of itself
    /// then.
    ///
    /// # Errors
    /// As [`migrate_to`](Self::migrate_to): refusals, and what fails. That the downtime would not be met is no error but
    /// [found](Rehearsal::obstacle).
    pub fn rehearse_to(
        self,
        uri: &Uri,
        rehearse: Rehearse,
        observer: impl FnMut(&Progress),
    ) -> Result<Rehearsal, MigrateError> {
        self.connect(uri, Some(rehearse), observer)?.rehearsed()
    }

    /// The attempt begins, which the observer is told of, unless it has: whatever is waited for from now on is part of it. `uri`: the
    /// destination, where it is no file.
    pub(crate) fn begin(
        &self,
        uri: Option<&Uri>,
        rehearse: Option<Rehearse>,
        observer: &mut impl FnMut(&Progress),
    ) -> Result<(), MigrateError> {
        if self.control.progress().attempt.is_some() {
            return Ok(());
        }
        let kind = match (rehearse, &self.file) {
            (Some(Rehearse::Ask), _) => AttemptKind::Check,
            (Some(Rehearse::Precopy | Rehearse::Switchover), _) => AttemptKind::Rehearsal,
            (None, Some(_)) => AttemptKind::Save,
            (None, None) => AttemptKind::Migration,
        };
        let named = self.options.peer_name.clone().or_else(|| uri.map(Uri::to_string));
        let peer = self.file.as_deref().map(file_peer).or(named).unwrap_or_default();
        let (vm, epoch) = (self.machine.id(), self.options.epoch);
        let info = AttemptInfo::beginning(vm, new_attempt_id()?, epoch, kind, peer);
        self.control.begun();
        self.control.set_progress(Progress { attempt: Some(info), ..self.control.progress() });
        observer(&self.control.progress());
        Ok(())
    }

    fn connect(
        self,
        uri: &Uri,
        rehearse: Option<Rehearse>,
        mut observer: impl FnMut(&Progress),
    ) -> Result<SourceEnd, MigrateError> {
        let _threads = set_up(self.thread_setup());
        connect::check_chosen(uri, self.options.security.as_ref()).map_err(not_connected)?;
        self.begin(Some(uri), rehearse, &mut observer)?;
        let (plan, engine) =
            PlannedMigration::new(self.machine, self.options, self.control, uri.clone(), rehearse)?;
        let planned = [PhaseTime { phase: Phase::Plan, took: plan.took }];
        let connecting = || plan.control.look_around(Phase::Hello, &planned).is_some();
        connecting();
        let SourceOptions { security, unix_peers, connect_timeout: limit, .. } = &plan.options;
        let wait = plan.answers.wait(None, Request::Connection, Some(*limit));
        let connected = connect::connect(uri, security.as_ref(), unix_peers, *limit, connecting);
        drop(wait);
        let socket = connected.map_err(|error| {
            connecting();
            match error {
                ConnectError::Cancelled => plan.control.cancelled(Phase::Hello),
                error => not_connected(error),
            }
        })?;
        session::run(plan, engine, socket, observer)
    }

    /// Migrates over a stream socket that is already connected to the destination. The session takes it over.
    ///
    /// # Errors
    /// As [`migrate_to`](Self::migrate_to). A COMMIT whose answer is lost cannot be asked after on another connection.
    pub fn migrate_over(
        self,
        socket: OwnedFd,
        observer: impl FnMut(&Progress),
    ) -> Result<Completed, MigrateError> {
        self.over(socket, None, observer)?.completed()
    }

    /// Rehearses over a stream socket that is already connected to the destination. The session takes it over.
    ///
    /// # Errors
    /// As [`rehearse_to`](Self::rehearse_to).
    pub fn rehearse_over(
        self,
        socket: OwnedFd,
        rehearse: Rehearse,
        observer: impl FnMut(&Progress),
    ) -> Result<Rehearsal, MigrateError> {
        self.over(socket, Some(rehearse), observer)?.rehearsed()
    }

    fn over(
        self,
        socket: OwnedFd,
        rehearse: Option<Rehearse>,
        mut observer: impl FnMut(&Progress),
    ) -> Result<SourceEnd, MigrateError> {
        let _threads = set_up(self.thread_setup());
        let number: RawFd = std::os::fd::AsRawFd::as_raw_fd(&socket);
        let uri = Uri::Fd(number);
        connect::check_chosen(&uri, self.options.security.as_ref()).map_err(not_connected)?;
        self.begin(Some(&uri), rehearse, &mut observer)?;
        let (plan, engine) = PlannedMigration::new(self.machine, self.options, self.control, uri, rehearse)?;
        connect::check_stream(&socket, number).map_err(not_connected)?;
        let SourceOptions { security, unix_peers, connect_timeout: limit, .. } = &plan.options;
        let socket = connect::secured(socket, &plan.uri, security.as_ref(), unix_peers, *limit)
            .map_err(not_connected)?;
        session::run(plan, engine, socket, observer)
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Source")
            .field("vm", &self.machine.id())
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}
