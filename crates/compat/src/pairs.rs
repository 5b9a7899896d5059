//! A manifest as lines of `path=value`, for tools that know no JSON, and back.
//!
//! ```text
//! kind=device
//! pci.vendor=5555
//! regions[0].size=16384
//! parameters.queues.value=8
//! ```
//! What is not known has no line. A text that could be taken for something else is in quotes, as in JSON.

use serde_json::{Map, Value};

use crate::document::Document;
use crate::error::ManifestError;
use crate::tree::{MAX_DEPTH, MAX_ITEMS};

/// Most lines of a manifest that is written as pairs.
const MAX_LINES: usize = 1 << 17;

/// The manifest as lines of key and value.
pub fn to_pairs(document: &Document) -> String {
    let mut lines = String::new();
    write(&document.tree(), &mut String::new(), &mut lines);
    lines
}

/// Reads lines back. `text` may come from anybody; empty lines and those that begin with `#` are skipped.
///
/// # Errors
/// As [`Document::parse`]; and a line that is none, or says something again.
pub fn from_pairs(text: &str, origin: &str) -> Result<Document, ManifestError> {
    crate::tree::at_most_bytes(origin, text.len(), Document::MAX_BYTES)?;
    let mut tree = Value::Object(Map::new());
    for (n, line) in text.lines().enumerate() {
        let wrong = |rule: &str| ManifestError::new(origin, format!("line {}", n + 1), rule);
        if n >= MAX_LINES {
            return Err(wrong("too many lines"));
        }
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (steps, value) = split(line).ok_or_else(|| wrong("this is no path=value"))?;
        put(&mut tree, &steps, value).map_err(wrong)?;
    }
    Document::from_tree(tree, origin)
}

fn write(value: &Value, path: &mut String, lines: &mut String) {
    let len = path.len();
    match value {
        Value::Null => {}
        Value::Object(fields) if !fields.is_empty() => {
            for (name, value) in fields {
                let plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte));
                if plain && !name.is_empty() {
                    if len > 0 {
                        path.push('.');
                    }
                    path.push_str(name);
                } else {
                    path.push_str(&format!("[{}]", Value::from(name.as_str())));
                }
                write(value, path, lines);
                path.truncate(len);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for (n, value) in items.iter().enumerate() {
                path.push_str(&format!("[{n}]"));
                write(value, path, lines);
                path.truncate(len);
            }
        }
        Value::String(text) if is_bare(text) => lines.push_str(&format!("{path}={text}\n")),
        other => lines.push_str(&format!("{path}={other}\n")),
    }
}

/// Whether `text` needs no quotes.
fn is_bare(text: &str) -> bool {
    let plain = text.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ');
    plain && text.trim() == text && matches!(scalar(text), Some(Value::String(same)) if same == text)
}

fn scalar(text: &str) -> Option<Value> {
    match serde_json::from_str(text) {
        Ok(Value::Number(number)) if number.is_f64() => Some(Value::from(text)),
        Ok(Value::Array(items)) if !items.is_empty() => None,
        Ok(Value::Object(fields)) if !fields.is_empty() => None,
        Ok(value) => Some(value),
        // What looks like JSON and is none is a slip, not a text.
        Err(_) if text.is_empty() || text.starts_with(['"', '[', '{']) => None,
        Err(_) => Some(Value::from(text)),
    }
}

enum Step {
    Field(String),
    Item(usize),
}

/// The steps of a path, and the value behind it.
fn split(line: &str) -> Option<(Vec<Step>, Value)> {
    let mut steps = Vec::new();
    let mut rest = line;
    while let Some(next) = rest.chars().next() {
        if steps.len() > MAX_DEPTH {
            return None;
        }
        match next {
            '=' => {
                return scalar(rest.get(1..)?.trim())
                    .filter(|_| !steps.is_empty())
                    .map(|value| (steps, value));
            }
            '[' if rest.starts_with("[\"") => {
                let inner = rest.get(1..)?;
                let mut read = serde_json::Deserializer::from_str(inner).into_iter::<String>();
                let name = read.next()?.ok()?;
                rest = inner.get(read.byte_offset()..)?.strip_prefix(']')?;
                steps.push(Step::Field(name));
            }
            '[' => {
                let (index, after) = rest.get(1..)?.split_once(']')?;
                let plain = !index.is_empty() && index.bytes().all(|byte| byte.is_ascii_digit());
                steps.push(Step::Item(index.parse().ok().filter(|_| plain)?));
                rest = after;
            }
            _ => {
                let name = if steps.is_empty() { rest } else { rest.strip_prefix('.')? };
                let end = name.find(['.', '[', '='])?;
                let (name, after) = name.split_at_checked(end).filter(|(name, _)| !name.is_empty())?;
                steps.push(Step::Field(name.trim_end().to_owned()));
                rest = after;
            }
        }
    }
    None
}

/// Puts a value where the steps lead; lists grow one item after the other.
fn put(tree: &mut Value, steps: &[Step], value: Value) -> Result<(), &'static str> {
    let Some((first, rest)) = steps.split_first() else {
        if !tree.is_null() {
            return Err("this was said before");
        }
        *tree = value;
        return Ok(());
    };
    match first {
        Step::Field(name) => {
            if tree.is_null() {
                *tree = Value::Object(Map::new());
            }
            let Value::Object(fields) = tree else { return Err("an earlier line has something else here") };
            if fields.len() >= MAX_ITEMS && !fields.contains_key(name) {
                return Err("too many fields");
            }
            put(fields.entry(name.as_str()).or_insert(Value::Null), rest, value)
        }
        Step::Item(index) => {
            if tree.is_null() {
                *tree = Value::Array(Vec::new());
            }
            let Value::Array(items) = tree else { return Err("an earlier line has something else here") };
            if *index == items.len() && *index < MAX_ITEMS {
                items.push(Value::Null);
            }
            put(items.get_mut(*index).ok_or("items of a list come one after the other, from 0")?, rest, value)
        }
    }
}
