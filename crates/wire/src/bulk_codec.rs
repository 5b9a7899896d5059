//! Payloads of bulk frames.

use vfio_migration_types::PAGE_SIZE;

use crate::cursor::{Cursor, Put};
use crate::error::WireError;
use crate::header::{FLAG_BODY, FLAG_BODY_CRC};
use crate::kind::Kind;
use crate::limits;
use crate::message::{Bulk, DeviceEnd};
use crate::message_codec::{check_device, check_pages, decode_total, encode_total};

/// Bytes that [`encode`] appends at most.
pub(crate) const LONGEST_HEAD: usize = 8 + limits::SECTION_NAME;

impl Bulk<'_> {
    /// Bytes that follow the frame's payload on the stream, at most 1 MiB: those of [`Bulk::Pages`].
    pub fn body_len(&self) -> u64 {
        match self {
            Self::Pages { count, .. } => u64::from(*count) * PAGE_SIZE,
            _ => 0,
        }
    }
}

/// Appends the fixed fields to `head`; gives the type, the flags and the bytes that follow the head.
pub(crate) fn encode<'a>(bulk: &Bulk<'a>, head: &mut Vec<u8>) -> Result<(Kind, u16, &'a [u8]), WireError> {
    Ok(match *bulk {
        Bulk::Pages { first, count, crc } => {
            check_pages(Kind::Pages, first, count.into())?;
            head.put_u64(first);
            head.put_u32(count);
            head.put_u32(crc.unwrap_or(0));
            (Kind::Pages, if crc.is_some() { FLAG_BODY | FLAG_BODY_CRC } else { FLAG_BODY }, &[])
        }
        Bulk::ZeroPages { first, count } => {
            check_pages(Kind::ZeroPages, first, count)?;
            head.put_u64(first);
            head.put_u64(count);
            (Kind::ZeroPages, 0, &[])
        }
        Bulk::DeviceData { device, sequence, offset, bytes } => {
            check_device(Kind::DeviceData, device)?;
            check_offset(offset, bytes)?;
            head.put_u16(device);
            head.put_reserved::<6>();
            head.put_u64(sequence);
            head.put_u64(offset);
            (Kind::DeviceData, 0, bytes)
        }
        Bulk::DeviceEnd(DeviceEnd { device, total }) => {
            check_device(Kind::DeviceEnd, device)?;
            head.put_u16(device);
            head.put_reserved::<6>();
            encode_total(total, head);
            (Kind::DeviceEnd, 0, &[])
        }
        Bulk::Section { name, version, bytes } => {
            check_name(name.as_bytes())?;
            head.put_u32(version);
            head.put_u16(u16::try_from(name.len()).unwrap_or(u16::MAX));
            head.put_reserved::<2>();
            head.put(name.as_bytes());
            if bytes.len() > limits::SECTION {
                return Err(too_long(bytes.len()));
            }
            (Kind::Section, 0, bytes)
        }
    })
}

/// Decodes a payload whose length is within the limits of `kind`.
pub(crate) fn decode(kind: Kind, body_crc: bool, payload: &[u8]) -> Result<Bulk<'_>, WireError> {
    let mut cursor = Cursor::new(kind.name(), payload);
    let bulk = match kind {
        Kind::Pages => {
            let (first, count) = (cursor.u64("first")?, cursor.u32("count")?);
            check_pages(kind, first, count.into())?;
            let crc = cursor.u32("body_crc")?;
            if !body_crc {
                cursor.absent(crc, 0)?;
            }
            Bulk::Pages { first, count, crc: body_crc.then_some(crc) }
        }
        Kind::ZeroPages => {
            let (first, count) = (cursor.u64("first")?, cursor.u64("count")?);
            check_pages(kind, first, count)?;
            Bulk::ZeroPages { first, count }
        }
        Kind::DeviceData => {
            let device = decode_device(kind, &mut cursor)?;
            let sequence = cursor.u64("sequence")?;
            let offset = cursor.u64("offset")?;
            let bytes = cursor.rest();
            check_offset(offset, bytes)?;
            Bulk::DeviceData { device, sequence, offset, bytes }
        }
        Kind::DeviceEnd => {
            let device = decode_device(kind, &mut cursor)?;
            Bulk::DeviceEnd(DeviceEnd { device, total: decode_total(&mut cursor)? })
        }
        Kind::Section => decode_section(&mut cursor)?,
        // `Frame::decode` gives control types to the other codec.
        _ => return Err(WireError::UnknownFrame(kind.facts().number)),
    };
    cursor.finish()?;
    Ok(bulk)
}

fn decode_section<'a>(cursor: &mut Cursor<'a>) -> Result<Bulk<'a>, WireError> {
    let version = cursor.u32("version")?;
    let name_len = cursor.u16("name_len")?;
    cursor.reserved::<2>()?;
    if usize::from(name_len) > limits::SECTION_NAME {
        return Err(cursor.value("name_len", name_len.into()));
    }
    let name = check_name(cursor.slice("name", name_len.into())?)?;
    let bytes = cursor.rest();
    if bytes.len() > limits::SECTION {
        return Err(too_long(bytes.len()));
    }
    Ok(Bulk::Section { name, version, bytes })
}

fn decode_device(kind: Kind, cursor: &mut Cursor<'_>) -> Result<u16, WireError> {
    let device = cursor.u16("device")?;
    cursor.reserved::<6>()?;
    check_device(kind, device)?;
    Ok(device)
}

/// A device's state has at most 2^64 - 1 bytes.
fn check_offset(offset: u64, bytes: &[u8]) -> Result<(), WireError> {
    match offset.checked_add(bytes.len() as u64) {
        Some(_) => Ok(()),
        None => Err(WireError::Value { frame: Kind::DeviceData.name(), field: "offset", value: offset }),
    }
}

/// 1 to [`limits::SECTION_NAME`] bytes of graphic ASCII.
fn check_name(name: &[u8]) -> Result<&str, WireError> {
    let frame = Kind::Section.name();
    if name.is_empty() || name.len() > limits::SECTION_NAME {
        return Err(WireError::Value { frame, field: "name_len", value: name.len() as u64 });
    }
    std::str::from_utf8(name)
        .ok()
        .filter(|name| name.bytes().all(|byte| byte.is_ascii_graphic()))
        .ok_or(WireError::Text { frame, field: "name", offset: 8 })
}

fn too_long(len: usize) -> WireError {
    WireError::Value { frame: Kind::Section.name(), field: "bytes", value: len as u64 }
}
