//! The reasons of a verdict, as ACCEPT and REFUSE carry them.

use crate::cursor::{Cursor, Put};
use crate::error::WireError;
use crate::limits;
use crate::message::Reason;

pub(crate) fn encode_reasons(reasons: &[Reason], out: &mut Vec<u8>) {
    let reasons = &reasons[..reasons.len().min(limits::REASONS)];
    out.put_u16(u16::try_from(reasons.len()).unwrap_or(u16::MAX));
    out.put_reserved::<2>();
    for reason in reasons {
        out.put_text(&reason.code, limits::REASON_CODE);
        out.put_text(&reason.text, limits::REASON_TEXT);
        out.put_text(&reason.device, limits::DEVICE_NAME);
        out.put_text(&reason.field, limits::REASON_FIELD);
        out.put_text(&reason.source, limits::REASON_VALUE);
        out.put_text(&reason.destination, limits::REASON_VALUE);
        out.put_text(&reason.severity, limits::REASON_WORD);
        out.put_text(&reason.fix, limits::REASON_WORD);
    }
}

pub(crate) fn decode_reasons(cursor: &mut Cursor<'_>) -> Result<Vec<Reason>, WireError> {
    let count = cursor.u16("count")?;
    if usize::from(count) > limits::REASONS {
        return Err(cursor.value("count", count.into()));
    }
    cursor.reserved::<2>()?;
    let mut text = |field, max| cursor.text(field, max).map(str::to_owned);
    (0..count)
        .map(|_| {
            Ok(Reason {
                code: text("code", limits::REASON_CODE)?,
                text: text("text", limits::REASON_TEXT)?,
                device: text("device", limits::DEVICE_NAME)?,
                field: text("field", limits::REASON_FIELD)?,
                source: text("source", limits::REASON_VALUE)?,
                destination: text("destination", limits::REASON_VALUE)?,
                severity: text("severity", limits::REASON_WORD)?,
                fix: text("fix", limits::REASON_WORD)?,
            })
        })
        .collect()
}
