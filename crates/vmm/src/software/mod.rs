//! The software guest: the program of [`guest`](crate::guest) as a host thread, for machines without KVM.
//!
//! It drives the same devices through the same bus, keeps the same pages, blocks and counts at the same places of
//! guest RAM, and reports in the same page. Everything that it knows is in guest RAM: what is saved besides is where
//! in the program it stands. It can only be paused between two turns of its loop, when it holds no interrupt that it
//! has taken and not handled.
//!
//! What it does not do: it runs no machine code, so it proves the migration of memory, devices and interrupts, and
//! nothing of vCPU state. It leaves a serial card alone, and reports no bytes of one.

mod backend;
mod cpu;
mod driver;
mod orders;
mod program;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vfio_migration::Section;
use vfio_migration_memory::{DirtySource, GuestRam, WriteLog};

pub use backend::SoftwareBackend;

use crate::bus::IoBus;
use crate::error::VmmError;
use crate::guest::{BootInfo, write_boot_page};
use crate::section::{SectionReader, SectionWriter};
use cpu::Cpu;
use program::{Pc, Program};

/// The only section: name and version. The guest of version 1 had its stamps at a place of its own, whatever its boot page said.
const SECTION: (&str, u32) = ("software.vcpu", 2);

/// A guest that is a thread of this process.
#[derive(Debug)]
pub struct SoftwareVm {
    ram: Arc<GuestRam>,
    log: Arc<WriteLog>,
    backend: Arc<SoftwareBackend>,
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    control: Mutex<Control>,
    changed: Condvar,
}

#[derive(Debug)]
struct Control {
    /// The guest should run.
    run: bool,
    /// The thread is in a turn of the loop, or about to be.
    busy: bool,
    /// The thread should end.
    quit: bool,
    pc: Pc,
}

impl SoftwareVm {
    /// A guest in `ram`, not booted.
    ///
    /// # Errors
    /// No eventfd is to be had.
    pub fn new(ram: Arc<GuestRam>) -> Result<Self, VmmError> {
        let backend = SoftwareBackend::new().map_err(io_error("making an eventfd"))?;
        let log = Arc::new(WriteLog::new("software", ram.size()));
        let control = Control { run: false, busy: false, quit: false, pc: Pc::Off };
        let shared = Arc::new(Shared { control: Mutex::new(control), changed: Condvar::new() });
        Ok(Self { ram, log, backend: Arc::new(backend), shared, thread: Mutex::new(None) })
    }

    /// The way from PCI functions to this guest, and back.
    pub fn backend(&self) -> &Arc<SoftwareBackend> {
        &self.backend
    }

    /// Writes the boot page; the program begins with the first [`resume`](Self::resume).
    ///
    /// # Errors
    /// `info` makes no sense.
    pub fn boot(&self, info: &BootInfo) -> Result<(), VmmError> {
        write_boot_page(&self.ram, info)?;
        self.control().pc = Pc::Boot;
        Ok(())
    }

    /// Makes the thread, paused.
    ///
    /// # Errors
    /// It cannot be made, or was already.
    pub fn start(&self, bus: &Arc<dyn IoBus>) -> Result<(), VmmError> {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if thread.is_some() {
            return Err(VmmError::Refused("the software guest has its thread already".into()));
        }
        let (ram, log, backend) = (Arc::clone(&self.ram), Arc::clone(&self.log), Arc::clone(&self.backend));
        let cpu = Cpu { ram, log, backend, bus: Arc::clone(bus) };
        let shared = Arc::clone(&self.shared);
        let builder = std::thread::Builder::new().name("software vcpu".into());
        let made = builder.spawn(move || shared.work(cpu)).map_err(io_error("making the guest's thread"))?;
        *thread = Some(made);
        Ok(())
    }

    /// Stops the guest between two turns of its loop. Pausing a paused one does nothing.
    ///
    /// # Errors
    /// It did not come back within `patience`: a device does not answer it. It goes on then.
    pub fn pause(&self, patience: Duration) -> Result<(), VmmError> {
        let deadline = Instant::now() + patience;
        let mut control = self.control();
        let ran = control.run;
        control.run = false;
        self.backend.kick();
        while control.busy {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                control.run = ran;
                let source = io::Error::from(io::ErrorKind::TimedOut);
                return Err(VmmError::Io { doing: "pausing the software guest".into(), source });
            }
            let waited = self.shared.changed.wait_timeout(control, left);
            control = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Lets it run.
    ///
    /// # Errors
    /// It was neither booted nor loaded, or has no thread.
    pub fn resume(&self) -> Result<(), VmmError> {
        let mut control = self.control();
        if control.pc == Pc::Off || control.quit {
            return Err(VmmError::Refused("the software guest has nothing to run".into()));
        }
        control.run = true;
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Ends the thread. Nothing runs again.
    pub fn shutdown(&self) {
        {
            let mut control = self.control();
            (control.run, control.quit) = (false, true);
            self.shared.changed.notify_all();
        }
        self.backend.kick();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("the software guest panicked");
        }
    }

    /// The guest's state besides RAM, while it is paused.
    ///
    /// # Errors
    /// It is not paused.
    pub fn save(&self) -> Result<Vec<Section>, VmmError> {
        let control = self.paused()?;
        let mut writer = SectionWriter::default();
        writer.u32(control.pc.number());
        Ok(vec![writer.finish(SECTION.0.to_owned(), SECTION.1)])
    }

    /// Puts the state back into a guest that has not run. Sections of other names are not looked at.
    ///
    /// # Errors
    /// The section is missing or makes no sense.
    pub fn load(&self, sections: &[Section]) -> Result<(), VmmError> {
        let section = sections.iter().find(|section| section.name == SECTION.0);
        let section = section.ok_or_else(|| VmmError::section(SECTION.0, "it did not come"))?;
        let mut reader = SectionReader::open(section, SECTION.1)?;
        let number = reader.u32()?;
        reader.end()?;
        let pc =
            Pc::of(number).ok_or_else(|| VmmError::section(SECTION.0, format!("it stands at {number}")))?;
        self.paused()?.pc = pc;
        Ok(())
    }

    /// Names and versions of its sections.
    pub fn section_versions() -> BTreeMap<String, u32> {
        BTreeMap::from([(SECTION.0.to_owned(), SECTION.1)])
    }

    /// The log of its stores to RAM, a dirty source called `software`.
    pub fn dirty_source(&self) -> Arc<dyn DirtySource> {
        Arc::clone(&self.log) as _
    }

    /// Whether its program gave up. The report page says why.
    pub fn failed(&self) -> bool {
        self.control().pc == Pc::Failed
    }

    fn paused(&self) -> Result<MutexGuard<'_, Control>, VmmError> {
        let control = self.control();
        if control.run || control.busy {
            return Err(VmmError::Refused("the software guest is not paused".into()));
        }
        Ok(control)
    }

    fn control(&self) -> MutexGuard<'_, Control> {
        self.shared.lock()
    }
}

impl Drop for SoftwareVm {
    fn drop(&mut self) {
        self.shutdown();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread: turns of the loop while the guest runs.
    fn work(&self, cpu: Cpu) {
        let program = Program::new(cpu);
        loop {
            let pc = {
                let mut control = self.lock();
                while !control.run && !control.quit {
                    control = self.changed.wait(control).unwrap_or_else(PoisonError::into_inner);
                }
                if control.quit {
                    return;
                }
                control.busy = true;
                control.pc
            };
            // What it reads is guest RAM, which may hold anything after a move gone wrong: a guest that falls over stops
            // as one that gave up, and does not take the pause of its machine with it. It keeps nothing that could be
            // left half changed: all its state is that RAM.
            let next = catch_unwind(AssertUnwindSafe(|| program.turn(pc))).unwrap_or_else(|_| {
                tracing::error!("the software guest panicked");
                Pc::Failed
            });
            let mut control = self.lock();
            control.pc = next;
            control.busy = false;
            self.changed.notify_all();
            if control.run && !control.quit {
                drop(control);
                program.idle();
            }
        }
    }
}

fn io_error(doing: &'static str) -> impl FnOnce(io::Error) -> VmmError {
    move |source| VmmError::Io { doing: doing.to_owned(), source }
}
