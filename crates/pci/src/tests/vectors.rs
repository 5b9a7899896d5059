//! Vectors that are many, fewer at the host than the guest wants, or that the device does not let go of.

use std::fs::File;
use std::sync::Arc;

use rustix::process::{Resource, Rlimit, setrlimit};
use vfio_migration_device::{IrqIndex, PciFunction};
use vfio_migration_types::{Gpa, error_chain};

use super::fakes::FakeHardware;
use super::functions::{Machine, message};

/// Place of the table of [`FakeHardware::of_vectors`] in BAR 0.
const TABLE: u64 = 0x1_0000;
const MANY: u16 = 2048;

/// A machine of such devices, decoded, whose guest has enabled MSI-X with everything masked.
fn many(devices: u8, vectors: u16, noresize: bool) -> Machine {
    let device = |slot| Arc::new(FakeHardware::of_vectors(&format!("dev{slot}"), vectors, noresize));
    let machine = Machine::of((1..=devices).map(device).collect());
    for slot in 1..=devices {
        machine.config_write(slot, 4, &[6, 0]);
        machine.config_write(slot, 0x42, &0x8000u16.to_le_bytes());
    }
    machine
}

impl Machine {
    /// The guest writes an entry of the table of the function in `slot`, and unmasks it.
    fn unmask(&self, slot: u8, vector: u64, data: u32) {
        let at = u64::from(self.dword(slot, 0x10) & !0xf) + TABLE + 16 * vector;
        self.bus.mmio_write(Gpa(at), &message(data).address.to_le_bytes());
        self.store(at + 8, data);
        self.store(at + 12, 0);
    }

    fn mask(&self, slot: u8, vector: u64) {
        self.store(u64::from(self.dword(slot, 0x10) & !0xf) + TABLE + 16 * vector + 12, 1);
    }
}

/// Runs test `name` of this file in a process of its own that may open `limit` files; there, runs `body`.
fn limited(name: &str, limit: u64, body: impl FnOnce()) {
    const INSIDE: &str = "VFIO_MIGRATE_TEST_FILE_LIMIT";
    if std::env::var_os(INSIDE).is_some() {
        setrlimit(Resource::Nofile, Rlimit { current: Some(limit), maximum: Some(limit) }).unwrap();
        return body();
    }
    let program = std::env::current_exe().unwrap();
    let path = format!("tests::vectors::{name}");
    let run = std::process::Command::new(program)
        .args(["--exact", &path, "--nocapture", "--test-threads=1"])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let out = String::from_utf8_lossy(&run.stdout);
    assert!(
        run.status.success() && out.contains("1 passed"),
        "{out}{}",
        String::from_utf8_lossy(&run.stderr)
    );
}

/// Leaves an even number of descriptors below `limit`: a vector takes two, its eventfd and the fake device's copy of it,
/// and it is the eventfd that is to find none.
fn an_even_number_left(limit: u64) -> Option<File> {
    let open = std::fs::read_dir("/proc/self/fd").unwrap().filter(|entry| {
        let name = entry.as_ref().unwrap().file_name();
        name.to_str().unwrap().parse::<u64>().unwrap() < limit
    });
    // One of them is the folder's own.
    let left = limit - (open.count() as u64 - 1);
    (left % 2 == 1).then(|| File::open("/dev/null").unwrap())
}

#[test]
fn two_devices_of_2048_vectors_work_with_64_unmasked() {
    limited("two_devices_of_2048_vectors_work_with_64_unmasked", 1024, || {
        let machine = many(2, MANY, false);
        for slot in [1, 2] {
            for n in 0..64 {
                machine.unmask(slot, 31 * n, u32::try_from(n).unwrap());
            }
            assert!((0..64).all(|n| machine.devices[usize::from(slot) - 1].raise(31 * n)));
            let mut data: Vec<u32> = machine.irq.take().iter().map(|message| message.data).collect();
            data.sort_unstable();
            assert_eq!(data, (0..64).collect::<Vec<_>>());
        }
        let connected = |device: usize| machine.devices[device].state.lock().unwrap().events.len();
        assert_eq!((connected(0), connected(1)), (64, 64));

        let state = machine.save().unwrap();
        let destination = Machine::of(vec![Arc::new(FakeHardware::of_vectors("dev1", MANY, false))]);
        assert_eq!(destination.restore(&state).unwrap(), 64);
        destination.devices[0].raise(31 * 63);
        assert_eq!(destination.irq.take(), [message(63)]);
        assert!(machine.bus.functions().iter().all(|function| function.errors() == 0));
    });
}

#[test]
fn a_vector_without_a_descriptor_is_told_by_name_and_the_others_work() {
    limited("a_vector_without_a_descriptor_is_told_by_name_and_the_others_work", 90, || {
        let machine = many(1, MANY, false);
        let odd = an_even_number_left(90);
        let function = machine.function();
        let fits = (0u32..).find(|n| {
            machine.unmask(1, u64::from(*n), *n);
            function.errors() > 0
        });
        let fits = fits.unwrap();
        assert!((8..64).contains(&fits), "{fits} fit");
        assert!((0..fits).all(|n| machine.devices[0].raise(n)));
        assert_eq!(machine.irq.take().len(), fits as usize);
        // What one gives back, by a disable, is there again.
        machine.config_write(1, 0x42, &[0xff, 0x07]);
        let errors = function.errors();
        (0..u64::from(fits)).for_each(|n| machine.mask(1, n));
        (u64::from(fits)..u64::from(MANY)).for_each(|n| machine.mask(1, n));
        machine.config_write(1, 0x42, &[0xff, 0x87]);
        machine.unmask(1, 2047, 7);
        assert!(machine.devices[0].raise(2047));
        assert_eq!((machine.irq.take(), function.errors()), (vec![message(7)], errors));

        // As the destination of a guest that has more in use.
        let mut state = machine.save().unwrap();
        state.vectors.iter_mut().for_each(|vector| vector.masked = false);
        drop((machine, odd));
        let destination = Machine::of(vec![Arc::new(FakeHardware::of_vectors("dev1", MANY, false))]);
        let _odd = an_even_number_left(90);
        let refused = error_chain(&destination.restore(&state).unwrap_err());
        let named = refused.split("MSI-X vector ").nth(1).and_then(|rest| rest.split(' ').next());
        assert!(named.is_some_and(|number| number.parse::<u32>().is_ok()), "{refused}");
        assert!(
            refused.contains("limit on open files") && refused.contains("Too many open files"),
            "{refused}"
        );
        destination.function().undo().unwrap();
    });
}

#[test]
fn interrupt_numbers_that_run_out_are_told_and_come_back() {
    let (host, ..) = super::fakes::fake_host();
    let router = host.router();
    let all: Vec<u32> = std::iter::from_fn(|| router.allocate()).collect();
    // KVM takes 4096 routes, and the pins have 40 of them.
    assert_eq!((all.len(), all[0]), (4096 - 40, 24));
    router.free(100);
    assert_eq!((router.allocate(), router.allocate()), (Some(100), None));
}

#[test]
fn a_device_whose_vectors_are_one_set_grows_and_loses_no_raise() {
    let machine = many(1, 8, true);
    let device = &machine.devices[0];
    device.log();
    machine.unmask(1, 2, 20);
    machine.unmask(1, 1, 10);
    assert_eq!(device.log(), ["irqs 2 off", "irqs 2 0+3", "irqs 2 1+1"], "what is inside of the set fits");
    assert!(machine.irq.take().is_empty());
    machine.unmask(1, 5, 50);
    assert_eq!(device.log(), ["irqs 2 off", "irqs 2 0+6"]);
    let mut data: Vec<u32> = machine.irq.take().iter().map(|message| message.data).collect();
    data.sort_unstable();
    assert_eq!(data, [10, 20], "each may have been raised meanwhile");
    assert!([1, 2, 5].into_iter().all(|n| device.raise(n)));
    assert_eq!((machine.irq.take().len(), machine.function().errors()), (3, 0));
    // At the destination it is one set from the start.
    let state = machine.save().unwrap();
    let destination = Machine::of(vec![Arc::new(FakeHardware::of_vectors("dev1", 8, true))]);
    assert_eq!(destination.restore(&state).unwrap(), 3);
    assert!(destination.devices[0].log().contains(&"irqs 2 0+6".to_owned()));
}

/// A guest that has enabled all four of MSI's vectors.
fn four(possible: Option<u32>) -> Machine {
    let machine = Machine::of(vec![FakeHardware::legacy("dev1", true)]);
    machine.config_write(1, 4, &[7, 0]);
    machine.devices[0].state.lock().unwrap().possible = possible;
    machine.devices[0].log();
    machine.msi(0x21, message(0x40), 0);
    machine
}

#[test]
fn msi_of_which_the_host_has_fewer_is_retried_with_what_is_possible() {
    for possible in [1, 2, 3] {
        let machine = four(Some(possible));
        let device = &machine.devices[0];
        assert_eq!(device.log(), ["irqs 0 off", "irqs 1 0+4", &format!("irqs 1 0+{possible}")]);
        assert!((0..4).all(|n| device.raise_as(IrqIndex::Msi, n) == (n < possible)));
        assert_eq!(machine.irq.take().len(), possible as usize);
        assert_eq!(machine.function().errors(), 1, "it is told");
        // Masking one does not ask for them all again, which would disconnect those that work.
        machine.config_write(1, 0x70, &[1, 0, 0, 0]);
        machine.config_write(1, 0x70, &[0, 0, 0, 0]);
        assert_eq!((device.log(), machine.function().errors()), (vec![], 1));
        // Enabled anew, all are asked for again.
        machine.msi(0, message(0x40), 0);
        device.state.lock().unwrap().possible = None;
        device.log();
        machine.msi(0x21, message(0x40), 0);
        assert_eq!(device.log(), ["irqs 0 off", "irqs 1 0+4"]);
        assert!(device.raise_as(IrqIndex::Msi, 3));
    }
}

#[test]
fn msix_of_which_the_host_has_fewer_is_retried_with_what_is_possible() {
    let machine = Machine::running(1);
    machine.devices[0].state.lock().unwrap().possible = Some(1);
    machine.vector(0, message(0x41), false);
    machine.vector(1, message(0x42), false);
    machine.msix(true, false);
    assert_eq!(machine.devices[0].log(), ["irqs 2 0+2", "irqs 2 0+1"]);
    assert!(machine.devices[0].raise(0) && !machine.devices[0].raise(1));
    assert_eq!((machine.irq.take(), machine.function().errors()), (vec![message(0x41)], 1));
}

#[test]
fn a_destination_that_has_fewer_refuses_and_is_as_it_was() {
    let msix = Machine::running(1);
    msix.vector(0, message(0x41), false);
    msix.vector(1, message(0x42), false);
    msix.msix(true, false);
    let msix = (msix.save().unwrap(), Machine::new(1), "MSI-X");
    let msi = (four(None).save().unwrap(), Machine::of(vec![FakeHardware::legacy("dev1", true)]), "MSI");
    for (state, destination, kind) in [msix, msi] {
        let device = &destination.devices[0];
        device.state.lock().unwrap().possible = Some(1);
        let refused = error_chain(&destination.restore(&state).unwrap_err());
        assert!(refused.contains(&format!("connecting {kind} vectors 0 to ")), "{refused}");
        assert!(refused.contains("the host has 1 of the"), "{refused}");
        destination.function().undo().unwrap();
        assert!(
            device.state.lock().unwrap().events.is_empty()
                && destination.irq.attached.lock().unwrap().is_empty()
        );
        device.state.lock().unwrap().possible = None;
        destination.restore(&state).unwrap();
    }
}

/// Config writes by which a guest turns one kind on, in the place of whatever is.
fn turn_on(machine: &Machine, kind: IrqIndex) {
    if kind != IrqIndex::Msix {
        machine.msix(false, false);
    }
    if kind != IrqIndex::Msi {
        machine.msi(0, message(0x50), 0);
    }
    match kind {
        IrqIndex::Msix => machine.msix(true, false),
        IrqIndex::Msi => machine.msi(1, message(0x50), 0),
        IrqIndex::Intx => {}
    }
}

#[test]
fn a_kind_that_the_device_refuses_to_disable_is_not_forgotten() {
    let kinds = [IrqIndex::Intx, IrqIndex::Msi, IrqIndex::Msix];
    let pairs = kinds.iter().flat_map(|from| kinds.iter().map(move |to| (*from, *to)));
    for (from, to) in pairs.filter(|(from, to)| from != to) {
        let machine = Machine::of(vec![FakeHardware::legacy("dev1", true)]);
        let device = &machine.devices[0];
        machine.config_write(1, 4, &[6, 0]);
        machine.vector(0, message(0x41), false);
        turn_on(&machine, from);
        device.log();
        device.state.lock().unwrap().keeps.insert(from.number());
        // The fake panics when another kind is connected beside it.
        turn_on(&machine, to);
        assert!(machine.function().errors() > 0, "{from} to {to}");
        let only = |kind: IrqIndex| {
            let state = device.state.lock().unwrap();
            !state.events.is_empty() && state.events.keys().all(|(of, _)| *of == kind.number())
        };
        assert!(only(from), "{from} to {to}");
        assert!(!device.raise_as(from, 0) || machine.irq.take().is_empty(), "{from} is off for the guest");
        // With the next that the guest changes, the device lets go, and the other is there.
        device.state.lock().unwrap().keeps.clear();
        let errors = machine.function().errors();
        machine.store(u64::from(machine.dword(1, 0x10)) + 0x200c, 0);
        if to != IrqIndex::Msix {
            machine.config_write(1, 4, &[6, 0]);
        }
        assert!(only(to), "{from} to {to}: {:?}", device.log());
        assert_eq!(machine.function().errors(), errors);
    }
}

#[test]
fn what_a_failed_undo_left_connected_goes_before_a_restore() {
    let source = four(None);
    let state = source.save().unwrap();
    let destination = Machine::of(vec![FakeHardware::legacy("dev1", true)]);
    let device = &destination.devices[0];
    destination.restore(&state).unwrap();
    device.state.lock().unwrap().keeps.insert(1);
    destination.function().undo().unwrap_err();
    destination.restore(&state).unwrap_err();
    device.state.lock().unwrap().keeps.clear();
    device.log();
    assert_eq!(destination.restore(&state).unwrap(), 4);
    assert_eq!(
        device.log().iter().filter(|line| line.starts_with("irqs")).collect::<Vec<_>>(),
        ["irqs 1 off", "irqs 1 0+4"]
    );
}

#[test]
fn what_a_device_refused_once_is_connected_by_another_try() {
    let machine = Machine::of(vec![FakeHardware::legacy("dev1", true)]);
    let (device, function) = (&machine.devices[0], machine.function());
    machine.config_write(1, 4, &[6, 0]);
    machine.vector(0, message(0x41), false);
    device.state.lock().unwrap().fail = true;
    machine.msix(true, false);
    assert!(function.is_unsettled() && function.errors() == 1);
    assert!(!device.raise_as(IrqIndex::Msix, 0), "it has an eventfd");
    // Not beside a guest that is paused, and no fault of the guest's then.
    machine.bus.host().gate().close();
    assert!(!function.settle_interrupts() && machine.bus.host().gate().violations() == 0);
    machine.bus.host().gate().open();
    assert!(function.settle_interrupts() && !function.is_unsettled());
    assert!(device.raise_as(IrqIndex::Msix, 0));
    assert_eq!(machine.irq.take(), [message(0x41)]);
    assert_eq!(function.errors(), 1);
}
