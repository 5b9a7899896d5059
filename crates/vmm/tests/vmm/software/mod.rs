//! The software guest from outside, with sample devices: it works, it stands still when paused, its dirty log is
//! exact, it can be moved; and its checks find what is put wrong on purpose.

mod machine;

use std::sync::Arc;
use std::time::{Duration, Instant};

use vfio_migration_memory::GuestRam;
use vfio_migration_sim::Options;
use vfio_migration_types::{Bitmap, Gpa, Granule, PAGE_SIZE, RamOffset};
use vfio_migration_vmm::bus::IoBus;
use vfio_migration_vmm::guest::{Areas, BootInfo, Stage, map, parts};
use vfio_migration_vmm::layout;
use vfio_migration_vmm::software::SoftwareVm;

use self::machine::{Machine, PATIENCE};

/// One region of RAM.
const SMALL: u64 = 16 << 20;
/// RAM below and above the 32-bit hole.
const SPLIT: u64 = 64 << 20;

fn options() -> Options {
    Options { state_size: 1 << 20, ..Options::default() }
}

#[test]
fn without_devices_it_numbers_and_compares_pages() {
    let machine = Machine::boot(SPLIT, 0, 50_000, &options());
    let report = machine.wait("working", |report| report.page_passes > 2 && report.pages_written > 20_000);
    assert_eq!((report.stage, report.lost(), report.dma_blocks), (Stage::Running, 0, 0), "{report:?}");
    assert!(report.pages_checked > 10_000, "{report:?}");
}

#[test]
fn it_drives_real_devices_and_loses_nothing() {
    let machine = Machine::boot(SPLIT, 3, 10_000, &options());
    let report = machine.wait("working", |report| report.dma_blocks > 1000 && report.p2p_blocks > 300);
    assert_eq!((report.lost(), report.spurious), (0, 0), "{report:?}");
    assert!(report.interrupts > 100, "{report:?}");
    assert_eq!(machine.sample.bus.functions().iter().map(|function| function.errors()).sum::<u64>(), 0);
}

#[test]
fn what_was_put_wrong_in_pages_is_counted_and_nothing_else() {
    let machine = Machine::boot(SPLIT, 0, 2000, &options());
    let areas = Areas::of(&parts(&machine.ram), 0).unwrap();
    machine.wait("numbering pages", |report| report.pages_written > 1000);
    machine.vm.pause(PATIENCE).unwrap();
    // Each of the three words that carry something, and the whole page as a lost write leaves it.
    for page in 0..400 {
        let start = machine.at(areas.page(page).unwrap(), PAGE_SIZE);
        match [0, 8, 4088].get(usize::try_from(page % 4).unwrap()) {
            Some(word) => machine.ram.write(RamOffset(start.0 + *word), &[0xee; 8]).unwrap(),
            None => machine.ram.write(start, &[0; 4096]).unwrap(),
        }
    }
    machine.vm.resume().unwrap();
    let report = machine.wait_for_all_checks();
    assert_eq!((report.pages_lost, report.blocks_lost, report.interrupts_lost), (400, 0, 0), "{report:?}");
    let again = machine.wait_for_all_checks();
    assert_eq!(again.pages_lost, 400, "each counts once");
}

#[test]
fn paused_it_stands_still() {
    let machine = Machine::boot(SMALL, 0, 20_000, &options());
    for _ in 0..20 {
        let before = machine.report().loops;
        machine.wait("going on", |report| report.loops > before);
        machine.vm.pause(PATIENCE).unwrap();
        let digest = machine.ram.digest().unwrap();
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(machine.ram.digest().unwrap(), digest, "a paused guest wrote");
        machine.vm.resume().unwrap();
    }
    assert_eq!(machine.wait_for_all_checks().lost(), 0);
}

#[test]
fn many_pauses_among_interrupts_lose_none() {
    let machine = Machine::boot(SMALL, 2, 5000, &options());
    machine.wait("working", |report| report.dma_blocks > 50);
    let began = machine.report();
    for _ in 0..200 {
        machine.vm.pause(PATIENCE).unwrap();
        machine.sample.host.gate().close();
        // What the devices raise now comes to nobody who could take it.
        std::thread::yield_now();
        machine.sample.host.gate().open();
        machine.vm.resume().unwrap();
        let loops = machine.report().loops;
        machine.wait("going on", |report| report.loops > loops);
    }
    let report = machine.wait("going on after all", |report| report.dma_blocks > began.dma_blocks + 200);
    assert_eq!(report.lost(), 0, "{report:?}");
    assert_eq!(machine.sample.host.gate().violations(), 0, "a paused guest reached for its devices");
}

#[test]
fn the_dirty_log_names_what_changed_and_no_other_page() {
    let machine = Machine::boot(SPLIT, 0, 20_000, &options());
    machine.wait("numbering pages", |report| report.pages_written > 1000);
    let first_numbered = Areas::of(&parts(&machine.ram), 0).unwrap().low_start / PAGE_SIZE;
    let log = machine.vm.dirty_source();
    assert_eq!(log.name(), "software");
    machine.vm.pause(PATIENCE).unwrap();
    log.start().unwrap();
    for _ in 0..5 {
        let before: Vec<_> = (0..machine.pages()).map(|page| machine.page(page)).collect();
        let then = machine.report();
        machine.vm.resume().unwrap();
        let mut dirty = Bitmap::new(SPLIT, Granule::PAGE);
        let deadline = Instant::now() + PATIENCE;
        // Reports in the middle of its writes: none may fall between a write and its mark.
        while machine.report().pages_written < then.pages_written + 1000 {
            log.report(&mut dirty).unwrap();
            assert!(Instant::now() < deadline);
        }
        machine.vm.pause(PATIENCE).unwrap();
        log.report(&mut dirty).unwrap();
        for (page, before) in (0..).zip(&before) {
            let changed = machine.page(page) != *before;
            assert!(!changed || dirty.test(page), "page {page} changed and is not in the log");
            assert!(
                changed || page < first_numbered || !dirty.test(page),
                "page {page} is in the log for nothing"
            );
        }
    }
    log.stop().unwrap();
}

#[test]
fn it_moves_five_times_with_memory_alone() {
    let mut machine = Machine::boot(SPLIT, 0, 20_000, &options());
    for _ in 0..5 {
        machine.wait("numbering pages", |report| report.pages_written > 1000);
        let then = machine.report();
        machine = machine.migrate();
        let report = machine.wait_for_all_checks();
        assert_eq!(report.lost(), 0, "{report:?}");
        assert!(report.loops > then.loops && report.pages_written > then.pages_written);
    }
}

#[test]
fn it_moves_five_times_with_two_devices() {
    let mut machine = Machine::boot(SPLIT, 2, 10_000, &options());
    for _ in 0..5 {
        let blocks = machine.report().dma_blocks;
        let then = machine.wait("working", |report| report.dma_blocks > blocks + 100);
        machine = machine.migrate();
        machine.wait("going on there", |report| {
            report.dma_blocks > then.dma_blocks + 200
                && report.p2p_blocks > then.p2p_blocks + 50
                && report.interrupts > then.interrupts + 50
        });
        let report = machine.wait_for_all_checks();
        assert_eq!((report.lost(), report.integrity_failures), (0, 0), "{report:?}");
    }
    assert!(machine.sample.hardware.iter().all(|hardware| hardware.device.integrity() == 0));
}

#[test]
fn an_interrupt_withheld_is_missed_after_a_second_and_made_good() {
    for flow in [0, 1] {
        let machine = Machine::boot(SMALL, 2, 1000, &options());
        machine.wait("working", |report| report.p2p_blocks > 50);
        machine.sample.hardware[0].swallow(flow);
        let withheld = Instant::now();
        let report = machine.wait("missing it", |report| report.interrupts_lost > 0);
        assert!(withheld.elapsed() > Duration::from_millis(900), "too soon: {:?}", withheld.elapsed());
        assert_eq!((report.interrupts_lost, report.pages_lost, report.blocks_lost), (1, 0, 0), "{report:?}");
        let later = machine.wait("going on", |now| now.dma_blocks > report.dma_blocks + 300);
        assert_eq!(later.interrupts_lost, 1, "it is missed once");
    }
}

#[test]
fn a_stale_block_in_a_slot_is_found() {
    // Slow, so that the slots are compared several times before they are written again.
    let machine =
        Machine::boot(SMALL, 1, 1000, &Options { dma_interval: Duration::from_millis(3), ..options() });
    machine.wait("working", |report| report.dma_blocks > 80);
    machine.vm.pause(PATIENCE).unwrap();
    let entry = |slot: u64| machine.word(map::DEVICES + map::DEVICE_SLOTS + 8 * slot);
    let mut held: Vec<(u64, u64)> = (0..map::SLOTS).map(|slot| (entry(slot), slot)).collect();
    held.sort_unstable();
    // The newest ten now hold whole and well-formed blocks of an earlier time.
    let newest = &held[held.len() - 10..];
    assert!(newest.iter().all(|(number, _)| *number > 0), "{held:?}");
    let target = |slot: u64| machine.at(map::DEVICES + map::DEVICE_TARGETS + slot * PAGE_SIZE, PAGE_SIZE);
    for ((_, from), (_, to)) in held[held.len() - 20..].iter().zip(newest) {
        let mut block = vec![0; 4096];
        machine.ram.read(target(*from), &mut block).unwrap();
        machine.ram.write(target(*to), &block).unwrap();
    }
    machine.vm.resume().unwrap();
    let report = machine.wait_for_all_checks();
    assert_eq!((report.blocks_lost, report.pages_lost, report.interrupts_lost), (10, 0, 0), "{report:?}");
}

/// Falls over under whoever asks it anything.
#[derive(Debug)]
struct Trapdoor;

impl IoBus for Trapdoor {
    fn pio_read(&self, _port: u16, _data: &mut [u8]) {
        panic!("on purpose");
    }

    fn pio_write(&self, _port: u16, _data: &[u8]) {}

    fn mmio_read(&self, _gpa: Gpa, _data: &mut [u8]) {
        panic!("on purpose");
    }

    fn mmio_write(&self, _gpa: Gpa, _data: &[u8]) {}
}

#[test]
fn a_guest_that_falls_over_is_known_to_have_and_can_be_paused() {
    let ram = Arc::new(GuestRam::new("software", &layout::ram_regions(SMALL).unwrap()).unwrap());
    let vm = SoftwareVm::new(ram.clone()).unwrap();
    let bus: Arc<dyn IoBus> = Arc::new(Trapdoor);
    vm.start(&bus).unwrap();
    vm.boot(&BootInfo::new(&parts(&ram), 0, 0, false).unwrap()).unwrap();
    vm.resume().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !vm.failed() {
        assert!(Instant::now() < deadline, "nobody was told");
        std::thread::sleep(Duration::from_millis(1));
    }
    vm.pause(PATIENCE).unwrap();
    vm.save().unwrap();
    vm.shutdown();
}
