//! Versions of a device model, and ranges of them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// `X.Y.Z`, or `X.Y` where Z is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ModelVersion {
    /// States of different majors do not fit each other.
    pub major: u32,
    /// A newer minor loads the state of an older one.
    pub minor: u32,
    /// Says nothing of the state.
    pub patch: u32,
}

/// The text is no version, or no list of ranges.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text} is no {want}")]
pub struct VersionError {
    text: String,
    want: &'static str,
}

impl ModelVersion {
    /// Whether a device of this version loads, by the rule alone, what one of version `source` saved.
    pub fn loads(self, source: Self) -> bool {
        self.major == source.major && self.minor >= source.minor
    }

    /// The first and the last of the versions that it [`loads`](Self::loads).
    pub(crate) fn loaded(self) -> (Self, Self) {
        (Self { minor: 0, patch: 0, ..self }, Self { patch: u32::MAX, ..self })
    }
}

impl fmt::Display for ModelVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

impl FromStr for ModelVersion {
    type Err = VersionError;

    fn from_str(text: &str) -> Result<Self, VersionError> {
        version(text).ok_or_else(|| VersionError {
            text: crate::text::quote(text),
            want: "version (want X.Y.Z or X.Y)",
        })
    }
}

fn version(text: &str) -> Option<ModelVersion> {
    let number = |digits: &str| {
        let plain = !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_digit());
        plain.then(|| digits.parse().ok()).flatten()
    };
    let mut parts = text.split('.');
    let (major, minor) = (number(parts.next()?)?, number(parts.next()?)?);
    let patch = parts.next().map_or(Some(0), number)?;
    parts.next().is_none().then_some(ModelVersion { major, minor, patch })
}

/// Ranges of versions, `"1.2.0-1.9.9,2.0.0-"`: both ends included, an open end for whatever is newer, a single version for itself.
/// They are read once, where a document is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct VersionRanges {
    text: String,
    ranges: Vec<(ModelVersion, Option<ModelVersion>)>,
}

impl VersionRanges {
    /// Most ranges in one text.
    pub const MAX: usize = 64;

    /// As they were written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Number of ranges.
    pub(crate) fn len(&self) -> usize {
        self.ranges.len()
    }

    /// Whether `version` is in one of them.
    pub fn contain(&self, version: ModelVersion) -> bool {
        self.ranges.iter().any(|(from, to)| *from <= version && to.is_none_or(|to| version <= to))
    }

    /// The first and the last version of each.
    pub(crate) fn intervals(&self) -> impl Iterator<Item = (ModelVersion, ModelVersion)> + '_ {
        let newest = ModelVersion { major: u32::MAX, minor: u32::MAX, patch: u32::MAX };
        self.ranges.iter().map(move |(from, to)| (*from, to.unwrap_or(newest)))
    }

    /// The newest versions that the ranges name, those of ends that are not open.
    pub fn ends(&self) -> impl Iterator<Item = ModelVersion> + '_ {
        self.ranges.iter().map(|(from, to)| to.unwrap_or(*from))
    }
}

impl FromStr for VersionRanges {
    type Err = VersionError;

    fn from_str(text: &str) -> Result<Self, VersionError> {
        let want = "list of version ranges (want, for example, 1.2.0-1.9.9,2.0.0-)";
        match ranges(text) {
            Some(ranges) => Ok(Self { text: text.to_owned(), ranges }),
            None => Err(VersionError { text: crate::text::quote(text), want }),
        }
    }
}

impl From<VersionRanges> for String {
    fn from(ranges: VersionRanges) -> Self {
        ranges.text
    }
}

impl TryFrom<String> for VersionRanges {
    type Error = VersionError;

    fn try_from(text: String) -> Result<Self, VersionError> {
        text.parse()
    }
}

fn ranges(text: &str) -> Option<Vec<(ModelVersion, Option<ModelVersion>)>> {
    if text.split(',').count() > VersionRanges::MAX {
        return None;
    }
    text.split(',')
        .map(|range| match range.trim().split_once('-') {
            None => version(range.trim()).map(|only| (only, Some(only))),
            Some((from, "")) => version(from).map(|from| (from, None)),
            Some((from, to)) => {
                let (from, to) = (version(from)?, version(to)?);
                (from <= to).then_some((from, Some(to)))
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v(text: &str) -> ModelVersion {
        text.parse().unwrap()
    }

    #[test]
    fn two_or_three_numbers_are_a_version() {
        assert_eq!(v("1.2"), v("1.2.0"));
        assert_eq!(v("1.2").to_string(), "1.2.0");
        for bad in [
            "",
            "1",
            "1.",
            ".2",
            "1.+2",
            "1.2.",
            "1.2.3.4",
            "1.99999999999",
            "one.two",
            "1.2-3",
            " 1.2",
            "1.2\n",
        ] {
            assert!(bad.parse::<ModelVersion>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_newer_minor_of_one_major_loads() {
        assert!(v("1.3.0").loads(v("1.2.9")) && v("1.2.0").loads(v("1.2.9")));
        assert!(!v("1.1.9").loads(v("1.2.0")) && !v("2.2.0").loads(v("1.2.0")));
    }

    #[test]
    fn ranges_have_ends_and_open_ends() {
        let ranges: VersionRanges = "1.2.0-1.9.9,2.0.0-, 0.5".parse().unwrap();
        for inside in ["1.2.0", "1.9.9", "1.5", "2.0.0", "77.1", "0.5"] {
            assert!(ranges.contain(v(inside)), "{inside}");
        }
        for outside in ["1.1.9", "1.10", "1.99.0", "0.5.1", "0.4"] {
            assert!(!ranges.contain(v(outside)), "{outside}");
        }
        for bad in ["", ",", "-", "-1.0", "1.0-0.9", "1.0--", "x", "1.0-x", &"1.0,".repeat(100)] {
            assert!(bad.parse::<VersionRanges>().is_err(), "{bad}");
        }
    }
}
