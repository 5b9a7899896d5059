//! A model's parameter, after Hajnoczi's proposal of 2020 ("VFIO Migration", qemu-devel): a value, the value that means
//! the behaviour of before the parameter existed, and the values whose state a device takes.

use std::fmt;

use schemars::JsonSchema;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::scalar::Scalar;

/// A parameter of a device's model. In JSON also its bare value, for one that is known by nothing else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Parameter {
    /// What it is set to.
    pub value: Scalar,
    /// The value under which a device behaves as one that does not know the parameter; `null` where there is none.
    pub off: Option<Scalar>,
    /// The values, beyond its own, whose state the device takes; in an offer, those it can be created with. `null`
    /// where nothing is declared: its own value alone.
    pub allowed: Option<Vec<Allowed>>,
}

/// One value that is allowed, or a range of numbers.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum Allowed {
    /// Exactly this value.
    Value(Scalar),
    /// Each whole number between two, both included.
    Range(IntRange),
}

/// The whole numbers from `min` to `max`, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub struct IntRange {
    /// First number of the range.
    pub min: i64,
    /// Last number of the range, itself allowed.
    pub max: i64,
}

impl Parameter {
    /// A parameter of which only the value is known.
    pub fn new(value: impl Into<Scalar>) -> Self {
        Self { value: value.into(), off: None, allowed: None }
    }

    /// Whether a device that has this parameter takes the state of one with `value`.
    pub fn takes(&self, value: &Scalar) -> bool {
        self.value == *value
            || self.allowed.as_ref().is_some_and(|all| all.iter().any(|one| one.contains(value)))
    }
}

impl Allowed {
    /// Whether `value` is among it.
    pub fn contains(&self, value: &Scalar) -> bool {
        match (self, value) {
            (Self::Value(own), value) => own == value,
            (Self::Range(range), Scalar::Int(value)) => (range.min..=range.max).contains(value),
            (Self::Range(_), _) => false,
        }
    }
}

impl fmt::Display for Allowed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Value(value) => value.fmt(f),
            Self::Range(range) => write!(f, "{} to {}", range.min, range.max),
        }
    }
}

impl<'de> Deserialize<'de> for Parameter {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Whole {
            value: Scalar,
            #[serde(default)]
            off: Option<Scalar>,
            #[serde(default)]
            allowed: Option<Vec<Allowed>>,
        }
        let whole = from.deserialize_any(ScalarOr(
            "a value, or an object with `value`, `off` and `allowed`",
            |value| Whole { value, off: None, allowed: None },
        ))?;
        Ok(Self { value: whole.value, off: whole.off, allowed: whole.allowed })
    }
}

impl<'de> Deserialize<'de> for Allowed {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        enum OneOf {
            Value(Scalar),
            Range(IntRange),
        }
        impl<'de> Deserialize<'de> for OneOf {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                IntRange::deserialize(from).map(OneOf::Range)
            }
        }
        let one =
            from.deserialize_any(ScalarOr("a value, or an object with `min` and `max`", OneOf::Value))?;
        Ok(match one {
            OneOf::Value(value) => Self::Value(value),
            OneOf::Range(range) => Self::Range(range),
        })
    }
}

/// Takes a bare value, or else a map as `T`.
struct ScalarOr<T>(&'static str, fn(Scalar) -> T);

impl<'de, T: Deserialize<'de>> Visitor<'de> for ScalarOr<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<T, E> {
        Ok((self.1)(Scalar::Bool(value)))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<T, E> {
        Ok((self.1)(Scalar::Int(value)))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<T, E> {
        let fits =
            i64::try_from(value).map_err(|_| E::custom(format!("the number {value} is over 2^63 - 1")));
        fits.map(|value| (self.1)(Scalar::Int(value)))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<T, E> {
        Ok((self.1)(Scalar::Text(value.to_owned())))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map))
    }
}
