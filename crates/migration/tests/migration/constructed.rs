//! A destination that has no machine until its state is there.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use vfio_migration::{
    Destination, IncomingDevice, IncomingFunction, IncomingMachine, LockError, Machine, MachineError,
    MachineState, MigrateError, NotBuilt, Side, Source,
};
use vfio_migration_compat::MachineManifest;
use vfio_migration_memory::GuestRam;
use vfio_migration_types::{Phase, VmId};

use crate::toy::secure::{tls_destination, tls_source};
use crate::toy::{Plan, Toy, prove_moved};

/// Devices and RAM, and what they become.
struct Parts {
    toy: Arc<Toy>,
    /// What was there when it was finished.
    found: Arc<Mutex<Vec<String>>>,
    fails: AtomicBool,
}

impl IncomingMachine for Parts {
    fn id(&self) -> VmId {
        Machine::id(&*self.toy)
    }

    fn manifest(&self) -> Result<MachineManifest, MachineError> {
        Machine::manifest(&*self.toy)
    }

    fn ram(&self) -> Arc<GuestRam> {
        Machine::ram(&*self.toy)
    }

    fn incoming_devices(&self) -> Vec<IncomingDevice> {
        let devices = Machine::devices(&*self.toy).into_iter();
        devices.map(|moved| IncomingDevice { device: moved.device, pci: IncomingFunction::Later }).collect()
    }

    fn finish(&self, state: MachineState) -> Result<Arc<dyn Machine>, MachineError> {
        if self.fails.load(Ordering::Relaxed) {
            return Err(MachineError::new("constructing the machine", "made to fail"));
        }
        let mut found = self.found.lock().unwrap();
        found.extend(state.functions.iter().map(|(device, function)| {
            format!("{device}: {} bytes of config, {} vectors", function.config.len(), function.vectors.len())
        }));
        found.extend(state.sections.iter().map(|section| section.name.clone()));
        drop(found);
        self.toy.load(state.sections)?;
        Ok(self.toy.clone())
    }

    fn release_locks(&self) -> Result<(), LockError> {
        Machine::release_locks(&*self.toy)
    }

    fn take_locks(&self) -> Result<(), LockError> {
        Machine::take_locks(&*self.toy)
    }
}

/// Moves a toy into `parts`, which may fail.
fn move_into(source: &Arc<Toy>, parts: Parts) -> Result<(), MigrateError> {
    let mut destination =
        Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), tls_destination()).unwrap();
    let to = destination.local().clone();
    std::thread::scope(|scope| {
        let arriving = scope.spawn(move || destination.accept(|_| Ok::<_, NotBuilt>(parts)).map(drop));
        let moved = Source::new(source.clone(), tls_source()).migrate_to(&to, |_| {}).map(drop);
        assert_eq!(moved.is_ok(), arriving.join().unwrap().is_ok(), "{moved:?}");
        moved
    })
}

fn parts(plan: &Plan, fails: bool) -> (Parts, Arc<Toy>, Arc<Mutex<Vec<String>>>) {
    let (toy, found) = (Toy::new(plan), Arc::new(Mutex::new(Vec::new())));
    let parts = Parts { toy: toy.clone(), found: found.clone(), fails: fails.into() };
    (parts, toy, found)
}

#[test]
fn a_machine_is_made_of_what_arrives() {
    let plan = Plan::default();
    let source = Toy::booted(&plan);
    let (parts, toy, found) = parts(&plan, false);
    move_into(&source, parts).unwrap();
    prove_moved(&source, &toy);
    assert_eq!(*found.lock().unwrap(), ["toy0: 256 bytes of config, 2 vectors", "toy.vcpu"]);
    // The library put the functions back that came with the machine, in its order.
    let order = toy.journal.lock().unwrap().clone();
    let at =
        |what: &str| order.iter().position(|line| line.contains(what)).unwrap_or_else(|| panic!("{order:?}"));
    assert!(at("config") < at("stage") && at("stage") < at("commit") && at("commit") < at("connect"));
}

#[test]
fn a_machine_that_cannot_be_made_leaves_the_guest_at_its_source() {
    let plan = Plan::default();
    let without_functions = Plan { functions: false, ..plan.clone() };
    for (plan_there, fails, said) in [
        (&plan, true, "constructing the machine failed: made to fail"),
        (&without_functions, false, "the finished machine has no PCI function for it"),
    ] {
        let source = Toy::booted(&plan);
        let (parts, toy, _) = parts(plan_there, fails);
        let Err(MigrateError::Aborted(aborted)) = move_into(&source, parts) else { panic!("it was to fail") };
        let cause = &aborted.cause;
        assert_eq!((cause.side, cause.phase), (Side::Destination, Phase::Ready), "{cause}");
        assert!(cause.to_string().contains(said), "{cause}");
        source.prove_restored();
        assert!(!toy.locked.load(Ordering::Relaxed), "the destination kept a storage lock");
    }
}

#[test]
fn a_guest_arrives_at_a_socket_that_listens_already() {
    let plan = Plan::default();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let bound = format!("tcp:{}", listener.local_addr().unwrap());
    let mut destination = Destination::at_listener(listener.into(), tls_destination()).unwrap();
    assert_eq!((destination.local().to_string(), destination.is_connected()), (bound, false));
    let (to, source) = (destination.local().clone(), Toy::booted(&plan));
    let (parts, toy, _) = parts(&plan, false);
    std::thread::scope(|scope| {
        let arriving = scope.spawn(move || destination.accept(|_| Ok::<_, NotBuilt>(parts)).map(drop));
        Source::new(source.clone(), tls_source()).migrate_to(&to, |_| {}).unwrap();
        arriving.join().unwrap().unwrap();
    });
    prove_moved(&source, &toy);
    // What does not listen is refused as what it is.
    let (connected, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let datagrams = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let file = std::fs::File::open("/dev/null").unwrap();
    for socket in [connected.into(), datagrams.into(), file.into()] {
        let refused = Destination::at_listener(socket, tls_destination()).unwrap_err();
        let said = vfio_migration_types::error_chain(&refused);
        assert!(said.contains("no stream socket that listens"), "{said}");
    }
}
