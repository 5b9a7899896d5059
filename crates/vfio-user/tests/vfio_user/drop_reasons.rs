//! Why a server drops a client is told to its device, and nothing of a client that leaves by itself.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vfio_user_peer::codec::{Command, Header, Kind};
use vfio_user_peer::{DropReason, Server, ServerOptions, StopHandle};

use crate::by_hand::Raw;
use crate::rig::{Device, Served, quick_server};

const SHORT: Duration = Duration::from_millis(100);
const EVER: Duration = Duration::from_secs(3600);

/// The one reason for which `served` has dropped anybody.
fn dropped(served: &Served) -> DropReason {
    served.device.wait("a client to be dropped", |state| !state.drops.is_empty());
    let state = served.device.state.lock().unwrap();
    assert_eq!(state.drops.len(), 1, "{:?}", state.drops);
    state.drops[0].clone()
}

#[test]
fn who_says_no_version_is_dropped_for_it() {
    let options = ServerOptions { handshake_timeout: SHORT, ..quick_server() };
    let served = Served::new(Device::new(), options);
    let _silent = Raw::connect(&served);
    assert_eq!(dropped(&served), DropReason::NoVersion(SHORT));

    let (_near, far) = UnixStream::pair().unwrap();
    let device = Device::new();
    Server::serve_stream(far, &device, &options, &StopHandle::new().unwrap());
    assert_eq!(device.state.lock().unwrap().drops, [DropReason::NoVersion(SHORT)]);
}

#[test]
fn of_too_many_silent_ones_the_oldest_is_dropped_for_it() {
    let served = Served::new(Device::new(), ServerOptions { handshake_timeout: EVER, ..quick_server() });
    let mut silent: Vec<Raw> = (0..17).map(|_| Raw::connect(&served)).collect();
    assert_eq!(dropped(&served), DropReason::TooManySilent);
    assert!(silent.remove(0).ended());
}

#[test]
fn a_late_client_is_dropped_for_it_before_it_is_gone() {
    let options = ServerOptions { message_timeout: SHORT, ..quick_server() };
    let served = Served::new(Device::new(), options);
    let mut raw = Raw::negotiated(&served);
    let kind = Kind::Command { no_reply: false };
    let header = Header { id: 5, command: Command::REGION_WRITE, size: 32, kind };
    raw.0.write_all(&header.encode()).unwrap();
    assert_eq!(dropped(&served), DropReason::Late("a command was not whole within 100ms".into()));
    served.device.wait("the client to be gone", |state| state.gone == 1);
    assert!(served.device.state.lock().unwrap().dropped_before_gone);
}

#[test]
fn a_client_that_breaks_the_protocol_is_not_quoted() {
    const HOSTILE: &str = "\u{9b}2J\u{202e}OWNED";
    for json in [
        serde_json::json!({"capabilities": {"max_msg_fds": HOSTILE}}),
        serde_json::json!({"capabilities": {"write_multiple": [HOSTILE]}}),
        serde_json::json!({"capabilities": {"twin_socket": {"supported": HOSTILE}}}),
        serde_json::json!({"capabilities": {"twin_socket": HOSTILE}}),
        serde_json::json!({"capabilities": {"x-vfio-migrate": {"version": 1, "p2p": HOSTILE}}}),
        serde_json::json!(HOSTILE),
    ] {
        let served = Served::start();
        let mut raw = Raw::connect(&served);
        raw.refused(Command::VERSION, &[&[0, 0, 2, 0], json.to_string().as_bytes(), &[0]].concat());
        let DropReason::Protocol(what) = dropped(&served) else { panic!("{json}") };
        assert!(what.starts_with("VERSION: ") && what.is_ascii(), "{what:?}");
        assert!(!what.contains("OWNED") && !what.contains(char::is_control), "{what:?}");
    }
}

#[test]
fn who_leaves_is_not_told_of() {
    let served = Served::start();
    drop(Raw::connect(&served));
    drop(Raw::negotiated(&served));
    served.device.wait("the client to be gone", |state| state.gone == 1);
    assert!(served.device.state.lock().unwrap().drops.is_empty());
}
