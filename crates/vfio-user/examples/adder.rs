//! A device in a hundred lines: it adds two numbers, and migrates.
//!
//! `cargo run --example adder -- /tmp/adder.sock`, and beside it `cargo run --example drive -- /tmp/adder.sock`.

use std::sync::Mutex;

use vfio_user_peer::{
    Backend, DeviceInfo, DmaMapping, Errno, IrqInfo, IrqRequest, MigrationFlags, MigrationState, RegionInfo,
    Server, StopHandle, irq_index, region_index,
};

/// BAR0: two operands, and their sum to be read behind them. All of it is the state that migrates.
#[derive(Default)]
struct Adder {
    state: Mutex<State>,
}

struct State {
    operands: [u8; 16],
    mig: MigrationState,
    /// How much of the operands the session has moved.
    moved: usize,
}

impl Default for State {
    fn default() -> Self {
        Self { operands: [0; 16], mig: MigrationState::Running, moved: 0 }
    }
}

impl Adder {
    fn state(&self) -> Result<std::sync::MutexGuard<'_, State>, Errno> {
        self.state.lock().map_err(|_| Errno::IO)
    }
}

impl Backend for Adder {
    fn device_info(&self) -> DeviceInfo {
        DeviceInfo {
            resettable: true,
            pci: true,
            num_regions: region_index::COUNT,
            num_irqs: irq_index::COUNT,
        }
    }

    fn region_info(&self, index: u32) -> Result<RegionInfo, Errno> {
        let size = if index == 0 { 24 } else { 0 };
        Ok(RegionInfo { size, read: size != 0, write: size != 0, ..RegionInfo::default() })
    }

    fn irq_info(&self, _index: u32) -> Result<IrqInfo, Errno> {
        Ok(IrqInfo::default())
    }

    fn region_read(&self, _index: u32, offset: u64, into: &mut [u8]) -> Result<(), Errno> {
        let state = self.state()?;
        let (a, b) = state.operands.split_at(8);
        let number = |raw: &[u8]| raw.try_into().map(u64::from_le_bytes).map_err(|_| Errno::IO);
        let sum = number(a)?.wrapping_add(number(b)?);
        let bar = [&state.operands[..], &sum.to_le_bytes()].concat();
        let at = usize::try_from(offset).map_err(|_| Errno::INVAL)?;
        into.copy_from_slice(bar.get(at..at + into.len()).ok_or(Errno::INVAL)?);
        Ok(())
    }

    fn region_write(&self, _index: u32, offset: u64, from: &[u8]) -> Result<(), Errno> {
        let at = usize::try_from(offset).map_err(|_| Errno::INVAL)?;
        let mut state = self.state()?;
        let place = state.operands.get_mut(at..at + from.len()).ok_or(Errno::PERM)?;
        place.copy_from_slice(from);
        Ok(())
    }

    fn set_irqs(&self, _request: IrqRequest) -> Result<(), Errno> {
        Err(Errno::INVAL)
    }

    fn dma_map(&self, _mapping: DmaMapping) -> Result<(), Errno> {
        // It does no DMA, so it needs no mapping; the descriptor closes here.
        Ok(())
    }

    fn dma_unmap(&self, _iova: u64, _len: u64) -> Result<(), Errno> {
        Ok(())
    }

    fn reset(&self) -> Result<(), Errno> {
        *self.state()? = State::default();
        Ok(())
    }

    fn migration_flags(&self) -> Result<MigrationFlags, Errno> {
        Ok(MigrationFlags::default())
    }

    fn mig_state(&self) -> Result<MigrationState, Errno> {
        Ok(self.state()?.mig)
    }

    fn set_mig_state(&self, to: MigrationState) -> Result<(), Errno> {
        let mut state = self.state()?;
        if state.mig == MigrationState::Resuming && state.moved != state.operands.len() {
            return Err(Errno::INVAL);
        }
        state.mig = to;
        state.moved = 0;
        Ok(())
    }

    fn mig_data_read(&self, into: &mut [u8]) -> Result<usize, Errno> {
        let mut state = self.state()?;
        let rest = state.operands.get(state.moved..).unwrap_or_default();
        let count = rest.len().min(into.len());
        into.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
        state.moved += count;
        Ok(count)
    }

    fn mig_data_write(&self, from: &[u8]) -> Result<(), Errno> {
        let mut state = self.state()?;
        let at = state.moved;
        state.operands.get_mut(at..at + from.len()).ok_or(Errno::NOMEM)?.copy_from_slice(from);
        state.moved += from.len();
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("usage: adder SOCKET")?;
    let server = Server::bind(&path)?;
    eprintln!("serving on {path}");
    server.serve(&Adder::default(), &StopHandle::new()?)?;
    Ok(())
}
