//! A bandwidth cap as it is written: a size, or `none`.

use std::borrow::Cow;
use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Deserialize, Deserializer, Error, Visitor};
use serde::{Serialize, Serializer};

use crate::units;

/// The word for no cap.
const NONE: &str = "none";
/// Why nothing is no cap. A cap of nothing would let nothing through, and other programs mean none by it.
const ZERO: &str = "a cap of 0 would let nothing through; \"none\" is no cap";

/// A bandwidth cap, or the word that there is to be none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bandwidth {
    /// Whatever the link takes.
    Unlimited,
    BytesPerSecond(NonZeroU64),
}

impl Bandwidth {
    fn of_bytes(bytes: u64) -> Result<Self, String> {
        NonZeroU64::new(bytes).map(Self::BytesPerSecond).ok_or_else(|| ZERO.into())
    }

    /// Bytes each second, as a session takes them.
    pub(crate) fn cap(self) -> Option<u64> {
        match self {
            Self::Unlimited => None,
            Self::BytesPerSecond(bytes) => Some(bytes.get()),
        }
    }
}

impl FromStr for Bandwidth {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == NONE { Ok(Self::Unlimited) } else { Self::of_bytes(units::size(text)?) }
    }
}

impl Serialize for Bandwidth {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Unlimited => to.serialize_str(NONE),
            Self::BytesPerSecond(bytes) => bytes.serialize(to),
        }
    }
}

impl<'de> Deserialize<'de> for Bandwidth {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Written;

        impl Visitor<'_> for Written {
            type Value = Bandwidth;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes each second, or \"none\"")
            }

            fn visit_u64<E: Error>(self, bytes: u64) -> Result<Bandwidth, E> {
                Bandwidth::of_bytes(bytes).map_err(E::custom)
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Bandwidth, E> {
                match text {
                    NONE => Ok(Bandwidth::Unlimited),
                    other => Err(E::invalid_value(serde::de::Unexpected::Str(other), &self)),
                }
            }
        }

        from.deserialize_any(Written)
    }
}

impl JsonSchema for Bandwidth {
    fn schema_name() -> Cow<'static, str> {
        "Bandwidth".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "Bytes each second, or \"none\": no cap.",
            "anyOf": [{"type": "integer", "format": "uint64", "minimum": 1}, {"const": NONE}],
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{from_value, json};

    use super::*;

    #[test]
    fn a_cap_is_a_size_or_none_and_never_0() {
        for (text, value, cap) in [("1K", json!(1024), Some(1024)), ("none", json!("none"), None)] {
            let read: Bandwidth = text.parse().unwrap();
            assert_eq!((json!(read), read.cap()), (value.clone(), cap));
            assert_eq!(from_value::<Bandwidth>(value).unwrap(), read);
        }
        for text in ["0", "0K", "", "None", "-1"] {
            assert!(text.parse::<Bandwidth>().is_err(), "{text}");
        }
        assert!("0".parse::<Bandwidth>().unwrap_err().contains("\"none\" is no cap"));
        for value in [json!(0), json!(-1), json!(1.5), json!("0"), json!(true)] {
            assert!(from_value::<Bandwidth>(value.clone()).is_err(), "{value}");
        }
        assert!(from_value::<Bandwidth>(json!(0)).unwrap_err().to_string().contains("\"none\" is no cap"));
    }
}
