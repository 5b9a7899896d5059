//! Sample devices inside the test: registers, rings, DMA, interrupts — enough of the hardware contract to prove the
//! guest's driver, and with faults on request to prove its checks.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use vfio_migration_memory::{GuestRam, RamSpec};
use vfio_migration_types::{Gpa, RamOffset};
use vfio_migration_vmm::bus::{IoBus, unclaimed};
use vfio_migration_vmm::kvm::{GsiRoute, KvmVm, SlotId};
use vfio_migration_vmm::layout::{IOAPIC_PINS, MMIO32_BASE, MMIO64_BASE};

const MAILBOX_LEN: u64 = 1 << 20;
const BAR0_LEN: u64 = 0x4000;
const MAGIC: u64 = 0x4b43_4f4c_4253_4d56;
const PATTERN: u64 = 0x9E37_79B9_7F4A_7C15;
const MSIX_CAP: u32 = 0x40;

/// One thing that goes wrong once.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    /// The next raise of an interrupt is swallowed.
    pub(crate) interrupt: AtomicBool,
    /// The next block of flow 0 is announced but not written.
    pub(crate) stale_block: AtomicBool,
    /// The next block says that this many pages of the device's state are damaged.
    pub(crate) integrity: AtomicU64,
    /// No descriptor is begun.
    pub(crate) hold: AtomicBool,
}

/// A PCI bus with sample devices at devices 1 and up.
#[derive(Debug)]
pub(crate) struct FakeBus {
    ram: Arc<GuestRam>,
    vm: Arc<KvmVm>,
    devices: Vec<Arc<Device>>,
    config_address: Mutex<u32>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    stop: Arc<AtomicBool>,
}

#[derive(Debug)]
struct Device {
    index: u64,
    mailbox: GuestRam,
    slot: OnceLock<SlotId>,
    doorbell: OwnedFd,
    irqfd: OwnedFd,
    gsi: u32,
    state: Mutex<State>,
    faults: Faults,
}

/// What would travel in the device's migration stream.
#[derive(Clone, Debug, Default)]
pub(crate) struct State {
    command: u32,
    msix_control: u32,
    table: [u32; 8],
    enabled: bool,
    ring: u64,
    ring_size: u64,
    tail_addr: u64,
    done_addr: u64,
    head: u64,
    blocks: [u64; 2],
    ack: [u64; 2],
    raised: [bool; 2],
}

impl FakeBus {
    /// `count` devices that work on one descriptor each `pace`.
    pub(crate) fn new(ram: &Arc<GuestRam>, vm: &Arc<KvmVm>, count: u64, pace: Duration) -> Arc<Self> {
        let devices: Vec<_> = (0..count).map(|index| Device::new(index, vm)).collect();
        let bus = Arc::new(Self {
            ram: Arc::clone(ram),
            vm: Arc::clone(vm),
            devices,
            config_address: Mutex::new(0),
            threads: Mutex::default(),
            stop: Arc::default(),
        });
        for device in &bus.devices {
            let (device, bus_too) = (Arc::clone(device), Arc::clone(&bus));
            let thread = std::thread::spawn(move || device.work(&bus_too, pace));
            bus.threads.lock().unwrap().push(thread);
        }
        bus
    }

    pub(crate) fn faults(&self, device: usize) -> &Faults {
        &self.devices[device].faults
    }

    /// Stops every device; the state and mailboxes they leave.
    pub(crate) fn stop(&self) -> Vec<(State, Vec<u8>)> {
        self.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.lock().unwrap().drain(..) {
            thread.join().unwrap();
        }
        self.devices
            .iter()
            .map(|device| {
                let mut mailbox = vec![0; MAILBOX_LEN as usize];
                device.mailbox.read(RamOffset(0), &mut mailbox).unwrap();
                (device.state.lock().unwrap().clone(), mailbox)
            })
            .collect()
    }

    /// Gives fresh, idle devices the state of others.
    pub(crate) fn load(&self, states: Vec<(State, Vec<u8>)>) {
        // The routes before the devices, which begin to work and to interrupt at once.
        self.route(states.iter().map(|(state, _)| state.table));
        // All mailboxes before any device: one that works writes to its peer's.
        for (device, (_, mailbox)) in self.devices.iter().zip(&states) {
            device.mailbox.write(RamOffset(0), mailbox).unwrap();
        }
        for (device, (state, _)) in self.devices.iter().zip(states) {
            *device.state.lock().unwrap() = state;
        }
    }

    /// Rings all doorbells, as a device does by itself when it runs again.
    pub(crate) fn wake(&self) {
        for device in &self.devices {
            signal(&device.doorbell);
        }
    }

    fn route(&self, tables: impl Iterator<Item = [u32; 8]>) {
        let route = |(device, table): (&Arc<Device>, [u32; 8])| {
            let address = u64::from(table[1]) << 32 | u64::from(table[0]);
            GsiRoute { gsi: device.gsi, address, data: table[2] }
        };
        let routes: Vec<_> = self.devices.iter().zip(tables).map(route).collect();
        self.vm.set_gsi_routes(&routes).unwrap();
    }

    /// Where DMA to `address` goes.
    fn dma_write(&self, address: u64, bytes: &[u8]) {
        if let Some(offset) = self.ram.offset_of(Gpa(address), bytes.len() as u64) {
            return self.ram.write(offset, bytes).unwrap();
        }
        let offset = address - MMIO64_BASE;
        let device = &self.devices[(offset / MAILBOX_LEN) as usize];
        device.mailbox.write(RamOffset(offset % MAILBOX_LEN), bytes).unwrap();
    }

    fn dma_read(&self, address: u64, len: usize) -> Vec<u64> {
        let mut bytes = vec![0; len];
        let offset = self.ram.offset_of(Gpa(address), len as u64).unwrap();
        self.ram.read(offset, &mut bytes).unwrap();
        bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
    }

    fn raise(&self, device: &Device, state: &mut State, flow: usize) {
        if state.raised[flow] || state.blocks[flow] <= state.ack[flow] {
            return;
        }
        state.raised[flow] = true;
        if device.faults.interrupt.swap(false, Ordering::SeqCst) {
            return;
        }
        if flow == 0 {
            signal(&device.irqfd);
        } else {
            let address = u64::from(state.table[5]) << 32 | u64::from(state.table[4]);
            self.vm.signal_msi(address, state.table[6]).unwrap();
        }
    }
}

impl Device {
    fn new(index: u64, vm: &Arc<KvmVm>) -> Arc<Self> {
        let mailbox = GuestRam::new("mailbox", &[RamSpec { gpa: Gpa(0), len: MAILBOX_LEN }]).unwrap();
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let (doorbell, irqfd, gsi) = (event(), event(), IOAPIC_PINS + u32::try_from(index).unwrap());
        vm.register_irqfd(irqfd.as_fd(), gsi).unwrap();
        let place = Gpa(MMIO32_BASE + index * BAR0_LEN + 0x1000);
        vm.register_ioeventfd(doorbell.as_fd(), place, 4, None).unwrap();
        let host = mailbox.host_address(RamOffset(0), MAILBOX_LEN).unwrap();
        // SAFETY: the device holds the mailbox until it has removed the slot.
        let slot =
            unsafe { vm.add_memory_slot(Gpa(MMIO64_BASE + index * MAILBOX_LEN), host, MAILBOX_LEN, false) };
        Arc::new(Self {
            index,
            mailbox,
            slot: OnceLock::from(slot.unwrap()),
            doorbell,
            irqfd,
            gsi,
            state: Mutex::default(),
            faults: Faults::default(),
        })
    }

    fn work(&self, bus: &FakeBus, pace: Duration) {
        while !bus.stop.load(Ordering::SeqCst) {
            let busy = !self.faults.hold.load(Ordering::SeqCst) && self.step(bus);
            let patience = if busy { pace } else { Duration::from_millis(5) };
            let patience = Timespec::try_from(patience).unwrap();
            if busy {
                // The pace of the hardware.
                std::thread::park_timeout(pace);
            } else {
                poll(&mut [PollFd::new(&self.doorbell, PollFlags::IN)], Some(&patience)).unwrap();
            }
            let _ = rustix::io::read(&self.doorbell, &mut [0; 8]);
        }
    }

    /// One descriptor, if there is one.
    fn step(&self, bus: &FakeBus) -> bool {
        let mut state = self.state.lock().unwrap();
        if !state.enabled {
            return false;
        }
        let tail = bus.dma_read(state.tail_addr, 8)[0];
        if state.head == tail {
            return false;
        }
        let descriptor = bus.dma_read(state.ring + state.head % state.ring_size * 32, 32);
        let [source, target, len_flags, cookie] = descriptor.try_into().unwrap();
        let (len, flow) = ((len_flags & 0xFFFF_FFFF) as usize, (len_flags >> 32) as usize);
        let number = state.blocks[flow] + 1;
        let sum = bus.dma_read(source, len).into_iter().fold(0, u64::wrapping_add);
        let integrity = self.faults.integrity.swap(0, Ordering::SeqCst);
        let mut block = vec![MAGIC, number, cookie, len_flags, sum, integrity, 0, 0];
        block.extend((8..len as u64 / 8).map(|index| number.wrapping_mul(PATTERN) ^ (index << 32 | index)));
        block[7] = block.iter().copied().fold(0, u64::wrapping_add);
        let bytes: Vec<u8> = block.into_iter().flat_map(u64::to_le_bytes).collect();
        if flow != 0 || !self.faults.stale_block.swap(false, Ordering::SeqCst) {
            bus.dma_write(target, &bytes);
        }
        state.head += 1;
        state.blocks[flow] = number;
        bus.dma_write(state.done_addr + 8 * flow as u64, &number.to_le_bytes());
        bus.raise(self, &mut state, flow);
        true
    }

    fn config_read(&self, register: u32) -> u32 {
        let state = self.state.lock().unwrap();
        match register {
            0x00 => 0x4d53_5646,
            0x04 => 0x0010_0000 | state.command,
            0x08 => 0xFF00_0001,
            0x10 => u32::try_from(MMIO32_BASE + self.index * BAR0_LEN).unwrap(),
            0x18 => ((MMIO64_BASE + self.index * MAILBOX_LEN) & 0xFFFF_FFFF) as u32 | 0xC,
            0x1C => ((MMIO64_BASE + self.index * MAILBOX_LEN) >> 32) as u32,
            0x34 => MSIX_CAP,
            MSIX_CAP => state.msix_control | 1 << 16 | 0x11,
            0x44 => 0x2000,
            0x48 => 0x3000,
            _ => 0,
        }
    }

    fn config_write(&self, bus: &FakeBus, register: u32, value: u32) {
        let mut state = self.state.lock().unwrap();
        match register {
            0x04 => state.command = value & 0xFFFF,
            MSIX_CAP => state.msix_control = value & 0xC000_0000,
            _ => {}
        }
        drop(state);
        if register == MSIX_CAP {
            bus.route(bus.devices.iter().map(|device| device.state.lock().unwrap().table));
        }
    }

    fn read(&self, register: u64) -> u64 {
        let state = self.state.lock().unwrap();
        match register {
            0x00 => 0x4c50_4d53,
            0x04 => 0x1_0000,
            0x0C => u64::from(state.enabled),
            0x48 => state.blocks[0],
            0x50 => state.blocks[1],
            0x60 => state.head,
            0x2000..0x2020 => u64::from(state.table[((register - 0x2000) / 4) as usize]),
            _ => 0,
        }
    }

    fn write(&self, bus: &FakeBus, register: u64, value: u64) {
        let mut state = self.state.lock().unwrap();
        match register {
            0x08 => state.enabled = value & 1 == 1,
            0x10 => state.ring = value,
            0x18 => state.ring_size = value,
            0x20 => state.tail_addr = value,
            0x28 => state.done_addr = value,
            0x30 | 0x38 => {
                let flow = ((register - 0x30) / 8) as usize;
                state.ack[flow] = value;
                state.raised[flow] = false;
                bus.raise(self, &mut state, flow);
            }
            0x1000 => panic!("the doorbell left KVM"),
            0x2000..0x2020 => state.table[((register - 0x2000) / 4) as usize] = value as u32,
            _ => {}
        }
    }
}

impl IoBus for FakeBus {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        let address = *self.config_address.lock().unwrap();
        let device = (address >> 11 & 31).checked_sub(1).and_then(|index| self.devices.get(index as usize));
        match (port, device) {
            (0xCFC, Some(device)) if address >> 31 == 1 && address >> 16 & 0xFF == 0 => {
                data.copy_from_slice(&device.config_read(address & 0xFC).to_le_bytes());
            }
            _ => unclaimed(data),
        }
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        let mut value = [0; 4];
        value[..data.len()].copy_from_slice(data);
        let value = u32::from_le_bytes(value);
        if port == 0xCF8 {
            *self.config_address.lock().unwrap() = value;
        } else if port == 0xCFC {
            let address = *self.config_address.lock().unwrap();
            if let Some(device) = self.devices.get((address >> 11 & 31) as usize - 1) {
                device.config_write(self, address & 0xFC, value);
            }
        }
    }

    fn mmio_read(&self, gpa: Gpa, data: &mut [u8]) {
        let offset = gpa.0 - MMIO32_BASE;
        let value = self.devices[(offset / BAR0_LEN) as usize].read(offset % BAR0_LEN);
        data.copy_from_slice(&value.to_le_bytes()[..data.len()]);
    }

    fn mmio_write(&self, gpa: Gpa, data: &[u8]) {
        let mut value = [0; 8];
        value[..data.len()].copy_from_slice(data);
        let offset = gpa.0 - MMIO32_BASE;
        let device = &self.devices[(offset / BAR0_LEN) as usize];
        device.write(self, offset % BAR0_LEN, u64::from_le_bytes(value));
    }
}

/// Takes what KVM holds of the devices away again; the machine must be paused.
pub(crate) fn detach(bus: &FakeBus) {
    for device in &bus.devices {
        bus.vm.unregister_irqfd(device.irqfd.as_fd(), device.gsi).unwrap();
        let place = Gpa(MMIO32_BASE + device.index * BAR0_LEN + 0x1000);
        bus.vm.unregister_ioeventfd(device.doorbell.as_fd(), place, 4, None).unwrap();
        bus.vm.remove_memory_slot(*device.slot.get().unwrap()).unwrap();
    }
}

fn signal(event: &OwnedFd) {
    rustix::io::write(event, &1u64.to_ne_bytes()).unwrap();
}
