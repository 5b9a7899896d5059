//! The device over a vfio-user socket.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crate::support::{LIMIT, options};
use rustix::io::Errno;
use vfio_migration_guest_driver::registers::offset;
use vfio_migration_memory::Mapping;
use vfio_migration_sim::driver::{DriverConfig, Hardware, P2pTarget, RAM_SIZE, TestDriver};
use vfio_migration_sim::{Options, SampleBackend, SampleDevice, StopHandle, serve};
use vfio_user_peer::MigrationState::{PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};
use vfio_user_peer::{
    Client, ClientOptions, DmaHandler, IovaRange, MigrationFlags, OnConnect, Prot, Server, ServerError,
    irq_index,
};

/// A device served on a socket of its own.
struct Served {
    dir: tempfile::TempDir,
    stop: StopHandle,
    thread: Option<JoinHandle<()>>,
}

impl Served {
    fn new(options: Options) -> Self {
        Self::with(move |path, stop| serve(path, options, &stop).unwrap())
    }

    fn with(run: impl FnOnce(PathBuf, StopHandle) + Send + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let stop = StopHandle::new().unwrap();
        let (path, handle) = (dir.path().join("device"), stop.clone());
        let thread = std::thread::spawn(move || run(path, handle));
        Self { dir, stop, thread: Some(thread) }
    }

    fn client(&self) -> Client {
        self.client_with(ClientOptions::default())
    }

    fn client_with(&self, options: ClientOptions) -> Client {
        Client::connect(self.dir.path().join("device"), options).unwrap()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

fn driver_of(client: &Client, peer: Option<P2pTarget>) -> TestDriver {
    let config = DriverConfig { doorbell_eventfd: true, ..DriverConfig::default() };
    let mut driver = TestDriver::new(config, peer).unwrap();
    driver.connect(client).unwrap();
    driver.start(client).unwrap();
    driver
}

fn read_all(client: &Client) -> Vec<u8> {
    let mut stream = Vec::new();
    let mut piece = vec![0; 200_000];
    loop {
        let count = client.mig_data_read(&mut piece).unwrap();
        if count == 0 {
            return stream;
        }
        stream.extend(&piece[..count]);
    }
}

#[test]
fn what_a_vmm_learns_of_it() {
    let served = Served::new(options());
    let client = served.client();
    let info = client.device_info().unwrap();
    assert!(info.pci && info.resettable);
    assert_eq!((info.num_regions, info.num_irqs), (9, 5));
    let sizes: Vec<u64> = (0..9).map(|n| client.region_info(n).unwrap().size).collect();
    assert_eq!(sizes, [16 << 10, 0, 1 << 20, 0, 0, 0, 0, 256, 0]);
    let mailbox = client.region_info(2).unwrap();
    let memory = Mapping::new(mailbox.fd.unwrap().as_fd(), mailbox.offset, mailbox.size, true).unwrap();
    memory.write(77, b"by mapping").unwrap();
    let mut bytes = [0; 10];
    client.region_read(2, 77, &mut bytes).unwrap();
    assert_eq!(&bytes, b"by mapping");
    let irqs: Vec<u32> = (0..5).map(|n| client.irq_info(n).unwrap().count).collect();
    assert_eq!(irqs, [0, 0, 2, 0, 0]);
    assert!(client.irq_mask(irq_index::MSIX, 0, 1).is_err(), "the VMM masks");
    let fds = client.region_io_fds(0).unwrap();
    assert_eq!((fds.len(), fds[0].offset, fds[0].size), (1, offset::DOORBELL, 4));
    let mut id = [0; 4];
    client.region_read(7, 0, &mut id).unwrap();
    assert_eq!(id, [0x46, 0x56, 0x53, 0x4d]);
    assert_eq!(client.migration_flags().unwrap(), Some(MigrationFlags::new(true, true)));
    let manifest = String::from_utf8(client.device_manifest().unwrap()).unwrap();
    for part in ["vfio-migrate.org/sample", "\"1.0.0\"", "\"state_size\":{\"off\":0,\"value\":1048576}"] {
        assert!(manifest.contains(part), "{manifest}");
    }
}

#[test]
fn a_working_pair_moves_between_servers() {
    let sources = [Served::new(options()), Served::new(options())];
    let from = sources.each_ref().map(Served::client);
    let mailbox = |client: &Client| {
        let fd = client.region_info(2).unwrap().fd.unwrap();
        P2pTarget { iova: 0x4000_0000, fd: fd.as_fd().try_clone_to_owned().unwrap() }
    };
    let mut drivers = [0, 1].map(|n: usize| driver_of(&from[n], Some(mailbox(&from[1 - n]))));
    for (driver, client) in drivers.iter_mut().zip(&from) {
        driver.run(client, 200, LIMIT).unwrap();
    }
    from.iter().for_each(|client| client.set_mig_state(PreCopy).unwrap());
    assert!(from[0].precopy_info().unwrap().initial_bytes >= 1 << 20);
    let mut streams = from.each_ref().map(read_all);
    assert_eq!(from[0].precopy_info().unwrap().initial_bytes, 0);
    for (driver, client) in drivers.iter_mut().zip(&from) {
        driver.run(client, 100, LIMIT).unwrap();
        driver.post().unwrap();
        driver.ring(client).unwrap();
    }
    for state in [PreCopyP2p, StopCopy] {
        from.iter().for_each(|client| client.set_mig_state(state).unwrap());
    }
    assert!(from[0].mig_data_size().unwrap() < 2 << 20);
    for (stream, client) in streams.iter_mut().zip(&from) {
        stream.extend(read_all(client));
    }

    let destinations = [Served::new(options()), Served::new(options())];
    let to = destinations.each_ref().map(Served::client);
    for (n, driver) in drivers.iter_mut().enumerate() {
        to[n].set_mig_state(Resuming).unwrap();
        to[n].mig_data_write(&streams[n]).unwrap();
        driver.set_peer(mailbox(&to[1 - n])).unwrap();
        driver.connect(&to[n]).unwrap();
        to[n].set_mig_state(Stop).unwrap();
    }
    for state in [RunningP2p, Running] {
        to.iter().for_each(|client| client.set_mig_state(state).unwrap());
    }
    for (driver, client) in drivers.iter_mut().zip(&to) {
        driver.run(client, 200, LIMIT).unwrap();
    }
    for (driver, client) in drivers.iter_mut().zip(&to) {
        driver.drain(client, LIMIT).unwrap();
        driver.recheck().unwrap();
        let found = driver.findings();
        assert!(found.p2p_blocks > 100);
        assert_eq!((found.blocks_lost, found.interrupts_lost, found.integrity), (0, 0, 0));
    }
}

#[test]
fn without_the_extension_it_is_plain_vfio_user() {
    let served = Served::new(Options { extension: false, ..options() });
    let client = served.client();
    assert_eq!(client.migration_flags().unwrap(), Some(MigrationFlags::new(false, true)));
    assert!(client.precopy_info().is_err() && client.mig_data_size().is_err());
    assert!(client.device_manifest().is_err() && client.set_mig_state(RunningP2p).is_err());
    let mut driver = driver_of(&client, None);
    driver.run(&client, 50, LIMIT).unwrap();
    client.set_mig_state(PreCopy).unwrap();
    let mut stream = read_all(&client);
    client.set_mig_state(StopCopy).unwrap();
    stream.extend(read_all(&client));

    let other = Served::new(Options { extension: false, ..options() });
    let to = other.client();
    driver.connect(&to).unwrap();
    to.set_mig_state(Resuming).unwrap();
    to.mig_data_write(&stream).unwrap();
    to.set_mig_state(Stop).unwrap();
    to.set_mig_state(Running).unwrap();
    driver.run(&to, 50, LIMIT).unwrap();
    assert_eq!((driver.findings().blocks_lost, driver.findings().interrupts_lost), (0, 0));
}

#[test]
fn refusals_carry_their_errno() {
    let served = Served::new(Options {
        faults: vec!["fail-arc:PRE_COPY:PRE_COPY_P2P:ENOSPC:1".parse().unwrap()],
        ..options()
    });
    let client = served.client();
    client.set_mig_state(PreCopy).unwrap();
    let error = client.set_mig_state(StopCopy).unwrap_err();
    assert_eq!(error.errno(), Some(Errno::NOSPC));
    assert_eq!(client.mig_state().unwrap(), PreCopy);
    client.set_mig_state(Resuming).unwrap();
    assert_eq!(client.mig_data_write(&[1; 48]).unwrap_err().errno(), Some(Errno::INVAL));
    client.reset().unwrap();
    assert_eq!(client.mig_state().unwrap(), Running);
}

#[test]
fn the_log_works_in_every_state_and_ends_with_its_client() {
    let served = Served::new(options());
    let client = served.client();
    let mut driver = driver_of(&client, None);
    let base = DriverConfig::default().ram_base;
    assert_eq!(client.dma_logging_start(4096, &[IovaRange { iova: base, len: RAM_SIZE }]).unwrap(), 4096);
    driver.run(&client, 64, LIMIT).unwrap();
    driver.drain(&client, LIMIT).unwrap();
    client.set_mig_state(StopCopy).unwrap();
    let mut words = [0; 4];
    client.dma_logging_report(IovaRange { iova: base, len: RAM_SIZE }, 4096, &mut words).unwrap();
    let pages: u32 = words.iter().map(|word: &u64| word.count_ones()).sum();
    assert_eq!(pages, 65, "64 slots and the counts");
    drop(client);
    // The state is kept for whoever asks for it; the log and the mappings are gone.
    let client =
        served.client_with(ClientOptions { on_connect: OnConnect::Leave, ..ClientOptions::default() });
    assert_eq!(client.mig_state().unwrap(), StopCopy);
    client.set_mig_state(Running).unwrap();
    assert!(client.dma_logging_report(IovaRange { iova: base, len: RAM_SIZE }, 4096, &mut words).is_err());
    client.reset().unwrap();
    let mut driver = driver_of(&client, None);
    driver.run(&client, 20, LIMIT).unwrap();
}

#[derive(Debug)]
struct Memory {
    mapping: Mapping,
    base: u64,
    written: Mutex<Vec<u64>>,
}

impl DmaHandler for Memory {
    fn dma_read(&self, iova: u64, into: &mut [u8]) -> Result<(), Errno> {
        let at = iova.checked_sub(self.base).ok_or(Errno::FAULT)?;
        self.mapping.read(at, into).map_err(|_| Errno::FAULT)
    }

    fn dma_write(&self, iova: u64, from: &[u8]) -> Result<(), Errno> {
        let at = iova.checked_sub(self.base).ok_or(Errno::FAULT)?;
        self.mapping.write(at, from).map_err(|_| Errno::FAULT)?;
        self.written.lock().map_err(|_| Errno::IO)?.push(at / 4096);
        Ok(())
    }
}

#[test]
fn memory_without_a_descriptor_is_reached_by_messages_and_logged_by_the_client() {
    for twin_socket in [true, false] {
        let served = Served::new(options());
        let mut driver = TestDriver::new(DriverConfig::default(), None).unwrap();
        let (fd, base) = driver.ram();
        let memory = Arc::new(Memory {
            mapping: Mapping::new(fd, 0, RAM_SIZE, true).unwrap(),
            base,
            written: Mutex::default(),
        });
        let dma: Arc<dyn DmaHandler> = memory.clone();
        let client =
            served.client_with(ClientOptions { dma: Some(dma), twin_socket, ..ClientOptions::default() });
        client.dma_map(base, RAM_SIZE, Prot::READ_WRITE, None).unwrap();
        driver.connect_vectors(&client).unwrap();
        driver.start(&client).unwrap();
        client.dma_logging_start(4096, &[]).unwrap();
        driver.run(&client, 100, LIMIT).unwrap();
        // A stop in the middle waits for the message under way, and the client serves it meanwhile.
        driver.post().unwrap();
        driver.ring(&client).unwrap();
        client.set_mig_state(Stop).unwrap();
        let range = IovaRange { iova: base, len: RAM_SIZE };
        assert!(client.dma_logging_report(range, 4096, &mut [0; 4]).is_err(), "not the device's to log");
        client.set_mig_state(Running).unwrap();
        driver.drain(&client, LIMIT).unwrap();
        client.dma_unmap(base, RAM_SIZE).unwrap();
        assert_eq!((driver.findings().blocks_lost, driver.findings().interrupts_lost), (0, 0));
        assert!(memory.written.lock().unwrap().contains(&TestDriver::done_page()));
    }
}

#[test]
fn a_scripted_death_is_no_answer() {
    let served = Served::with(|path, stop| {
        let options = Options { faults: vec!["die-in-read:1000".parse().unwrap()], ..options() };
        let device = Arc::new(SampleDevice::new(options).unwrap());
        let handle = stop.clone();
        // In a process of its own it is killed; here the server ends.
        let backend = SampleBackend::with_death(device, move || handle.stop());
        let served: Result<(), ServerError> = Server::bind(path).unwrap().serve(&backend, &stop);
        served.unwrap();
    });
    let client = served.client();
    client.set_mig_state(StopCopy).unwrap();
    let mut piece = [0; 4096];
    assert_eq!(client.mig_data_read(&mut piece).unwrap(), 1000);
    assert!(client.mig_data_read(&mut piece).is_err());
    assert!(client.mig_data_read(&mut piece).is_err());
}

#[test]
fn registers_answer_over_the_socket() {
    let served = Served::new(Options { version: (3, 4), ..options() });
    let client = served.client();
    let mut word = [0; 4];
    Hardware::read(&client, offset::VERSION, &mut word).unwrap();
    assert_eq!(u32::from_le_bytes(word), 0x0003_0004);
    let mut wide = [0; 8];
    Hardware::read(&client, offset::STATE_SIZE, &mut wide).unwrap();
    assert_eq!(u64::from_le_bytes(wide), 1 << 20);
}
