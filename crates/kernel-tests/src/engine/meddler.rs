//! A wire with somebody on it who alters devices' state, and knows how frames are made: their checksums are right.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use vfio_migration_wire::{Bulk, Frame, FrameHeader, HEADER_LEN, Message, PREAMBLE, encode_bulk};

use super::pair::{Ended, Pair, options};
use crate::check::Outcome;

/// What is made of a piece of a device's state; with whether the guest stood when it was sent.
pub(super) type Alter = fn(stopped: bool, piece: &mut Vec<u8>);

/// Lets all pass.
pub(super) fn nothing(_: bool, _: &mut Vec<u8>) {}

/// Migrates by such a wire.
pub(super) fn migrate(pair: &Pair, alter: Alter) -> Outcome<Ended> {
    let (here, near) = UnixStream::pair()?;
    let (far, there) = UnixStream::pair()?;
    let (near_back, far_back) = (near.try_clone()?, far.try_clone()?);
    std::thread::scope(|scope| {
        let forth = scope.spawn(move || {
            let passed = pass(&near, &far, alter);
            // Whoever reads may still read what was sent.
            let _ = far.shutdown(Shutdown::Write);
            let _ = near.shutdown(Shutdown::Read);
            passed.map_err(|error| error.to_string())
        });
        scope.spawn(move || {
            let _ = std::io::copy(&mut &far_back, &mut &near_back);
            let _ = near_back.shutdown(Shutdown::Write);
        });
        let ended = pair.migrate_between(here.into(), there.into(), options(), |_, _| {})?;
        forth.join().map_err(|_| "the meddler panicked")??;
        Ok(ended)
    })
}

/// Passes frames on until either end is gone.
fn pass(mut from: &UnixStream, mut to: &UnixStream, alter: Alter) -> Outcome {
    let mut preamble = [0; PREAMBLE.len()];
    from.read_exact(&mut preamble)?;
    to.write_all(&preamble)?;
    let mut stopped = false;
    for sequence in 0.. {
        let mut head = [0; HEADER_LEN];
        if from.read_exact(&mut head).is_err() {
            break;
        }
        let header = FrameHeader::parse(&head, sequence)?;
        let mut payload = vec![0; header.payload_len()];
        // The source may leave in the middle of a frame when it has given up.
        if from.read_exact(&mut payload).is_err() {
            break;
        }
        let mut body = Vec::new();
        let mut altered = None;
        match Frame::decode(&header, &payload)? {
            Frame::Message(Message::Final(_)) => stopped = true,
            Frame::Bulk(Bulk::DeviceData { device, sequence: piece, offset, bytes }) => {
                let mut bytes = bytes.to_vec();
                alter(stopped, &mut bytes);
                let bulk = Bulk::DeviceData { device, sequence: piece, offset, bytes: &bytes };
                altered = Some(encode_bulk(&bulk, sequence)?.parts().concat());
            }
            Frame::Bulk(bulk) => body.resize(usize::try_from(bulk.body_len())?, 0),
            _ => {}
        }
        if from.read_exact(&mut body).is_err() {
            break;
        }
        let frame = altered.unwrap_or_else(|| [head.as_slice(), &payload, &body].concat());
        if to.write_all(&frame).is_err() {
            break;
        }
    }
    Ok(())
}
