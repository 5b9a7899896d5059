//! Where a guest sees a device on its PCI bus.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Address of a PCI function as its guest sees it: `"00:04.0"` is slot 4, function 0 of bus 0. A domain before it,
/// `"0001:00:04.0"`, is said where it is not 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct GuestPciAddress {
    /// Domain, or segment.
    pub domain: u16,
    /// Bus in its domain.
    pub bus: u8,
    /// Slot (the PCI specification's device number) on its bus: 0 to 31.
    pub slot: u8,
    /// Function in its slot: 0 to 7.
    pub function: u8,
}

/// The text is no address of a PCI function.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0} is no PCI address (want BUS:SLOT.FUNCTION, \"00:04.0\", or a domain before it, \"0000:00:04.0\")"
)]
pub struct GuestPciAddressError(String);

impl fmt::Display for GuestPciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { domain, bus, slot, function } = self;
        if *domain != 0 {
            write!(f, "{domain:04x}:")?;
        }
        write!(f, "{bus:02x}:{slot:02x}.{function}")
    }
}

impl FromStr for GuestPciAddress {
    type Err = GuestPciAddressError;

    fn from_str(text: &str) -> Result<Self, GuestPciAddressError> {
        parse(text).ok_or_else(|| GuestPciAddressError(crate::text::quote(text)))
    }
}

fn parse(text: &str) -> Option<GuestPciAddress> {
    let (rest, function) = text.split_once('.')?;
    let (rest, slot) = rest.rsplit_once(':')?;
    let (domain, bus) = rest.split_once(':').unwrap_or(("0000", rest));
    let hex = |text: &str, digits: usize| {
        let plain = text.len() == digits && text.bytes().all(|digit| digit.is_ascii_hexdigit());
        u16::from_str_radix(text, 16).ok().filter(|_| plain)
    };
    let byte = |text: &str, digits: usize, max: u8| {
        u8::try_from(hex(text, digits)?).ok().filter(|number| *number <= max)
    };
    Some(GuestPciAddress {
        domain: hex(domain, 4)?,
        bus: byte(bus, 2, 0xff)?,
        slot: byte(slot, 2, 31)?,
        function: byte(function, 1, 7)?,
    })
}

impl From<GuestPciAddress> for String {
    fn from(address: GuestPciAddress) -> String {
        address.to_string()
    }
}

impl TryFrom<String> for GuestPciAddress {
    type Error = GuestPciAddressError;

    fn try_from(text: String) -> Result<Self, GuestPciAddressError> {
        text.parse()
    }
}

impl JsonSchema for GuestPciAddress {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "GuestPciAddress".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "description": "Address of a PCI function as its guest sees it: \"00:04.0\", or with a domain \"0000:00:04.0\".",
            "pattern": "^([0-9a-fA-F]{4}:)?[0-9a-fA-F]{2}:[01][0-9a-fA-F]\\.[0-7]$",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_back_and_nonsense_is_refused() {
        for text in ["00:04.0", "ff:1f.7", "0001:00:00.0"] {
            assert_eq!(text.parse::<GuestPciAddress>().unwrap().to_string(), text);
        }
        assert_eq!("0000:00:1A.0".parse(), "00:1a.0".parse::<GuestPciAddress>());
        for bad in [
            "",
            "4",
            "04.0",
            "00:04",
            "00:04.8",
            "00:20.0",
            "0:04.0",
            "00:4.0",
            "00:04.00",
            "00:+4.0",
            "000:00:04.0",
            "0000:00:04.0.0",
            "0:0000:00:04.0",
            ":00:04.0",
            "00:04.0 ",
        ] {
            assert!(bad.parse::<GuestPciAddress>().is_err(), "{bad}");
        }
    }
}
