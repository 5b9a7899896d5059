//! Servers as other projects have them (libvfio-user, rust-vmm), imitated: what they can take, send and stumble over.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use crate::by_hand::{answer_version, message, read_message, words};
use crate::rig::{Served, memfd, quick};
use vfio_user_peer::codec::{Command, Kind, VersionCapabilities, VersionPayload};
use vfio_user_peer::{
    Client, ClientOptions, Extension, IoFdKind, IovaRange, IrqAction, IrqData, MigrationState, RegionWrite,
    irq_index,
};

/// The messages that went by: what each was, and how long.
type Lengths = Arc<Mutex<Vec<(Command, usize)>>>;

/// A client of `served`, and the length of every message that it sends from now on. Its messages pass through here, so
/// it sends no descriptors.
fn watched(served: &Served, options: ClientOptions) -> (Client, Lengths) {
    let lengths = Lengths::default();
    let (near, mut far) = UnixStream::pair().unwrap();
    let mut server = UnixStream::connect(&served.path).unwrap();
    let seen = Arc::clone(&lengths);
    std::thread::spawn(move || {
        while let Some((header, body)) = read_message(&mut far) {
            seen.lock().unwrap().push((header.command, 16 + body.len()));
            server.write_all(&message(header, header.kind, &body)).unwrap();
            let Some((header, body)) = read_message(&mut server) else { return };
            far.write_all(&message(header, header.kind, &body)).unwrap();
        }
    });
    let options = ClientOptions { twin_socket: false, ..options };
    (Client::from_stream(near, options).unwrap(), lengths)
}

/// Everything that can make a long message.
fn write_a_lot(client: &Client, served: &Served) {
    let data = vec![7; (1 << 20) + 5];
    client.region_write(0, 0x200, &data).unwrap();
    let mut back = vec![0; data.len()];
    client.region_read(0, 0x200, &mut back).unwrap();
    assert_eq!(back, data);
    let write = RegionWrite { offset: 0x200, region: 0, count: 8, data: [9; 8] };
    client.region_write_multi(&vec![write; 1000]).unwrap();
    client.set_irqs(irq_index::MSIX, 0, IrqAction::Mask, IrqData::Bool(&[true; 200])).unwrap();
    let ranges: Vec<_> = (0..4096).map(|n| IovaRange { iova: n << 13, len: 4096 }).collect();
    assert_eq!(client.dma_logging_start(4096, &ranges).unwrap(), 4096);
    client.dma_logging_stop().unwrap();
    client.set_mig_state(MigrationState::Resuming).unwrap();
    client.mig_data_write(&data).unwrap();
    assert_eq!(served.device.state.lock().unwrap().written, data);
}

/// libvfio-user reads a payload with one recv(2), which may give no more than one buffer of the kernel's.
#[test]
fn no_request_is_longer_than_one_buffer_without_the_extension() {
    let served = Served::start();
    let (client, lengths) = watched(&served, ClientOptions { extension: Extension::NONE, ..quick() });
    write_a_lot(&client, &served);
    let lengths = lengths.lock().unwrap();
    let longest = lengths.iter().max_by_key(|(_, len)| *len).unwrap();
    assert!(longest.1 <= 32 << 10, "{longest:?}");
}

#[test]
fn requests_are_as_long_as_negotiated_with_the_extension() {
    let served = Served::start();
    let (client, lengths) = watched(&served, quick());
    write_a_lot(&client, &served);
    let lengths = lengths.lock().unwrap();
    for command in [Command::REGION_WRITE, Command::MIG_DATA_WRITE] {
        let longest = lengths.iter().filter(|(of, _)| *of == command).map(|(_, len)| *len).max();
        assert!(longest.unwrap() > 1 << 20, "{command}: {longest:?}");
    }
}

/// libvfio-user's entries have 48 bytes: a shadow's offset where the specification has `datamatch`, and that behind it.
#[test]
fn datamatch_is_read_where_the_entry_has_it() {
    for (stride, datamatch) in [(40usize, 0x1234u64), (48, 0x1234), (56, 0x1234)] {
        let (near, mut far) = UnixStream::pair().unwrap();
        let thread = std::thread::spawn(move || {
            let (header, _) = read_message(&mut far).unwrap();
            let mut version = Vec::new();
            VersionPayload { major: 0, minor: 1, capabilities: VersionCapabilities::default() }
                .encode(&mut version);
            far.write_all(&message(header, Kind::Reply, &version)).unwrap();
            let (header, _) = read_message(&mut far).unwrap();
            let mut body = words(&[u32::try_from(16 + 2 * stride).unwrap(), 0, 0, 2]);
            for kind in [0, 1] {
                let mut entry = 0x1000u64.to_ne_bytes().to_vec();
                entry.extend(4u64.to_ne_bytes());
                entry.extend(words(&[0, kind, 1, 0]));
                // An ioregionfd's user_data stays where it was.
                let value = if stride == 40 || kind == 1 { datamatch } else { 0xbad };
                entry.extend(value.to_ne_bytes());
                entry.extend(if kind == 0 { datamatch } else { 0xbad }.to_ne_bytes());
                entry.resize(56, 0xff);
                entry.truncate(stride);
                body.extend(entry);
            }
            let reply = message(header, Kind::Reply, &body);
            let descriptor = memfd(0);
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
            let fds = [descriptor.as_fd()];
            assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&fds)));
            let bytes = [std::io::IoSlice::new(&reply)];
            rustix::net::sendmsg(&far, &bytes, &mut control, rustix::net::SendFlags::empty()).unwrap();
        });
        let options = ClientOptions { on_connect: vfio_user_peer::OnConnect::Leave, ..quick() };
        let entries = Client::from_stream(near, options).unwrap().region_io_fds(0).unwrap();
        let kinds: Vec<_> = entries.iter().map(|entry| entry.kind).collect();
        assert_eq!(
            kinds,
            [
                IoFdKind::Eventfd { flags: 1, datamatch },
                IoFdKind::Regionfd { flags: 1, user_data: datamatch }
            ],
            "{stride}"
        );
        thread.join().unwrap();
    }
}

/// Neither the loss alone nor the refusal of the second connection would say what such a server is.
#[test]
fn a_server_that_loses_step_and_accepts_once_is_told_as_that() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("once.sock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let serving = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        drop(listener);
        answer_version(&mut stream);
        let (header, _) = read_message(&mut stream).unwrap();
        stream.write_all(&message(header, Kind::Error(0), &[])).unwrap();
    });
    let error = Client::connect(&path, quick()).unwrap_err().to_string();
    serving.join().unwrap();
    for says in
        ["it answered", "DEVICE_FEATURE", "lost step", "no second connection", "refused (os error 111)"]
    {
        assert_eq!(error.matches(says).count(), 1, "{says}: {error}");
    }
}
