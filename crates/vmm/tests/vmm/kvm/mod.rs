//! The reference VMM on real KVM: the guest program boots, runs, checks, is paused, saved and loaded.
#![expect(clippy::cast_possible_truncation, reason = "the numbers of the tests are small")]

mod clock;
mod ring;

use std::sync::Arc;
use std::time::Duration;

use self::ring::{Rig, kvm_answers};
use crate::sample::SampleBus;
use vfio_migration_memory::DirtySource;
use vfio_migration_pci::{MsiRouter, PciHost};
use vfio_migration_sim::{MigrationState, Options};
use vfio_migration_types::{Bitmap, Granule, PAGE_SIZE, RamOffset};
use vfio_migration_vmm::StopReason;
use vfio_migration_vmm::guest::{self, Areas, BootInfo, Stage, map};
use vfio_migration_vmm::kvm::{KvmBackend, KvmVm, cpu_features, section_versions};
use vfio_migration_vmm::layout;

/// Time that a device takes for a block.
const PACE: Duration = Duration::from_millis(4);

#[test]
fn the_program_runs_without_devices() {
    if !kvm_answers() {
        return;
    }
    let rig = Rig::new(64);
    rig.boot(50 << 20, 0, false);
    let report = rig.wait("full passes", |report| report.page_passes >= 2 && report.pages_written > 20_000);
    assert_eq!(report.lost(), 0, "{report:?}");
    assert!(report.last_clock_ns > 0 && report.ticks > 0 && report.loops > 0);
    assert_eq!(rig.platform.serial().lines(), ["guest: up", "guest: driver ready, checking"]);
    assert_eq!(rig.platform.failure(), None);
}

#[test]
fn a_corrupted_page_is_found_once() {
    if !kvm_answers() {
        return;
    }
    let rig = Rig::new(64);
    rig.boot(1 << 20, 0, false);
    let before = rig.wait("pages", |report| report.pages_written > 200 && report.page_passes >= 1);
    assert_eq!(before.lost(), 0);
    rig.pause();
    let areas = Areas::of(&guest::parts(&rig.ram), 0).unwrap();
    // One word each of the first, second and last of the three that are compared.
    for (page, word) in [(10, 0), (11, 1), (12, 511)] {
        let at = rig.offset(areas.page(page).unwrap() + word * 8, 8);
        rig.ram.write_u64(at, 0xBAD).unwrap();
    }
    rig.vm.resume().unwrap();
    let found = rig.wait("the loss", |report| report.pages_lost >= 3);
    let after = rig.wait("another pass", |report| report.page_passes > found.page_passes + 1);
    assert_eq!(after.pages_lost, 3, "{after:?}");
}

#[test]
fn a_paused_machine_does_not_change() {
    if !kvm_answers() {
        return;
    }
    let rig = Rig::new(64);
    rig.boot(50 << 20, 0, false);
    rig.wait("pages", |report| report.pages_written > 1000);
    for _ in 0..20 {
        rig.pause();
        assert!(rig.vm.is_paused());
        let (digest, report) = (rig.ram.digest().unwrap(), rig.report());
        std::thread::park_timeout(Duration::from_millis(5));
        assert_eq!(digest, rig.ram.digest().unwrap());
        rig.vm.resume().unwrap();
        rig.wait("it to go on", |now| now.loops > report.loops);
    }
    assert_eq!(rig.report().lost(), 0);
}

#[test]
fn a_machine_moves_five_times() {
    if !kvm_answers() {
        return;
    }
    let mut rig = Rig::new(64);
    rig.boot(50 << 20, 0, false);
    rig.wait("pages", |report| report.pages_written > 1000);
    for _ in 0..5 {
        rig.pause();
        let before = rig.report();
        rig = rig.moved();
        assert_eq!(rig.report(), before);
        rig.vm.resume().unwrap();
        let after = rig.wait("it to go on", |report| {
            report.pages_written > before.pages_written + 500 && report.page_passes > before.page_passes + 1
        });
        assert_eq!(after.lost(), 0, "{after:?}");
        assert!(after.ticks > before.ticks && after.stage == Stage::Running);
        assert!(after.longest_gap_ns >= 1_000_000, "the gap is visible: {after:?}");
    }
    guest::ask_to_reset_gap(&rig.ram).unwrap();
    rig.wait("the gap to be forgotten", |report| report.request == 0);
}

#[test]
fn a_move_that_loses_a_page_is_found() {
    if !kvm_answers() {
        return;
    }
    let rig = Rig::new(64);
    rig.boot(20 << 20, 0, false);
    rig.wait("pages", |report| report.pages_written > 2000);
    rig.pause();
    let page = Areas::of(&guest::parts(&rig.ram), 0).unwrap().page(1000).unwrap();
    let to = rig.moved();
    to.ram.write(to.offset(page, 4096), &[0; 4096]).unwrap();
    to.vm.resume().unwrap();
    to.wait("the loss", |report| report.pages_lost == 1);
}

#[test]
fn the_dirty_log_names_every_page_written() {
    if !kvm_answers() {
        return;
    }
    let rig = Rig::new(64);
    rig.boot(20 << 20, 0, false);
    rig.wait("pages", |report| report.pages_written > 100);
    let log = rig.vm.dirty_log().unwrap();
    assert!(rig.vm.dirty_log().is_err(), "there is one log");
    log.report(&mut Bitmap::new(rig.ram.size(), Granule::PAGE)).unwrap_err();
    rig.pause();
    let mut images = vec![image(&rig)];
    log.start().unwrap();
    log.start().unwrap_err();
    for round in 0..4 {
        let mut dirty = Bitmap::new(rig.ram.size(), Granule::PAGE);
        let before = rig.report();
        rig.vm.resume().unwrap();
        rig.wait("pages", |report| report.pages_written > before.pages_written + 2000);
        if round % 2 == 1 {
            // Reading while it runs loses nothing either.
            log.report(&mut dirty).unwrap();
            rig.wait("pages", |report| report.pages_written > before.pages_written + 4000);
        }
        rig.pause();
        log.report(&mut dirty).unwrap();
        images.push(image(&rig));
        let [old, new] = &images[round..] else { panic!() };
        let changed: Vec<_> = (0..dirty.len()).filter(|page| differs(old, new, *page)).collect();
        let missing: Vec<_> = changed.iter().filter(|page| !dirty.test(**page)).collect();
        assert!(changed.len() > 1000, "{}", changed.len());
        assert!(missing.is_empty(), "written and not logged: {missing:?}");
        let extra = dirty.count() - changed.len() as u64;
        assert!(extra < 100, "{extra} pages too many in the log");
        let mut again = Bitmap::new(rig.ram.size(), Granule::PAGE);
        log.report(&mut again).unwrap();
        assert!(!again.any(), "a report forgets what it said");
    }
    log.stop().unwrap();
    log.stop().unwrap();
    log.start().unwrap();
    log.stop().unwrap();
}

fn image(rig: &Rig) -> Vec<u8> {
    let mut image = vec![0; rig.ram.size() as usize];
    rig.ram.read(RamOffset(0), &mut image).unwrap();
    image
}

fn differs(old: &[u8], new: &[u8], page: u64) -> bool {
    let bytes = page as usize * 4096..(page as usize + 1) * 4096;
    old[bytes.clone()] != new[bytes]
}

/// A machine with `count` sample devices, on which nothing runs yet.
fn with_devices(count: usize) -> (Rig, SampleBus) {
    let mut sample = None;
    let rig = Rig::with_bus(64, |ram, vm| {
        let backend = Arc::new(KvmBackend::new(vm.clone()));
        let router = Arc::new(MsiRouter::new(backend.clone(), layout::MESSAGES));
        let host = PciHost::new(backend.clone(), backend, router, layout::bar_windows());
        let options = Options { state_size: 1 << 20, dma_interval: PACE, ..Options::default() };
        sample.insert(SampleBus::new(ram, host, count, &options)).bus.clone()
    });
    (rig, sample.unwrap())
}

/// The same, with a guest that is up.
fn driven_devices(count: usize, p2p: bool) -> (Rig, SampleBus) {
    let (rig, sample) = with_devices(count);
    sample.bus.place_bars().unwrap();
    rig.boot(10 << 20, count as u64, p2p);
    (rig, sample)
}

#[test]
fn devices_are_driven() {
    if !kvm_answers() {
        return;
    }
    let (rig, _sample) = driven_devices(3, true);
    let report = rig.wait("blocks", |report| {
        report.dma_blocks > 1000 && report.p2p_blocks > 300 && report.block_passes >= 1
    });
    assert_eq!((report.lost(), report.integrity_failures), (0, 0), "{report:?}");
    assert!(report.interrupts > 0 && report.blocks_checked > report.dma_blocks);
}

#[test]
fn a_lost_interrupt_is_counted_and_survived() {
    if !kvm_answers() {
        return;
    }
    let (rig, sample) = driven_devices(1, false);
    let before = rig.wait("blocks", |report| report.dma_blocks > 100);
    assert_eq!(before.lost(), 0);
    sample.hardware[0].swallow(0);
    let lost = rig.wait("the loss", |report| report.interrupts_lost > 0);
    let after = rig.wait("it to go on", |report| report.dma_blocks > lost.dma_blocks + 100);
    assert_eq!((after.interrupts_lost, after.blocks_lost, after.pages_lost), (1, 0, 0), "{after:?}");
}

/// Where the first device writes block after block.
fn targets(rig: &Rig) -> Vec<Vec<u8>> {
    let slot = |slot| {
        let mut block = vec![0; 4096];
        rig.ram.read(target(rig, slot), &mut block).unwrap();
        block
    };
    (0..map::SLOTS).map(slot).collect()
}

fn target(rig: &Rig, slot: u64) -> RamOffset {
    rig.offset(map::DEVICES + map::DEVICE_TARGETS + slot * PAGE_SIZE, PAGE_SIZE)
}

/// Pauses the guest until its device has written all blocks that it was asked for. Gives a slot with one that the guest
/// has not seen, and what it held before.
fn unseen_block(rig: &Rig) -> (u64, Vec<u8>) {
    let word = |at| rig.ram.read_u64(rig.offset(map::DEVICES + at, 8)).unwrap();
    // How often the guest is ahead is its host's affair.
    let until = std::time::Instant::now() + ring::PATIENCE;
    while std::time::Instant::now() < until {
        rig.pause();
        let before = targets(rig);
        let deadline = std::time::Instant::now() + ring::PATIENCE;
        while word(map::DEVICE_DONE) < word(map::DEVICE_TAIL) {
            assert!(std::time::Instant::now() < deadline, "the device does not go on");
            std::thread::yield_now();
        }
        let written = targets(rig);
        let changed = (0..).zip(before).zip(&written).find(|((_, before), now)| before != *now);
        if let Some(((slot, before), _)) = changed {
            return (slot, before);
        }
        rig.vm.resume().unwrap();
        rig.wait("it to go on", |report| report.stage == Stage::Running);
    }
    panic!("the guest is always ahead of its device");
}

#[test]
fn a_stale_block_is_counted() {
    if !kvm_answers() {
        return;
    }
    let (rig, _sample) = driven_devices(1, false);
    rig.wait("blocks", |report| report.dma_blocks > 100);
    // A block that is announced, and was not written.
    let (slot, stale) = unseen_block(&rig);
    rig.ram.write(target(&rig, slot), &stale).unwrap();
    rig.vm.resume().unwrap();
    let lost = rig.wait("the loss", |report| report.blocks_lost > 0);
    // One that says that three pages of the device's state are damaged, which its sum covers.
    let (slot, _) = unseen_block(&rig);
    let at = |word: u64| RamOffset(target(&rig, slot).0 + word * 8);
    let sum = rig.ram.read_u64(at(7)).unwrap();
    assert_eq!(rig.ram.read_u64(at(5)).unwrap(), 0);
    rig.ram.write_u64(at(5), 3).unwrap();
    rig.ram.write_u64(at(7), sum.wrapping_add(3)).unwrap();
    rig.vm.resume().unwrap();
    rig.wait("the damage", |report| report.integrity_failures > 0);
    let after = rig.wait("it to go on", |report| report.dma_blocks > lost.dma_blocks + 100);
    assert_eq!((after.interrupts_lost, after.blocks_lost, after.integrity_failures), (0, 2, 1), "{after:?}");
}

#[test]
fn a_damaged_old_block_is_found() {
    if !kvm_answers() {
        return;
    }
    let (rig, sample) = driven_devices(1, false);
    rig.wait("blocks", |report| report.dma_blocks > 100);
    // A device that is stopped uses no slot again.
    let device = &sample.hardware[0].device;
    device.set_state(MigrationState::Stop).unwrap();
    rig.pause();
    let slots = rig.offset(map::DEVICES + map::DEVICE_SLOTS, 512);
    // The newest block of those that the guest knows. Its last word is compared only through the sum.
    let number = |slot: &u64| rig.ram.read_u64(RamOffset(slots.0 + slot * 8)).unwrap();
    let full = (0..map::SLOTS).max_by_key(number).unwrap();
    let word = map::DEVICES + map::DEVICE_TARGETS + full * 4096 + 504;
    rig.ram.write_u64(rig.offset(word, 8), 1).unwrap();
    rig.vm.resume().unwrap();
    rig.wait("the damage", |report| report.blocks_lost == 1);
    device.set_state(MigrationState::Running).unwrap();
}

#[test]
fn a_machine_with_devices_moves_with_its_interrupts() {
    if !kvm_answers() {
        return;
    }
    let (mut rig, mut sample) = driven_devices(2, true);
    for _ in 0..5 {
        let before = rig.report();
        rig.wait("blocks", |report| report.dma_blocks > before.dma_blocks + 200);
        rig.pause();
        // Before the machine's state is saved: what KVM still had under way reaches the interrupt controllers by this.
        let states = sample.stop();
        let (to, to_sample) = with_devices(2);
        rig.copy_into(&to);
        sample.move_devices(&to_sample);
        to_sample.start(&sample, &states);
        assert_eq!(sample.host.gate().violations(), 0, "a paused guest reached for its devices");
        (rig, sample) = (to, to_sample);
        rig.vm.resume().unwrap();
    }
    let before = rig.report();
    let after = rig.wait("blocks", |report| {
        report.dma_blocks > before.dma_blocks + 500 && report.block_passes > before.block_passes + 1
    });
    assert_eq!((after.blocks_lost, after.pages_lost, after.interrupts_lost), (0, 0, 0), "{after:?}");
}

#[test]
fn a_program_without_its_devices_gives_up() {
    if !kvm_answers() {
        return;
    }
    let rig = Rig::new(64);
    let info = BootInfo::new(&guest::parts(&rig.ram), 0, 2, false).unwrap();
    guest::load(&rig.vm, &info).unwrap();
    rig.vm.resume().unwrap();
    let deadline = std::time::Instant::now() + ring::PATIENCE;
    while rig.platform.failure().is_none() {
        assert!(std::time::Instant::now() < deadline);
        std::thread::yield_now();
    }
    let report = rig.report();
    assert_eq!((report.stage, report.failure_code, report.failure_detail), (Stage::Failed, 2, 0));
    assert_eq!(rig.platform.failure(), Some(2));
    // It waits for ever with interrupts off, so only a kick gets it out.
    let start = std::time::Instant::now();
    rig.pause();
    eprintln!("paused in {:?}", start.elapsed());
    rig.vm.save_state().unwrap();
}

#[test]
fn a_triple_fault_stops_the_machine_with_a_reason() {
    if !kvm_answers() {
        return;
    }
    let rig = Rig::new(64);
    let info = BootInfo::new(&guest::parts(&rig.ram), 0, 0, false).unwrap();
    guest::load(&rig.vm, &info).unwrap();
    // No interrupt table is there yet, so the first instruction's fault cannot be served.
    rig.ram.write(rig.offset(map::PROGRAM, 2), &[0x0F, 0x0B]).unwrap();
    rig.vm.resume().unwrap();
    let reason = rig.vm.wait_for_stop(ring::PATIENCE);
    let stopped = matches!(reason, Some(StopReason::Shutdown { .. } | StopReason::InternalError { .. }));
    assert!(stopped, "{reason:?}");
    rig.vm.resume().unwrap_err();
    rig.pause();
    rig.vm.shutdown();
    rig.vm.resume().unwrap_err();
}

#[test]
fn damaged_state_is_refused() {
    if !kvm_answers() {
        return;
    }
    let rig = Rig::new(64);
    rig.boot(0, 0, false);
    rig.wait("the driver", |report| report.stage == Stage::Running);
    rig.vm.save_state().unwrap_err();
    rig.pause();
    let good = rig.vm.save_state().unwrap();
    let versions = section_versions(1);
    assert_eq!(good.len(), versions.len());
    assert!(good.iter().all(|section| versions.get(&section.name) == Some(&section.version)));
    for (index, section) in good.iter().enumerate() {
        let mut sections = good.clone();
        sections.remove(index);
        rig.vm.load_state(&sections).unwrap_err();
        sections = good.clone();
        sections.push(section.clone());
        rig.vm.load_state(&sections).unwrap_err();
        sections = good.clone();
        sections[index].bytes.pop();
        rig.vm.load_state(&sections).unwrap_err();
        sections = good.clone();
        sections[index].version += 1;
        rig.vm.load_state(&sections).unwrap_err();
    }
    // A CPU feature that no host has: an unassigned bit of leaf 7. Entries are 28 bytes from byte 4.
    let mut sections = good.clone();
    let vcpu = sections.iter_mut().find(|section| section.name == "kvm.vcpu.0").unwrap();
    let leaf =
        vcpu.bytes[4..].chunks_exact(28).position(|entry| entry[..8] == [7, 0, 0, 0, 0, 0, 0, 0]).unwrap();
    let edx = 4 + leaf * 28 + 24;
    assert_eq!(vcpu.bytes[edx] & 1, 0);
    vcpu.bytes[edx] |= 1;
    let error = rig.vm.load_state(&sections).unwrap_err().to_string();
    assert!(error.contains("cpuid.7.0.edx.0"), "{error}");
    // A TSC twice as fast.
    let mut sections = good.clone();
    let vcpu = sections.iter_mut().find(|section| section.name == "kvm.vcpu.0").unwrap();
    let entries = u32::from_le_bytes(vcpu.bytes[..4].try_into().unwrap()) as usize;
    let khz = 4 + entries * 28;
    let faster = u32::from_le_bytes(vcpu.bytes[khz..khz + 4].try_into().unwrap()) * 2;
    vcpu.bytes[khz..khz + 4].copy_from_slice(&faster.to_le_bytes());
    match rig.vm.load_state(&sections) {
        Err(error) => assert!(error.to_string().contains("kHz"), "{error}"),
        Ok(()) => eprintln!("this host scales the TSC"),
    }
    rig.vm.load_state(&good).unwrap();
    rig.vm.resume().unwrap();
    let before = rig.report();
    rig.wait("it to go on", |report| report.ticks > before.ticks + 10);
}

#[test]
fn every_machine_of_a_host_is_offered_the_same_features() {
    if !kvm_answers() {
        return;
    }
    let offered = cpu_features(&KvmVm::open().unwrap()).unwrap();
    assert!(!offered.is_empty());
    assert_eq!(cpu_features(&KvmVm::open().unwrap()).unwrap(), offered);
}

#[test]
fn machines_leave_nothing_behind() {
    if !kvm_answers() {
        return;
    }
    let rig = Rig::new(64);
    rig.boot(0, 0, false);
    rig.wait("the driver", |report| report.stage == Stage::Running);
    let weak = (Arc::downgrade(&rig.vm), Arc::downgrade(&rig.ram));
    drop(rig);
    assert!(weak.0.upgrade().is_none() && weak.1.upgrade().is_none());
}
