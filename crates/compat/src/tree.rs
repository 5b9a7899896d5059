//! A stranger's JSON as a tree, with everything capped before anything is made of it.

use std::cell::RefCell;
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;
use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::error::ManifestError;
use crate::text::quote;

/// How deep lists and objects may stand in each other.
pub(crate) const MAX_DEPTH: usize = 24;
/// Most items of a list, and most fields of an object.
pub(crate) const MAX_ITEMS: usize = 4096;
/// U+FEFF in UTF-8, with which some editors begin a file.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
/// Longest text, in bytes.
pub(crate) const MAX_TEXT: usize = 4096;

/// The numbers that a document may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numbers {
    /// Whole ones below 2^64 alone, which every reader reads alike.
    Whole,
    /// Fractions too.
    Any,
}

/// Reads a stranger's JSON, strictly: what two readers could read in two ways is refused. `origin` names the document in
/// errors. At most 24 levels deep, with 4096 items to a list or object, and texts of 4096 bytes.
///
/// # Errors
/// Where in the document what is wrong: it is no JSON, it is too deep, has too much of something, a text that is too
/// long, a name twice, or a number that it may not have.
pub fn read_json(bytes: &[u8], origin: &str, numbers: Numbers) -> Result<Value, ManifestError> {
    if bytes.starts_with(BYTE_ORDER_MARK) {
        let rule = "it begins with a byte order mark, and JSON has none (RFC 8259, section 8.1)";
        return Err(ManifestError::new(origin, "", rule));
    }
    let path = Path::default();
    let mut json = serde_json::Deserializer::from_slice(bytes);
    Node { path: &path, depth: 0, numbers }
        .deserialize(&mut json)
        .and_then(|tree| json.end().map(|()| tree))
        .map_err(|error| ManifestError::new(origin, path.to_string(), error.to_string()))
}

/// Reads a document that people write: JSON when it begins with `{`, TOML otherwise, of at most `max` bytes. `origin`, a file's name for
/// example, goes into errors.
///
/// # Errors
/// The path in the document and the rule that it breaks.
pub fn read_toml_or_json<T: DeserializeOwned>(
    bytes: &[u8],
    origin: &str,
    max: usize,
) -> Result<T, ManifestError> {
    at_most_bytes(origin, bytes.len(), max)?;
    let json = bytes.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'{');
    if json { typed(parse(bytes, origin)?, origin) } else { toml(bytes, origin) }
}

/// Reads a document of this crate's: whole numbers alone.
pub(crate) fn parse(bytes: &[u8], origin: &str) -> Result<Value, ManifestError> {
    read_json(bytes, origin, Numbers::Whole)
}

/// What either of two maps has, in the order of the keys, with the values of both.
pub(crate) fn either<'m, K: Ord, V>(
    from: &'m BTreeMap<K, V>,
    to: &'m BTreeMap<K, V>,
) -> impl Iterator<Item = (&'m K, Option<&'m V>, Option<&'m V>)> {
    let (mut from, mut to) = (from.iter().peekable(), to.iter().peekable());
    std::iter::from_fn(move || {
        let order = match (from.peek(), to.peek()) {
            (Some((own, _)), Some((other, _))) => own.cmp(other),
            (Some(_), None) => Ordering::Less,
            (None, _) => Ordering::Greater,
        };
        let own = if order.is_le() { from.next() } else { None };
        let other = if order.is_ge() { to.next() } else { None };
        let (key, _) = own.or(other)?;
        Some((key, own.map(|(_, value)| value), other.map(|(_, value)| value)))
    })
}

/// As JSON; what cannot be shown is `null`.
pub(crate) fn json(value: impl Serialize) -> Value {
    serde_json::to_value(value).unwrap_or(Value::Null)
}

pub(crate) fn compact(value: &impl Serialize, origin: &str) -> Result<Vec<u8>, ManifestError> {
    serde_json::to_vec(value).map_err(|error| ManifestError::new(origin, "", error.to_string()))
}

pub(crate) fn at_most_bytes(origin: &str, len: usize, max: usize) -> Result<(), ManifestError> {
    if len > max {
        return Err(ManifestError::new(origin, "", format!("{len} bytes (at most {max} are taken)")));
    }
    Ok(())
}

/// A tree as what it should be.
pub(crate) fn typed<T: DeserializeOwned>(tree: Value, origin: &str) -> Result<T, ManifestError> {
    serde_path_to_error::deserialize(tree).map_err(|error| {
        let rule = error.inner().to_string();
        from_path(error, origin, rule)
    })
}

/// A TOML document as what it should be.
pub(crate) fn toml<T: DeserializeOwned>(bytes: &[u8], origin: &str) -> Result<T, ManifestError> {
    let wrong = |rule: String| ManifestError::new(origin, "", rule);
    let text = std::str::from_utf8(bytes).map_err(|error| wrong(error.to_string()))?;
    // The parser's own text is a picture of several lines, with the line of the file as it is.
    let rule = |error: &toml::de::Error| match error.span() {
        Some(span) => format!("{}{}", place(text, span.start), error.message()),
        None => error.message().to_owned(),
    };
    let document =
        toml::de::Deserializer::parse(text).map_err(|error| wrong(format!("no TOML: {}", rule(&error))))?;
    serde_path_to_error::deserialize(document).map_err(|error| {
        let rule = rule(error.inner());
        from_path(error, origin, rule)
    })
}

/// Line and column of a byte of `text`.
fn place(text: &str, at: usize) -> String {
    let before = text.get(..at).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.chars().rev().take_while(|character| *character != '\n').count() + 1;
    format!("line {line}, column {column}: ")
}

fn from_path<E>(error: serde_path_to_error::Error<E>, origin: &str, rule: String) -> ManifestError {
    let path = error.path().to_string();
    let path = if path == "." { String::new() } else { path };
    ManifestError::new(origin, path, rule)
}

/// Where the reader stands: left as it was when something is wrong.
#[derive(Default)]
struct Path(RefCell<Vec<String>>);

impl Path {
    fn within<T, E>(&self, step: String, read: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        self.0.borrow_mut().push(step);
        let value = read()?;
        self.0.borrow_mut().pop();
        Ok(value)
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let steps = self.0.borrow().concat();
        f.write_str(steps.strip_prefix('.').unwrap_or(&steps))
    }
}

struct Node<'p> {
    path: &'p Path,
    depth: usize,
    numbers: Numbers,
}

impl Node<'_> {
    fn deeper<E: Error>(&self) -> Result<Self, E> {
        if self.depth == MAX_DEPTH {
            return Err(E::custom(format!("deeper than {MAX_DEPTH} levels")));
        }
        Ok(Self { path: self.path, depth: self.depth + 1, numbers: self.numbers })
    }
}

impl<'de> DeserializeSeed<'de> for Node<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Value, D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Node<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        if self.numbers == Numbers::Any {
            return Ok(value.into());
        }
        Err(E::custom("a number must be whole, and below 2^64"))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Value, E> {
        text_fits(text)?;
        Ok(text.into())
    }

    fn visit_string<E: Error>(self, text: String) -> Result<Value, E> {
        text_fits(&text)?;
        Ok(text.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut from: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        loop {
            let seed = self.deeper()?;
            let step = format!("[{}]", items.len());
            match self.path.within(step, || from.next_element_seed(seed))? {
                None => return Ok(Value::Array(items)),
                Some(_) if items.len() == MAX_ITEMS => {
                    return Err(A::Error::custom(format!("more than {MAX_ITEMS} items")));
                }
                Some(item) => items.push(item),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut from: A) -> Result<Value, A::Error> {
        let mut fields = Map::new();
        while let Some(name) = from.next_key::<String>()? {
            text_fits(&name)?;
            if fields.len() == MAX_ITEMS {
                return Err(A::Error::custom(format!("more than {MAX_ITEMS} fields")));
            }
            let seed = self.deeper()?;
            let value = self.path.within(step(&name), || {
                if fields.contains_key(&name) {
                    return Err(A::Error::custom("named twice"));
                }
                from.next_value_seed(seed)
            })?;
            fields.insert(name, value);
        }
        Ok(Value::Object(fields))
    }
}

fn text_fits<E: Error>(text: &str) -> Result<(), E> {
    if text.len() > MAX_TEXT {
        return Err(E::custom(format!("a text of {} bytes (at most {MAX_TEXT} are taken)", text.len())));
    }
    Ok(())
}

/// A field as a step of a path.
pub(crate) fn step(name: &str) -> String {
    let plain =
        !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte));
    if plain && name.len() <= 64 { format!(".{name}") } else { format!("[{}]", quote(name)) }
}

/// The paths of what `whole` has and `part` does not, each the topmost.
pub(crate) fn beyond(whole: &Value, part: &Value, at: &str, found: &mut Vec<String>) {
    match (whole, part) {
        (Value::Object(whole), Value::Object(part)) => {
            for (name, value) in whole {
                let path = format!("{at}{}", step(name));
                match part.get(name) {
                    Some(known) => beyond(value, known, &path, found),
                    None => found.push(path.strip_prefix('.').unwrap_or(&path).to_owned()),
                }
            }
        }
        (Value::Array(whole), Value::Array(part)) => {
            for (n, (value, known)) in whole.iter().zip(part).enumerate() {
                beyond(value, known, &format!("{at}[{n}]"), found);
            }
        }
        _ => {}
    }
}

/// Puts into `part` what only `whole` has.
pub(crate) fn merge(whole: &Value, part: &mut Value) {
    match (whole, part) {
        (Value::Object(whole), Value::Object(part)) => {
            for (name, value) in whole {
                match part.get_mut(name) {
                    Some(known) => merge(value, known),
                    None => {
                        part.insert(name.clone(), value.clone());
                    }
                }
            }
        }
        (Value::Array(whole), Value::Array(part)) => {
            for (value, known) in whole.iter().zip(part) {
                merge(value, known);
            }
        }
        _ => {}
    }
}
