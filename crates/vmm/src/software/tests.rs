//! The software guest on a bus with devices made of a thread each; moved with its memory in full flight.

#![expect(clippy::cast_possible_truncation, reason = "flows, and sizes of a mebibyte at most")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vfio_migration_device::{ConfigRules, IrqRouter, PciFunction, PciHardware, RegionIndex};
use vfio_migration_memory::{DirtySource, GuestRam, Mapping, WriteLog};
use vfio_migration_types::{Bitmap, Gpa, Granule, RamOffset};

use super::*;
use crate::guest::{Areas, Report, Stage, ask_to_reset_gap, map, parts, read_report};
use crate::layout;
use crate::platform::PlatformBus;
use vfio_migration_device::testing::FakeHardware;
use vfio_migration_pci::{Devfn, MsiRouter, PciBus, PciHost, VfioPciFunction};

const MEMORY: u64 = 16 << 20;
const MAILBOX_LEN: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(30);

/// What the device has besides its registers and its mailbox.
#[derive(Clone, Copy, Debug, Default)]
struct Engine {
    head: u64,
    done: [u64; 2],
    /// What the guest had acknowledged when the vector was raised, while a raise is outstanding.
    raised: [Option<u64>; 2],
    damage: u64,
}

/// The sample device, as little of it as the driver needs.
struct Sample {
    hardware: Arc<FakeHardware>,
    log: Arc<WriteLog>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Engine>>,
}

impl Sample {
    fn new(index: usize) -> Self {
        let hardware = FakeHardware::new(&format!("dev{index}"));
        hardware.region_write(RegionIndex::BAR0, 0, &0x4c50_4d53u32.to_le_bytes()).unwrap();
        hardware.region_write(RegionIndex::BAR0, 0xc, &1u32.to_le_bytes()).unwrap();
        let log = Arc::new(WriteLog::new("device", MEMORY));
        Self { hardware, log, stop: Arc::default(), thread: None }
    }

    fn run(&mut self, mut engine: Engine, ram: Arc<GuestRam>, mailboxes: Vec<Arc<Mapping>>) {
        self.stop.store(false, Ordering::SeqCst);
        let (hardware, log, stop) = (self.hardware.clone(), self.log.clone(), self.stop.clone());
        self.thread = Some(std::thread::spawn(move || {
            while !stop.load(Ordering::SeqCst) {
                hardware.rung();
                engine.step(&hardware, &ram, &log, &mailboxes);
                // Its pace.
                std::thread::sleep(Duration::from_micros(200));
            }
            engine
        }));
    }

    fn stop(&mut self) -> Engine {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Engine {
    fn step(&mut self, hardware: &FakeHardware, ram: &GuestRam, log: &WriteLog, mailboxes: &[Arc<Mapping>]) {
        let register = |at: u64| {
            let mut bytes = [0; 8];
            hardware.region_read(RegionIndex::BAR0, at, &mut bytes).unwrap();
            u64::from_le_bytes(bytes)
        };
        if register(8) & 1 == 0 || register(0x28) == 0 {
            return;
        }
        let at = |gpa: u64, len: u64| ram.offset_of(Gpa(gpa), len).unwrap();
        let word = |gpa: u64| ram.read_u64(at(gpa, 8)).unwrap();
        if self.head < word(register(0x20)) {
            let descriptor = register(0x10) + self.head % register(0x18) * 32;
            let [source, target, len_and_flags, cookie] =
                [0, 8, 16, 24].map(|offset| word(descriptor + offset));
            let (len, flow) = (len_and_flags & 0xffff_ffff, (len_and_flags >> 32) as usize);
            let number = self.done[flow] + 1;
            let sum = (0..len / 8).fold(0u64, |sum, index| sum.wrapping_add(word(source + 8 * index)));
            let mut block =
                vec![0x4b43_4f4c_4253_4d56, number, cookie, len_and_flags, sum, self.damage, 0, 0];
            block.extend((8..len / 8).map(|i| number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (i << 32 | i)));
            block[7] = block.iter().fold(0u64, |sum, word| sum.wrapping_add(*word));
            let bytes: Vec<u8> = block.iter().flat_map(|word| word.to_le_bytes()).collect();
            if flow == 0 {
                ram.write(at(target, len), &bytes).unwrap();
                log.mark(at(target, len), len);
            } else {
                let offset = target - layout::MMIO64_BASE;
                mailboxes[(offset / MAILBOX_LEN) as usize].write(offset % MAILBOX_LEN, &bytes).unwrap();
            }
            self.head += 1;
            self.done[flow] = number;
            let done = at(register(0x28) + 8 * flow as u64, 8);
            ram.write_u64(done, number).unwrap();
            log.mark(done, 8);
        }
        for flow in 0..2 {
            let acknowledged = register(0x30 + 8 * flow as u64);
            if self.raised[flow].is_some_and(|then| then != acknowledged) {
                self.raised[flow] = None;
            }
            if self.done[flow] > acknowledged && self.raised[flow].is_none() {
                self.raised[flow] = Some(acknowledged);
                assert!(hardware.raise(flow as u32));
            }
        }
    }
}

struct Machine {
    ram: Arc<GuestRam>,
    host: Arc<PciHost>,
    bus: Arc<PciBus>,
    vm: SoftwareVm,
    samples: Vec<Sample>,
    mailboxes: Vec<Arc<Mapping>>,
}

impl Machine {
    fn new(devices: usize) -> Self {
        let ram = Arc::new(GuestRam::new("test", &layout::ram_regions(MEMORY).unwrap()).unwrap());
        let vm = SoftwareVm::new(ram.clone()).unwrap();
        let router = Arc::new(MsiRouter::new(vm.backend().clone(), layout::MESSAGES));
        let host = PciHost::new(vm.backend().clone(), vm.backend().clone(), router, layout::bar_windows());
        let bus = Arc::new(PciBus::new(host.clone(), Gpa(layout::ECAM_BASE)));
        let samples: Vec<Sample> = (0..devices).map(Sample::new).collect();
        for (slot, sample) in (1..).zip(&samples) {
            let function =
                VfioPciFunction::new(Devfn::in_slot(slot), sample.hardware.clone(), host.clone()).unwrap();
            bus.add(Arc::new(function));
        }
        let platform: Arc<dyn IoBus> = Arc::new(PlatformBus::new(bus.clone()));
        vm.start(&platform).unwrap();
        let mailboxes = samples.iter().map(|sample| Arc::new(sample.hardware.mailbox())).collect();
        Self { ram, host, bus, vm, samples, mailboxes }
    }

    fn boot(devices: usize) -> Self {
        let mut machine = Self::new(devices);
        machine.bus.place_bars().unwrap();
        // 4000 pages a second: all of them several times in a second.
        let info = BootInfo::new(&parts(&machine.ram), 4000 * 4096, devices as u64, devices > 1).unwrap();
        machine.vm.boot(&info).unwrap();
        machine.run_devices(&vec![Engine::default(); devices]);
        machine.vm.resume().unwrap();
        machine
    }

    fn run_devices(&mut self, engines: &[Engine]) {
        for (sample, engine) in self.samples.iter_mut().zip(engines) {
            sample.run(*engine, self.ram.clone(), self.mailboxes.clone());
        }
    }

    fn report(&self) -> Report {
        read_report(&self.ram).unwrap()
    }

    fn wait(&self, what: &str, condition: impl Fn(&Report) -> bool) -> Report {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let report = self.report();
            if condition(&report) {
                return report;
            }
            assert!(Instant::now() < deadline && !self.vm.failed(), "{what}: {report:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn sources(&self) -> Vec<&dyn DirtySource> {
        let mut sources: Vec<&dyn DirtySource> = vec![&*self.vm.log];
        sources.extend(self.samples.iter().map(|sample| &*sample.log as &dyn DirtySource));
        sources
    }

    /// Moves the guest to a new machine. `hear` says which dirty pages of which source are heard.
    fn migrate(mut self, hear: impl Fn(&str, u64) -> bool) -> Self {
        let mut next = Self::new(self.samples.len());
        self.sources().iter().for_each(|source| source.start().unwrap());
        let pages = MEMORY / 4096;
        let copy = |page: u64, to: &GuestRam| {
            let mut bytes = [0; 4096];
            self.ram.read(RamOffset(page * 4096), &mut bytes).unwrap();
            to.write(RamOffset(page * 4096), &bytes).unwrap();
        };
        let before = self.report().loops;
        (0..pages).for_each(|page| copy(page, &next.ram));
        // The guest goes on while its memory is copied.
        self.wait("going on", |report| report.loops > before + 20);

        self.vm.pause(PATIENCE).unwrap();
        self.host.gate().close();
        let engines: Vec<Engine> = self.samples.iter_mut().map(Sample::stop).collect();
        let functions = self.bus.functions();
        let states: Vec<_> = functions
            .iter()
            .map(|function| function.save_interrupts(function.save_config().unwrap()).unwrap())
            .collect();
        let mut dirty = Bitmap::new(MEMORY, Granule::PAGE);
        for source in self.sources() {
            let mut of_source = Bitmap::new(MEMORY, Granule::PAGE);
            source.report(&mut of_source).unwrap();
            source.stop().unwrap();
            let heard = |page: &u64| of_source.test(*page) && hear(&source.name(), *page);
            (0..pages).filter(heard).for_each(|page| dirty.set(page));
        }
        (0..pages).filter(|page| dirty.test(*page)).for_each(|page| {
            let mut bytes = [0; 4096];
            self.ram.read(RamOffset(page * 4096), &mut bytes).unwrap();
            next.ram.write(RamOffset(page * 4096), &bytes).unwrap();
        });
        next.vm.load(&self.vm.save().unwrap()).unwrap();
        next.bus.set_config_address(self.bus.config_address());
        for (old, new) in self.samples.iter().zip(&next.samples) {
            let mut bytes = vec![0; 0x1000];
            old.hardware.region_read(RegionIndex::BAR0, 0, &mut bytes).unwrap();
            new.hardware.region_write(RegionIndex::BAR0, 0, &bytes).unwrap();
        }
        for (old, new) in self.mailboxes.iter().zip(&next.mailboxes) {
            let mut bytes = vec![0; MAILBOX_LEN as usize];
            old.read(0, &mut bytes).unwrap();
            new.write(0, &bytes).unwrap();
        }
        let arrived = next.bus.functions();
        for (function, state) in arrived.iter().zip(&states) {
            function.restore_config(state, &ConfigRules::default()).unwrap();
            function.stage_interrupts(state).unwrap();
        }
        next.host.router().commit().unwrap();
        for (function, state) in arrived.iter().zip(&states) {
            assert_eq!(function.connect_interrupts(state).unwrap(), 2);
        }
        next.run_devices(&engines);
        next.vm.resume().unwrap();
        next
    }
}

/// The page walk and the block walk have gone round twice since `then`.
fn checked_all_since(then: Report) -> impl Fn(&Report) -> bool {
    move |now| now.page_passes > then.page_passes + 2 && now.block_passes > then.block_passes + 2
}

#[test]
fn it_boots_works_and_finds_nothing_wrong() {
    let machine = Machine::boot(3);
    let report = machine.wait("working", |report| {
        report.stage == Stage::Running
            && report.dma_blocks > 500
            && report.page_passes > 3
            && report.block_passes > 1
    });
    assert!(
        report.p2p_blocks > 100 && report.interrupts > 100 && report.ticks > 0 && report.pages_written > 100
    );
    assert!(report.pages_checked > 0 && report.blocks_checked > report.dma_blocks);
    assert_eq!((report.lost(), report.spurious, report.integrity_failures), (0, 0, 0), "{report:?}");
    assert_eq!(machine.host.gate().violations(), 0);

    machine.vm.pause(PATIENCE).unwrap();
    let still = machine.report();
    assert!(machine.vm.save().is_ok());
    assert_eq!(machine.report(), still, "paused, it does nothing");
    machine.vm.resume().unwrap();
    assert!(machine.vm.save().is_err(), "running, it cannot be saved");
    machine.wait("going on", |report| report.loops > still.loops);
    let asked = ask_to_reset_gap(&machine.ram);
    assert!(asked.is_ok());
    machine.wait("the gap to be forgotten", |report| report.request == 0);
}

#[test]
fn it_moves_again_and_again_and_loses_nothing() {
    let mut machine = Machine::boot(2);
    for _ in 0..3 {
        let then = machine.wait("working", |report| report.dma_blocks > 100 && report.pages_written > 3000);
        machine = machine.migrate(|_, _| true);
        let report = machine.wait("checking all of it", checked_all_since(then));
        assert_eq!((report.lost(), report.integrity_failures), (0, 0), "{report:?}");
        assert!(report.dma_blocks > then.dma_blocks && report.interrupts > then.interrupts);
    }
}

#[test]
fn it_finds_pages_that_were_lost() {
    let machine = Machine::boot(1);
    machine.wait("working", |report| report.pages_written > 3000);
    let first = Areas::of(&parts(&machine.ram), machine.samples.len() as u64).unwrap().low_start / 4096;
    let machine = machine.migrate(|name, page| name != "software" || page < first);
    let report = machine.wait("pages to be missed", |report| report.pages_lost > 0);
    assert_eq!((report.blocks_lost, report.interrupts_lost), (0, 0));
}

#[test]
fn it_finds_blocks_that_were_lost() {
    let machine = Machine::boot(1);
    machine.wait("working", |report| report.dma_blocks > 200);
    let targets = (map::DEVICES + map::DEVICE_TARGETS) / 4096;
    let machine = machine.migrate(|name, page| name != "device" || page < targets);
    let report = machine.wait("blocks to be missed", |report| report.blocks_lost > 0);
    assert_eq!((report.pages_lost, report.interrupts_lost), (0, 0));
}

#[test]
fn it_finds_an_interrupt_that_was_lost() {
    // Whether one is pending at the moment of the move is chance: it is made certain.
    let mut machine = Machine::boot(1);
    machine.wait("working", |report| report.dma_blocks > 50);
    machine.vm.pause(PATIENCE).unwrap();
    let deadline = Instant::now() + PATIENCE;
    let mut engine = machine.samples[0].stop();
    let function = &machine.bus.functions()[0];
    while !function.save_interrupts(function.save_config().unwrap()).unwrap().vectors[0].pending {
        assert!(Instant::now() < deadline);
        engine.step(&machine.samples[0].hardware, &machine.ram, &machine.samples[0].log, &machine.mailboxes);
    }
    // Not delivered: the guest never hears of it.
    machine.run_devices(&[engine]);
    machine.vm.resume().unwrap();
    let report = machine.wait("an interrupt to be missed", |report| report.interrupts_lost == 1);
    assert_eq!((report.pages_lost, report.blocks_lost), (0, 0));
    let more = report.dma_blocks + 50;
    let report = machine.wait("going on by itself", |report| report.dma_blocks > more);
    assert_eq!(report.interrupts_lost, 1);
}

#[test]
fn it_hears_of_damage_inside_a_device() {
    let mut machine = Machine::boot(1);
    machine.wait("working", |report| report.dma_blocks > 50);
    let engine = machine.samples[0].stop();
    machine.run_devices(&[Engine { damage: 1, ..engine }]);
    machine.wait("damage to be reported", |report| report.integrity_failures > 0 && report.blocks_lost > 0);
}

#[test]
fn without_its_devices_it_gives_up_and_says_why() {
    let machine = Machine::new(1);
    machine.bus.place_bars().unwrap();
    let info = BootInfo::new(&parts(&machine.ram), 0, 2, false).unwrap();
    assert!(machine.vm.resume().is_err(), "there is nothing to run");
    machine.vm.boot(&info).unwrap();
    machine.vm.resume().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !machine.vm.failed() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(2));
    }
    let report = machine.report();
    assert_eq!((report.stage, report.failure_code, report.failure_detail), (Stage::Failed, 2, 1));
}

#[test]
fn state_that_makes_no_sense_is_refused() {
    let ram = Arc::new(GuestRam::new("test", &layout::ram_regions(MEMORY).unwrap()).unwrap());
    let vm = SoftwareVm::new(ram).unwrap();
    let section = |version, bytes: &[u8]| Section { name: SECTION.0.into(), version, bytes: bytes.to_vec() };
    assert!(vm.load(&[]).is_err());
    assert!(vm.load(&[section(1, &[0; 4])]).is_err());
    assert!(vm.load(&[section(2, &[0; 3])]).is_err());
    assert!(vm.load(&[section(2, &[9, 0, 0, 0])]).is_err());
    assert!(vm.load(&[section(2, &[2, 0, 0, 0, 0])]).is_err());
    vm.load(&[section(2, &[2, 0, 0, 0])]).unwrap();
    assert_eq!(vm.save().unwrap(), [section(2, &[2, 0, 0, 0])]);
}
