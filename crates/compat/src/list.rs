//! A manifest as lines of `KEY=VALUE`, for schedulers that know nothing else, and back.
//!
//! A key is the value's path: names joined by points, items by their number from 0. A name with a point, an `=` or white space in
//! it is quoted as JSON does. A value is JSON, but text that cannot be taken for anything else stands as it is. What is not
//! known has no line.

use serde_json::{Map, Value};

use crate::tree::{MAX_DEPTH, MAX_ITEMS};
use crate::{Document, ManifestError, document};

/// The document as lines.
pub fn render(document: &Document) -> String {
    let mut lines = String::new();
    flatten(&document.tree(), &mut String::new(), &mut lines);
    lines
}

/// Reads lines; empty ones and those that begin with `#` count for nothing. `origin`, a file's name for example, goes into
/// errors.
///
/// # Errors
/// Which line, or which path, what rule is broken at.
pub fn parse(bytes: &[u8], origin: &str) -> Result<Document, ManifestError> {
    document::at_most_bytes(origin, bytes.len(), Document::MAX_BYTES)?;
    let wrong = |line: usize, rule: &str| ManifestError::new(origin, format!("line {}", line + 1), rule);
    let text = std::str::from_utf8(bytes).map_err(|_| ManifestError::new(origin, "", "a list is UTF-8"))?;
    let mut tree = Value::Object(Map::new());
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (path, value) = split(line).ok_or_else(|| wrong(number, "a line is KEY=VALUE"))?;
        if path.len() > MAX_DEPTH {
            return Err(wrong(number, "the key is too deep"));
        }
        put(&mut tree, &path, value).map_err(|rule| wrong(number, rule))?;
    }
    // What was put together is held to the same rules as what came as JSON.
    Document::parse(tree.to_string().as_bytes(), origin)
}

fn flatten(value: &Value, path: &mut String, lines: &mut String) {
    let mut each = |name: String, value: &Value| {
        let before = path.len();
        if before > 0 {
            path.push('.');
        }
        path.push_str(&name);
        flatten(value, path, lines);
        path.truncate(before);
    };
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            fields.iter().for_each(|(name, value)| each(key(name), value));
        }
        Value::Array(items) if !items.is_empty() => {
            items.iter().enumerate().for_each(|(n, value)| each(n.to_string(), value));
        }
        Value::Null => {}
        Value::String(text) if is_plain(text) => lines.push_str(&format!("{path}={text}\n")),
        other => lines.push_str(&format!("{path}={other}\n")),
    }
}

/// Text that stands as it is: it would be read as nothing else.
fn is_plain(text: &str) -> bool {
    let same = text.trim() == text && !text.chars().any(char::is_control);
    same && !text.is_empty() && serde_json::from_str::<Value>(text).is_err() && !text.starts_with('"')
}

fn key(name: &str) -> String {
    let number = name.bytes().all(|byte| byte.is_ascii_digit());
    let plain = |char: char| !char.is_whitespace() && !char.is_control() && !"=.\"#".contains(char);
    if !name.is_empty() && !number && name.chars().all(plain) {
        name.to_owned()
    } else {
        Value::String(name.to_owned()).to_string()
    }
}

/// One step of a path.
enum Step {
    Name(String),
    Item(usize),
}

fn split(line: &str) -> Option<(Vec<Step>, Value)> {
    let mut path = Vec::new();
    let mut rest = line;
    loop {
        let (step, after) = if rest.starts_with('"') {
            let mut quoted = serde_json::Deserializer::from_str(rest).into_iter::<String>();
            let name = quoted.next()?.ok()?;
            (Step::Name(name), rest.get(quoted.byte_offset()..)?)
        } else {
            let end = rest.find(['.', '='])?;
            let (name, after) = rest.split_at(end);
            let name = name.trim_end();
            if name.is_empty() {
                return None;
            }
            match name.parse() {
                Ok(item) if name.bytes().all(|byte| byte.is_ascii_digit()) => (Step::Item(item), after),
                _ => (Step::Name(name.to_owned()), after),
            }
        };
        path.push(step);
        let after = after.trim_start();
        if let Some(value) = after.strip_prefix('=') {
            let value = value.trim();
            let read = serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.to_owned()));
            return Some((path, read));
        }
        rest = after.strip_prefix('.')?;
        if path.len() > MAX_DEPTH {
            return Some((path, Value::Null));
        }
    }
}

fn put(tree: &mut Value, path: &[Step], value: Value) -> Result<(), &'static str> {
    let Some((step, rest)) = path.split_first() else {
        if !tree.is_null() {
            return Err("this key is there twice, or is part of another");
        }
        *tree = value;
        return Ok(());
    };
    match step {
        Step::Name(name) => {
            if tree.is_null() {
                *tree = Value::Object(Map::new());
            }
            let fields =
                tree.as_object_mut().ok_or("this key has names where another has a value or items")?;
            if fields.len() >= MAX_ITEMS {
                return Err("there are too many names");
            }
            put(fields.entry(name.clone()).or_insert(Value::Null), rest, value)
        }
        Step::Item(at) => {
            if tree.is_null() {
                *tree = Value::Array(Vec::new());
            }
            let items = tree.as_array_mut().ok_or("this key has items where another has a value or names")?;
            if *at > items.len() || *at >= MAX_ITEMS {
                return Err("items are numbered from 0, one after another");
            }
            if *at == items.len() {
                items.push(Value::Null);
            }
            put(items.get_mut(*at).ok_or("there is no such item")?, rest, value)
        }
    }
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;
    use serde_json::json;
    use vfio_migration_types::DeviceId;

    use super::*;
    use crate::{DeviceManifest, Parameter};

    fn sample() -> Document {
        let mut device = DeviceManifest::new(DeviceId::new("net0").unwrap());
        device.model = Some("vfio-migrate.org/sample".into());
        device.firmware = Some("12".into());
        device.regions = Some(vec![]);
        device.parameters.insert("queue.count".into(), Parameter::new("8".to_owned()));
        device.extra.insert("rack".into(), json!({"row": 3, "7": "x"}));
        device.into()
    }

    #[test]
    fn a_list_reads_as_it_was_written() {
        let list = render(&sample());
        for line in
            ["model=vfio-migrate.org/sample", "firmware=\"12\"", "regions=[]", "rack.row=3", "rack.\"7\"=x"]
        {
            assert!(list.lines().any(|have| have == line), "{line} in\n{list}");
        }
        assert!(list.contains("parameters.\"queue.count\""), "{list}");
        assert!(!list.contains("pci"), "what is not known has no line: {list}");
        assert_eq!(parse(list.as_bytes(), "list").unwrap().manifest, sample().manifest);
    }

    #[test]
    fn bad_lines_are_named() {
        let good = render(&sample());
        for (line, why) in [
            ("no value", "line 1: a line is KEY=VALUE"),
            ("=x", "line 1: a line is KEY=VALUE"),
            ("regions.1.index=0", "line 1: items are numbered from 0"),
            ("model=x\nmodel=y", "line 2: this key is there twice"),
            ("model=x\nmodel.y=z", "line 2: this key has names where"),
        ] {
            let error = parse(line.as_bytes(), "list").unwrap_err();
            assert!(error.to_string().contains(why), "{line}: {error}");
        }
        let twice = parse(format!("{good}id=net1\n").as_bytes(), "list").unwrap_err();
        assert!(twice.to_string().contains("twice"), "{twice}");
        let error = parse(good.replace("kind=device", "kind=thing").as_bytes(), "list").unwrap_err();
        assert!(error.to_string().contains("kind"), "{error}");
    }

    proptest! {
        #[test]
        fn no_list_is_too_strange(text in "[a-z0-9.=\"# \\n]{0,80}") {
            let _ = parse(text.as_bytes(), "list");
        }

        #[test]
        fn any_text_survives(text in any::<String>().prop_filter("plain", |text| text.len() < 500)) {
            let clean: String = text.chars().filter(|char| !char.is_control()).collect();
            let mut device = DeviceManifest::new(DeviceId::new("net0").unwrap());
            device.extra.insert("note".into(), json!({ clean.clone(): clean }));
            let document = Document::from(device);
            prop_assert_eq!(parse(render(&document).as_bytes(), "list").unwrap().manifest, document.manifest);
        }
    }
}
