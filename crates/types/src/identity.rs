//! Names of what is migrated: the VM, the attempt, and the VM's devices.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::text::printable;

/// Identity of a VM, the same on every host that ever runs it: a UUID's 16 bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct VmId(pub [u8; 16]);

impl VmId {
    /// The nil UUID, which no VM has: where it stands, no VM is named.
    pub const NIL: Self = Self([0; 16]);

    /// Whether it names a VM.
    pub fn names_a_vm(self) -> bool {
        self != Self::NIL
    }
}

/// The text is not a UUID.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a UUID (want 32 hexadecimal digits, dashes as usual)")]
pub struct VmIdError(String);

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            if matches!(index, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VmId({self})")
    }
}

impl FromStr for VmId {
    type Err = VmIdError;

    fn from_str(text: &str) -> Result<Self, VmIdError> {
        let refuse = || VmIdError(printable(&text.chars().take(64).collect::<String>()).into_owned());
        let groups: Vec<&str> = text.split('-').collect();
        let dashed = groups.iter().map(|group| group.len()).eq([8, 4, 4, 4, 12]);
        if !(dashed || (groups.len() == 1 && text.len() == 32)) {
            return Err(refuse());
        }
        let digits: String = groups.concat();
        if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(refuse());
        }
        let value = u128::from_str_radix(&digits, 16).map_err(|_| refuse())?;
        Ok(Self(value.to_be_bytes()))
    }
}

impl From<VmId> for String {
    fn from(id: VmId) -> String {
        id.to_string()
    }
}

impl TryFrom<String> for VmId {
    type Error = VmIdError;

    fn try_from(text: String) -> Result<Self, VmIdError> {
        text.parse()
    }
}

/// The number of times that a VM has changed owner. Only the owner of (VM, epoch) may run it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch that a successful commit begins.
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

/// One attempt to migrate: random, drawn by the source, bound to every channel of the session.
///
/// In documents it is 32 hexadecimal digits. An array of 16 numbers, as journals of layout 1 have it, is read too.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "WrittenAttempt")]
pub struct AttemptId(pub [u8; 16]);

/// The forms in which a document may have an attempt.
#[derive(Deserialize)]
#[serde(untagged)]
enum WrittenAttempt {
    Digits(String),
    Numbers([u8; 16]),
}

/// The text is not the name of an attempt.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' names no attempt (want 32 hexadecimal digits)")]
pub struct AttemptIdError(String);

impl FromStr for AttemptId {
    type Err = AttemptIdError;

    fn from_str(text: &str) -> Result<Self, AttemptIdError> {
        let digits = text.len() == 32 && text.bytes().all(|digit| digit.is_ascii_hexdigit());
        let value = u128::from_str_radix(text, 16).ok().filter(|_| digits);
        let refuse = || AttemptIdError(text.chars().take(64).collect());
        value.map(|value| Self(value.to_be_bytes())).ok_or_else(refuse)
    }
}

impl From<AttemptId> for String {
    fn from(id: AttemptId) -> String {
        id.to_string()
    }
}

impl TryFrom<WrittenAttempt> for AttemptId {
    type Error = AttemptIdError;

    fn try_from(written: WrittenAttempt) -> Result<Self, AttemptIdError> {
        match written {
            WrittenAttempt::Digits(text) => text.parse(),
            WrittenAttempt::Numbers(bytes) => Ok(Self(bytes)),
        }
    }
}

impl fmt::Display for AttemptId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for AttemptId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AttemptId({self})")
    }
}

/// Most devices of one machine: what the wire, a manifest, the reference VMM's bus and its guest program take.
pub const DEVICES_MAX: u16 = 64;

/// A device's name, given by whoever configures the VM and equal on both sides: 1 to 64 of `[A-Za-z0-9._-]`.
///
/// A name, not a bus address: the destination's device may sit at another address.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct DeviceId(String);

/// The text cannot name a device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' cannot name a device (want 1 to 64 letters, digits, '.', '_' or '-')")]
pub struct DeviceIdError(String);

impl DeviceId {
    /// Longest name, in bytes.
    pub const MAX_LEN: usize = 64;

    /// Checks and takes a name.
    pub fn new(name: impl Into<String>) -> Result<Self, DeviceIdError> {
        let name = name.into();
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if name.is_empty() || name.len() > Self::MAX_LEN || !name.bytes().all(legal) {
            return Err(DeviceIdError(name.chars().take(Self::MAX_LEN).collect()));
        }
        Ok(Self(name))
    }

    /// The name as text, valid as [`DeviceId`] says.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceId({})", self.0)
    }
}

impl FromStr for DeviceId {
    type Err = DeviceIdError;

    fn from_str(text: &str) -> Result<Self, DeviceIdError> {
        Self::new(text)
    }
}

impl From<DeviceId> for String {
    fn from(id: DeviceId) -> String {
        id.0
    }
}

impl TryFrom<String> for DeviceId {
    type Error = DeviceIdError;

    fn try_from(text: String) -> Result<Self, DeviceIdError> {
        Self::new(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_read_back_and_nonsense_is_refused() {
        let text = "00112233-4455-6677-8899-aabbccddeeff";
        let id: VmId = text.parse().unwrap();
        assert_eq!(id.to_string(), text);
        assert_eq!("00112233445566778899AABBCCDDEEFF".parse(), Ok(id));
        for bad in ["", "0011", "0011223344556677-8899-aabbccddeeff", "+0112233-4455-6677-8899-aabbccddeeff"]
        {
            assert!(bad.parse::<VmId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn attempts_are_written_as_digits_and_read_in_both_forms() {
        let id = AttemptId([0xab; 16]);
        let text = serde_json::to_string(&id).unwrap();
        assert_eq!(text, format!("\"{}\"", "ab".repeat(16)));
        assert_eq!(serde_json::from_str::<AttemptId>(&text).unwrap(), id);
        let numbers = serde_json::to_string(&[0xab_u8; 16]).unwrap();
        assert_eq!(serde_json::from_str::<AttemptId>(&numbers).unwrap(), id);
        for bad in ["\"\"", "\"abc\"", "[1,2]", "7", &format!("\"+{}\"", "a".repeat(31))] {
            assert!(serde_json::from_str::<AttemptId>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn device_names_are_bounded() {
        assert!(DeviceId::new("net0").is_ok());
        for bad in ["", "a/b", "a b", "é", &"x".repeat(65)] {
            assert!(DeviceId::new(bad).is_err(), "{bad}");
        }
    }
}
