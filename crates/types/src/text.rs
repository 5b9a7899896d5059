//! Foreign text in a sentence: what a peer, a file, a device or a server wrote may end on somebody's terminal, where some
//! characters are commands.

use std::borrow::Cow;

/// Longest piece of foreign text in quotes, in characters.
const QUOTED: usize = 80;

/// Whether a terminal takes `character` as a command, or changes the order or the lines of what it shows because of it:
/// control characters (C0, DEL, C1), Unicode's line and paragraph separators, and its `Bidi_Control`s.
pub fn is_control(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        )
}

/// `text` on one line, each of its control characters as an escape (`\u{1b}`, `\n`).
pub fn printable(text: &str) -> Cow<'_, str> {
    escape(text, is_control)
}

/// `text` in which each character that `is_bad` is an escape.
fn escape(text: &str, is_bad: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(&is_bad) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        if is_bad(character) {
            shown.extend(character.escape_default());
        } else {
            shown.push(character);
        }
    }
    Cow::Owned(shown)
}

/// `text` of several lines, each of its control characters but tabs and ends of lines as an escape.
pub fn printable_lines(text: &str) -> Cow<'_, str> {
    escape(text, |character| is_control(character) && !matches!(character, '\n' | '\t'))
}

/// `text` in quotes, escaped, cut after 80 characters.
pub fn quote(text: &str) -> String {
    let mut shown: String = text.chars().take(QUOTED).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    format!("{shown:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A character of each kind that does something to a terminal.
    const HOSTILE: &str =
        "\u{0}\u{7}\u{8}\r\n\u{1b}[31m\u{7f}\u{85}\u{9b}2J\u{61c}\u{200f}\u{2028}\u{202e}\u{2066}";

    #[test]
    fn nothing_hostile_is_left() {
        for shown in [printable(HOSTILE).into_owned(), quote(HOSTILE), format!("{HOSTILE:?}")] {
            assert!(!shown.contains(is_control), "{shown:?}");
        }
        assert_eq!(printable("a\u{1b}[2J\nb"), "a\\u{1b}[2J\\nb");
        assert_eq!(printable_lines("a\u{1b}\n\tb\r"), "a\\u{1b}\n\tb\\r");
        assert!(matches!(printable("Überlänge, 長さ, ✓"), Cow::Borrowed(_)));
    }

    #[test]
    fn long_words_are_cut_and_quoted() {
        assert_eq!(quote("a\u{1b}b"), "\"a\\u{1b}b\"");
        assert!(quote(&"x".repeat(500)).chars().count() < 90);
    }
}
