//! Moves a `copier` with its guest's memory from one process to another, as a VMM would: the guest is this program.
//!
//! `cargo run --example migrate -- /tmp/a.sock /tmp/b.sock`, with a `copier` on each of them.

use std::error::Error;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use vfio_user_peer::{Client, ClientOptions, IovaRange, MigrationState, Prot, irq_index, region_index};

/// Bytes of guest memory; four words of a bitmap have a bit for each page.
const RAM: u64 = 1 << 20;
const PAGE_SIZE: usize = 4096;
const PAGE: u64 = PAGE_SIZE as u64;
/// What the guest has in each of its pages.
const CONTENT: [u8; PAGE_SIZE] = [0xa5; PAGE_SIZE];

/// One side: guest memory, a device that reaches it from bus address 0, and its interrupt.
struct Host {
    ram: File,
    device: Client,
    vector: OwnedFd,
}

impl Host {
    fn new(socket: &str) -> Result<Self, Box<dyn Error>> {
        let ram = File::from(memfd_create("ram", MemfdFlags::CLOEXEC)?);
        ram.set_len(RAM)?;
        let device = Client::connect(socket, ClientOptions::default())?;
        // Whatever its last guest left in it.
        device.reset()?;
        device.dma_map(0, RAM, Prot::READ_WRITE, Some((ram.as_fd(), 0)))?;
        let vector = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        device.irq_connect(irq_index::MSIX, 0, &[vector.as_fd()])?;
        Ok(Self { ram, device, vector })
    }

    /// What the guest's driver does: has the page at `source` copied to `target`, and waits for the interrupt.
    fn copy(&self, source: u64, target: u64) -> Result<(), Box<dyn Error>> {
        for (register, value) in [(0, source), (8, target), (16, PAGE)] {
            self.device.region_write(0, register, &value.to_le_bytes())?;
        }
        let limit = Timespec::try_from(Duration::from_secs(10))?;
        poll(&mut [PollFd::new(&self.vector, PollFlags::IN)], Some(&limit))?;
        rustix::io::read(&self.vector, &mut [0; 8])?;
        Ok(())
    }

    fn copies(&self) -> Result<u64, Box<dyn Error>> {
        let mut raw = [0; 8];
        self.device.region_read(0, 24, &mut raw)?;
        Ok(u64::from_le_bytes(raw))
    }

    fn page(&self, at: u64) -> Result<[u8; PAGE_SIZE], Box<dyn Error>> {
        let mut page = [0; PAGE_SIZE];
        self.ram.read_exact_at(&mut page, at)?;
        Ok(page)
    }
}

/// Sends the pages that the device wrote since the last time. How many.
fn send_written(from: &Host, to: &Host) -> Result<u32, Box<dyn Error>> {
    let mut bitmap = [0u64; 4];
    from.device.dma_logging_report(IovaRange { iova: 0, len: RAM }, PAGE, &mut bitmap)?;
    for (number, at) in (0..RAM).step_by(PAGE_SIZE).enumerate() {
        if bitmap[number / 64] >> (number % 64) & 1 == 1 {
            to.ram.write_all_at(&from.page(at)?, at)?;
        }
    }
    Ok(bitmap.iter().map(|word| word.count_ones()).sum())
}

/// Moves guest and device from `source` to `destination`, which are sockets of devices alike.
pub(crate) fn migrate(source: &str, destination: &str) -> Result<(), Box<dyn Error>> {
    let (from, to) = (Host::new(source)?, Host::new(destination)?);
    // PCI_COMMAND: memory and bus master.
    from.device.region_write(region_index::CONFIG, 4, &[6, 0])?;
    from.ram.write_all_at(&CONTENT, 0)?;
    from.copy(0, PAGE)?;

    // The log begins, then all of RAM is sent while the device runs; what it writes meanwhile is sent again.
    from.device.dma_logging_start(PAGE, &[IovaRange { iova: 0, len: RAM }])?;
    for at in (0..RAM).step_by(PAGE_SIZE) {
        to.ram.write_all_at(&from.page(at)?, at)?;
    }
    from.copy(PAGE, 7 * PAGE)?;
    println!("{} page was written while memory was sent", send_written(&from, &to)?);
    from.copy(PAGE, 9 * PAGE)?;

    // From here on the guest stands still. The last pages are known once the device is stopped.
    from.device.set_mig_state(MigrationState::Stop)?;
    println!("{} page was written since", send_written(&from, &to)?);
    from.device.set_mig_state(MigrationState::StopCopy)?;
    to.device.set_mig_state(MigrationState::Resuming)?;
    let mut piece = [0; 4096];
    loop {
        match from.device.mig_data_read(&mut piece)? {
            0 => break,
            got => to.device.mig_data_write(&piece[..got])?,
        }
    }
    from.device.set_mig_state(MigrationState::Stop)?;
    to.device.set_mig_state(MigrationState::Running)?;

    // The guest goes on at the destination, with all that it had.
    assert_eq!(to.copies()?, 3);
    for at in [0, PAGE, 7 * PAGE, 9 * PAGE] {
        assert!(to.page(at)? == CONTENT, "the page at {at:#x} was not sent");
    }
    to.copy(9 * PAGE, 11 * PAGE)?;
    assert!(to.copies()? == 4 && to.page(11 * PAGE)? == CONTENT);
    println!("the guest goes on at the destination");
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [source, destination] = arguments.as_slice() else {
        return Err("usage: migrate SOURCE-SOCKET DESTINATION-SOCKET".into());
    };
    migrate(source, destination)
}
