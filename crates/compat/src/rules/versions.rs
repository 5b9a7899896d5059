//! What is behind a device and changes with a host's updates: firmware and the host's driver.

use super::{DevicePair, drivers};
use crate::codes::{self, ReasonCode};
use crate::findings::Findings;
use crate::tree::json;

/// Compares them, and the rules for config space.
pub(crate) fn compare(pair: DevicePair<'_>, findings: &mut Findings<'_>) {
    let decides = drivers::firmware_decides(pair);
    let (from, to) = (pair.source, pair.destination);
    let firmware = Codes {
        strict: (!decides).then_some(&codes::STRICT_FIRMWARE),
        differs: &codes::FIRMWARE,
        unknown: &codes::UNKNOWN_FIRMWARE,
    };
    one(pair, findings, firmware, "firmware", "the firmware", (&from.firmware, &to.firmware));
    let host_driver = Codes {
        strict: Some(&codes::STRICT_HOST_DRIVER),
        differs: &codes::HOST_DRIVER,
        unknown: &codes::UNKNOWN_HOST_DRIVER,
    };
    let values = (&from.host_driver, &to.host_driver);
    one(pair, findings, host_driver, "host_driver", "the host's driver", values);
    if from.config_mask != to.config_mask {
        let code = if pair.strict { &codes::STRICT_CONFIG_MASK } else { &codes::DEVICE_CONFIG_MASK };
        let values = || (json(&from.config_mask), json(&to.config_mask));
        pair.differs(findings, code, "config_mask", "the list of rules for config space", values);
    }
}

struct Codes {
    /// Where equality is strict, unless the driver's own rule knows better.
    strict: Option<ReasonCode>,
    differs: ReasonCode,
    unknown: ReasonCode,
}

fn one(
    pair: DevicePair<'_>,
    findings: &mut Findings<'_>,
    codes: Codes,
    field: &str,
    what: &str,
    (from, to): (&Option<String>, &Option<String>),
) {
    if from == to {
        return;
    }
    let code = match codes.strict {
        Some(strict) if pair.strict => strict,
        _ if from.is_none() || to.is_none() => codes.unknown,
        _ => codes.differs,
    };
    pair.differs(findings, code, field, what, || (json(from), json(to)));
}
