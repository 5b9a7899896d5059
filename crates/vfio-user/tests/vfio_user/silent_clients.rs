//! Connections that do not say their version, or not all of it: no clients, and in no client's way.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::by_hand::Raw;
use crate::rig::{Device, Served, quick, quick_server};
use vfio_user_peer::codec::{Command, Header, Kind, VersionCapabilities, VersionPayload};
use vfio_user_peer::{ClientOptions, Server, ServerOptions, StopHandle};

const EVER: Duration = Duration::from_secs(3600);

/// Waits so long for a version; commands have long.
fn patient(handshake_timeout: Duration) -> ServerOptions {
    ServerOptions { handshake_timeout, message_timeout: EVER, ..quick_server() }
}

fn version() -> Vec<u8> {
    let mut body = Vec::new();
    VersionPayload { major: 0, minor: 2, capabilities: VersionCapabilities::default() }.encode(&mut body);
    let size = u32::try_from(16 + body.len()).unwrap();
    let header = Header { id: 5, command: Command::VERSION, size, kind: Kind::Command { no_reply: false } };
    [&header.encode()[..], &body].concat()
}

#[test]
fn the_first_that_says_its_version_is_served() {
    let served = Served::new(Device::new(), patient(EVER));
    let mut silent: Vec<Raw> = (0..40).map(|_| Raw::connect(&served)).collect();
    let version = version();
    for (n, raw) in silent.iter_mut().enumerate() {
        raw.0.write_all(&version[..n * (version.len() - 1) / 39]).unwrap();
    }
    for _ in 0..2 {
        served.client(ClientOptions { twin_socket: false, ..quick() }).device_info().unwrap();
    }
    // The last of them are still heard.
    let last = silent.last_mut().unwrap();
    last.0.write_all(&version[version.len() - 1..]).unwrap();
    assert_eq!(last.receive().0, Kind::Reply);
    last.in_step();
}

#[test]
fn a_connection_that_has_had_its_time_is_dropped() {
    let served = Served::new(Device::new(), patient(Duration::from_millis(100)));
    let version = version();
    for part in [0, 1, 15, 16, version.len() / 3, version.len() - 1] {
        let mut raw = Raw::connect(&served);
        raw.0.write_all(&version[..part]).unwrap();
        assert!(raw.ended(), "{part} bytes");
    }
    // Not so a client, once it is one.
    let mut raw = Raw::negotiated(&served);
    std::thread::sleep(Duration::from_millis(300));
    raw.in_step();
}

#[test]
fn a_stream_that_says_nothing_is_not_served_for_ever() {
    for part in [0, 20] {
        let (mut near, far) = UnixStream::pair().unwrap();
        near.write_all(&version()[..part]).unwrap();
        let options = patient(Duration::from_millis(100));
        Server::serve_stream(far, &Device::new(), &options, &StopHandle::new().unwrap());
    }
}

#[test]
fn a_server_with_silent_connections_stops() {
    let served = Served::new(Device::new(), patient(EVER));
    let _silent = Raw::connect(&served);
    drop(Raw::negotiated(&served));
    drop(served);
}
