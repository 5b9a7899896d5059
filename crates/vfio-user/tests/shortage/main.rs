//! A server whose process has no descriptor left. The limit is the whole process's, so this is a program of its own.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};
use vfio_user_peer::{
    Backend, Client, ClientOptions, DeviceInfo, DmaMapping, Errno, IrqInfo, IrqRequest, RegionInfo, Server,
    StopHandle,
};

/// Passes on what is warned of.
struct Warnings(Sender<String>);

struct Text<'a>(&'a mut String);

impl Visit for Text<'_> {
    fn record_debug(&mut self, _field: &Field, value: &dyn std::fmt::Debug) {
        self.0.push_str(&format!("{value:?}"));
    }
}

impl Subscriber for Warnings {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::WARN
    }

    fn new_span(&self, _span: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _span: &Id, _values: &Record<'_>) {}

    fn record_follows_from(&self, _span: &Id, _follows: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut text = String::new();
        event.record(&mut Text(&mut text));
        let _ = self.0.send(text);
    }

    fn enter(&self, _span: &Id) {}

    fn exit(&self, _span: &Id) {}
}

/// A device of nothing at all.
struct Null;

impl Backend for Null {
    fn device_info(&self) -> DeviceInfo {
        DeviceInfo { resettable: false, pci: true, num_regions: 9, num_irqs: 5 }
    }

    fn region_info(&self, _index: u32) -> Result<RegionInfo, Errno> {
        Ok(RegionInfo::default())
    }

    fn irq_info(&self, _index: u32) -> Result<IrqInfo, Errno> {
        Ok(IrqInfo::default())
    }

    fn region_read(&self, _index: u32, _offset: u64, _into: &mut [u8]) -> Result<(), Errno> {
        Err(Errno::INVAL)
    }

    fn region_write(&self, _index: u32, _offset: u64, _from: &[u8]) -> Result<(), Errno> {
        Err(Errno::INVAL)
    }

    fn set_irqs(&self, _request: IrqRequest) -> Result<(), Errno> {
        Err(Errno::INVAL)
    }

    fn dma_map(&self, _mapping: DmaMapping) -> Result<(), Errno> {
        Ok(())
    }

    fn dma_unmap(&self, _iova: u64, _len: u64) -> Result<(), Errno> {
        Ok(())
    }
}

/// Lets the process open `more` descriptors, and no other.
fn allow(more: u64) {
    let lowest = std::fs::File::open("/dev/null").unwrap().as_raw_fd();
    let limit =
        Rlimit { current: Some(u64::try_from(lowest).unwrap() + more), ..getrlimit(Resource::Nofile) };
    setrlimit(Resource::Nofile, limit).unwrap();
}

/// Stops a server, also when the test fails: whoever waits for it would wait for ever.
struct Stopping<'a>(&'a StopHandle);

impl Drop for Stopping<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// What a server is short of passes, and so does the wait of its clients. A limit of 0 fails even the server's polls: a server of
/// its own for it, as one that still sees its last client off would fail in that.
#[test]
fn a_server_outlives_a_shortage_of_descriptors() {
    let (told, warnings) = channel();
    tracing::subscriber::set_global_default(Warnings(told)).unwrap();
    let before = getrlimit(Resource::Nofile);
    for none in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("device.sock");
        let (server, stop) = (Server::bind(&path).unwrap(), StopHandle::new().unwrap());
        std::thread::scope(|scope| {
            let serving = scope.spawn(|| server.serve(&Null, &stop));
            let stopping = Stopping(&stop);
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
            let socket = UnixStream::from(socket.unwrap());
            allow(0);
            if none {
                setrlimit(Resource::Nofile, Rlimit { current: Some(0), ..before }).unwrap();
            }
            connect(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
            let warning = warnings.recv_timeout(Duration::from_secs(60)).unwrap();
            assert!(warning.starts_with("a client could not be accepted; trying again: "), "{warning}");
            assert!(warning.ends_with("(os error 24)"), "{warning}");
            assert!(!serving.is_finished());
            setrlimit(Resource::Nofile, before).unwrap();
            let client = Client::from_stream(socket, ClientOptions::default()).unwrap();
            assert_eq!(client.device_info().unwrap().num_regions, 9);
            drop(stopping);
            serving.join().unwrap().unwrap();
        });
    }
    assert_eq!(warnings.try_recv().ok(), None, "told once each");
}
