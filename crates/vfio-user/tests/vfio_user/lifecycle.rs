//! Coming and going: clients that die, servers that restart, sockets that are stale, threads and descriptors that must not stay.

use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::rig::{Device, Memory, Served, event, memfd, quick, quick_server, readable, untouched};
use vfio_user_peer::{
    Client, ClientError, ClientOptions, IovaRange, MigrationState, OnConnect, Prot, Recovery, Server,
    ServerError, StopHandle, irq_index,
};

#[test]
fn a_device_left_stopped_runs_again_for_the_next_client() {
    for (left, twin) in [
        (MigrationState::Stop, true),
        (MigrationState::StopCopy, false),
        (MigrationState::Resuming, true),
        (MigrationState::PreCopyP2p, true),
    ] {
        let served = Served::start();
        let client = served.client(ClientOptions { twin_socket: twin, ..quick() });
        client.set_mig_state(left).unwrap();
        client.dma_map(0, 0x1000, Prot::READ, Some((memfd(4096).as_fd(), 0))).unwrap();
        client.irq_connect(irq_index::MSIX, 0, &[event().as_fd()]).unwrap();
        client.dma_logging_start(4096, &[IovaRange { iova: 0, len: 4096 }]).unwrap();
        drop(client);
        served.device.wait("the client to be gone", |state| state.gone == 1);
        {
            let state = served.device.state.lock().unwrap();
            assert!(state.maps.is_empty() && state.irqs.is_empty() && state.logging.is_none());
            assert_eq!(state.mig, left, "the state is retained");
        }
        // Whoever wants to keep it can.
        let client = served.client(untouched());
        assert_eq!(client.mig_state().unwrap(), left);
        assert_eq!(client.state_at_connect(), None);
        drop(client);
        let client = served.client(quick());
        assert_eq!(client.state_at_connect(), Some(left));
        assert_eq!(client.mig_state().unwrap(), MigrationState::Running);
        assert_eq!(client.recover().unwrap(), Recovery::WasRunning);
    }
}

#[test]
fn a_device_in_error_is_reset() {
    let served = Served::start();
    served.device.state.lock().unwrap().mig = MigrationState::Error;
    let client = served.client(quick());
    assert_eq!(client.state_at_connect(), Some(MigrationState::Error));
    assert_eq!(client.mig_state().unwrap(), MigrationState::Running);
}

#[test]
fn connecting_waits_for_the_server_to_listen() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("late.sock");
    // Refused at first: bound, as a dead server leaves it; later served.
    drop(UnixListener::bind(&path).unwrap());
    assert!(UnixStream::connect(&path).is_err());
    let stop = StopHandle::new().unwrap();
    std::thread::scope(|scope| {
        let client = scope.spawn(|| Client::connect(&path, quick()));
        let server = Server::bind(&path).unwrap();
        let serving = scope.spawn({
            let stop = &stop;
            move || server.serve(&Device::new(), stop)
        });
        drop(client.join().unwrap().unwrap());
        stop.stop();
        serving.join().unwrap().unwrap();
    });
    assert!(!path.exists());
}

#[test]
fn connecting_to_nobody_fails_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let options = ClientOptions { connect_timeout: Duration::from_millis(100), ..quick() };
    let before = Instant::now();
    let error = Client::connect(dir.path().join("nobody.sock"), options).unwrap_err();
    assert!(matches!(error, ClientError::Io { .. }), "{error}");
    assert!(before.elapsed() >= Duration::from_millis(100) && before.elapsed() < Duration::from_secs(5));
}

#[test]
fn sockets_in_use_are_left_alone_and_stale_ones_replaced() {
    let served = Served::start();
    assert!(matches!(Server::bind(&served.path), Err(ServerError::InUse(_))));
    served.client(quick()).device_info().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stale.sock");
    drop(UnixListener::bind(&path).unwrap());
    drop(Server::bind(&path).unwrap());
    assert!(!path.exists());
    std::fs::write(&path, b"precious").unwrap();
    assert!(matches!(Server::bind(&path), Err(ServerError::NotASocket(_))));
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[test]
fn a_server_stops_with_a_client_connected() {
    let served = Served::start();
    let client = served.client(quick());
    drop(served);
    assert!(matches!(client.device_info(), Err(ClientError::ConnectionLost { .. })));
    assert!(!client.is_alive());
}

#[test]
fn the_next_client_waits_its_turn() {
    let served = Served::start();
    let first = served.client(quick());
    let waiting = UnixStream::connect(&served.path).unwrap();
    first.device_info().unwrap();
    drop(first);
    let second = Client::from_stream(waiting, quick()).unwrap();
    second.device_info().unwrap();
}

#[test]
fn a_client_is_shared_between_threads() {
    let served = Served::start();
    let client = Arc::new(served.client(quick()));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                (0..200).for_each(|_| assert_eq!(client.irq_info(irq_index::MSIX).unwrap().count, 200))
            });
        }
    });
}

/// The count of descriptors and threads is the process's, so this looks at those of one connection: a pipe's end that
/// the server was given, and the handler that the client's thread holds.
#[test]
fn nothing_is_left_behind() {
    let served = Served::start();
    let memory = Memory::new(4096);
    for twin in [true, false] {
        for _ in 0..20 {
            let (reader, writer) = rustix::pipe::pipe().unwrap();
            let dma = Some(Arc::clone(&memory) as Arc<_>);
            let client = served.client(ClientOptions { dma, twin_socket: twin, ..quick() });
            client.dma_map(0, 0x1000, Prot::READ, Some((writer.as_fd(), 0))).unwrap();
            client.irq_connect(irq_index::MSIX, 0, &[writer.as_fd()]).unwrap();
            drop((client, writer));
            assert_eq!(Arc::strong_count(&memory), 1);
            assert!(readable(&reader), "the server keeps a descriptor");
        }
    }
}

#[test]
fn recovery_is_a_choice() {
    assert_eq!(ClientOptions::default().on_connect, OnConnect::Recover);
    let served = Served::new(Device::new(), quick_server());
    let client = served.client(untouched());
    client.set_mig_state(MigrationState::Resuming).unwrap();
    assert_eq!(client.recover().unwrap(), Recovery::Recovered { from: MigrationState::Resuming });
    assert_eq!(client.mig_state().unwrap(), MigrationState::Running);
}
