//! The sample device itself: registers, DMA and interrupts, as a VMM reaches them. Its migration is in `migrate`.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustix::io::Errno;
use serde_json::{Map, Value, json};
use vfio_migration_guest_driver::registers::{VECTORS, offset};
use vfio_user_peer::MigrationState;

use crate::dma::DmaTarget;
use crate::engine;
use crate::error::{SimError, invalid};
use crate::fault::Fault;
use crate::migration::SampleMigration;
use crate::options::Options;
use crate::pci::{self, BAR2_SIZE, CONFIG_SIZE, SampleConfigSpace, region};
use crate::regs::{Effect, Facts, Registers};
use crate::shared::{Mode, Shared, drain, lock, signal};

/// A sample device: a PCI function with a DMA engine, a mailbox, and state worth migrating.
///
/// It works on threads of its own, which end when it is dropped. Every method may be called from any thread.
pub struct SampleDevice {
    pub(crate) shared: Arc<Shared>,
    pub(crate) migration: Mutex<SampleMigration>,
    threads: Vec<JoinHandle<()>>,
}

impl SampleDevice {
    /// A fresh device, in RUNNING with nothing enabled.
    ///
    /// # Errors
    /// Options that no device can have, or the host lacks memory, descriptors or threads.
    pub fn new(options: Options) -> Result<Self, SimError> {
        options.check()?;
        let shared = Arc::new(Shared::new(options)?);
        let mut device = Self { shared, migration: Mutex::default(), threads: Vec::new() };
        for (name, run) in
            [("sample-dma", engine::run_dma as fn(&Shared)), ("sample-churn", engine::run_churn)]
        {
            let shared = device.shared.clone();
            let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || run(&shared));
            let no_thread = |error: std::io::Error| {
                let errno = Errno::from_io_error(&error).unwrap_or(Errno::AGAIN);
                SimError::new(errno, "no thread is left for the device (ulimit -u, TasksMax= or pids.max)")
            };
            device.threads.push(thread.map_err(no_thread)?);
        }
        Ok(device)
    }

    /// Options that the device was made with.
    pub fn options(&self) -> &Options {
        &self.shared.options
    }

    /// The device's manifest, for whoever decides about a migration.
    pub fn manifest(&self) -> serde_json::Value {
        let options = self.options();
        // A number or a truth value counts as such.
        let scalar = |text: &String| match serde_json::from_str(text) {
            Ok(value @ (Value::Bool(_) | Value::Number(_))) => value,
            _ => Value::String(text.clone()),
        };
        let claimed =
            options.parameters.iter().map(|(name, text)| (name.clone(), json!({"value": scalar(text)})));
        let mut parameters: Map<String, Value> = claimed.collect();
        // Without bulk state it is as a device that knows of none.
        parameters.insert("state_size".into(), json!({"value": options.state_size, "off": 0}));
        let mut manifest = json!({
            "model": options.model, "model_version": options.version_string(), "parameters": parameters,
        });
        for (name, text) in &options.fields {
            manifest[name] = serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.clone()));
        }
        manifest
    }

    /// Reads from a region: BAR0, BAR2 or configuration space. Works in every migration state.
    ///
    /// # Errors
    /// EINVAL outside of the function's regions.
    pub fn region_read(&self, index: u32, at: u64, into: &mut [u8]) -> Result<(), SimError> {
        let at = within(index, at, into.len())?;
        match index {
            region::BAR0 if at.offset < 0x1000 => {
                // What is behind two locks is fetched one after the other, in their order.
                let front = lock(&self.shared.front);
                let integrity = lock(&self.shared.bulk).integrity;
                let options = self.options();
                let facts = Facts { version: options.version, state_size: options.state_size, integrity };
                front.registers.read(at.offset, into, facts);
            }
            region::BAR0 => into.fill(0),
            region::BAR2 => self.shared.mailbox.read(at.offset, into)?,
            _ => lock(&self.shared.front).config.read(at.index, into),
        }
        Ok(())
    }

    /// Writes to a region. A write that switches the DMA engine off returns when it has stopped.
    ///
    /// # Errors
    /// EINVAL outside of the function's regions.
    pub fn region_write(&self, index: u32, at: u64, from: &[u8]) -> Result<(), SimError> {
        let at = within(index, at, from.len())?;
        match index {
            region::BAR0 if at.offset < 0x1000 => self.register_write(at.offset, from),
            region::BAR0 if at.offset == offset::DOORBELL => {
                lock(&self.shared.front).registers.doorbell = true;
                self.shared.kick();
            }
            // The VMM emulates MSI-X table and PBA.
            region::BAR0 => {}
            region::BAR2 => self.shared.mailbox.write(at.offset, from)?,
            _ => lock(&self.shared.front).config.write(at.index, from),
        }
        Ok(())
    }

    /// The memory behind BAR2, 1 MiB from offset 0, to be mapped.
    pub fn mailbox_fd(&self) -> BorrowedFd<'_> {
        self.shared.mailbox.fd.as_fd()
    }

    /// An eventfd whose signal is as good as a write to the doorbell.
    pub fn doorbell_fd(&self) -> BorrowedFd<'_> {
        self.shared.doorbell.as_fd()
    }

    pub(crate) fn mailbox_arc(&self) -> Arc<OwnedFd> {
        self.shared.mailbox.fd.clone()
    }

    pub(crate) fn doorbell_arc(&self) -> Arc<OwnedFd> {
        self.shared.doorbell.clone()
    }

    /// Adds memory that the device may reach, for reading and with `write` for writing.
    ///
    /// # Errors
    /// It is empty, wraps around, overlaps another mapping or cannot be mapped.
    pub fn dma_map(&self, iova: u64, len: u64, write: bool, target: DmaTarget<'_>) -> Result<(), SimError> {
        self.shared.dma.map(iova, len, true, write, target)
    }

    /// Removes a mapping exactly as it was made; afterwards the device does not touch it.
    ///
    /// # Errors
    /// ENOENT: there is none.
    pub fn dma_unmap(&self, iova: u64, len: u64) -> Result<(), SimError> {
        if self.shared.dma.unmap(iova, len)? {
            // A message may be under way, outside of the table's lock.
            self.shared.order(None);
        }
        Ok(())
    }

    /// Removes every mapping.
    pub fn dma_unmap_all(&self) {
        self.shared.dma.unmap_all();
    }

    /// Connects MSI-X vector `vector` to an eventfd, or disconnects it. A raise that found the vector disconnected is
    /// sent now, as from a set bit of the PBA.
    ///
    /// # Errors
    /// EINVAL: no such vector.
    pub fn connect_vector(&self, vector: usize, fd: Option<OwnedFd>) -> Result<(), SimError> {
        if vector >= VECTORS {
            return Err(invalid("no such vector"));
        }
        lock(&self.shared.front).connect(vector, fd);
        Ok(())
    }

    /// Signals a vector's eventfd as if the device raised it, without any count of its own.
    ///
    /// # Errors
    /// EINVAL: no such vector, or it is not connected.
    pub fn trigger_vector(&self, vector: usize) -> Result<(), SimError> {
        let front = lock(&self.shared.front);
        match front.eventfds.get(vector) {
            Some(Some(fd)) => {
                signal(fd);
                Ok(())
            }
            _ => Err(invalid("no such vector, or it is not connected")),
        }
    }

    /// Begins to log DMA writes to `ranges` of `(iova, length)`, or to all of memory when there are none, in pages of
    /// about `page_size` bytes. Returns the page size chosen. The same START twice changes nothing.
    ///
    /// # Errors
    /// ENOTTY without a log; E2BIG, EINVAL, EOVERFLOW for ranges that cannot be; EINVAL when another log runs.
    pub fn start_dma_log(&self, page_size: u64, ranges: &[(u64, u64)]) -> Result<u64, SimError> {
        self.need_log()?;
        self.shared.dma.start_log(page_size, ranges)
    }

    /// Ends the log. Without one nothing happens.
    ///
    /// # Errors
    /// ENOTTY without a log.
    pub fn stop_dma_log(&self) -> Result<(), SimError> {
        self.need_log()?;
        self.shared.dma.stop_log();
        Ok(())
    }

    /// ORs into `words` a bit for each page of `page_size` bytes, counted from `iova`, that the device wrote since the
    /// last report, and forgets them. Complete once the device stands still.
    ///
    /// # Errors
    /// EINVAL when no log runs, for a bad page size and for memory reached by messages; ENOENT where nothing is
    /// mapped; EOVERFLOW.
    pub fn report_dma_log(
        &self,
        iova: u64,
        len: u64,
        page_size: u64,
        words: &mut [u64],
    ) -> Result<(), SimError> {
        self.need_log()?;
        self.shared.dma.report(iova, len, page_size, words)
    }

    /// Resets the function: RUNNING, with nothing enabled, every migration session gone. DMA mappings, connected
    /// vectors and a log stay.
    pub fn reset(&self) -> Result<(), SimError> {
        let mut migration = lock(&self.migration);
        migration.resets += 1;
        let fails = self.options().fault(|fault| match fault {
            Fault::FailReset { errno, from } if from.is_none_or(|from| migration.resets >= from) => {
                Some(*errno)
            }
            _ => None,
        });
        if let Some(errno) = fails {
            return Err(SimError::new(errno, "scripted: the reset fails"));
        }
        self.reset_with(&mut migration)
    }

    pub(crate) fn reset_with(&self, migration: &mut SampleMigration) -> Result<(), SimError> {
        let shared = &self.shared;
        shared.order(Some(Mode::Stopped));
        let foreign = migration.forget();
        {
            let mut front = lock(&shared.front);
            front.registers = Registers::default();
            front.config = SampleConfigSpace::of(self.options());
            front.active = true;
        }
        {
            let mut bulk = lock(&shared.bulk);
            bulk.tracking = None;
            bulk.reinit = false;
            if foreign || bulk.integrity > 0 || bulk.sweep.is_some() {
                bulk.renew();
            }
            bulk.frozen = false;
        }
        shared.bulk_changed.notify_all();
        drain(&shared.doorbell);
        shared.mailbox.clear()?;
        shared.set_state(MigrationState::Running);
        shared.order(Some(Mode::Running));
        Ok(())
    }

    /// Number of pages of the internal state that were ever found damaged.
    pub fn integrity(&self) -> u64 {
        lock(&self.shared.bulk).integrity
    }

    /// Whether the look at every page that follows a migration is over.
    pub fn sweep_done(&self) -> bool {
        lock(&self.shared.bulk).sweep.is_none()
    }

    /// A digest over everything that migrates: equal on both sides while both stand still.
    pub fn digest(&self) -> Result<[u8; 32], SimError> {
        let registers = lock(&self.shared.front).registers.clone();
        let (integrity, bulk) = {
            let bulk = lock(&self.shared.bulk);
            (bulk.integrity, bulk.digest())
        };
        let mut hash = blake3::Hasher::new();
        hash.update(&registers.encode(integrity));
        hash.update(&bulk);
        hash.update(&self.shared.mailbox.copy()?);
        Ok(*hash.finalize().as_bytes())
    }

    fn register_write(&self, at: u64, from: &[u8]) {
        let effect = {
            let mut front = lock(&self.shared.front);
            let effect = front.registers.write(at, from);
            if let Effect::Raise(vector) = effect {
                front.raise(vector);
            }
            effect
        };
        match effect {
            Effect::None | Effect::Raise(_) => {}
            Effect::Kick => self.shared.kick(),
            Effect::Quiesce => self.shared.order(None),
            Effect::Reinit => {
                let mut bulk = lock(&self.shared.bulk);
                bulk.reinit = bulk.tracking.is_some();
            }
        }
    }

    fn need_log(&self) -> Result<(), SimError> {
        match self.options().dirty_log {
            true => Ok(()),
            false => Err(SimError::new(Errno::NOTTY, "this device has no DMA log")),
        }
    }
}

impl Drop for SampleDevice {
    fn drop(&mut self) {
        self.shared.end();
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so already.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for SampleDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SampleDevice").field("state", &self.shared.state()).finish_non_exhaustive()
    }
}

/// A checked place in a region.
struct Place {
    offset: u64,
    index: usize,
}

fn within(region: u32, offset: u64, len: usize) -> Result<Place, SimError> {
    let end = offset.checked_add(len as u64);
    match (end.is_some_and(|end| end <= pci::region_size(region)), usize::try_from(offset)) {
        (true, Ok(index)) => Ok(Place { offset, index }),
        _ => Err(invalid(format!("{len} bytes at {offset:#x} of region {region} are outside of it"))),
    }
}

const _: () = assert!(BAR2_SIZE.is_multiple_of(4096) && CONFIG_SIZE == 256);
