//! Clients that are late: with their answer to a device's DMA, or with reading what they asked for. They stay clients.

use std::io::Write;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::{sleep, spawn};
use std::time::Duration;

use crate::by_hand::{Raw, message, read_message, words};
use crate::rig::{Device, INLINE_DMA, Memory, Served, quick, quick_server};
use vfio_user_peer::codec::{Command, DmaAccess, Header, Kind};
use vfio_user_peer::{ClientOptions, DmaHandler, Errno, ServerOptions};

const SHORT: Duration = Duration::from_millis(300);

fn impatient() -> Served {
    Served::new(Device::new(), ServerOptions { message_timeout: SHORT, ..quick_server() })
}

/// The device's request, and an answer of bytes that are all `fill`.
fn asked(raw: &mut Raw, command: Command, fill: u8) -> Vec<u8> {
    let (header, body) = read_message(&mut raw.0).unwrap();
    assert_eq!(header.command, command);
    let mut reply = body[..DmaAccess::SIZE].to_vec();
    if command == Command::DMA_READ {
        let count = u64::from_ne_bytes(body[8..16].try_into().unwrap());
        reply.resize(DmaAccess::SIZE + usize::try_from(count).unwrap(), fill);
    }
    message(header, Kind::Reply, &reply)
}

/// Wherever in it the time runs out, the late answer is dropped, commands are served on, and the next request gets its own.
#[test]
fn a_late_answer_to_dma_is_dropped_and_the_client_stays() {
    let served = impatient();
    let mut raw = Raw::negotiated(&served);
    let dma = served.device.channel();
    for front in [0, 1, 15, 16, 31, 32, 50, 95] {
        let late = spawn({
            let dma = dma.clone();
            move || dma.read(0x1000, &mut [0; 64])
        });
        let reply = asked(&mut raw, Command::DMA_READ, 1);
        raw.0.write_all(&reply[..front]).unwrap();
        assert_eq!(late.join().unwrap(), Err(Errno::TIMEDOUT), "{front} bytes were there in time");
        // Nothing else is asked while it is late.
        assert_eq!(dma.write(0x1000, &[1; 64]), Err(Errno::TIMEDOUT));
        if front == 0 {
            raw.in_step();
        }
        raw.0.write_all(&reply[front..]).unwrap();
        raw.in_step();
        let next = spawn({
            let dma = dma.clone();
            move || {
                let mut into = [0; 64];
                dma.read(0x2000, &mut into).map(|()| into)
            }
        });
        let reply = asked(&mut raw, Command::DMA_READ, 2);
        raw.0.write_all(&reply).unwrap();
        assert_eq!(next.join().unwrap(), Ok([2; 64]), "{front} bytes were there in time");
    }
}

/// The device asks inside a command, which fails and is answered.
#[test]
fn a_command_whose_dma_is_late_fails_and_the_client_stays() {
    let served = impatient();
    let mut raw = Raw::negotiated(&served);
    let mut write = INLINE_DMA.to_ne_bytes().to_vec();
    write.extend(words(&[0, 8]));
    write.extend(0x3000u64.to_ne_bytes());
    raw.send(Command::REGION_WRITE, &write, false);
    let late = asked(&mut raw, Command::DMA_READ, 1);
    let (kind, _) = raw.receive();
    assert_eq!(kind, Kind::Error(Errno::TIMEDOUT.raw_os_error().unsigned_abs()));
    raw.0.write_all(&late).unwrap();
    raw.in_step();
}

/// Memory that answers when it is told to.
struct Held(std::sync::Mutex<Receiver<()>>, Arc<Memory>);

impl DmaHandler for Held {
    fn dma_read(&self, iova: u64, into: &mut [u8]) -> Result<(), Errno> {
        self.1.dma_read(iova, into)
    }

    fn dma_write(&self, iova: u64, from: &[u8]) -> Result<(), Errno> {
        let _ = self.0.lock().unwrap().recv();
        self.1.dma_write(iova, from)
    }
}

#[test]
fn our_own_client_stays_when_its_memory_is_late() {
    for twin_socket in [true, false] {
        let served = impatient();
        let (release, held) = channel();
        let memory = Memory::new(4096);
        let dma = Some(Arc::new(Held(held.into(), Arc::clone(&memory))) as Arc<_>);
        let client = served.client(ClientOptions { dma, twin_socket, ..quick() });
        let device = served.device.channel();
        assert_eq!(device.write(0, &[7; 8]), Err(Errno::TIMEDOUT), "twin socket {twin_socket}");
        client.region_write(0, 0x2000, &[1; 4]).unwrap();
        drop(release);
        device.write(8, &[8; 8]).unwrap();
        assert_eq!(memory.0.lock().unwrap()[..16], [[7; 8], [8; 8]].concat(), "what was late is written too");
        client.region_write(0, 0x2000, &[2; 4]).unwrap();
        assert_eq!(client.lost(), None);
    }
}

/// More than a socket holds, which is read long after it was to be sent.
#[test]
fn a_client_that_reads_its_replies_late_gets_them() {
    let served = impatient();
    let mut raw = Raw::negotiated(&served);
    served.device.state.lock().unwrap().memory.fill(5);
    let mut read = 0u64.to_ne_bytes().to_vec();
    read.extend(words(&[0, 1 << 20]));
    for id in [1, 2] {
        let header =
            Header { id, command: Command::REGION_READ, size: 0, kind: Kind::Command { no_reply: false } };
        raw.0.write_all(&message(header, header.kind, &read)).unwrap();
    }
    // As slow as a client may be, and not a way to wait for anything.
    sleep(4 * SHORT);
    for id in [1, 2] {
        let (header, body) = read_message(&mut raw.0).expect("a reply");
        assert_eq!((header.id, header.kind, body.len()), (id, Kind::Reply, 16 + (1 << 20)));
        assert!(body[16..].iter().all(|byte| *byte == 5));
    }
    raw.in_step();
}
