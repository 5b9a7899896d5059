//! Versions of a device model.

use std::str::FromStr;

/// `major.minor`: a destination loads the state of the same major and of a minor no newer than its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ModelVersion {
    major: u32,
    minor: u32,
}

impl ModelVersion {
    /// Whether a device of this version loads what a device of version `source` saved.
    pub(crate) fn loads(self, source: Self) -> bool {
        self.major == source.major && self.minor >= source.minor
    }
}

impl FromStr for ModelVersion {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let number = |digits: &str| {
            let plain = !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_digit());
            plain.then(|| digits.parse().ok()).flatten().ok_or(())
        };
        let (major, minor) = text.split_once('.').ok_or(())?;
        Ok(Self { major: number(major)?, minor: number(minor)? })
    }
}
