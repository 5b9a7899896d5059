//! Foreign text in a sentence: what a peer, a file, a device or a server wrote may end on somebody's terminal, where some
//! characters are commands.

use std::borrow::Cow;

/// Longest piece of foreign text in quotes, in characters.
const QUOTED: usize = 80;

/// Whether `character` does something else on a terminal than show itself: control characters, which a terminal obeys; what changes
/// the order or the lines of a text; and what is not seen at all (zero-width and format characters, fillers, tags, private and
/// unassigned ones), by which two names that differ look the same.
pub fn is_control(character: char) -> bool {
    if character.is_ascii() {
        return character.is_ascii_control();
    }
    // Seen as nothing, although Unicode counts them as letters or marks (`Default_Ignorable_Code_Point`).
    let invisible = matches!(
        character,
        '\u{34f}'
            | '\u{115f}'
            | '\u{1160}'
            | '\u{17b4}'
            | '\u{17b5}'
            | '\u{180b}'..='\u{180f}'
            | '\u{3164}'
            | '\u{fe00}'..='\u{fe0f}'
            | '\u{ffa0}'
            | '\u{e0000}'..='\u{e0fff}'
    );
    invisible || !is_shown(character)
}

/// Whether the standard library, which has Unicode's tables, would show `character` behind another one as it is; any space is.
fn is_shown(character: char) -> bool {
    let mut pair = [b'a'; 5];
    let len = 1 + character.encode_utf8(&mut pair[1..]).len();
    let pair = std::str::from_utf8(&pair[..len]).unwrap_or_default();
    let is_space = character.is_whitespace() && !matches!(character, '\u{85}' | '\u{2028}' | '\u{2029}');
    is_space || pair.escape_debug().count() == 2
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
    // `Debug` leaves some that are not seen.
    printable(&format!("{shown:?}")).into_owned()
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
        for shown in ["Überlänge, 長さ, ✓", "ü as u\u{308}", "नमस्ते", "a\u{a0}b\u{3000}c"]
        {
            assert!(matches!(printable(shown), Cow::Borrowed(_)), "{shown:?}");
        }
    }

    /// Two names that look the same are the same.
    #[test]
    fn nothing_unseen_is_left() {
        let ranges =
            [0xad..=0xad, 0x600..=0x605, 0x200b..=0x200f, 0x2028..=0x202e, 0x2060..=0x206f, 0xfff0..=0xfffb];
        let singles = [0x34f, 0x61c, 0x70f, 0x115f, 0x180e, 0x3164, 0xfe0f, 0xfeff, 0xffa0, 0x1_d173, 0xe000];
        let planes = [0xe_0000..=0xe_01ef, 0xf_0000..=0xf_00ff, 0x10_fffd..=0x10_ffff];
        for code in ranges.into_iter().chain(planes).flatten().chain(singles) {
            let Some(character) = char::from_u32(code) else { continue };
            let name = format!("net{character}0");
            assert!(is_control(character), "U+{code:04X} is not seen");
            assert_ne!(printable(&name), name);
            assert!(printable(&name).is_ascii() && quote(&name).is_ascii(), "{name:?}");
        }
    }

    #[test]
    fn long_words_are_cut_and_quoted() {
        assert_eq!(quote("a\u{1b}b"), "\"a\\u{1b}b\"");
        assert!(quote(&"x".repeat(500)).chars().count() < 90);
    }
}
