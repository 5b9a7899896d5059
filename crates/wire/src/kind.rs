//! The frame types of version 1: number, name, and how long a payload can be.

use crate::limits;

/// The bit of a type's number that makes it optional: a receiver that does not know the type skips the frame.
/// No type of version 1 has it.
pub const OPTIONAL: u16 = 0x8000;

/// A frame type that this version knows, as a row of the table in `docs/protocol.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameType {
    /// The type's number in the header.
    pub number: u16,
    /// The type's name in the documentation and in errors.
    pub name: &'static str,
    /// The shortest payload, bytes.
    pub min: u32,
    /// The longest payload, bytes.
    pub max: u32,
}

impl FrameType {
    /// Every type, by number.
    pub fn all() -> impl Iterator<Item = Self> {
        Kind::ALL.iter().map(|kind| kind.facts())
    }
}

macro_rules! kinds {
    ($($kind:ident $number:literal $name:literal $min:expr, $max:expr;)*) => {
        /// A frame type, closed: what the codecs match on.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Kind { $($kind),* }

        impl Kind {
            const ALL: &[Self] = &[$(Self::$kind),*];

            pub(crate) const fn facts(self) -> FrameType {
                match self {
                    $(Self::$kind => FrameType { number: $number, name: $name, min: bound($min), max: bound($max) },)*
                }
            }
        }
    };
}

/// Bytes of the longest [`Failure`](vfio_migration_types::Failure).
const ERROR: usize = 16 + 3 * 2 + limits::ERROR_DEVICE + limits::ERROR_TEXT + limits::ERROR_REMEDY;
const REASON: usize = 8 * 2
    + limits::REASON_CODE
    + limits::REASON_TEXT
    + limits::DEVICE_NAME
    + limits::REASON_FIELD
    + 2 * limits::REASON_VALUE
    + 2 * limits::REASON_WORD;
const REASONS: usize = 4 + limits::REASONS * REASON;
const NAMES: usize = 4 + limits::DEVICES as usize * 2 * (2 + limits::DEVICE_NAME);
const CONFIGURATION: usize = 32 + limits::CONFIGURATION;
const TOTALS: usize = limits::DEVICES as usize * 40;

kinds! {
    // What must be understood before, or without, an agreement on a version: frozen.
    Hello         0x0001 "HELLO"          56, 56;
    HelloReply    0x0002 "HELLO_REPLY"    16, 16;
    Refuse        0x0003 "REFUSE"         4, REASONS;
    Abort         0x0004 "ABORT"          22, ERROR;
    Query         0x0005 "QUERY"          72, 72;
    Running       0x0006 "RUNNING"        40, 40 + ERROR;
    Declined      0x0007 "DECLINED"       22, ERROR;
    // Control.
    Offer         0x0010 "OFFER"          6, NAMES + CONFIGURATION + limits::MANIFEST;
    Accept        0x0011 "ACCEPT"         26, 20 + REASONS + limits::MANIFEST;
    Begin         0x0012 "BEGIN"          16, 16;
    Begun         0x0013 "BEGUN"          0, 0;
    InitialSent   0x0014 "INITIAL_SENT"   8, 8;
    InitialLoaded 0x0015 "INITIAL_LOADED" 8, 8;
    EndIteration  0x0016 "END_ITERATION"  4, 4;
    Applied       0x0017 "APPLIED"        24, 24;
    Credit        0x0018 "CREDIT"         16, 16;
    Final         0x0019 "FINAL"          36, 36;
    LocksFree     0x001a "LOCKS_FREE"     0, 0;
    FinalEnd      0x001b "FINAL_END"      48, 48 + TOTALS;
    Ready         0x001c "READY"          64, 64 + TOTALS;
    Commit        0x001d "COMMIT"         24, 24;
    Ping          0x001e "PING"           8, 8;
    Pong          0x001f "PONG"           8, 8;
    EndRehearsal  0x0020 "END_REHEARSAL"  4, 4 + ERROR;
    Rehearsed     0x0021 "REHEARSED"      4, 4 + ERROR;
    DigestRam     0x0022 "DIGEST_RAM"     16, 16;
    RamDigests    0x0023 "RAM_DIGESTS"    26, 26 + limits::RAM_DIGESTS as usize * 32 + limits::DIRTY_LOGS;
    LimitsUnmet   0x0024 "LIMITS_UNMET"   22, ERROR;
    // Bulk.
    Pages         0x0100 "PAGES"          16, 16;
    ZeroPages     0x0101 "ZERO_PAGES"     16, 16;
    DeviceData    0x0102 "DEVICE_DATA"    25, 24 + limits::DEVICE_DATA;
    DeviceEnd     0x0103 "DEVICE_END"     48, 48;
    Section       0x0104 "SECTION"        9, limits::PAYLOAD;
}

impl Kind {
    /// The type of this number, if this version knows it.
    pub(crate) fn known(number: u16) -> Option<Self> {
        Self::ALL.iter().copied().find(|kind| kind.facts().number == number)
    }

    pub(crate) const fn name(self) -> &'static str {
        self.facts().name
    }

    /// Whether pages follow the payload.
    pub(crate) const fn has_body(self) -> bool {
        matches!(self, Self::Pages)
    }
}

/// Every bound is evaluated at compile time.
pub(crate) const fn bound(bytes: usize) -> u32 {
    assert!(bytes <= limits::PAYLOAD);
    #[expect(clippy::cast_possible_truncation, reason = "checked on the line above; try_from is not const")]
    let bytes = bytes as u32;
    bytes
}
