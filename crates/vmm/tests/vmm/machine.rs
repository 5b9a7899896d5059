//! The whole machine with served sample devices, on both accelerators: it works, it stands still when told to, and it
//! moves, by hand and in the library's order, with nothing lost.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vfio_migration::{Machine, Paused};
use vfio_migration_device::{Chunk, ConfigRules};
use vfio_migration_sim::{Options, StopHandle};
use vfio_migration_types::{DeviceId, MigrationState, RamOffset, VmId};
use vfio_migration_vmm::guest::Report;
use vfio_migration_vmm::machine::{
    Accelerator, DeviceConfig, DevicePath, MachineConfig, ReferenceMachine, Workload, kvm_answers,
};

const MEMORY: u64 = 64 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

/// Served devices, and the end of their servers with them.
struct Devices {
    sockets: Vec<PathBuf>,
    servers: Vec<(StopHandle, Option<JoinHandle<()>>)>,
    _dir: tempfile::TempDir,
}

impl Devices {
    fn new(count: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let sockets: Vec<PathBuf> =
            (0..count).map(|index| dir.path().join(format!("{index}.sock"))).collect();
        let serve = |socket: &PathBuf| {
            let (socket, stop) = (socket.clone(), StopHandle::new().unwrap());
            let handle = stop.clone();
            // A pace that one emulated vCPU keeps up with: the interrupts of faster devices would leave no room for its clock.
            let dma_interval = Duration::from_millis(3);
            let options = Options { state_size: 1 << 20, dma_interval, ..Options::default() };
            let thread =
                std::thread::spawn(move || vfio_migration_sim::serve(&socket, options, &handle).unwrap());
            (stop, Some(thread))
        };
        let servers = sockets.iter().map(serve).collect();
        Self { sockets, servers, _dir: dir }
    }

    fn build(&self, accelerator: Accelerator) -> Arc<ReferenceMachine> {
        let device = |(index, socket): (usize, &PathBuf)| {
            let id = DeviceId::new(format!("dev{index}")).unwrap();
            DeviceConfig::new(id, DevicePath::VfioUser(socket.clone()))
        };
        let devices = self.sockets.iter().enumerate().map(device).collect();
        let config = MachineConfig { id: VmId([7; 16]), memory: MEMORY, vcpus: 1, accelerator, devices };
        ReferenceMachine::build(config).unwrap()
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        for (stop, thread) in &mut self.servers {
            stop.stop();
            let _ = thread.take().map(JoinHandle::join);
        }
    }
}

fn wait(machine: &ReferenceMachine, what: &str, condition: impl Fn(&Report) -> bool) -> Report {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let report = machine.report().unwrap();
        if condition(&report) {
            return report;
        }
        assert_eq!(machine.failure(), None, "{what}: {report:?}");
        assert!(Instant::now() < deadline, "{what}: {report:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Accelerators that there are here.
fn accelerators() -> Vec<Accelerator> {
    match kvm_answers() {
        Ok(()) => vec![Accelerator::Software, Accelerator::Kvm],
        Err(error) => {
            eprintln!("without KVM: {error}");
            vec![Accelerator::Software]
        }
    }
}

fn boot(accelerator: Accelerator, devices: &Devices) -> Arc<ReferenceMachine> {
    let machine = devices.build(accelerator);
    machine.boot(&Workload { dirty_rate: 8 << 20, ..Workload::default() }).unwrap();
    machine.cont().unwrap();
    machine
}

#[test]
fn a_guest_works_and_stands_still_when_told_to() {
    for accelerator in accelerators() {
        let devices = Devices::new(3);
        let machine = boot(accelerator, &devices);
        let report = wait(&machine, "working", |report| {
            report.dma_blocks > 300
                && report.p2p_blocks > 50
                && report.interrupts > 50
                && report.block_passes > 1
        });
        assert_eq!(report.lost(), 0, "{accelerator:?} {report:?}");
        machine.stop().unwrap();
        let still = machine.report().unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(machine.report().unwrap().loops, still.loops);
        machine.cont().unwrap();
        wait(&machine, "going on", |report| report.dma_blocks > still.dma_blocks + 50);
        assert_eq!(machine.report().unwrap().lost(), 0);
        machine.stop().unwrap();
        assert_eq!((machine.device_errors(), machine.gate_violations()), (0, 0));
        assert_eq!(machine.lost_devices(), []);
        drop(devices);
        assert_eq!(machine.lost_devices().len(), 3, "their servers have gone");
    }
}

/// Stop-and-copy by hand: what the library does, without its sockets, threads and pre-copy.
fn move_by_hand(from: Arc<ReferenceMachine>, to: &Arc<ReferenceMachine>) {
    let source: Arc<dyn Machine> = from;
    let paused = Paused::pause(&source).unwrap();
    let functions = source.devices().into_iter().map(|device| (device.pci.unwrap(), device.device));
    let configs: Vec<_> = functions.map(|(pci, device)| (pci.save_config().unwrap(), pci, device)).collect();
    for state in [MigrationState::RunningP2p, MigrationState::Stop] {
        configs.iter().for_each(|(_, _, device)| device.set_state(state).unwrap());
    }
    let states: Vec<_> =
        configs.into_iter().map(|(config, pci, _)| pci.save_interrupts(config).unwrap()).collect();
    let sections = source.save(&paused).unwrap();
    for range in source.ram().data_extents().unwrap() {
        let mut bytes = vec![0; 4096];
        for offset in (range.start().0..range.end()).step_by(4096) {
            source.ram().read(RamOffset(offset), &mut bytes).unwrap();
            to.ram().write(RamOffset(offset), &bytes).unwrap();
        }
    }
    assert_eq!(source.ram().digest().unwrap(), to.ram().digest().unwrap());

    let mut resuming = Vec::new();
    for (old, new) in source.devices().iter().zip(to.devices()) {
        let mut saving = old.device.begin_stop_copy().unwrap();
        let mut session = new.device.begin_resuming().unwrap();
        let mut buf = vec![0; 64 << 10];
        loop {
            match saving.read(&mut buf).unwrap() {
                Chunk::Data(len) => session.write(&buf[..len]).unwrap(),
                Chunk::NothingNow => panic!("in STOP_COPY there is always more, or an end"),
                Chunk::End => break,
            }
        }
        assert_eq!(saving.end().unwrap(), MigrationState::Stop);
        resuming.push(session);
    }
    to.load(sections).unwrap();
    let functions: Vec<_> = to.devices().iter().map(|device| device.pci.clone().unwrap()).collect();
    for (function, state) in functions.iter().zip(&states) {
        function.restore_config(state, &ConfigRules::default()).unwrap();
    }
    for (function, state) in functions.iter().zip(&states) {
        function.stage_interrupts(state).unwrap();
    }
    to.irq_router().commit().unwrap();
    for (function, state) in functions.iter().zip(&states) {
        assert_eq!(function.connect_interrupts(state).unwrap(), 2);
    }
    resuming.into_iter().for_each(|session| session.finish().unwrap());
    paused.commit();
    for state in [MigrationState::RunningP2p, MigrationState::Running] {
        to.devices().iter().for_each(|device| device.device.set_state(state).unwrap());
    }
    Machine::resume(&**to, true).unwrap();
}

#[test]
fn a_guest_moves_there_and_back_and_loses_nothing() {
    for accelerator in accelerators() {
        let first = Devices::new(2);
        let mut machine = boot(accelerator, &first);
        let mut homes = vec![first];
        // On hosts whose KVM emulates ring 0, the guest takes a while to walk over everything.
        for _ in 0..if accelerator == Accelerator::Kvm { 2 } else { 4 } {
            let then =
                wait(&machine, "working", |report| report.dma_blocks > 200 && report.pages_written > 1000);
            let home = Devices::new(2);
            let next = home.build(accelerator);
            move_by_hand(machine, &next);
            machine = next;
            homes.push(home);
            let report = wait(&machine, "checking all of it", |report| {
                report.page_passes > then.page_passes + 1
                    && report.block_passes > then.block_passes + 1
                    && report.dma_blocks > then.dma_blocks + 100
            });
            // Long enough for an interrupt that was lost to be missed.
            let until = report.ticks + 1200;
            let report = wait(&machine, "waiting for what is missing", |report| report.ticks > until);
            assert_eq!(report.lost(), 0, "{accelerator:?} {report:?}");
        }
    }
}
