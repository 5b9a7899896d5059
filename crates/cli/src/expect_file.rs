//! The file of `vm --expect`: what a receiver is told to expect, by whoever sends guests there.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use vfio_migration::{Expectation, ExpectedSource, Pin, Right};
use vfio_migration_compat::{ManifestError, read_toml_or_json};
use vfio_migration_types::{Epoch, VmId};

use crate::exit::CliError;
use crate::words::read_capped_by_owner;

/// Longest file, in bytes.
const MAX_BYTES: usize = 256 << 10;

/// What a receiver takes. What is not named may be anything, or anybody who is trusted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Expectation")]
pub(crate) struct ExpectDocument {
    /// The VM that may be offered, by its UUID.
    #[schemars(with = "Option<String>")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) vm: Option<VmId>,
    /// Who may come. An empty list is nobody.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) sources: Option<Vec<ExpectedEntry>>,
    /// What sources may do that say nothing else: both, where it is not named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) may: Option<Vec<RightWord>>,
    /// The least epoch under which its source owns the VM. Each move makes it one more; a guest that was never moved has 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) min_epoch: Option<u64>,
    /// Most bytes of RAM that the guest may have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) max_memory: Option<u64>,
    /// Most attempts to move that are let in, whatever becomes of them. Questions and rehearsals do not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) max_attempts: Option<u64>,
    /// Most guests that may arrive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) max_arrivals: Option<u64>,
}

/// A source that may come. It has to prove all that is named, and that is its name, its key, or both.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "ExpectedSource")]
pub(crate) struct ExpectedEntry {
    /// A DNS name or IP address of its certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    /// Its public key, `"sha256:"` and 64 hexadecimal digits.
    #[schemars(with = "Option<String>")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) pin: Option<Pin>,
    /// What it may do; where it is not named, what `may` of the document says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) may: Option<Vec<RightWord>>,
}

/// What a source may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "Right")]
pub(crate) enum RightWord {
    /// Ask whether a guest could come: `check`, `rehearse`.
    Ask,
    /// Move a guest there.
    Move,
}

impl RightWord {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ask => "ask",
            Self::Move => "move",
        }
    }
}

impl From<RightWord> for Right {
    fn from(word: RightWord) -> Self {
        match word {
            RightWord::Ask => Self::Ask,
            RightWord::Move => Self::Move,
        }
    }
}

impl From<Right> for RightWord {
    fn from(right: Right) -> Self {
        match right {
            Right::Ask => Self::Ask,
            Right::Move => Self::Move,
        }
    }
}

impl From<ExpectDocument> for Expectation {
    fn from(document: ExpectDocument) -> Self {
        let ExpectDocument { vm, sources, may, min_epoch, max_memory, max_attempts, max_arrivals } = document;
        let rights = |words: Vec<RightWord>| words.into_iter().map(Right::from).collect();
        let source = |ExpectedEntry { name, pin, may }| ExpectedSource { name, pin, may: may.map(rights) };
        let any = Self::default();
        Self {
            sources: sources.map(|sources| sources.into_iter().map(source).collect()),
            may: may.map_or(any.may, rights),
            vm,
            min_epoch: min_epoch.map_or(any.min_epoch, Epoch),
            max_memory,
            max_attempts,
            max_arrivals,
        }
    }
}

impl From<Expectation> for ExpectDocument {
    fn from(expectation: Expectation) -> Self {
        let Expectation { sources, may, vm, min_epoch, max_memory, max_attempts, max_arrivals } = expectation;
        let words =
            |rights: std::collections::BTreeSet<Right>| rights.into_iter().map(RightWord::from).collect();
        let entry = |ExpectedSource { name, pin, may }| ExpectedEntry { name, pin, may: may.map(words) };
        Self {
            vm,
            sources: sources.map(|sources| sources.into_iter().map(entry).collect()),
            may: Some(words(may)),
            min_epoch: Some(min_epoch.0).filter(|epoch| *epoch > 0),
            max_memory,
            max_attempts,
            max_arrivals,
        }
    }
}

/// Reads the file.
pub(crate) fn read(path: &Path) -> Result<ExpectDocument, CliError> {
    let bytes = read_capped_by_owner(path, MAX_BYTES)?;
    parse(&bytes, &path.display().to_string()).map_err(CliError::failed)
}

/// What says that whoever is trusted may come.
const EVERYBODY: &str = "`may = [\"ask\", \"move\"]` is whoever is trusted";

fn parse(bytes: &[u8], origin: &str) -> Result<ExpectDocument, String> {
    // Before anything else: neither format has a word for nothing at all.
    let empty = || format!("{origin}: it says nothing, and lets nobody in ({EVERYBODY})");
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Err(empty());
    }
    let document: ExpectDocument =
        read_toml_or_json(bytes, origin, MAX_BYTES).map_err(|error: ManifestError| error.to_string())?;
    // As it is while somebody writes it, or once all of it is commented out: no leave for everybody.
    if document == ExpectDocument::default() {
        return Err(empty());
    }
    if let Some((key, value)) = vacuous(&document) {
        let at = line_of(bytes, key).map_or_else(String::new, |line| format!("line {line}: "));
        return Err(format!(
            "{origin}: {at}`{key} = {value}` keeps nobody out, and nothing else is said, so it lets nobody in ({EVERYBODY})"
        ));
    }
    let nobody = |entry: &ExpectedEntry| entry.name.is_none() && entry.pin.is_none();
    match document.sources.iter().flatten().position(nobody) {
        Some(n) => Err(format!("{origin}: at sources[{n}]: it needs a name, a pin, or both")),
        None => Ok(document),
    }
}

/// Bytes of RAM that every guest stays below: a guest's physical address has 52 bits at most, on x86-64 and on ARM.
const ALL_MEMORY: u64 = 1 << 52;
/// Attempts, or guests, that nobody lives to count.
const COUNTLESS: u64 = u32::MAX as u64;

/// The first key of a document that constrains nothing at all, and its value. Whoever is trusted may come where that is said aloud, by
/// `may`, and not where a bound was meant and none was set.
fn vacuous(document: &ExpectDocument) -> Option<(&'static str, u64)> {
    let ExpectDocument { vm, sources, may, min_epoch, max_memory, max_attempts, max_arrivals } = document;
    if vm.is_some() || sources.is_some() || may.is_some() {
        return None;
    }
    let bounds = [
        ("min_epoch", min_epoch, min_epoch.is_some_and(|epoch| epoch > 0)),
        ("max_memory", max_memory, max_memory.is_some_and(|most| most < ALL_MEMORY)),
        ("max_attempts", max_attempts, max_attempts.is_some_and(|most| most < COUNTLESS)),
        ("max_arrivals", max_arrivals, max_arrivals.is_some_and(|most| most < COUNTLESS)),
    ];
    if bounds.iter().any(|(_, _, holds)| *holds) {
        return None;
    }
    bounds.into_iter().find_map(|(key, value, _)| Some((key, (*value)?)))
}

/// The first line that has this key, from 1; comments of TOML have none.
fn line_of(bytes: &[u8], key: &str) -> Option<usize> {
    let text = std::str::from_utf8(bytes).ok()?;
    let has = |line: &str| line.split('#').next().is_some_and(|line| line.contains(key));
    text.lines().position(has).map(|before| before + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn toml_and_json_say_the_same() {
        let pin = Pin::of_key(b"a key");
        let toml = format!(
            "vm = \"0d5c8a92-7c1e-4b0b-9a55-0f2f6f6f0002\"\nmin_epoch = 3\nmax_attempts = 2\n\
             [[sources]]\nname = \"host-a\"\n[[sources]]\npin = \"{pin}\"\nmay = [\"ask\"]\n"
        );
        let json = format!(
            "{{\"vm\": \"0d5c8a92-7c1e-4b0b-9a55-0f2f6f6f0002\", \"min_epoch\": 3, \"max_attempts\": 2, \
             \"sources\": [{{\"name\": \"host-a\"}}, {{\"pin\": \"{pin}\", \"may\": [\"ask\"]}}]}}"
        );
        let document = parse(toml.as_bytes(), "a").unwrap();
        assert_eq!(document, parse(json.as_bytes(), "b").unwrap());
        let expectation = Expectation::from(document.clone());
        let sources = expectation.sources.clone().unwrap();
        assert_eq!((sources.len(), sources[1].may.clone()), (2, Some([Right::Ask].into())));
        // What was left out is told as what it comes to.
        let may = Some(vec![RightWord::Ask, RightWord::Move]);
        assert_eq!(ExpectDocument::from(expectation), ExpectDocument { may, ..document });
        let everybody = parse(b"may = [\"ask\", \"move\"]", "c").unwrap();
        assert_eq!(Expectation::from(everybody), Expectation::default());
    }

    #[test]
    fn what_is_wrong_is_named_and_lets_nobody_in() {
        for (text, says) in [
            ("", "it says nothing, and lets nobody in"),
            (" \r\n\t", "it says nothing"),
            ("\u{feff}", ""),
            ("\u{feff}# nothing\n", ""),
            ("# nobody yet\n# [[sources]]\n# name = \"src-b\"\n", "it says nothing"),
            ("# no end of line", "it says nothing"),
            ("{}", "it says nothing"),
            (" {\n}\n", "it says nothing"),
            ("{\"vm\": null, \"sources\": null}", "it says nothing"),
            ("# a bound\nmin_epoch = 0", "line 2: `min_epoch = 0` keeps nobody out"),
            (
                "{\"max_memory\": 18446744073709551615}",
                "line 1: `max_memory = 18446744073709551615` keeps nobody",
            ),
            ("[[sources]]", "at sources[0]: it needs a name, a pin, or both"),
            ("[sources]", ""),
            ("[expect]\nvm = \"x\"", "unknown field `expect`"),
            ("null", ""),
            ("[]", ""),
            ("{\"vm\": \"0d5c8a92\"}", "at vm: '0d5c8a92' is not a UUID"),
            ("vms = 3", "unknown field `vms`"),
            ("{\"max_memory\": -1}", "max_memory"),
            ("[[sources]]\nmay = [\"move\"]", "at sources[0]: it needs a name, a pin, or both"),
            (
                "[[sources]]\nname = \"a\"\n[[sources]]\npin = \"sha256:00\"",
                "at sources[1].pin: line 4, column 7: a pin is sha256:",
            ),
            ("[[sources]]\nname = \"a\"\nmay = [\"fly\"]", "unknown variant `fly`"),
            ("{\"vm\": \"0d5c8a92-7c1e-4b0b-9a55-0f2f6f6f0002\"", "EOF"),
        ] {
            let told = parse(text.as_bytes(), "expect.toml").unwrap_err();
            assert!(told.starts_with("expect.toml") && told.contains(says), "{text}: {told}");
        }
    }

    /// Each key alone, and all of them together: with a value that holds, with one that does not, and left out.
    #[test]
    fn what_constrains_nothing_lets_nobody_in() {
        const TOML_MOST: u64 = i64::MAX as u64;
        let keys = [
            ("min_epoch", ["0", "0"], "1"),
            ("max_memory", ["4503599627370496", "MOST"], "4503599627370495"),
            ("max_attempts", ["4294967295", "MOST"], "0"),
            ("max_arrivals", ["4294967295", "MOST"], "4294967294"),
        ];
        let mut refused = 0;
        for choice in 1..4_usize.pow(4) {
            let chosen = keys.iter().enumerate().filter_map(|(n, (key, none, some))| {
                let value = match choice / 4_usize.pow(n.try_into().unwrap()) % 4 {
                    0 => return None,
                    1 => none[0],
                    2 => none[1],
                    _ => some,
                };
                Some((*key, value, value == *some))
            });
            let chosen: Vec<_> = chosen.collect();
            let holds = chosen.iter().any(|(_, _, holds)| *holds);
            let (toml_most, json_most) = (TOML_MOST.to_string(), u64::MAX.to_string());
            let toml = chosen.iter().map(|(key, value, _)| format!("{key} = {value}\n"));
            let json = chosen.iter().map(|(key, value, _)| format!("\"{key}\": {value}"));
            let toml = toml.collect::<String>().replace("MOST", &toml_most);
            let json = json.collect::<Vec<_>>().join(", ").replace("MOST", &json_most);
            for text in [toml.clone(), format!("{{{json}, \"vm\": null}}")] {
                match parse(text.as_bytes(), "expect") {
                    Ok(_) => assert!(holds, "{text}"),
                    Err(told) => {
                        assert!(!holds && told.starts_with("expect: line 1: `"), "{text}: {told}");
                        assert!(told.contains(chosen[0].0) && told.contains(EVERYBODY), "{text}: {told}");
                        refused += 1;
                    }
                }
            }
            // Said aloud.
            for aloud in ["may = [\"ask\", \"move\"]", "sources = []"] {
                parse(format!("{aloud}\n{toml}").as_bytes(), "expect").unwrap();
            }
        }
        assert_eq!(refused, 2 * (3_u32.pow(4) - 1));
    }
}
