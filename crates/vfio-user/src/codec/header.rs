//! The header that every message begins with, and the commands.

use std::fmt;

use super::{CodecError, split};

/// Length of a header in bytes.
pub const HEADER_SIZE: usize = 16;

const FLAG_TYPE: u32 = 0xf;
const TYPE_COMMAND: u32 = 0;
const TYPE_REPLY: u32 = 1;
const FLAG_NO_REPLY: u32 = 1 << 4;
const FLAG_ERROR: u32 = 1 << 5;

/// A command number. Any number is one: what a peer does not know it refuses.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Command(pub u16);

macro_rules! commands {
    ($($(#[$doc:meta])* $name:ident = $number:expr;)*) => {
        impl Command {
            $($(#[$doc])* pub const $name: Self = Self($number);)*

            fn name(self) -> Option<&'static str> {
                match self {
                    $(Self::$name => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

commands! {
    /// Negotiation; the first message of a connection.
    VERSION = 1;
    /// Adds a stretch of memory that the device may reach.
    DMA_MAP = 2;
    /// Removes a range of the client's memory.
    DMA_UNMAP = 3;
    /// Number of regions and interrupt types.
    DEVICE_GET_INFO = 4;
    /// Asks about one region.
    DEVICE_GET_REGION_INFO = 5;
    /// Descriptors that accesses to a region may go to.
    DEVICE_GET_REGION_IO_FDS = 6;
    /// Asks about one interrupt type.
    DEVICE_GET_IRQ_INFO = 7;
    /// Connects, masks, raises interrupts.
    DEVICE_SET_IRQS = 8;
    /// Reads from a region.
    REGION_READ = 9;
    /// Writes to a region.
    REGION_WRITE = 10;
    /// Server to client: reads from the client's memory.
    DMA_READ = 11;
    /// Server to client: writes to the client's memory.
    DMA_WRITE = 12;
    /// Resets the device.
    DEVICE_RESET = 13;
    /// Several small writes.
    REGION_WRITE_MULTI = 15;
    /// Gets, sets or probes a feature.
    DEVICE_FEATURE = 16;
    /// Reads migration data.
    MIG_DATA_READ = 17;
    /// Writes migration data.
    MIG_DATA_WRITE = 18;
    /// Extension: pre-copy estimates.
    X_PRECOPY_INFO = 0x8001;
    /// Extension: the device's manifest.
    X_MANIFEST = 0x8002;
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "command {}", self.0),
        }
    }
}

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A request, which is to be answered unless it says otherwise.
    Command {
        /// The sender wants no reply, not even to an error.
        no_reply: bool,
    },
    /// The answer to one; its payload is the command's.
    Reply,
    /// A refusal: the errno, which may be 0. It has no payload.
    Error(u32),
}

/// The header of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Chosen by the sender of the command, echoed in the reply. Need not be unique.
    pub id: u16,
    /// The command, in its reply too.
    pub command: Command,
    /// Length of the whole message, header included: at least [`HEADER_SIZE`].
    pub size: u32,
    /// Whether the message asks or answers.
    pub kind: Kind,
}

impl Header {
    /// Reads a header. Reserved flags are ignored.
    ///
    /// # Errors
    /// The message is shorter than its header, or neither command nor reply: what follows it cannot be found.
    pub fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        let (id, rest) = split::<2>(bytes)?;
        let (command, rest) = split::<2>(rest)?;
        let (size, rest) = split::<4>(rest)?;
        let (flags, rest) = split::<4>(rest)?;
        let (errno, _) = split::<4>(rest)?;
        let (size, flags) = (u32::from_ne_bytes(*size), u32::from_ne_bytes(*flags));
        if usize::try_from(size).is_ok_and(|size| size < HEADER_SIZE) {
            return Err(CodecError::Invalid(format!("a message of {size} bytes, less than its header")));
        }
        let kind = match flags & FLAG_TYPE {
            TYPE_COMMAND => Kind::Command { no_reply: flags & FLAG_NO_REPLY != 0 },
            TYPE_REPLY if flags & FLAG_ERROR != 0 => Kind::Error(u32::from_ne_bytes(*errno)),
            TYPE_REPLY => Kind::Reply,
            other => return Err(CodecError::Invalid(format!("a message of type {other}"))),
        };
        Ok(Self { id: u16::from_ne_bytes(*id), command: Command(u16::from_ne_bytes(*command)), size, kind })
    }

    /// The header as it is on the wire.
    pub fn encode(&self) -> [u8; HEADER_SIZE] {
        let (flags, errno) = match self.kind {
            Kind::Command { no_reply: false } => (TYPE_COMMAND, 0),
            Kind::Command { no_reply: true } => (TYPE_COMMAND | FLAG_NO_REPLY, 0),
            Kind::Reply => (TYPE_REPLY, 0),
            Kind::Error(errno) => (TYPE_REPLY | FLAG_ERROR, errno),
        };
        let mut out = [0; HEADER_SIZE];
        let fields = [
            &self.id.to_ne_bytes()[..],
            &self.command.0.to_ne_bytes(),
            &self.size.to_ne_bytes(),
            &flags.to_ne_bytes(),
            &errno.to_ne_bytes(),
        ];
        out.iter_mut().zip(fields.into_iter().flatten()).for_each(|(to, from)| *to = *from);
        out
    }

    /// Bytes of payload.
    pub fn body_len(&self) -> usize {
        usize::try_from(self.size).unwrap_or(usize::MAX).saturating_sub(HEADER_SIZE)
    }
}
