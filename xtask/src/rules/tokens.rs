//! A source text as words and signs, without comments and literals. Enough of Rust and C to follow imports and calls.

/// Splits `text`. `::` is one token; strings, characters and lifetimes are none.
pub(crate) fn tokens(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let length = match first {
            '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            '/' if rest.starts_with("/*") => block_comment(rest),
            '"' => string(rest),
            '\'' => quote(rest),
            ':' if rest.starts_with("::") => {
                found.push(&rest[..2]);
                2
            }
            _ if word(first) => {
                let length = rest.find(|character| !word(character)).unwrap_or(rest.len());
                match raw_string(&rest[..length], &rest[length..]) {
                    Some(more) => length + more,
                    None if rest.starts_with("r#") => 2,
                    None => {
                        found.push(&rest[..length]);
                        length
                    }
                }
            }
            _ => {
                let length = first.len_utf8();
                if !first.is_whitespace() {
                    found.push(&rest[..length]);
                }
                length
            }
        };
        rest = &rest[length..];
    }
    found
}

/// Where the bracket at `open` closes: the index of its partner, or the end.
pub(crate) fn closing(tokens: &[&str], open: usize) -> usize {
    let mut depth = 0_usize;
    for (at, token) in tokens.iter().enumerate().skip(open) {
        match *token {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth == 0 {
            return at;
        }
    }
    tokens.len()
}

/// Whether a token is a name, a keyword or a number.
pub(crate) fn is_word(token: &str) -> bool {
    token.starts_with(word)
}

fn word(character: char) -> bool {
    character.is_ascii_alphanumeric() || character == '_'
}

fn block_comment(text: &str) -> usize {
    let (mut depth, mut at) = (0_usize, 0);
    while at < text.len() {
        let rest = &text.as_bytes()[at..];
        if rest.starts_with(b"/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if rest.starts_with(b"*/") {
            (depth, at) = (depth - 1, at + 2);
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    text.len()
}

fn string(text: &str) -> usize {
    let mut escaped = false;
    for (at, character) in text.char_indices().skip(1) {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// The length of a raw string after its prefix, if `prefix` and what follows begin one.
fn raw_string(prefix: &str, rest: &str) -> Option<usize> {
    let hashes = rest.len() - rest.trim_start_matches('#').len();
    if !matches!(prefix, "r" | "br" | "cr") || !rest[hashes..].starts_with('"') {
        return None;
    }
    let end = format!("\"{}", &rest[..hashes]);
    let body = &rest[hashes + 1..];
    Some(body.find(&end).map_or(rest.len(), |at| hashes + 1 + at + end.len()))
}

/// The length of a character literal, or of the quote alone and the name of a lifetime.
fn quote(text: &str) -> usize {
    let mut characters = text.char_indices().skip(1);
    match characters.next() {
        Some((_, '\\')) => {
            characters.next();
            characters.find(|(_, character)| *character == '\'').map_or(text.len(), |(at, _)| at + 1)
        }
        Some((at, character)) => {
            let after = at + character.len_utf8();
            match text[after..].starts_with('\'') {
                true => after + 1,
                false => text[1..]
                    .find(|character| !word(character))
                    .map_or(text.len(), |at| at.max(1) + 1)
                    .min(text.len()),
            }
        }
        None => text.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::{closing, tokens};

    #[test]
    fn comments_strings_and_lifetimes_are_no_tokens() {
        let text = "use a::b; // use c::d;\n/* /* x */ y */ f::<'a>('\\'', 'é', \"use \\\" e\", r#\"use \" g\"#, r#type)";
        let expected =
            ["use", "a", "::", "b", ";", "f", "::", "<", ">", "(", ",", ",", ",", ",", "type", ")"];
        assert_eq!(tokens(text), expected);
    }

    #[test]
    fn brackets_close_where_they_were_opened() {
        assert_eq!(closing(&["{", "(", ")", "}", "x"], 0), 3);
        assert_eq!(closing(&["{", "("], 0), 2);
    }
}
