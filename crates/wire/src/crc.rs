//! CRC-32C, as headers, payloads and page bodies carry it.

use crate::error::WireError;

/// A CRC-32C (Castagnoli) in the making: for a body that passes in pieces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Crc(u32);

impl Crc {
    /// The checksum of no bytes, to be extended.
    pub fn new() -> Self {
        Self::default()
    }

    /// The checksum of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(crc32c::crc32c(bytes))
    }

    /// Goes on with these bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0 = crc32c::crc32c_append(self.0, bytes);
    }

    /// The number that is written on the wire.
    pub fn value(self) -> u32 {
        self.0
    }

    /// Compares a body with what its frame announced (the `crc` of [`Bulk::Pages`](crate::Bulk::Pages)).
    pub fn check_body(self, announced: u32) -> Result<(), WireError> {
        if self.0 == announced { Ok(()) } else { Err(WireError::BodyCrc { announced, found: self.0 }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 3720, B.4, and the check value of the CRC catalogue.
    #[test]
    fn it_is_the_castagnoli_polynomial() {
        assert_eq!(Crc::new().value(), 0);
        assert_eq!(Crc::of(b"123456789").value(), 0xe306_9283);
        assert_eq!(Crc::of(&[0; 32]).value(), 0x8a91_36aa);
    }

    #[test]
    fn pieces_and_the_whole_agree() {
        let mut crc = Crc::new();
        crc.update(b"1234");
        crc.update(b"");
        crc.update(b"56789");
        assert_eq!(crc, Crc::of(b"123456789"));
        assert_eq!(crc.check_body(0xe306_9283), Ok(()));
        assert_eq!(crc.check_body(1), Err(WireError::BodyCrc { announced: 1, found: 0xe306_9283 }));
    }
}
