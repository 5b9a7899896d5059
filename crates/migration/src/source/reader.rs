//! The reader's thread: receives from the destination, and reports why the connection ended.

use vfio_migration_engine::SourceEvent;
use vfio_migration_types::{Failure, Side, error_chain};
use vfio_migration_wire::{Frame, Message};

use crate::channel::error::ChannelError;
use crate::channel::link::Link;
use crate::channel::reader::Reader;
use crate::session::events::Events;
use crate::source::attempt::SourceShared;

/// Receives from the destination until the connection ends, then reports why it did.
pub(super) fn read_loop(
    mut reader: Reader,
    link: &Link,
    events: &Events<SourceEvent>,
    shared: &SourceShared,
) {
    let error = loop {
        match reader.next() {
            Ok(Frame::Message(Message::Credit { device, bytes })) => {
                match shared.credits.get(usize::from(device)) {
                    Some(credit) => credit.grant(bytes),
                    None => break ChannelError::Unexpected,
                }
            }
            Ok(Frame::Message(message)) => events.send(SourceEvent::Peer(message)),
            Ok(_) => break ChannelError::Unexpected,
            Err(error) => break error,
        }
    };
    let damaged = matches!(error, ChannelError::Wire(_) | ChannelError::Unexpected);
    // If our own writing failed first, that is the reason.
    let why = link.write_error().unwrap_or_else(|| error_chain(&error));
    if damaged {
        // Told first, so that the destination learns why.
        events.send(SourceEvent::Damaged(Failure::new(Side::Source, shared.phase(), why.clone())));
    }
    events.send(SourceEvent::LinkLost(why));
    if damaged {
        reader.drain();
    } else {
        // Nobody reads any more: whoever is writing need not wait.
        link.shutdown();
    }
}
