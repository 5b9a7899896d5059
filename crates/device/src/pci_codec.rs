//! `PciState` as bytes: the section `pci.<device>` of the machine state.
//!
//! Layout, little-endian, nothing after its end. Version 2 is written only by a function with pending MSI vectors, so
//! that a side that knows version 1 alone reads all others:
//!
//! | bytes | what |
//! |---|---|
//! | 2 | version: 1 or 2 |
//! | 1 | flags: bit 0 the vectors are MSI-X, bit 1 INTx pending; others 0 |
//! | 1 | 0 |
//! | 4 | bytes of config space: 256 or 4096 |
//! | n | config space |
//! | 6 × 8 | BAR addresses |
//! | 4 | number of vectors, at most 2048 |
//! | n × 16 | vectors: address 8, data 4, flags 4 (bit 0 masked, bit 1 pending; others 0) |
//! | 4 | version 2 alone: pending MSI vectors, a bit each, not 0 |

use crate::pci::{MsiMessage, PciState, VectorState};

const VERSION: u16 = 1;
/// With pending MSI vectors.
const VERSION_MSI: u16 = 2;
/// PCI: an MSI-X table has at most 2048 entries.
const MAX_VECTORS: u32 = 2048;
const BARS: usize = 6;

const MSIX: u8 = 1;
const INTX_PENDING: u8 = 2;
const MASKED: u32 = 1;
const PENDING: u32 = 2;

/// The bytes are no PCI state that this version can read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PciCodecError {
    /// The bytes end too early.
    #[error("PCI state ends at byte {at}, inside of {what}")]
    End {
        /// The byte at which they end.
        at: usize,
        /// In the middle of what.
        what: &'static str,
    },
    /// A version of the layout that this side cannot read.
    #[error("PCI state of version {0}; this side reads {VERSION} and {VERSION_MSI}")]
    Version(u16),
    /// A number is out of its bounds.
    #[error("PCI state: {what} is {value}")]
    Value {
        /// The field that is wrong.
        what: &'static str,
        /// The value that the field has.
        value: u64,
    },
    /// More bytes than the state has.
    #[error("PCI state is followed by {0} bytes that belong to nothing")]
    Trailing(usize),
}

impl PciState {
    /// Name of the machine-state section that holds the PCI state of `device`.
    pub fn section_name(device: &vfio_migration_types::DeviceId) -> String {
        format!("pci.{device}")
    }

    /// The state as bytes.
    ///
    /// # Errors
    /// The state breaks the bounds that [`decode`](Self::decode) keeps.
    pub fn encode(&self) -> Result<Vec<u8>, PciCodecError> {
        let config_len = u32::try_from(self.config.len()).unwrap_or(u32::MAX);
        check_config_len(config_len)?;
        let vectors = u32::try_from(self.vectors.len()).unwrap_or(u32::MAX);
        check_vectors(vectors)?;

        let mut out = Vec::with_capacity(self.config.len() + 64 + self.vectors.len() * 16);
        let version = if self.msi_pending == 0 { VERSION } else { VERSION_MSI };
        out.extend_from_slice(&version.to_le_bytes());
        let flags = if self.msix { MSIX } else { 0 } | if self.intx_pending { INTX_PENDING } else { 0 };
        out.extend_from_slice(&[flags, 0]);
        out.extend_from_slice(&config_len.to_le_bytes());
        out.extend_from_slice(&self.config);
        self.bars.iter().for_each(|bar| out.extend_from_slice(&bar.to_le_bytes()));
        out.extend_from_slice(&vectors.to_le_bytes());
        for vector in &self.vectors {
            let flags = if vector.masked { MASKED } else { 0 } | if vector.pending { PENDING } else { 0 };
            out.extend_from_slice(&vector.message.address.to_le_bytes());
            out.extend_from_slice(&vector.message.data.to_le_bytes());
            out.extend_from_slice(&flags.to_le_bytes());
        }
        if version == VERSION_MSI {
            out.extend_from_slice(&self.msi_pending.to_le_bytes());
        }
        Ok(out)
    }

    /// Reads what [`encode`](Self::encode) wrote. All of `bytes` must be used up.
    pub fn decode(bytes: &[u8]) -> Result<Self, PciCodecError> {
        let mut from = StateReader { bytes, at: 0 };
        let version = u16::from_le_bytes(from.array("the version")?);
        if ![VERSION, VERSION_MSI].contains(&version) {
            return Err(PciCodecError::Version(version));
        }
        let [flags, reserved] = from.array("the flags")?;
        if flags & !(MSIX | INTX_PENDING) != 0 || reserved != 0 {
            return Err(PciCodecError::Value {
                what: "the flags word",
                value: u16::from_le_bytes([flags, reserved]).into(),
            });
        }
        let config_len = u32::from_le_bytes(from.array("the config length")?);
        let config = from.take(check_config_len(config_len)?, "config space")?.to_vec();
        let mut bars = [0; BARS];
        for bar in &mut bars {
            *bar = u64::from_le_bytes(from.array("the BARs")?);
        }
        let count = check_vectors(u32::from_le_bytes(from.array("the number of vectors")?))?;
        // Capped above, and checked against what is there before it is allocated.
        if bytes.len() - from.at < count * 16 {
            return Err(PciCodecError::End { at: bytes.len(), what: "the vectors" });
        }
        let mut vectors = Vec::with_capacity(count);
        for _ in 0..count {
            let address = u64::from_le_bytes(from.array("a vector")?);
            let data = u32::from_le_bytes(from.array("a vector")?);
            let flags = u32::from_le_bytes(from.array("a vector")?);
            if flags & !(MASKED | PENDING) != 0 {
                return Err(PciCodecError::Value { what: "a vector's flags word", value: flags.into() });
            }
            let message = MsiMessage { address, data };
            vectors.push(VectorState { message, masked: flags & MASKED != 0, pending: flags & PENDING != 0 });
        }
        let msi_pending = match version {
            VERSION_MSI => u32::from_le_bytes(from.array("the pending MSI vectors")?),
            _ => 0,
        };
        if version == VERSION_MSI && msi_pending == 0 {
            return Err(PciCodecError::Value { what: "the pending MSI vectors", value: 0 });
        }
        match bytes.len() - from.at {
            0 => Ok(Self {
                config,
                bars,
                vectors,
                msix: flags & MSIX != 0,
                msi_pending,
                intx_pending: flags & INTX_PENDING != 0,
            }),
            more => Err(PciCodecError::Trailing(more)),
        }
    }
}

fn check_config_len(len: u32) -> Result<usize, PciCodecError> {
    match len {
        256 => Ok(256),
        4096 => Ok(4096),
        other => Err(PciCodecError::Value { what: "the size of config space", value: other.into() }),
    }
}

fn check_vectors(count: u32) -> Result<usize, PciCodecError> {
    let bad = PciCodecError::Value { what: "the number of vectors", value: count.into() };
    if count > MAX_VECTORS { Err(bad) } else { usize::try_from(count).map_err(|_| bad) }
}

struct StateReader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> StateReader<'a> {
    fn take(&mut self, len: usize, what: &'static str) -> Result<&'a [u8], PciCodecError> {
        let end = self.at.checked_add(len).filter(|end| *end <= self.bytes.len());
        let piece = end.and_then(|end| self.bytes.get(self.at..end));
        let piece = piece.ok_or(PciCodecError::End { at: self.bytes.len(), what })?;
        self.at += len;
        Ok(piece)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], PciCodecError> {
        let at = self.bytes.len();
        self.take(N, what)?.try_into().map_err(|_| PciCodecError::End { at, what })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> PciState {
        let vector = |n: u32| VectorState {
            message: MsiMessage { address: 0xfee0_0000 + (u64::from(n) << 32), data: 0x40 + n },
            masked: n % 2 == 1,
            pending: n >= 2,
        };
        PciState {
            config: (0..=255).collect(),
            bars: [0xc000_0000, 0, 0x80_0000_0000, 0, 0, u64::MAX],
            vectors: (0..4).map(vector).collect(),
            msix: true,
            msi_pending: 0,
            intx_pending: false,
        }
    }

    #[test]
    fn what_is_written_reads_back() {
        for (msix, intx_pending, vectors, config) in [(true, false, 4, 256), (false, true, 0, 4096)] {
            let mut state = PciState { msix, intx_pending, ..state() };
            state.vectors.truncate(vectors);
            state.config.resize(config, 7);
            assert_eq!(PciState::decode(&state.encode().unwrap()), Ok(state));
        }
    }

    #[test]
    fn the_layout_does_not_drift() {
        let bytes = state().encode().unwrap();
        assert_eq!(bytes.len(), 8 + 256 + 48 + 4 + 4 * 16);
        assert_eq!(&bytes[..9], &[1, 0, 1, 0, 0, 1, 0, 0, 0]);
        assert_eq!(&bytes[8 + 256..][..8], &0xc000_0000u64.to_le_bytes());
        assert_eq!(&bytes[8 + 256 + 48..][..4], &[4, 0, 0, 0]);
        let last = &bytes[bytes.len() - 16..];
        assert_eq!(last, &[0, 0, 0xe0, 0xfe, 3, 0, 0, 0, 0x43, 0, 0, 0, 3, 0, 0, 0]);
    }

    #[test]
    fn pending_msi_vectors_are_version_2_and_follow_the_rest() {
        let with = PciState { msi_pending: 0x8000_0001, ..state() };
        let (plain, bytes) = (state().encode().unwrap(), with.encode().unwrap());
        assert_eq!((&bytes[..2], &bytes[2..plain.len()]), (&[2, 0][..], &plain[2..]));
        assert_eq!(&bytes[plain.len()..], &[1, 0, 0, 0x80]);
        assert_eq!(PciState::decode(&bytes), Ok(with));
        for len in plain.len()..bytes.len() {
            assert!(matches!(PciState::decode(&bytes[..len]), Err(PciCodecError::End { .. })), "{len}");
        }
        let nothing = [&bytes[..plain.len()], &[0; 4]].concat();
        assert!(matches!(PciState::decode(&nothing), Err(PciCodecError::Value { .. })));
        let more = [&bytes[..], &[0]].concat();
        assert_eq!(PciState::decode(&more), Err(PciCodecError::Trailing(1)));
    }

    #[test]
    fn every_truncation_and_any_excess_is_refused() {
        let bytes = state().encode().unwrap();
        for len in 0..bytes.len() {
            assert!(matches!(PciState::decode(&bytes[..len]), Err(PciCodecError::End { .. })), "{len}");
        }
        let more = [&bytes[..], &[0]].concat();
        assert_eq!(PciState::decode(&more), Err(PciCodecError::Trailing(1)));
    }

    #[test]
    fn lengths_are_capped_before_anything_is_allocated() {
        let bytes = state().encode().unwrap();
        let change = |at: usize, with: &[u8]| {
            let mut bytes = bytes.clone();
            bytes[at..at + with.len()].copy_from_slice(with);
            PciState::decode(&bytes)
        };
        assert_eq!(change(0, &[3, 0]), Err(PciCodecError::Version(3)));
        assert!(matches!(change(2, &[4]), Err(PciCodecError::Value { .. })));
        assert!(matches!(change(4, &[0xff; 4]), Err(PciCodecError::Value { .. })));
        assert!(matches!(change(8 + 256 + 48, &[0xff; 4]), Err(PciCodecError::Value { .. })));
        assert!(matches!(change(8 + 256 + 48, &2048u32.to_le_bytes()), Err(PciCodecError::End { .. })));
        assert!(matches!(change(bytes.len() - 1, &[0x80]), Err(PciCodecError::Value { .. })));
        let unfit = PciState { config: vec![0; 255], ..state() };
        assert!(unfit.encode().is_err());
    }
}
