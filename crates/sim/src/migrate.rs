//! The device's migration: its state machine, saving and resuming.

use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::io::Errno;
use vfio_migration_guest_driver::registers::VECTORS;
use vfio_migration_types::{Bitmap, Granule, PAGE_SIZE};
use vfio_user_peer::{ArcError, MigrationFlags, MigrationState, StopHandle};

use crate::bulk::PAGE;
use crate::device::SampleDevice;
use crate::error::{SimError, invalid};
use crate::fault::{Fault, Which};
use crate::migration::{SampleMigration, SampleResuming, SampleSession, no_session, strikes};
use crate::options::Options;
use crate::pci::BAR2_SIZE;
use crate::regs::Registers;
use crate::saving::{self, SamplePrecopy, SampleSaving};
use crate::shared::{Mode, lock};
use crate::stream::{Item, Parser, StreamHeader, model_hash};

/// Interval at which an arc that hangs looks for the end of its server.
const STOP_LOOKED_FOR: Duration = Duration::from_millis(100);

/// Result of a read of device state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateRead {
    /// So many bytes, at least one, are at the front of the buffer.
    Data(usize),
    /// Nothing for now: in pre-copy alone.
    NothingNow,
    /// The end of the STOP_COPY data.
    End,
}

impl SampleDevice {
    /// Features of the device's migration.
    pub fn migration_flags(&self) -> MigrationFlags {
        self.options().flags()
    }

    /// The state it is in. Answers at once, also while an arc is under way.
    pub fn state(&self) -> MigrationState {
        self.shared.state()
    }

    /// Moves the device to `to`, arc by arc as the uAPI says; each state on the way is real. To the state it is in:
    /// nothing happens.
    ///
    /// # Errors
    /// EINVAL for a transition that no device takes. When an arc fails the device stays in the last state reached.
    pub fn set_state(&self, to: MigrationState) -> Result<(), SimError> {
        let mut migration = lock(&self.migration);
        let steps = self
            .state()
            .path_to(to, self.migration_flags())
            .map_err(|error: ArcError| invalid(error.to_string()))?;
        for next in steps {
            let from = self.state();
            let taken = self
                .scripted(&mut migration, from, next)
                .and_then(|()| self.take_arc(&mut migration, from, next));
            if let Err(error) = taken {
                tracing::info!(target: "session", "the device does not go from {from} to {next}: {error}");
                return Err(error);
            }
            self.shared.set_state(next);
            migration.log_arc(from, next);
        }
        Ok(())
    }

    /// Fills the front of `into` with the next device state.
    ///
    /// # Errors
    /// EINVAL in a state that is not saving; ENODEV when the session was lost.
    pub fn read_data(&self, into: &mut [u8]) -> Result<StateRead, SimError> {
        let mut migration = lock(&self.migration);
        let SampleMigration { session: SampleSession::Saving(_), .. } = &*migration else {
            return Err(no_session(&migration, "no saving session is open"));
        };
        let allowed = self.fault_limit(&mut migration, into.len())?;
        if self.state() == MigrationState::StopCopy {
            self.hang_in_read(&mut migration);
        }
        let SampleSession::Saving(saving) = &mut migration.session else {
            return Err(invalid("no saving session is open"));
        };
        let room = into.get_mut(..allowed).unwrap_or_default();
        let mut count = saving.read(&mut lock(&self.shared.bulk), room);
        let stopped = saving.stopped();
        if count == 0 && stopped && self.options().faults.contains(&Fault::EndlessState) {
            room.fill(0);
            count = room.len();
        }
        migration.moved += count as u64;
        Ok(match (count, stopped) {
            (0, _) if into.is_empty() => StateRead::NothingNow,
            (0, true) => StateRead::End,
            (0, false) => StateRead::NothingNow,
            _ => StateRead::Data(count),
        })
    }

    /// Takes all of `from` as the next device state.
    ///
    /// # Errors
    /// EINVAL outside of RESUMING, and for state that is not this device's or is damaged: only a reset helps then.
    /// ENODEV when the session was lost.
    pub fn write_data(&self, from: &[u8]) -> Result<(), SimError> {
        let mut migration = lock(&self.migration);
        let SampleMigration { session: SampleSession::Resuming(_), .. } = &*migration else {
            return Err(no_session(&migration, "no resuming session is open"));
        };
        self.fault_limit(&mut migration, usize::MAX)?;
        let SampleSession::Resuming(resuming) = &mut migration.session else {
            return Err(invalid("no resuming session is open"));
        };
        let SampleResuming { parser, came, registers } = &mut **resuming;
        parser.push(from, |item| self.load(came, registers, item))?;
        migration.moved += from.len() as u64;
        Ok(())
    }

    /// Pre-copy estimates.
    ///
    /// # Errors
    /// EINVAL outside of PRE_COPY and PRE_COPY_P2P.
    pub fn progress(&self) -> Result<SamplePrecopy, SimError> {
        let mut migration = lock(&self.migration);
        match &mut migration.session {
            SampleSession::Saving(saving) if !saving.stopped() => {
                Ok(saving.progress(&mut lock(&self.shared.bulk)))
            }
            _ => Err(no_session(&migration, "no pre-copy is under way")),
        }
    }

    /// Estimated bytes that STOP_COPY would give now, in any state. A hint.
    pub fn stop_copy_size(&self) -> u64 {
        let used = |page: &[u8]| page.iter().any(|byte| *byte != 0);
        let mailbox = self.shared.mailbox.copy().unwrap_or_default();
        let mailbox_pages = mailbox.chunks(PAGE).filter(|page| used(page)).count() as u64;
        let migration = lock(&self.migration);
        let size = match &migration.session {
            SampleSession::Saving(saving) => saving.left(&lock(&self.shared.bulk), mailbox_pages),
            _ => saving::whole(self.options().state_size, mailbox_pages),
        };
        let percent = self.options().fault(|fault| match fault {
            Fault::WrongSizeEstimate(percent) => Some(*percent),
            _ => None,
        });
        percent.map_or(size, |percent| size.saturating_mul(percent) / 100)
    }

    fn take_arc(
        &self,
        migration: &mut SampleMigration,
        from: MigrationState,
        to: MigrationState,
    ) -> Result<(), SimError> {
        use MigrationState::{PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};
        let shared = &self.shared;
        match (from, to) {
            (Running, RunningP2p) | (PreCopy, PreCopyP2p) => shared.order(Some(Mode::NoP2p)),
            (RunningP2p, Running) | (PreCopyP2p, PreCopy) => shared.order(Some(Mode::Running)),
            (Running, PreCopy) | (RunningP2p, PreCopyP2p) => self.open_saving(migration),
            (PreCopy, Running) | (PreCopyP2p, RunningP2p) | (StopCopy, Stop) => self.close_session(migration),
            (Running | RunningP2p, Stop) => self.halt(),
            (PreCopy | PreCopyP2p, StopCopy) => {
                self.halt();
                if let Err(error) = self.enter_stop_copy(migration) {
                    // The arc was not taken: the device goes on as it did.
                    self.start(if from == PreCopy { Mode::Running } else { Mode::NoP2p });
                    return Err(error);
                }
            }
            (Stop, StopCopy) => {
                self.open_saving(migration);
                if let Err(error) = self.enter_stop_copy(migration) {
                    self.close_session(migration);
                    return Err(error);
                }
            }
            (Stop, Running) => self.start(Mode::Running),
            (Stop, RunningP2p) => self.start(Mode::NoP2p),
            (Stop, Resuming) => self.open_resuming(migration)?,
            (Resuming, Stop) => self.finish_resuming(migration)?,
            _ => return Err(invalid(format!("{from} to {to} is no single arc"))),
        }
        Ok(())
    }

    /// Makes the device stand still. When this returns the descriptor in hand is complete, what rang the doorbell is
    /// remembered, and nothing in the device changes.
    fn halt(&self) {
        self.shared.order(Some(Mode::Stopped));
        lock(&self.shared.front).active = false;
        lock(&self.shared.bulk).frozen = true;
    }

    fn start(&self, mode: Mode) {
        lock(&self.shared.bulk).frozen = false;
        self.shared.bulk_changed.notify_all();
        {
            let mut front = lock(&self.shared.front);
            front.active = true;
            // The tail may have moved without a doorbell that reached this device. An engine that is off or stopped has none, and
            // looks once it is switched on: a pause leaves no trace in it.
            front.registers.doorbell |= front.registers.enabled && !front.registers.ring_error;
            (0..VECTORS).for_each(|vector| front.raise(vector));
        }
        self.shared.order(Some(mode));
    }

    fn open_saving(&self, migration: &mut SampleMigration) {
        let corrupt = self.options().faults.contains(&Fault::CorruptTail);
        let Options { version, state_size, model, .. } = self.options();
        let header = StreamHeader { version: *version, state_size: *state_size, model: model_hash(model) };
        let saving = SampleSaving::open(&mut lock(&self.shared.bulk), header, corrupt);
        migration.session = SampleSession::Saving(Box::new(saving));
        migration.moved = 0;
    }

    fn enter_stop_copy(&self, migration: &mut SampleMigration) -> Result<(), SimError> {
        let mailbox = self.shared.mailbox.copy()?;
        let registers = lock(&self.shared.front).registers.clone();
        let mut bulk = lock(&self.shared.bulk);
        let registers = registers.encode(bulk.integrity);
        match &mut migration.session {
            SampleSession::Saving(saving) => saving.stop(&mut bulk, mailbox, registers),
            _ => return Err(SimError::new(Errno::NODEV, "the saving session was lost")),
        }
        Ok(())
    }

    fn close_session(&self, migration: &mut SampleMigration) {
        SampleSaving::close(&mut lock(&self.shared.bulk));
        migration.session = SampleSession::None;
    }

    fn open_resuming(&self, migration: &mut SampleMigration) -> Result<(), SimError> {
        self.shared.mailbox.clear()?;
        let resuming = SampleResuming {
            parser: Parser::default(),
            came: Bitmap::new(self.options().state_size, Granule::PAGE),
            registers: None,
        };
        migration.session = SampleSession::Resuming(Box::new(resuming));
        migration.moved = 0;
        migration.foreign = true;
        Ok(())
    }

    /// Takes one piece of the stream.
    fn load(
        &self,
        came: &mut Bitmap,
        registers: &mut Option<(Registers, u64)>,
        item: Item<'_>,
    ) -> Result<(), SimError> {
        match item {
            Item::Header(header) => {
                let options = self.options();
                if header.model != model_hash(&options.model) {
                    return Err(invalid("the state is of another model"));
                }
                let (major, minor) = header.version;
                if major != options.version.0 || minor > options.version.1 {
                    let ours = options.version_string();
                    return Err(invalid(format!(
                        "the state is of version {major}.{minor}, the device of {ours}"
                    )));
                }
                if header.state_size != options.state_size {
                    let (theirs, ours) = (header.state_size, options.state_size);
                    return Err(invalid(format!("the state has {theirs} bytes of bulk, the device {ours}")));
                }
            }
            Item::Pages { first, bytes } => {
                if !lock(&self.shared.bulk).load(first, bytes) {
                    return Err(invalid("pages outside of the bulk state"));
                }
                came.set_range(first, bytes.len() as u64 / PAGE_SIZE);
            }
            Item::Mailbox { at, bytes } => {
                if at.checked_add(bytes.len() as u64).is_none_or(|end| end > BAR2_SIZE) {
                    return Err(invalid("a piece outside of the mailbox"));
                }
                self.shared.mailbox.write(at, bytes)?;
            }
            Item::Registers(bytes) => *registers = Some(Registers::decode(bytes)?),
            Item::Trailer { generations } => {
                if came.count() != came.len() {
                    return Err(invalid("pages of the bulk state are missing"));
                }
                if lock(&self.shared.bulk).generations() != generations {
                    return Err(invalid("pages of the bulk state are out of date"));
                }
            }
        }
        Ok(())
    }

    fn finish_resuming(&self, migration: &mut SampleMigration) -> Result<(), SimError> {
        let SampleSession::Resuming(resuming) = &mut migration.session else {
            return Err(SimError::new(Errno::NODEV, "the resuming session was lost"));
        };
        if !resuming.parser.ended() {
            return Err(invalid("the state is not complete"));
        }
        let Some((registers, integrity)) = resuming.registers.take() else {
            return Err(invalid("the state has no registers"));
        };
        lock(&self.shared.front).registers = registers;
        let mut bulk = lock(&self.shared.bulk);
        bulk.integrity = integrity;
        bulk.sweep = (bulk.pages() > 0).then_some(0);
        migration.session = SampleSession::None;
        migration.foreign = false;
        Ok(())
    }

    /// Lets the faults strike that are about the arc `from` → `to`.
    fn scripted(
        &self,
        migration: &mut SampleMigration,
        from: MigrationState,
        to: MigrationState,
    ) -> Result<(), SimError> {
        migration.arcs += 1;
        let options = self.options();
        if !options.arc_delay.is_zero() {
            self.hang(Some(options.arc_delay));
        }
        let is = |which: &Which| which.is(migration.arcs, from, to);
        for (n, fault) in options.faults.iter().enumerate() {
            match fault {
                Fault::FailArc { which, errno, times }
                    if is(which) && times.is_none_or(|times| strikes(&mut migration.struck, n, times)) =>
                {
                    return Err(SimError::new(*errno, format!("scripted: {from} to {to} fails")));
                }
                Fault::ErrorArc(which) if is(which) => {
                    self.halt();
                    migration.session = SampleSession::Lost;
                    SampleSaving::close(&mut lock(&self.shared.bulk));
                    self.shared.set_state(MigrationState::Error);
                    return Err(SimError::new(Errno::IO, format!("scripted: {from} to {to} ends in ERROR")));
                }
                Fault::HangArc { which, time } if is(which) => {
                    tracing::warn!(%from, %to, "scripted: the arc hangs");
                    self.hang(*time);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Lets every arc that hangs by a scripted fault go on, now and later.
    pub fn release_hang(&self) {
        self.shared.hang_over.store(true, Ordering::Release);
        drop(lock(&self.shared.orders));
        self.shared.orders_changed.notify_all();
    }

    /// Has arcs that hang by a scripted fault end with the server that `stop` ends.
    pub(crate) fn hangs_until(&self, stop: &StopHandle) {
        // A device is served by one server.
        let _ = self.shared.stop.set(stop.clone());
    }

    /// Waits for `time`, or without one until [`release_hang`](Self::release_hang); no longer than the device is there and served.
    fn hang(&self, time: Option<Duration>) {
        let until = time.and_then(|time| std::time::Instant::now().checked_add(time));
        let shared = &self.shared;
        let stopped = || shared.stop.get().is_some_and(StopHandle::is_stopped);
        let mut orders = lock(&shared.orders);
        while !shared.ending.load(Ordering::Acquire) && !stopped() {
            let left = until.map(|until| until.saturating_duration_since(std::time::Instant::now()));
            match left {
                Some(Duration::ZERO) => return,
                None if shared.hang_over.load(Ordering::Acquire) => return,
                _ => {}
            }
            // The end of a server wakes nobody here.
            let slice = left.map_or(STOP_LOOKED_FOR, |left| left.min(STOP_LOOKED_FOR));
            orders = match shared.orders_changed.wait_timeout(orders, slice) {
                Ok((orders, _)) => orders,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    /// Lets the faults strike that are about the first read of a stopped device.
    fn hang_in_read(&self, migration: &mut SampleMigration) {
        for (n, fault) in self.options().faults.iter().enumerate() {
            if let Fault::HangRead(time) = fault
                && strikes(&mut migration.struck, n, 1)
            {
                tracing::warn!("scripted: the read hangs");
                self.hang(*time);
            }
        }
    }

    /// Number of `wanted` bytes that the faults let through in the open session.
    fn fault_limit(&self, migration: &mut SampleMigration, wanted: usize) -> Result<usize, SimError> {
        let mut allowed = wanted;
        let faults = &self.options().faults;
        for (n, fault) in faults.iter().enumerate() {
            let left =
                |after: u64| usize::try_from(after.saturating_sub(migration.moved)).unwrap_or(usize::MAX);
            match fault {
                Fault::ShortRead(most) => allowed = allowed.min(*most),
                Fault::DieInRead(after) if matches!(migration.session, SampleSession::Saving(_)) => {
                    if left(*after) == 0 {
                        return Err(SimError::death("scripted: the device dies in a read"));
                    }
                    allowed = allowed.min(left(*after));
                }
                Fault::EnodevMidStream(after)
                    if migration.struck.get(n).is_none_or(|struck| *struck == 0) =>
                {
                    if left(*after) == 0 {
                        strikes(&mut migration.struck, n, 1);
                        self.reset_with(migration)?;
                        migration.session = SampleSession::Lost;
                        return Err(SimError::new(Errno::NODEV, "scripted: the session is gone"));
                    }
                    allowed = allowed.min(left(*after));
                }
                _ => {}
            }
        }
        Ok(allowed)
    }
}
