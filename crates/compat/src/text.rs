//! Putting a stranger's words into a sentence.

/// Longest piece of foreign text in a sentence, in characters.
const SHOWN: usize = 80;
/// Most items of a list in a sentence.
const LISTED: usize = 8;

/// `text` in quotes, escaped, cut when it is long.
pub(crate) fn quote(text: &str) -> String {
    let mut shown: String = text.chars().take(SHOWN).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    format!("{shown:?}")
}

/// `text` as [`quote`] shows it, or the word for an absent one.
pub(crate) fn quote_or(text: Option<&str>, absent: &str) -> String {
    text.map_or_else(|| absent.to_owned(), quote)
}

/// The items with commas; when there are many, the first of them and how many more.
pub(crate) fn list(items: &[String]) -> String {
    let shown = items.len().min(LISTED);
    let more = items.len() - shown;
    let text = items[..shown].join(", ");
    if more == 0 { text } else { format!("{text} and {more} more") }
}
