//! BARs as large as those of graphics cards.

use std::sync::Arc;

use vfio_migration_device::PciRegion;
use vfio_migration_types::Gpa;

use super::fakes::{ECAM, FakeHardware, HIGH, PHYSICAL_BITS, fake_host, mailbox};
use super::functions::Machine;
use crate::*;

/// A device whose BAR 2 has so many bytes, all of them trapped.
fn with_bar(name: &str, size: u64) -> Arc<FakeHardware> {
    let large = |regions: &mut Vec<PciRegion>| (regions[1].size, regions[1].mappable) = (size, Vec::new());
    Arc::new(FakeHardware::with(name, mailbox(), 0, &large))
}

#[test]
fn the_bars_of_graphics_cards_have_room() {
    const GIB: u64 = 1 << 30;
    let sizes = [64 * GIB, 1 << 20, 32 * GIB, 64 * GIB, GIB];
    let machine = Machine::of((1..).zip(sizes).map(|(n, size)| with_bar(&format!("dev{n}"), size)).collect());
    let mut places = Vec::new();
    for (slot, size) in (1..).zip(sizes) {
        machine.config_write(slot, 4, &[6, 0]);
        let [low, high] = [machine.dword(slot, 0x18) & !0xf, machine.dword(slot, 0x1c)].map(u64::from);
        let at = high << 32 | low;
        assert!(at.is_multiple_of(size) && at >= HIGH && at + size <= 1 << PHYSICAL_BITS, "{at:#x}");
        assert_eq!(at < HIGH + GIB, size < GIB, "the guest program maps the first GiB alone");
        machine.store(at + 8, u32::from(slot));
        assert_eq!(machine.load(at + 8), u32::from(slot));
        places.push((at, at + size));
    }
    places.sort_unstable();
    assert!(places.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{places:x?}");
    // More than there is, is told.
    let (host, ..) = fake_host();
    let bus = PciBus::new(Arc::clone(&host), Gpa(ECAM));
    let too_large = with_bar("gpu0", 512 * GIB);
    bus.add(Arc::new(VfioPciFunction::new(Devfn::in_slot(1), too_large, host).unwrap()));
    assert!(bus.place_bars().is_err());
}
