//! The vectors of MSI and MSI-X as the guest sees them: messages, masks, pending bits, and where each raise goes.
//!
//! A vector that the guest unmasks for the first time since it enabled the kind gets an eventfd and an interrupt number of
//! the machine; the device gets the eventfd by SET_IRQS, and keeps it until the kind is disabled. While the vector is
//! unmasked the eventfd is attached to the interrupt controller (KVM: an irqfd); while it is masked it is detached,
//! remembers what the device raises, and is drained into the pending bit when somebody asks. Masking thus costs no call
//! to the device, and no raise is lost between the two. What a device raises before is in its own pending bits.
//!
//! A kind that is set up as a set (`VFIO_IRQ_INFO_NORESIZE`) is disabled and enabled anew to take one vector more; since a
//! device may have raised something meanwhile, each vector that was connected is raised once then.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;

use vfio_migration_device::{IrqIndex, IrqRouter, MsiMessage, PciHardware, VectorState, is_late};

use super::backend::{Eventfd, Irqfds};
use super::router::MsiRouter;

/// Bytes of a table entry: address low and high, data, control.
pub(super) const ENTRY: u64 = 16;
const CONTROL_MASKED: u32 = 1;

/// A step that failed and its error, for whoever knows the device.
pub(super) type PciFailure = (String, Box<dyn std::error::Error + Send + Sync>);

/// The way from a vector to the guest.
#[derive(Clone, Copy, Debug)]
pub(super) struct IrqPath<'a> {
    pub(super) hardware: &'a dyn PciHardware,
    pub(super) irq: &'a dyn Irqfds,
    pub(super) router: &'a MsiRouter,
}

#[derive(Debug)]
struct Vector {
    message: MsiMessage,
    masked: bool,
    /// Raised while masked; or, after a save, raised and not yet delivered.
    pending: bool,
    line: Option<Line>,
}

/// The means of a vector that is in use.
#[derive(Debug)]
struct Line {
    gsi: u32,
    event: Arc<Eventfd>,
    /// The eventfd is attached to the interrupt controller.
    attached: bool,
    /// The device has the eventfd.
    connected: bool,
}

/// The guest's settings of one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct VectorTarget {
    pub(super) message: MsiMessage,
    pub(super) masked: bool,
}

/// A vector of the guest's cannot be had.
#[derive(Debug, thiserror::Error)]
enum LineError {
    #[error("no eventfd can be made; the limit on open files (ulimit -n) may be too low")]
    Eventfd(#[source] io::Error),
    #[error("all interrupt numbers of the machine are in use")]
    NoNumber,
}

/// What to do where the host has fewer vectors than are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fewer {
    /// Connects as many as it has, and fails for the others.
    Take,
    /// Connects none, and fails.
    Refuse,
}

/// The MSI-X vectors of a function, or its MSI vectors.
#[derive(Debug)]
pub(super) struct Vectors {
    kind: IrqIndex,
    vectors: Vec<Vector>,
    /// Number of vectors that the guest uses, from the first: MSI-X always all, MSI what its control register says.
    in_use: usize,
    enabled: bool,
    all_masked: bool,
    /// Number of vectors that the device had when the kind was enabled at it, which it is: also after the guest has
    /// disabled it, for as long as the device refuses.
    at_device: Option<usize>,
    /// The device was late with its answer when the kind was enabled: it may have all of it, or nothing.
    unsure: bool,
    /// Vectors that the host can have of a kind that is set up as a set, as it said. Those beyond are not asked for again
    /// while the kind is enabled.
    limit: usize,
}

/// What decides of all vectors where they go.
#[derive(Clone, Copy)]
struct Controls {
    msi: bool,
    in_use: usize,
    enabled: bool,
    all_masked: bool,
}

impl Controls {
    /// Whether the vector needs an eventfd: it is not masked by itself. The few of MSI need theirs from the start, since a
    /// device takes them as one set.
    fn wanted(self, index: usize, vector: &Vector) -> bool {
        self.enabled && index < self.in_use && (self.msi || !vector.masked)
    }

    /// Whether what is raised now goes to the guest.
    fn open(self, index: usize, vector: &Vector) -> bool {
        self.enabled && index < self.in_use && !self.all_masked && !vector.masked
    }
}

impl Vectors {
    /// `count` vectors as after a reset: disabled, all masked.
    pub(super) fn new(kind: IrqIndex, count: u16) -> Self {
        let vector = || Vector { message: MsiMessage::default(), masked: true, pending: false, line: None };
        let vectors = (0..count).map(|_| vector()).collect();
        Self {
            kind,
            vectors,
            in_use: count.into(),
            enabled: false,
            all_masked: false,
            at_device: None,
            unsure: false,
            limit: usize::MAX,
        }
    }

    /// Number of vectors.
    pub(super) fn count(&self) -> usize {
        self.vectors.len()
    }

    /// Whether the device has the kind enabled.
    pub(super) fn is_at_device(&self) -> bool {
        self.at_device.is_some()
    }

    /// MSI: the guest wrote its registers, which say this of the vectors now. Those beyond `targets` are not in use.
    pub(super) fn set_targets(
        &mut self,
        enabled: bool,
        targets: &[VectorTarget],
        irq_path: IrqPath<'_>,
    ) -> Result<(), PciFailure> {
        // The device learns how many there are when it gets their eventfds, all at once.
        let recount = self.enabled && enabled && targets.len() != self.in_use;
        let off = if recount { self.set_control(false, false, irq_path) } else { Ok(()) };
        self.in_use = targets.len().min(self.vectors.len());
        for (vector, target) in self.vectors.iter_mut().zip(targets) {
            (vector.message, vector.masked) = (target.message, target.masked);
        }
        off.and(self.set_control(enabled, false, irq_path))
    }

    /// The guest wrote the message control register.
    pub(super) fn set_control(
        &mut self,
        enabled: bool,
        all_masked: bool,
        irq_path: IrqPath<'_>,
    ) -> Result<(), PciFailure> {
        self.all_masked = all_masked;
        if enabled {
            if !self.enabled && self.at_device.is_some() {
                // What the device refused to disable last is of another time.
                self.disconnect(irq_path)?;
            }
            self.enabled = true;
            self.settle(0..self.count(), irq_path)
        } else if self.enabled || self.at_device.is_some() {
            self.enabled = false;
            self.disconnect(irq_path)
        } else {
            Ok(())
        }
    }

    /// The dword at `offset` of the table.
    pub(super) fn table(&self, offset: u64) -> u32 {
        let Some(vector) = self.vectors.get(usize::try_from(offset / ENTRY).unwrap_or(usize::MAX)) else {
            return u32::MAX;
        };
        match offset % ENTRY {
            0 => low_half(vector.message.address),
            4 => low_half(vector.message.address >> 32),
            8 => vector.message.data,
            _ => u32::from(vector.masked) * CONTROL_MASKED,
        }
    }

    /// The guest wrote the dword at `offset` of the table.
    pub(super) fn set_table(
        &mut self,
        offset: u64,
        value: u32,
        irq_path: IrqPath<'_>,
    ) -> Result<(), PciFailure> {
        let index = usize::try_from(offset / ENTRY).unwrap_or(usize::MAX);
        let Some(vector) = self.vectors.get_mut(index) else { return Ok(()) };
        let (address, was_masked) = (vector.message.address, vector.masked);
        match offset % ENTRY {
            // The low two bits of an address are 0 (PCI 3.0, 6.8.2.7).
            0 => vector.message.address = address & !0xffff_ffff | u64::from(value & !3),
            4 => vector.message.address = address & 0xffff_ffff | u64::from(value) << 32,
            8 => vector.message.data = value,
            _ => vector.masked = value & CONTROL_MASKED != 0,
        }
        // A vector that is and stays masked goes nowhere: the usual case while a driver fills its table.
        if was_masked && vector.masked || !self.enabled {
            return Ok(());
        }
        self.settle(index..index + 1, irq_path)
    }

    /// The 32 pending bits from vector `32 * index`.
    pub(super) fn pending_bits(&mut self, index: usize) -> Result<u32, PciFailure> {
        let first = index.saturating_mul(32).min(self.count());
        self.drain(first..first.saturating_add(32).min(self.count()))?;
        let vectors = self.vectors.iter().skip(first).take(32);
        Ok(vectors.enumerate().fold(0, |bits, (bit, vector)| bits | u32::from(vector.pending) << bit))
    }

    /// The vectors for a save, with everything raised and not yet delivered in their pending bits. The device has
    /// stopped. What is pending on an unmasked vector stays so until [`resume`](Self::resume).
    ///
    /// # Errors
    /// Nothing is lost: what is detached then is attached again by a later call, or by [`resume`](Self::resume).
    pub(super) fn save(&mut self, irq_path: IrqPath<'_>) -> Result<Vec<VectorState>, PciFailure> {
        self.drain(0..self.count())?;
        let collected = self.collect(irq_path.irq);
        self.attach(0..self.count(), irq_path.irq)?;
        collected?;
        let state = |vector: &Vector| VectorState {
            message: vector.message,
            masked: vector.masked,
            pending: vector.pending,
        };
        Ok(self.vectors.iter().map(state).collect())
    }

    /// The guest goes on: whatever a failed save left detached is attached, and what is pending is raised.
    pub(super) fn resume(&mut self, irq: &dyn Irqfds) -> Result<(), PciFailure> {
        self.attach(0..self.count(), irq)?;
        self.deliver(0..self.count())
    }

    /// Puts saved vectors in, and stages the routes of those that are in force. All of MSI-X, or those of MSI that are
    /// in use.
    pub(super) fn stage(
        &mut self,
        enabled: bool,
        all_masked: bool,
        vectors: &[VectorState],
        router: &MsiRouter,
    ) -> Result<(), PciFailure> {
        (self.enabled, self.all_masked) = (enabled, all_masked);
        self.in_use = vectors.len().min(self.vectors.len());
        for (vector, state) in self.vectors.iter_mut().zip(vectors) {
            (vector.message, vector.masked, vector.pending) = (state.message, state.masked, state.pending);
        }
        (0..self.in_use).try_for_each(|index| {
            self.take_line(index, router)?;
            self.route(index, router)
        })
    }

    /// After [`stage`](Self::stage) and the commit of its routes: attaches, gives the device its eventfds, and raises
    /// what was pending. Returns the number of vectors connected.
    ///
    /// # Errors
    /// Also when the host has fewer vectors than the guest has in use.
    pub(super) fn restore(&mut self, irq_path: IrqPath<'_>) -> Result<u32, PciFailure> {
        if !self.enabled {
            return Ok(0);
        }
        let all = 0..self.count();
        self.attach(all.clone(), irq_path.irq)?;
        self.connect(all.clone(), Fewer::Refuse, irq_path)?;
        self.deliver(all)?;
        let lines = self.vectors.iter().filter_map(|vector| vector.line.as_ref());
        Ok(u32::try_from(lines.filter(|line| line.connected).count()).unwrap_or(u32::MAX))
    }

    /// Takes all of it back: as after a reset. Goes on after a failure, and says the first.
    pub(super) fn reset(&mut self, irq_path: IrqPath<'_>) -> Result<(), PciFailure> {
        self.enabled = false;
        let disconnected = self.disconnect(irq_path);
        for vector in &mut self.vectors {
            (vector.message, vector.masked, vector.pending) = (MsiMessage::default(), true, false);
        }
        self.all_masked = false;
        disconnected
    }

    fn controls(&self) -> Controls {
        Controls {
            msi: self.kind == IrqIndex::Msi,
            in_use: self.in_use,
            enabled: self.enabled,
            all_masked: self.all_masked,
        }
    }

    /// The vectors of a range that have a line, with their numbers and whether they are open.
    fn lines(&mut self, range: Range<usize>) -> impl Iterator<Item = (usize, bool, &mut Line, &mut bool)> {
        let controls = self.controls();
        let vectors = self.vectors.iter_mut().enumerate().take(range.end).skip(range.start);
        vectors.filter_map(move |(index, vector)| {
            let open = controls.open(index, vector);
            Some((index, open, vector.line.as_mut()?, &mut vector.pending))
        })
    }

    /// Brings vectors to what the registers say, and delivers what became deliverable. One that fails keeps no other from
    /// it; the first failure is told, by the vector's number.
    fn settle(&mut self, range: Range<usize>, irq_path: IrqPath<'_>) -> Result<(), PciFailure> {
        let mut result = self.detach(range.clone(), irq_path.irq);
        for index in range.clone() {
            result = result.and(self.take_line(index, irq_path.router));
            result = result.and(self.route(index, irq_path.router));
        }
        irq_path.router.commit().map_err(|source| ("committing interrupt routes".to_owned(), source))?;
        result = result.and(self.drain(range.clone()));
        // The way to the guest is ready before the device can raise.
        result = result.and(self.attach(range.clone(), irq_path.irq));
        result = result.and(self.deliver(range.clone()));
        if self.enabled {
            result = result.and(self.connect(range, Fewer::Take, irq_path));
        }
        result
    }

    /// Gives a vector that is in use an eventfd and an interrupt number.
    fn take_line(&mut self, index: usize, numbers: &MsiRouter) -> Result<(), PciFailure> {
        let controls = self.controls();
        let Some(vector) = self.vectors.get_mut(index) else { return Ok(()) };
        if vector.line.is_some() || !controls.wanted(index, vector) {
            return Ok(());
        }
        let line = Eventfd::new().map_err(LineError::Eventfd).and_then(|event| {
            let gsi = numbers.allocate().ok_or(LineError::NoNumber)?;
            Ok(Line { gsi, event: Arc::new(event), attached: false, connected: false })
        });
        vector.line = Some(line.map_err(|error| -> PciFailure {
            (format!("setting up {} vector {index}", self.kind), Box::new(error))
        })?);
        Ok(())
    }

    /// Stages the route of an open vector. One that is masked keeps the last that it had, since nothing goes by it.
    fn route(&mut self, index: usize, router: &MsiRouter) -> Result<(), PciFailure> {
        let controls = self.controls();
        let Some(vector) = self.vectors.get(index).filter(|vector| controls.open(index, vector)) else {
            return Ok(());
        };
        let Some(line) = &vector.line else { return Ok(()) };
        let staged = router.set(line.gsi, Some(vector.message));
        staged.map_err(|source| (format!("setting the route of {} vector {index}", self.kind), source))
    }

    /// Raises what is pending on open vectors.
    fn deliver(&mut self, range: Range<usize>) -> Result<(), PciFailure> {
        for (_, _, line, pending) in
            self.lines(range).filter(|(_, _, line, pending)| line.attached && **pending)
        {
            line.event.signal().map_err(failure("raising a pending interrupt"))?;
            *pending = false;
        }
        Ok(())
    }

    /// Detaches all vectors, and takes what has not reached the interrupt controller into their pending bits.
    fn collect(&mut self, irq: &dyn Irqfds) -> Result<(), PciFailure> {
        let fail = failure("settling an interrupt");
        for (_, _, line, pending) in self.lines(0..self.count()).filter(|(_, _, line, _)| line.attached) {
            // Detaching waits until what was raised has reached the interrupt controller; what has not is in the eventfd.
            irq.detach(line.gsi, &line.event).map_err(fail)?;
            line.attached = false;
            *pending |= line.event.drain().map_err(fail)?;
        }
        Ok(())
    }

    /// Detaches vectors that are not open any more.
    fn detach(&mut self, range: Range<usize>, irq: &dyn Irqfds) -> Result<(), PciFailure> {
        let mut result = Ok(());
        for (_, _, line, _) in self.lines(range).filter(|(_, open, line, _)| line.attached && !open) {
            match irq.detach(line.gsi, &line.event) {
                Ok(()) => line.attached = false,
                Err(error) => result = result.and(Err(failure("detaching an interrupt")(error))),
            }
        }
        result
    }

    /// Attaches vectors that are open now.
    fn attach(&mut self, range: Range<usize>, irq: &dyn Irqfds) -> Result<(), PciFailure> {
        let (kind, mut result) = (self.kind, Ok(()));
        for (index, _, line, _) in self.lines(range).filter(|(_, open, line, _)| *open && !line.attached) {
            match irq.attach(line.gsi, &line.event) {
                Ok(()) => line.attached = true,
                Err(error) => {
                    let failed: PciFailure = (format!("attaching {kind} vector {index}"), Box::new(error));
                    result = result.and(Err(failed));
                }
            }
        }
        result
    }

    /// Takes what the device raised on detached vectors into their pending bits.
    fn drain(&mut self, range: Range<usize>) -> Result<(), PciFailure> {
        for (_, _, line, pending) in self.lines(range).filter(|(_, _, line, _)| !line.attached) {
            *pending |= line.event.drain().map_err(failure("draining a masked interrupt"))?;
        }
        Ok(())
    }

    /// Gives the device the eventfds of vectors in `range` that it has not; all of them where the kind is not enabled yet.
    fn connect(
        &mut self,
        range: Range<usize>,
        fewer: Fewer,
        irq_path: IrqPath<'_>,
    ) -> Result<(), PciFailure> {
        let as_set = self.kind == IrqIndex::Msi || irq_path.hardware.irq_noresize(self.kind);
        let there = match self.at_device {
            Some(_) if self.unsure && as_set => return self.enlarge(fewer, irq_path),
            Some(there) if !self.unsure => there,
            _ => return self.enable(as_set, fewer, irq_path),
        };
        let limit = self.limit;
        let fresh = self.lines(range).filter(|(index, _, line, _)| !line.connected && *index < limit);
        let fresh: Vec<usize> = fresh.map(|(index, ..)| index).collect();
        match fresh.last() {
            Some(last) if as_set && *last >= there => self.enlarge(fewer, irq_path),
            _ => self.give_runs(&fresh, fewer, irq_path),
        }
    }

    /// Enables the kind at the device.
    fn enable(&mut self, as_set: bool, fewer: Fewer, irq_path: IrqPath<'_>) -> Result<(), PciFailure> {
        let all: Vec<usize> = self.lines(0..self.in_use).map(|(index, ..)| index).collect();
        let enabled = if as_set && let Some(last) = all.last() {
            self.give(0..last + 1, fewer, irq_path)
        } else if all.first() == Some(&0) {
            self.give_runs(&all, fewer, irq_path)
        } else {
            let on = irq_path.hardware.enable_irqs(self.kind);
            on.map_err(|error| -> PciFailure { (format!("enabling {}", self.kind), Box::new(error)) })
                .and_then(|()| {
                    self.at_device = Some(1);
                    self.give_runs(&all, fewer, irq_path)
                })
        };
        self.unsure = enabled.as_ref().is_err_and(|(_, error)| is_late(&**error));
        if self.unsure {
            // What it does when it comes to it, the guest has asked for: nothing is taken away, and all is asked for again.
            self.at_device = Some(self.at_device.unwrap_or(0));
        } else if enabled.is_err()
            && self.at_device.is_none()
            && irq_path.hardware.disable_irqs(self.kind).is_err()
        {
            // It may have some of it.
            self.at_device = Some(0);
        }
        enabled
    }

    /// Sets the kind up anew, since a set takes no more than it began with.
    fn enlarge(&mut self, fewer: Fewer, irq_path: IrqPath<'_>) -> Result<(), PciFailure> {
        irq_path.hardware.disable_irqs(self.kind).map_err(failure("disabling a set of interrupts"))?;
        self.at_device = None;
        let unsure = std::mem::take(&mut self.unsure);
        let mut before = Vec::new();
        for (index, _, line, _) in self.lines(0..self.count()) {
            if std::mem::take(&mut line.connected) || unsure {
                before.push(index);
            }
        }
        let result = self.enable(true, fewer, irq_path);
        for index in before {
            for (_, _, line, _) in self.lines(index..index + 1) {
                line.event.signal().map_err(failure("raising an interrupt of a set that grew"))?;
            }
        }
        result
    }

    /// Gives the device the eventfds of some vectors, in rising order, by one call for each run of them.
    fn give_runs(
        &mut self,
        vectors: &[usize],
        fewer: Fewer,
        irq_path: IrqPath<'_>,
    ) -> Result<(), PciFailure> {
        let mut result = Ok(());
        for run in vectors.chunk_by(|a, b| a + 1 == *b) {
            if let [first, ..] = run {
                result = result.and(self.give(*first..first + run.len(), fewer, irq_path));
            }
        }
        result
    }

    /// Gives the device the eventfds of a range of vectors, where they have one, by one call.
    fn give(&mut self, range: Range<usize>, fewer: Fewer, irq_path: IrqPath<'_>) -> Result<(), PciFailure> {
        let vectors = self.vectors.iter().take(range.end).skip(range.start);
        let events: Vec<_> = vectors.map(|vector| Some(vector.line.as_ref()?.event.as_fd())).collect();
        let start = u32::try_from(range.start).unwrap_or(u32::MAX);
        let given = irq_path.hardware.set_irq_eventfds(self.kind, start, &events);
        let Err(error) = given else {
            self.lines(range.clone()).for_each(|(_, _, line, _)| line.connected = true);
            self.at_device = Some(self.at_device.unwrap_or(0).max(range.end));
            return Ok(());
        };
        let possible = error.fewer_interrupts().and_then(|possible| usize::try_from(possible).ok());
        let possible = possible.filter(|possible| fewer == Fewer::Take && range.contains(possible));
        let last = range.end.saturating_sub(1);
        let Some(possible) = possible.filter(|possible| *possible > range.start) else {
            let doing = format!("connecting {} vectors {} to {last}", self.kind, range.start);
            return Err((doing, Box::new(error)));
        };
        self.limit = possible;
        self.give(range.start..possible, fewer, irq_path)?;
        // Those are raised in the place of the others, as far as the device can tell.
        Err((format!("connecting {} vectors {possible} to {last}", self.kind), Box::new(error)))
    }

    /// Disables the kind at the device, and gives the lines back. One that the device refuses to disable is tried again
    /// with the next change; it keeps its eventfds until then.
    fn disconnect(&mut self, irq_path: IrqPath<'_>) -> Result<(), PciFailure> {
        let mut result = Ok(());
        if self.at_device.is_some() {
            // The device first: afterwards nothing is raised any more.
            match irq_path.hardware.disable_irqs(self.kind) {
                Ok(()) => {
                    (self.at_device, self.unsure, self.limit) = (None, false, usize::MAX);
                    self.lines(0..self.count()).for_each(|(_, _, line, _)| line.connected = false);
                }
                Err(error) => result = Err(failure("disabling message-signalled interrupts")(error)),
            }
        }
        result = result.and(self.detach(0..self.count(), irq_path.irq));
        for vector in &mut self.vectors {
            // What is disabled has no pending bits: what was raised before does not outlive it.
            vector.pending = false;
            let Some(line) = &vector.line else { continue };
            let _ = line.event.drain();
            if !line.attached && !line.connected {
                irq_path.router.free(line.gsi);
                vector.line = None;
            }
        }
        let committed = irq_path.router.commit();
        result.and(committed.map_err(|source| ("committing interrupt routes".to_owned(), source)))
    }
}

pub(super) fn failure<E: std::error::Error + Send + Sync + 'static>(
    doing: &'static str,
) -> impl Fn(E) -> PciFailure + Copy {
    move |source| (doing.to_owned(), Box::new(source))
}

#[expect(clippy::cast_possible_truncation, reason = "the low half is meant")]
fn low_half(value: u64) -> u32 {
    value as u32
}
