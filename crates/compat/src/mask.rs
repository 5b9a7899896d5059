//! Which bytes of config space are compared: exceptions to the default of whoever compares them.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One exception: `"ignore 0x50+8"` or `"compare 0x9c+4"`. Later ones win.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct MaskRule {
    /// Offset of the first byte in config space.
    pub offset: u16,
    /// How many bytes the exception covers.
    pub len: u16,
    /// Whether a difference is refused.
    pub compare: bool,
}

/// The text is no rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is no rule for config space (want \"ignore 0x50+8\" or \"compare 0x50+8\", within 4096 bytes)")]
pub struct MaskRuleError(String);

impl fmt::Display for MaskRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = if self.compare { "compare" } else { "ignore" };
        write!(f, "{verb} {:#x}+{}", self.offset, self.len)
    }
}

impl FromStr for MaskRule {
    type Err = MaskRuleError;

    fn from_str(text: &str) -> Result<Self, MaskRuleError> {
        parse(text).ok_or_else(|| MaskRuleError(crate::text::quote(text)))
    }
}

impl MaskRule {
    /// Whether it is about the byte at `offset`.
    pub(crate) fn covers(self, offset: u16) -> bool {
        offset.checked_sub(self.offset).is_some_and(|at| at < self.len)
    }
}

fn parse(text: &str) -> Option<MaskRule> {
    let (verb, range) = text.split_once(' ')?;
    let compare = match verb {
        "compare" => true,
        "ignore" => false,
        _ => return None,
    };
    let (offset, len) = range.split_once('+')?;
    let number = |text: &str| match text.strip_prefix("0x") {
        Some(hex) if hex.bytes().all(|digit| digit.is_ascii_hexdigit()) => u16::from_str_radix(hex, 16).ok(),
        None if text.bytes().all(|digit| digit.is_ascii_digit()) => text.parse().ok(),
        _ => None,
    };
    let (offset, len) = (number(offset)?, number(len)?);
    let inside = len > 0 && u32::from(offset) + u32::from(len) <= 4096;
    inside.then_some(MaskRule { offset, len, compare })
}

impl From<MaskRule> for String {
    fn from(rule: MaskRule) -> String {
        rule.to_string()
    }
}

impl TryFrom<String> for MaskRule {
    type Error = MaskRuleError;

    fn try_from(text: String) -> Result<Self, MaskRuleError> {
        text.parse()
    }
}

impl JsonSchema for MaskRule {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "MaskRule".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "description": "An exception to the bytes of config space that are compared: \"ignore 0x50+8\" or \"compare 0x50+8\".",
            "pattern": "^(ignore|compare) [0-9a-fx]+\\+[0-9a-fx]+$",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_read_back_and_nonsense_is_refused() {
        for text in ["ignore 0x50+8", "compare 0x0+1", "ignore 0xffe+2"] {
            assert_eq!(text.parse::<MaskRule>().unwrap().to_string(), text);
        }
        assert_eq!("ignore 80+8".parse(), "ignore 0x50+8".parse::<MaskRule>());
        for bad in [
            "",
            "ignore",
            "ignore 1",
            "skip 1+1",
            "ignore 1+0",
            "ignore 0xfff+2",
            "ignore -1+1",
            "ignore +1+1",
        ] {
            assert!(bad.parse::<MaskRule>().is_err(), "{bad}");
        }
    }
}
