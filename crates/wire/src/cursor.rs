//! Bounded reading and writing of payload fields: every read names its field, nothing panics, nothing is left over.

use vfio_migration_types::is_control;

use crate::error::WireError;

/// Reads the fields of one payload in order.
#[derive(Debug)]
pub(crate) struct Cursor<'a> {
    frame: &'static str,
    bytes: &'a [u8],
    offset: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(frame: &'static str, bytes: &'a [u8]) -> Self {
        Self { frame, bytes, offset: 0 }
    }

    pub(crate) fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], WireError> {
        let Some((head, rest)) = self.bytes.split_first_chunk::<N>() else {
            return Err(self.truncated(field));
        };
        self.bytes = rest;
        self.offset += N;
        Ok(*head)
    }

    pub(crate) fn u8(&mut self, field: &'static str) -> Result<u8, WireError> {
        self.array(field).map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self, field: &'static str) -> Result<u16, WireError> {
        self.array(field).map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self, field: &'static str) -> Result<u32, WireError> {
        self.array(field).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self, field: &'static str) -> Result<u64, WireError> {
        self.array(field).map(u64::from_le_bytes)
    }

    /// One byte, 0 or 1.
    pub(crate) fn bool(&mut self, field: &'static str) -> Result<bool, WireError> {
        match self.u8(field)? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(self.value(field, other.into())),
        }
    }

    /// `N` bytes that are zero.
    pub(crate) fn reserved<const N: usize>(&mut self) -> Result<(), WireError> {
        let offset = self.offset;
        if self.array::<N>("reserved")? == [0; N] {
            Ok(())
        } else {
            Err(WireError::Reserved { frame: self.frame, offset })
        }
    }

    /// Checks an absent field: it is `default`, or the frame is refused.
    pub(crate) fn absent<T: PartialEq>(&self, found: T, default: T) -> Result<(), WireError> {
        if found == default {
            Ok(())
        } else {
            Err(WireError::Reserved { frame: self.frame, offset: self.offset })
        }
    }

    /// The next `len` bytes, as the field `field`.
    pub(crate) fn slice(&mut self, field: &'static str, len: usize) -> Result<&'a [u8], WireError> {
        let Some((head, rest)) = self.bytes.split_at_checked(len) else {
            return Err(self.truncated(field));
        };
        self.bytes = rest;
        self.offset += len;
        Ok(head)
    }

    /// Text of at most `max` bytes behind its length (u16). No control characters: it may end on a terminal.
    pub(crate) fn text(&mut self, field: &'static str, max: usize) -> Result<&'a str, WireError> {
        let len = usize::from(self.u16(field)?);
        if len > max {
            return Err(self.value(field, len as u64));
        }
        let offset = self.offset;
        let bytes = self.slice(field, len)?;
        std::str::from_utf8(bytes).ok().filter(|text| !text.contains(is_control)).ok_or(WireError::Text {
            frame: self.frame,
            field,
            offset,
        })
    }

    /// Everything that is left.
    pub(crate) fn rest(&mut self) -> &'a [u8] {
        self.offset += self.bytes.len();
        std::mem::take(&mut self.bytes)
    }

    /// Nothing may be left.
    pub(crate) fn finish(self) -> Result<(), WireError> {
        if self.bytes.is_empty() {
            Ok(())
        } else {
            Err(WireError::Trailing { frame: self.frame, offset: self.offset, bytes: self.bytes.len() })
        }
    }

    pub(crate) fn value(&self, field: &'static str, value: u64) -> WireError {
        WireError::Value { frame: self.frame, field, value }
    }

    fn truncated(&self, field: &'static str) -> WireError {
        WireError::Truncated { frame: self.frame, field, offset: self.offset }
    }
}

/// Appends fields to a payload.
pub(crate) trait Put {
    fn put(&mut self, bytes: &[u8]);

    fn put_u8(&mut self, value: u8) {
        self.put(&[value]);
    }

    fn put_u16(&mut self, value: u16) {
        self.put(&value.to_le_bytes());
    }

    fn put_u32(&mut self, value: u32) {
        self.put(&value.to_le_bytes());
    }

    fn put_u64(&mut self, value: u64) {
        self.put(&value.to_le_bytes());
    }

    fn put_reserved<const N: usize>(&mut self) {
        self.put(&[0; N]);
    }

    /// As much of `text` as `max` bytes hold, cut between characters, control characters as spaces; `max` fits in 16 bits.
    fn put_text(&mut self, text: &str, max: usize) {
        let mut fit = String::with_capacity(text.len().min(max));
        for char in text.chars().map(|char| if is_control(char) { ' ' } else { char }) {
            if fit.len() + char.len_utf8() > max {
                break;
            }
            fit.push(char);
        }
        self.put_u16(u16::try_from(fit.len()).unwrap_or(u16::MAX));
        self.put(fit.as_bytes());
    }
}

impl Put for Vec<u8> {
    fn put(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}
