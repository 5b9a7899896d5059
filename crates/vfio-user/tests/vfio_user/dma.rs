//! DMA from the server into the client's memory, on a twin socket and on the only one.

use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use crate::by_hand::{message, read_message};
use crate::rig::{Device, INLINE_DMA, Memory, Served, quick, quick_server, untouched};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vfio_user_peer::codec::{
    Command, DmaAccess, Header, Kind, TwinSocket, VersionCapabilities, VersionPayload,
};
use vfio_user_peer::{Client, ClientOptions, DmaHandler, Errno, ServerOptions};

fn connect(served: &Served, memory: &Arc<Memory>, twin: bool) -> Client {
    let dma = Some(Arc::clone(memory) as Arc<_>);
    let client =
        served.client(ClientOptions { dma, twin_socket: twin, max_data_xfer_size: 1 << 16, ..quick() });
    assert_eq!(client.negotiated().twin_socket, twin);
    client
}

#[test]
fn reaches_memory_while_nobody_waits() {
    for twin in [true, false] {
        let served = Served::start();
        let memory = Memory::new(1 << 20);
        let _client = connect(&served, &memory, twin);
        let dma = served.device.channel();
        let data: Vec<u8> = (0..300_000u32).map(|n| n.to_le_bytes()[0]).collect();
        dma.write(0x1234, &data).unwrap();
        let mut back = vec![0; data.len()];
        dma.read(0x1234, &mut back).unwrap();
        assert_eq!(back, data);
        assert_eq!(dma.read(1 << 40, &mut back), Err(Errno::FAULT));
        dma.read(0, &mut back).unwrap();
    }
}

#[test]
fn reaches_memory_inside_a_command() {
    for twin in [true, false] {
        let served = Served::start();
        let memory = Memory::new(1 << 20);
        memory.0.lock().unwrap()[0x3000..0x4000].fill(41);
        let client = connect(&served, &memory, twin);
        client.region_write(0, INLINE_DMA, &0x3000u64.to_ne_bytes()).unwrap();
        assert!(memory.0.lock().unwrap()[0x4000..0x5000].iter().all(|byte| *byte == 42));
        let refused = client.region_write(0, INLINE_DMA, &(1u64 << 50).to_ne_bytes()).unwrap_err();
        assert_eq!(refused.errno(), Some(Errno::FAULT));
    }
}

/// Large requests in both directions at once, from several threads: neither side may wait for the other for ever.
#[test]
fn requests_and_dma_interleave() {
    for twin in [true, false] {
        let served =
            Served::new(Device::new(), ServerOptions { max_data_xfer_size: 1 << 20, ..quick_server() });
        let memory = Memory::new(4 << 20);
        let dma = Some(Arc::clone(&memory) as Arc<_>);
        let client = served.client(ClientOptions { dma, twin_socket: twin, ..quick() });
        let channel = served.device.channel();
        std::thread::scope(|scope| {
            for n in 0..2u8 {
                let channel = channel.clone();
                scope.spawn(move || {
                    let at = u64::from(n) << 21;
                    let mut back = vec![0; 1 << 20];
                    for round in 0..20u8 {
                        channel.write(at, &vec![round; 1 << 20]).unwrap();
                        channel.read(at, &mut back).unwrap();
                        assert!(back.iter().all(|byte| *byte == round));
                    }
                });
            }
            for n in 0..2u8 {
                let client = &client;
                scope.spawn(move || {
                    let at = 0x1000 + (u64::from(n) << 20);
                    let mut back = vec![0; 900_000];
                    for round in 0..20u8 {
                        client.region_write(0, at, &vec![round; 900_000]).unwrap();
                        client.region_read(0, at, &mut back).unwrap();
                        assert!(back.iter().all(|byte| *byte == round));
                    }
                });
            }
        });
    }
}

#[test]
fn is_refused_without_a_handler() {
    let served = Served::start();
    let _client = served.client(quick());
    let dma = served.device.channel();
    assert_eq!(dma.write(0, &[1]), Err(Errno::OPNOTSUPP));
}

#[test]
fn fails_once_the_client_has_left() {
    for twin in [true, false] {
        let served = Served::start();
        let memory = Memory::new(4096);
        let client = connect(&served, &memory, twin);
        let dma = served.device.channel();
        drop(client);
        served.device.wait("the client to be gone", |state| state.gone == 1);
        assert_eq!(dma.write(0, &[1]), Err(Errno::NOTCONN));
        // Nothing of it keeps the handler alive.
        assert_eq!(Arc::strong_count(&memory), 1);
    }
}

/// Memory that takes its time.
struct Slow(Arc<Memory>);

impl DmaHandler for Slow {
    fn dma_read(&self, iova: u64, into: &mut [u8]) -> Result<(), Errno> {
        self.0.dma_read(iova, into)
    }

    fn dma_write(&self, iova: u64, from: &[u8]) -> Result<(), Errno> {
        std::thread::sleep(Duration::from_millis(20));
        self.0.dma_write(iova, from)
    }
}

/// A server by hand: three DMA_WRITEs without reply go out before the reply to each request.
fn posting_server(mut main: UnixStream, twin: bool) {
    let (near, mut far) = UnixStream::pair().unwrap();
    let (header, _) = read_message(&mut main).unwrap();
    let twin_socket = TwinSocket { supported: twin, fd_index: twin.then_some(0) };
    let capabilities = VersionCapabilities { twin_socket, max_msg_fds: 4, ..VersionCapabilities::default() };
    let mut body = Vec::new();
    VersionPayload { major: 0, minor: 1, capabilities }.encode(&mut body);
    let reply = message(header, Kind::Reply, &body);
    let fds = [near.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(!twin || control.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(&main, &[IoSlice::new(&reply)], &mut control, SendFlags::empty()).unwrap();
    drop(near);
    while let Some((header, body)) = read_message(&mut main) {
        for n in 0..3u8 {
            let mut write = DmaAccess { address: u64::from(n) * 8, count: 8 }.to_vec();
            write.extend_from_slice(&body[16..24]);
            let posted = Header { id: n.into(), command: Command::DMA_WRITE, ..header };
            let write = message(posted, Kind::Command { no_reply: true }, &write);
            if twin { far.write_all(&write).unwrap() } else { main.write_all(&write).unwrap() }
        }
        main.write_all(&message(header, Kind::Reply, &body[..16])).unwrap();
    }
}

#[test]
fn writes_without_reply_are_in_once_settled() {
    for twin in [true, false] {
        let (near, far) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || posting_server(far, twin));
        let memory = Memory::new(4096);
        let dma = Some(Arc::new(Slow(Arc::clone(&memory))) as Arc<_>);
        let client = Client::from_stream(near, ClientOptions { dma, ..untouched() }).unwrap();
        assert_eq!(client.negotiated().twin_socket, twin);
        client.dma_settled().unwrap();
        for round in 1..5u8 {
            client.region_write(0, 0, &[round; 8]).unwrap();
            client.dma_settled().unwrap();
            assert_eq!(memory.0.lock().unwrap()[..24], [round; 24]);
        }
        drop(client);
        server.join().unwrap();
    }
}

#[test]
fn writes_that_never_end_are_not_waited_for_for_ever() {
    struct Stuck(std::sync::Mutex<std::sync::mpsc::Receiver<()>>);
    impl DmaHandler for Stuck {
        fn dma_read(&self, _: u64, _: &mut [u8]) -> Result<(), Errno> {
            Err(Errno::FAULT)
        }
        fn dma_write(&self, _: u64, _: &[u8]) -> Result<(), Errno> {
            let _ = self.0.lock().unwrap().recv();
            Ok(())
        }
    }
    let (near, far) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || posting_server(far, true));
    let (release, stuck) = std::sync::mpsc::channel();
    let dma = Some(Arc::new(Stuck(stuck.into())) as Arc<_>);
    let timeout = Duration::from_millis(100);
    let client = Client::from_stream(near, ClientOptions { dma, timeout, ..untouched() }).unwrap();
    client.region_write(0, 0, &[1; 8]).unwrap();
    client.dma_settled().unwrap_err();
    assert!(client.is_alive());
    drop(release);
    drop(client);
    server.join().unwrap();
}
