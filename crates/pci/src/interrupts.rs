//! All interrupts of a function: the pin, MSI and MSI-X, of which at most one is connected at the device.

use std::sync::Arc;

use vfio_migration_device::{IrqIndex, PciHardware, PciState, VectorState};

use super::backend::Irqfds;
use super::config::{ConfigSpace, MsiLayout, MsixLayout};
use super::devfn::Devfn;
use super::intx::{Intx, Wanted};
use super::registers::{
    COMMAND, COMMAND_INTX_DISABLE, COMMAND_IO, COMMAND_MASTER, COMMAND_MEMORY, INTERRUPT_PIN, MSIX_CONTROL,
    MSIX_ENABLE, MSIX_MASK_ALL,
};
use super::router::MsiRouter;
use super::vectors::{IrqPath, PciFailure, Vectors, failure};

/// The interrupts of a function.
#[derive(Debug)]
pub(super) struct FunctionInterrupts {
    intx: Option<Intx>,
    msi: Option<(MsiLayout, Vectors)>,
    msix_layout: Option<MsixLayout>,
    pub(super) msix: Vectors,
    /// The device refused to disable a kind when that was last asked of it, so that what config space says is not so.
    refused: bool,
    /// Something failed when that was last asked of the device, so that the guest has not all that it asked for.
    unsettled: bool,
}

impl FunctionInterrupts {
    /// The interrupts that the device has, as after a reset. `msi` and `msix` are where those lie that can be served.
    pub(super) fn new(
        devfn: Devfn,
        hardware: &Arc<dyn PciHardware>,
        irq: &dyn Irqfds,
        config: &ConfigSpace,
        msi: Option<MsiLayout>,
        msix: Option<MsixLayout>,
    ) -> Result<Self, PciFailure> {
        let making = failure("making eventfds");
        let intx = match config.bytes().get(usize::from(INTERRUPT_PIN)).copied().unwrap_or(0) {
            pin @ 1..=4 if hardware.irq_count(IrqIndex::Intx) > 0 => {
                Some(Intx::new(Arc::clone(hardware), irq.number_of_pin(devfn.slot(), pin)).map_err(making)?)
            }
            _ => None,
        };
        let msi = msi.map(|layout| (layout, Vectors::new(IrqIndex::Msi, layout.vectors)));
        let table = Vectors::new(IrqIndex::Msix, msix.map_or(0, |layout| layout.vectors));
        Ok(Self { intx, msi, msix_layout: msix, msix: table, refused: false, unsettled: false })
    }

    /// The machine's interrupt that the pin raises.
    pub(super) fn line(&self) -> Option<u32> {
        self.intx.as_ref().map(Intx::gsi)
    }

    /// Whether a write of `len` bytes at `offset` of config space may have changed what the interrupts are to be.
    pub(super) fn concerned(&self, offset: u16, len: usize) -> bool {
        let touched = |start: u16, end: u16| {
            usize::from(offset) < usize::from(end) && usize::from(offset) + len > usize::from(start)
        };
        let msi = self.msi.as_ref().is_some_and(|(layout, _)| touched(layout.capability, layout.end()));
        let control = self.msix_layout.map(|layout| layout.capability + MSIX_CONTROL);
        let msix = control.is_some_and(|control| touched(control, control + 2));
        msi || msix || self.intx.is_some() && touched(COMMAND, COMMAND + 2)
    }

    /// Whether the guest has not all that it asked for, which is to be tried again.
    pub(super) fn is_unsettled(&self) -> bool {
        self.unsettled
    }

    /// Brings all of them to what config space says: first what is to go, since a device has one kind at a time.
    pub(super) fn apply_masks(
        &mut self,
        config: &ConfigSpace,
        irq_path: IrqPath<'_>,
    ) -> Result<(), PciFailure> {
        let applied = self.apply(config, irq_path);
        self.unsettled = applied.is_err();
        applied
    }

    fn apply(&mut self, config: &ConfigSpace, irq_path: IrqPath<'_>) -> Result<(), PciFailure> {
        let (msix_on, all_masked) = self.msix_control(config);
        let msi_on = self.msi_enabled(config);
        let wanted = self.wanted_pin(config);
        let mut result = Ok(());
        if !msix_on {
            result = result.and(self.msix.set_control(false, all_masked, irq_path));
        }
        if let Some((layout, vectors)) = self.msi.as_mut().filter(|_| !msi_on) {
            let (_, targets) = layout.targets(config);
            result = result.and(vectors.set_targets(false, &targets, irq_path));
        }
        if let Some(intx) = self.intx.as_mut().filter(|_| wanted == Wanted::Off) {
            result = result.and(intx.apply(Wanted::Off, irq_path.irq));
        }
        // A device has one kind at a time: nothing is connected beside what it did not let go of.
        self.refused = self.at_device(IrqIndex::Msix) && !msix_on
            || self.at_device(IrqIndex::Msi) && !msi_on
            || self.at_device(IrqIndex::Intx) && wanted == Wanted::Off;
        if self.refused {
            return result;
        }
        if msix_on {
            result = result.and(self.msix.set_control(true, all_masked, irq_path));
        }
        if let Some((layout, vectors)) = self.msi.as_mut().filter(|_| msi_on) {
            let (_, targets) = layout.targets(config);
            result = result.and(vectors.set_targets(true, &targets, irq_path));
        }
        if let Some(intx) = self.intx.as_mut().filter(|_| wanted != Wanted::Off) {
            result = result.and(intx.apply(wanted, irq_path.irq));
        }
        result
    }

    /// The dword at `offset` of the MSI-X table was written.
    pub(super) fn set_table(
        &mut self,
        offset: u64,
        value: u32,
        config: &ConfigSpace,
        irq_path: IrqPath<'_>,
    ) -> Result<(), PciFailure> {
        let written = self.msix.set_table(offset, value, irq_path);
        if self.refused {
            return written.and(self.apply_masks(config, irq_path));
        }
        // Another vector that is settled says nothing of this one.
        self.unsettled |= written.is_err();
        written
    }

    /// Whether the device has this kind enabled, as far as it said.
    fn at_device(&self, kind: IrqIndex) -> bool {
        match kind {
            IrqIndex::Intx => self.intx.as_ref().is_some_and(Intx::is_at_device),
            IrqIndex::Msi => self.msi.as_ref().is_some_and(|(_, vectors)| vectors.is_at_device()),
            IrqIndex::Msix => self.msix.is_at_device(),
        }
    }

    /// Disables what the device refused to disable before: ahead of a restore.
    pub(super) fn clear(&mut self, irq_path: IrqPath<'_>) -> Result<(), PciFailure> {
        let kinds = [IrqIndex::Intx, IrqIndex::Msi, IrqIndex::Msix];
        if kinds.iter().any(|kind| self.at_device(*kind)) { self.reset(irq_path) } else { Ok(()) }
    }

    /// Register and value of MSI's pending bits.
    pub(super) fn msi_pending(&mut self) -> Result<Option<(u16, u32)>, PciFailure> {
        let Some((layout, vectors)) = &mut self.msi else { return Ok(None) };
        let Some(register) = layout.pending() else { return Ok(None) };
        Ok(Some((register, vectors.pending_bits(0)?)))
    }

    /// The state to save: MSI-X vectors, pending MSI vectors, whether the pin is raised. Nothing changes.
    pub(super) fn save(
        &mut self,
        irq_path: IrqPath<'_>,
    ) -> Result<(Vec<VectorState>, u32, bool), PciFailure> {
        let table = self.msix.save(irq_path)?;
        let mut pending = 0;
        if let Some((_, vectors)) = &mut self.msi {
            for (n, vector) in vectors.save(irq_path)?.iter().enumerate().take(32) {
                pending |= u32::from(vector.pending) << n;
            }
        }
        let pin = self.intx.as_ref().map_or(Ok(false), Intx::save)?;
        Ok((table, pending, pin))
    }

    /// The reason for which `saved` cannot be the state of these interrupts.
    pub(super) fn misfit(&self, saved: &PciState) -> Option<String> {
        let own = self.msix.count();
        if !saved.msix && !saved.vectors.is_empty() {
            return Some("it has a vector table and no MSI-X".into());
        }
        if saved.vectors.len() != own {
            return Some(format!("it has {} vectors, and the function has {own}", saved.vectors.len()));
        }
        if saved.intx_pending && self.intx.is_none() {
            return Some("an INTx interrupt is pending, and the function has no pin".into());
        }
        let messages = self.msi.as_ref().map_or(0, |(_, vectors)| vectors.count());
        if saved.msi_pending.checked_shr(u32::try_from(messages).unwrap_or(32)).is_some_and(|bits| bits != 0)
        {
            return Some(format!(
                "MSI vectors {:#x} are pending, and the function has {messages}",
                saved.msi_pending
            ));
        }
        None
    }

    /// Puts saved vectors in and stages their routes. `config` is loaded.
    pub(super) fn stage(
        &mut self,
        saved: &PciState,
        config: &ConfigSpace,
        router: &MsiRouter,
    ) -> Result<(), PciFailure> {
        let (enabled, all_masked) = self.msix_control(config);
        self.msix.stage(enabled, all_masked, &saved.vectors, router)?;
        let enabled = self.msi_enabled(config);
        if let Some((layout, vectors)) = &mut self.msi {
            let (_, targets) = layout.targets(config);
            let states: Vec<VectorState> = targets
                .iter()
                .take(vectors.count())
                .enumerate()
                .map(|(n, target)| VectorState {
                    message: target.message,
                    masked: target.masked,
                    pending: saved.msi_pending >> n & 1 != 0,
                })
                .collect();
            vectors.stage(enabled, false, &states, router)?;
        }
        Ok(())
    }

    /// After [`stage`](Self::stage) and the commit of its routes: connects, and raises what was pending. Returns how
    /// many interrupts are connected.
    pub(super) fn restore(
        &mut self,
        saved: &PciState,
        config: &ConfigSpace,
        irq_path: IrqPath<'_>,
    ) -> Result<u32, PciFailure> {
        let wanted = self.wanted_pin(config);
        let mut connected = self.msix.restore(irq_path)?;
        if let Some((_, vectors)) = &mut self.msi {
            connected += vectors.restore(irq_path)?;
        }
        if let Some(intx) = &mut self.intx {
            connected += u32::from(intx.restore(wanted, saved.intx_pending, irq_path.irq)?);
        }
        Ok(connected)
    }

    /// The guest goes on where it was saved: what was collected is raised.
    pub(super) fn resume(&mut self, irq_path: IrqPath<'_>) -> Result<(), PciFailure> {
        let msix = self.msix.resume(irq_path.irq);
        msix.and(self.msi.as_mut().map_or(Ok(()), |(_, vectors)| vectors.resume(irq_path.irq)))
    }

    /// Takes all of it back: as after a reset. Goes on after a failure, and says the first.
    pub(super) fn reset(&mut self, irq_path: IrqPath<'_>) -> Result<(), PciFailure> {
        let mut result = self.msix.reset(irq_path);
        if let Some((_, vectors)) = &mut self.msi {
            result = result.and(vectors.reset(irq_path));
        }
        if let Some(intx) = &mut self.intx {
            result = result.and(intx.apply(Wanted::Off, irq_path.irq));
        }
        self.refused = result.is_err();
        self.unsettled = false;
        result
    }

    /// The MSI-X control register's enable and mask-all bits.
    fn msix_control(&self, config: &ConfigSpace) -> (bool, bool) {
        let Some(layout) = self.msix_layout else { return (false, false) };
        let control = config.u16(layout.capability + MSIX_CONTROL);
        (control & MSIX_ENABLE != 0, control & MSIX_MASK_ALL != 0)
    }

    /// A guest that enables both kinds breaks the rules (PCI 3.0, 6.8): it gets MSI-X.
    fn msi_enabled(&self, config: &ConfigSpace) -> bool {
        let enabled = self.msi.as_ref().is_some_and(|(layout, _)| layout.targets(config).0);
        enabled && !self.msix_control(config).0
    }

    /// A function that decodes nothing and masters nothing has nothing to raise its pin for: it is connected when the
    /// guest turns any of them on.
    fn wanted_pin(&self, config: &ConfigSpace) -> Wanted {
        let command = config.u16(COMMAND);
        let works = command & (COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER) != 0;
        if !works || self.msix_control(config).0 || self.msi_enabled(config) {
            Wanted::Off
        } else if command & COMMAND_INTX_DISABLE != 0 {
            Wanted::Masked
        } else {
            Wanted::On
        }
    }
}
