//! The vectors of MSI and MSI-X as the guest sees them: messages, masks, pending bits, and where each raise goes.
//!
//! Each vector has one eventfd, which the device gets by SET_IRQS when the guest enables the kind, and keeps. While the
//! vector is unmasked the eventfd is attached to the interrupt controller (KVM: an irqfd); while it is masked it is
//! detached, remembers what the device raises, and is drained into the pending bit when somebody asks. Masking thus
//! costs no call to the device, and no raise is lost between the two.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use vfio_migration_device::{IrqIndex, IrqRouter, MsiMessage, PciHardware, VectorState};

use super::{Eventfd, Irqfds};

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
    pub(super) router: &'a dyn IrqRouter,
}

#[derive(Debug)]
struct Vector {
    message: MsiMessage,
    masked: bool,
    /// Raised while masked; or, after a save, raised and not yet delivered.
    pending: bool,
    gsi: u32,
    event: Arc<Eventfd>,
    /// The vector's eventfd is attached to the interrupt controller.
    attached: bool,
}

/// The guest's settings of one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct VectorTarget {
    pub(super) message: MsiMessage,
    pub(super) masked: bool,
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
    /// The device has the eventfds.
    connected: bool,
}

impl Vectors {
    /// `count` vectors as after a reset: disabled, all masked. Vector n is interrupt `first_gsi + n`.
    pub(super) fn new(kind: IrqIndex, count: u16, first_gsi: u32) -> io::Result<Self> {
        let vector = |n: u16| {
            Ok(Vector {
                message: MsiMessage::default(),
                masked: true,
                pending: false,
                gsi: first_gsi + u32::from(n),
                event: Arc::new(Eventfd::new()?),
                attached: false,
            })
        };
        let vectors = (0..count).map(vector).collect::<io::Result<_>>()?;
        Ok(Self { kind, vectors, in_use: count.into(), enabled: false, all_masked: false, connected: false })
    }

    /// Number of vectors.
    pub(super) fn count(&self) -> usize {
        self.vectors.len()
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
        if enabled == self.enabled {
            return self.apply_masks(irq_path);
        }
        self.enabled = enabled;
        if enabled {
            // The way to the guest is ready before the device can raise.
            self.apply_masks(irq_path)?;
            self.connect(irq_path)
        } else {
            self.disconnect(irq_path)
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
        let Some(vector) = self.vectors.get_mut(usize::try_from(offset / ENTRY).unwrap_or(usize::MAX)) else {
            return Ok(());
        };
        let (address, was_masked) = (vector.message.address, vector.masked);
        match offset % ENTRY {
            // The low two bits of an address are 0 (PCI 3.0, 6.8.2.7).
            0 => vector.message.address = address & !0xffff_ffff | u64::from(value & !3),
            4 => vector.message.address = address & 0xffff_ffff | u64::from(value) << 32,
            8 => vector.message.data = value,
            _ => vector.masked = value & CONTROL_MASKED != 0,
        }
        // A vector that is and stays masked goes nowhere: the usual case while a driver fills its table.
        if was_masked && vector.masked { Ok(()) } else { self.apply_masks(irq_path) }
    }

    /// The 32 pending bits from vector `32 * index`.
    pub(super) fn pending_bits(&mut self, index: usize) -> Result<u32, PciFailure> {
        self.drain()?;
        let vectors = self.vectors.iter().skip(index.saturating_mul(32)).take(32);
        Ok(vectors.enumerate().fold(0, |bits, (bit, vector)| bits | u32::from(vector.pending) << bit))
    }

    /// The vectors for a save, with everything raised and not yet delivered in their pending bits. The device has
    /// stopped. What is pending on an unmasked vector stays so until [`resume`](Self::resume).
    ///
    /// # Errors
    /// Nothing is lost: what is detached then is attached again by a later call, or by [`resume`](Self::resume).
    pub(super) fn save(&mut self, irq_path: IrqPath<'_>) -> Result<Vec<VectorState>, PciFailure> {
        self.drain()?;
        let collected = self.collect(irq_path.irq);
        self.attach(irq_path.irq)?;
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
        self.attach(irq)?;
        self.deliver()
    }

    /// Raises what is pending on unmasked vectors.
    fn deliver(&mut self) -> Result<(), PciFailure> {
        for vector in self.vectors.iter_mut().filter(|vector| vector.attached && vector.pending) {
            vector.event.signal().map_err(failure("raising a pending interrupt"))?;
            vector.pending = false;
        }
        Ok(())
    }

    /// Puts saved vectors in, and stages the routes of those that are in force. All of MSI-X, or those of MSI that are
    /// in use.
    pub(super) fn stage(
        &mut self,
        enabled: bool,
        all_masked: bool,
        vectors: &[VectorState],
        router: &dyn IrqRouter,
    ) -> Result<(), PciFailure> {
        (self.enabled, self.all_masked) = (enabled, all_masked);
        self.in_use = vectors.len().min(self.vectors.len());
        for (vector, state) in self.vectors.iter_mut().zip(vectors) {
            vector.message = state.message;
            vector.masked = state.masked;
            vector.pending = state.pending;
            let unmasked = enabled && !all_masked && !state.masked;
            let route = unmasked.then_some(state.message);
            router
                .set(vector.gsi, route)
                .map_err(|source| ("staging an interrupt route".to_owned(), source))?;
        }
        Ok(())
    }

    /// After [`stage`](Self::stage) and the commit of its routes: attaches, gives the device its eventfds, and raises
    /// what was pending. Returns the number of vectors connected.
    pub(super) fn restore(&mut self, irq_path: IrqPath<'_>) -> Result<u32, PciFailure> {
        if !self.enabled {
            return Ok(0);
        }
        self.attach(irq_path.irq)?;
        self.connect(irq_path)?;
        self.deliver()?;
        Ok(u32::try_from(self.in_use).unwrap_or(u32::MAX))
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

    fn unmasked(&self, index: usize) -> bool {
        let open = self.enabled && !self.all_masked && index < self.in_use;
        open && self.vectors.get(index).is_some_and(|vector| !vector.masked)
    }

    /// Brings routes and attachments to what the registers say, and delivers what became deliverable.
    fn apply_masks(&mut self, irq_path: IrqPath<'_>) -> Result<(), PciFailure> {
        self.detach(irq_path.irq)?;
        for (index, vector) in self.vectors.iter().enumerate() {
            let route = self.unmasked(index).then_some(vector.message);
            irq_path
                .router
                .set(vector.gsi, route)
                .map_err(|source| ("setting an interrupt route".to_owned(), source))?;
        }
        irq_path.router.commit().map_err(|source| ("committing interrupt routes".to_owned(), source))?;
        self.drain()?;
        self.attach(irq_path.irq)?;
        self.deliver()
    }

    /// Detaches all vectors, and takes what has not reached the interrupt controller into their pending bits.
    fn collect(&mut self, irq: &dyn Irqfds) -> Result<(), PciFailure> {
        let fail = failure("settling an interrupt");
        for vector in self.vectors.iter_mut().filter(|vector| vector.attached) {
            // Detaching waits until what was raised has reached the interrupt controller; what has not is in the eventfd.
            irq.detach(vector.gsi, &vector.event).map_err(fail)?;
            vector.attached = false;
            vector.pending |= vector.event.drain().map_err(fail)?;
        }
        Ok(())
    }

    /// Detaches vectors that are not unmasked any more.
    fn detach(&mut self, irq: &dyn Irqfds) -> Result<(), PciFailure> {
        for index in 0..self.vectors.len() {
            let masked = !self.unmasked(index);
            let vector = &mut self.vectors[index];
            if masked && vector.attached {
                irq.detach(vector.gsi, &vector.event).map_err(failure("detaching an interrupt"))?;
                vector.attached = false;
            }
        }
        Ok(())
    }

    /// Attaches vectors that are unmasked now.
    fn attach(&mut self, irq: &dyn Irqfds) -> Result<(), PciFailure> {
        for index in 0..self.vectors.len() {
            let unmasked = self.unmasked(index);
            let vector = &mut self.vectors[index];
            if unmasked && !vector.attached {
                irq.attach(vector.gsi, &vector.event).map_err(failure("attaching an interrupt"))?;
                vector.attached = true;
            }
        }
        Ok(())
    }

    /// Takes what the device raised on detached vectors into their pending bits.
    fn drain(&mut self) -> Result<(), PciFailure> {
        for vector in self.vectors.iter_mut().filter(|vector| !vector.attached) {
            vector.pending |= vector.event.drain().map_err(failure("draining a masked interrupt"))?;
        }
        Ok(())
    }

    fn connect(&mut self, irq_path: IrqPath<'_>) -> Result<(), PciFailure> {
        let used = self.vectors.iter().take(self.in_use);
        let events: Vec<_> = used.map(|vector| Some(vector.event.as_fd())).collect();
        let connected = irq_path.hardware.set_irq_eventfds(self.kind, 0, &events);
        connected.map_err(failure("connecting message-signalled interrupts"))?;
        self.connected = true;
        Ok(())
    }

    fn disconnect(&mut self, irq_path: IrqPath<'_>) -> Result<(), PciFailure> {
        let mut first = Ok(());
        if self.connected {
            // The device first: afterwards nothing is raised any more.
            let disabled = irq_path.hardware.disable_irqs(self.kind);
            first = disabled.map_err(failure("disabling message-signalled interrupts"));
            self.connected = false;
        }
        let settled = self.apply_masks(irq_path);
        for vector in &mut self.vectors {
            // What is disabled has no pending bits: what was raised before does not outlive it.
            let _ = vector.event.drain();
            vector.pending = false;
        }
        first.and(settled)
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
