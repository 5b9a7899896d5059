//! Putting a stranger's words into a sentence.

use serde_json::Value;
pub(crate) use vfio_migration_types::quote;

/// Longest name without quotes, in characters.
const SHOWN: usize = 80;
/// Longest foreign sentence, in characters.
const SENTENCE: usize = 400;
/// Most items of a list in a sentence.
const LISTED: usize = 8;

/// A foreign sentence inside one of ours: escaped, cut when it is long.
pub(crate) fn sentence(text: &str) -> String {
    let mut shown: String = text.chars().take(SENTENCE).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    shown.escape_debug().collect::<String>().replace("\\\"", "\"").replace("\\'", "'")
}

/// The items with commas; when there are many, the first of them and how many more.
pub(crate) fn list(items: &[String]) -> String {
    let shown = items.len().min(LISTED);
    let more = items.len() - shown;
    let text = items[..shown].join(", ");
    if more == 0 { text } else { format!("{text} and {more} more") }
}

/// A value of a manifest in a sentence.
pub(crate) fn show(value: &Value) -> String {
    match value {
        Value::Null => "unknown".to_owned(),
        Value::String(text) => quote(text),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::Array(items) if items.is_empty() => "none".to_owned(),
        Value::Array(items) => list(&items.iter().map(show).collect::<Vec<_>>()),
        Value::Object(fields) => {
            let fields = fields.iter().map(|(name, value)| format!("{} {}", bare(name), show(value)));
            list(&fields.collect::<Vec<_>>())
        }
    }
}

/// A name without quotes where it is harmless.
fn bare(name: &str) -> String {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "._-+".contains(letter);
    if name.len() <= SHOWN && name.chars().all(plain) { name.to_owned() } else { quote(name) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_words_are_quoted_and_long_lists_cut() {
        assert_eq!(sentence("it's \"a\"\u{1b}[2J\n"), "it's \"a\"\\u{1b}[2J\\n");
        assert!(sentence(&"x".repeat(5000)).chars().count() < 410);
        let many: Vec<String> = (0..10).map(|n| n.to_string()).collect();
        assert_eq!(list(&many), "0, 1, 2, 3, 4, 5, 6, 7 and 2 more");
        assert_eq!(show(&serde_json::json!({"size": 4096, "a\nb": null})), "\"a\\nb\" unknown, size 4096");
    }
}
