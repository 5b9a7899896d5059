//! The pin: a level-triggered interrupt, with its resample.
//!
//! The device signals an eventfd when it raises its pin, and masks the pin itself until it is told otherwise
//! (`VFIO_IRQ_INFO_AUTOMASKED`). KVM takes the eventfd as the level of an IOAPIC pin, lowers the level when the guest ends
//! the interrupt, and signals the second eventfd, the resample, which unmasks the pin at the device; a device that still
//! raises it then signals again. A device that takes no resample eventfd is unmasked by a thread of ours.
//!
//! While the guest has the pin disabled (PCI_COMMAND bit 10) the eventfd is detached and remembers what is raised.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use vfio_migration_device::{IrqIndex, PciHardware};

use super::backend::{Eventfd, Irqfds};
use super::vectors::{PciFailure, failure};

/// State in which the guest wants the pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// Nothing is enabled, or message-signalled interrupts are in its place.
    Off,
    /// Disabled, while the function works.
    Masked,
    /// The guest uses the pin.
    On,
}

/// The pin of a function.
#[derive(Debug)]
pub(super) struct Intx {
    hardware: Arc<dyn PciHardware>,
    gsi: u32,
    event: Arc<Eventfd>,
    resample: Arc<Eventfd>,
    /// The device has the eventfds.
    connected: bool,
    attached: bool,
    unmasker: Option<Unmasker>,
}

impl Intx {
    /// The pin as after a reset, as interrupt `gsi` of the machine.
    pub(super) fn new(hardware: Arc<dyn PciHardware>, gsi: u32) -> std::io::Result<Self> {
        let (event, resample) = (Arc::new(Eventfd::new()?), Arc::new(Eventfd::new()?));
        Ok(Self { hardware, gsi, event, resample, connected: false, attached: false, unmasker: None })
    }

    /// Interrupt number of the machine that the pin raises.
    pub(super) fn gsi(&self) -> u32 {
        self.gsi
    }

    /// Whether the device has the pin connected, as far as it said.
    pub(super) fn is_at_device(&self) -> bool {
        self.connected
    }

    /// Brings it to what the guest wants.
    pub(super) fn apply(&mut self, wanted: Wanted, irq: &dyn Irqfds) -> Result<(), PciFailure> {
        match wanted {
            Wanted::Off => self.disconnect(irq),
            Wanted::Masked => {
                self.detach(irq)?;
                self.connect()
            }
            Wanted::On => {
                // The way to the guest is ready before the device can raise.
                self.attach(irq)?;
                self.connect()
            }
        }
    }

    /// Whether the pin is, or may be, raised. The device has stopped.
    ///
    /// Whether the guest has ended an interrupt that it was given cannot be seen, so one that may be open counts as
    /// raised: at the destination it comes once more. A driver finds its device idle then, as with every shared pin;
    /// one that is not told would wait forever for a pin that nobody unmasks.
    pub(super) fn save(&self) -> Result<bool, PciFailure> {
        if !self.connected {
            return Ok(false);
        }
        if self.attached {
            return Ok(true);
        }
        let raised = self.event.drain().map_err(failure("reading the pin's eventfd"))?;
        if raised {
            self.raise()?;
        }
        Ok(raised)
    }

    /// Connects it at the destination, and raises what was. Returns whether it is connected.
    pub(super) fn restore(
        &mut self,
        wanted: Wanted,
        pending: bool,
        irq: &dyn Irqfds,
    ) -> Result<bool, PciFailure> {
        if wanted != Wanted::On {
            // The interrupt controller came with the level that it had. Nobody would lower it for a pin that is not in use,
            // and a guest that ends the interrupt would be given it again at once, for ever.
            self.attach(irq)?;
            self.detach(irq)?;
            self.resample.drain().map_err(failure("forgetting an interrupt of the pin"))?;
        }
        self.apply(wanted, irq)?;
        if self.connected && pending {
            self.raise()?;
        }
        Ok(self.connected)
    }

    fn raise(&self) -> Result<(), PciFailure> {
        self.event.signal().map_err(failure("raising the pin"))
    }

    fn attach(&mut self, irq: &dyn Irqfds) -> Result<(), PciFailure> {
        if !self.attached {
            let attached = irq.attach_level(self.gsi, &self.event, &self.resample);
            attached.map_err(failure("attaching the pin"))?;
            self.attached = true;
        }
        Ok(())
    }

    fn detach(&mut self, irq: &dyn Irqfds) -> Result<(), PciFailure> {
        if self.attached {
            let detached = irq.detach_level(self.gsi, &self.event, &self.resample);
            detached.map_err(failure("detaching the pin"))?;
            self.attached = false;
            // An interrupt that was open is forgotten with the level. The device, unmasked, raises it anew if it still
            // has cause to, and the eventfd keeps that.
            self.resample.signal().map_err(failure("unmasking the pin"))?;
        }
        Ok(())
    }

    fn connect(&mut self) -> Result<(), PciFailure> {
        if self.connected {
            return Ok(());
        }
        let connected = self.hardware.set_irq_eventfds(IrqIndex::Intx, 0, &[Some(self.event.as_fd())]);
        connected.map_err(failure("connecting the pin"))?;
        self.connected = true;
        if let Err(error) = self.hardware.set_intx_resample(Some(self.resample.as_fd())) {
            tracing::debug!(device = %self.hardware.id(), %error, "the pin is unmasked by hand");
            let unmasker = Unmasker::new(Arc::clone(&self.hardware), Arc::clone(&self.resample));
            match unmasker {
                Ok(unmasker) => self.unmasker = Some(unmasker),
                Err(error) => {
                    // A pin that nobody unmasks is raised once and never again.
                    self.connected = self.hardware.disable_irqs(IrqIndex::Intx).is_err();
                    return Err(failure("making a thread that unmasks the pin")(error));
                }
            }
        }
        Ok(())
    }

    /// Goes on after a failure, and says the first.
    fn disconnect(&mut self, irq: &dyn Irqfds) -> Result<(), PciFailure> {
        let mut first = Ok(());
        if self.connected {
            first = self.hardware.disable_irqs(IrqIndex::Intx).map_err(failure("disabling the pin"));
            // A device that refuses has it still.
            self.connected = first.is_err();
        }
        if !self.connected {
            self.unmasker = None;
        }
        let detached = self.detach(irq);
        // What was raised before does not outlive it.
        let _ = (self.event.drain(), self.resample.drain());
        first.and(detached)
    }
}

/// A thread that unmasks the pin at a device whenever the guest has ended an interrupt.
#[derive(Debug)]
struct Unmasker {
    stop: Arc<Eventfd>,
    thread: Option<JoinHandle<()>>,
}

impl Unmasker {
    fn new(hardware: Arc<dyn PciHardware>, resample: Arc<Eventfd>) -> std::io::Result<Self> {
        let stop = Arc::new(Eventfd::new()?);
        let stopped = Arc::clone(&stop);
        let run = move || {
            while wait(&stopped, &resample) {
                if let Err(error) = hardware.mask_irq(IrqIndex::Intx, 0, false) {
                    tracing::error!(device = %hardware.id(), %error, "the pin stays masked");
                }
            }
        };
        let thread = std::thread::Builder::new().name("intx".into()).spawn(run)?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Unmasker {
    fn drop(&mut self) {
        if let Err(error) = self.stop.signal() {
            // It could not be joined then.
            tracing::error!(%error, "a thread cannot be told to end");
        } else if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("a thread panicked");
        }
    }
}

/// Waits for a resample: `false` when it is to end instead.
fn wait(stop: &Eventfd, resample: &Eventfd) -> bool {
    loop {
        let mut fds = [PollFd::new(stop, PollFlags::IN), PollFd::new(resample, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return false,
        }
        if stop.drain().unwrap_or(true) {
            return false;
        }
        match resample.drain() {
            Ok(true) => return true,
            Ok(false) => {}
            Err(_) => return false,
        }
    }
}
