//! Lists and tables of names for people: nothing is left out, and no line is longer than the terminal is wide, but for a name
//! that is longer itself.

use crate::output::terminal_columns;

/// Narrowest width that is kept to, in columns.
const NARROWEST: usize = 40;
/// Width where nobody says how wide the terminal is.
const UNKNOWN: usize = 100;
/// Most columns for names, where the answers beside them need the room.
const MOST_FOR_NAMES: usize = 36;

/// Columns that a line on stdout may have: those of the terminal, or of `COLUMNS` where stdout is none.
pub(crate) fn width() -> usize {
    let columns = terminal_columns();
    let asked = || std::env::var("COLUMNS").ok()?.parse().ok();
    columns.or_else(asked).unwrap_or(UNKNOWN).max(NARROWEST)
}

/// `names` behind `label`, with commas, in as many lines as it takes.
pub(crate) fn list(label: &str, names: &[String], width: usize) -> String {
    let indent = chars(label);
    let lines = wrap(names, width.saturating_sub(indent));
    let mut text = String::new();
    for (n, line) in lines.iter().enumerate() {
        let before = if n == 0 { label } else { "" };
        text.push_str(&format!("{before:indent$}{line}\n"));
    }
    text
}

/// A row: its names, and the lines of each of its cells.
pub(crate) type TableRow = (Vec<String>, Vec<Vec<String>>);

/// A table: a heading over the names and one over each column. Columns that do not fit beside each other come below each other.
pub(crate) fn table(head: &str, columns: &[String], rows: &[TableRow], width: usize) -> String {
    let natural = rows.iter().map(|(names, _)| chars(&names.join(", "))).max().unwrap_or(0).max(chars(head));
    let longest = rows.iter().flat_map(|(names, _)| names).map(|name| chars(name) + 1).max().unwrap_or(0);
    let widths: Vec<usize> = columns
        .iter()
        .enumerate()
        .map(|(n, column)| {
            let cells = rows.iter().filter_map(|(_, cells)| cells.get(n));
            cells.flatten().map(|line| chars(line)).max().unwrap_or(0).max(chars(column))
        })
        .collect();
    let all: usize = widths.iter().map(|column| column + 2).sum();
    let least = longest.clamp(chars(head), MOST_FOR_NAMES.max(chars(head)));
    let names = natural.min(width.saturating_sub(all).max(least));
    let mut text = String::new();
    let mut from = 0;
    while from < columns.len() {
        let mut used = names;
        let fitting = widths.iter().skip(from).take_while(|column| {
            used += *column + 2;
            used <= width
        });
        let to = from + fitting.count().max(1);
        if from > 0 {
            text.push('\n');
        }
        let band = from..to;
        push(&mut text, (head, names), columns, &widths, band.clone());
        for (own, cells) in rows {
            let own = wrap(own, names);
            let tallest = cells.get(band.clone()).into_iter().flatten().map(Vec::len).max().unwrap_or(0);
            for n in 0..own.len().max(tallest) {
                let line: Vec<String> =
                    cells.iter().map(|cell| cell.get(n).cloned().unwrap_or_default()).collect();
                let name = own.get(n).map(String::as_str).unwrap_or_default();
                push(&mut text, (name, names), &line, &widths, band.clone());
            }
        }
        from = to;
    }
    text
}

fn push(
    text: &mut String,
    (name, width): (&str, usize),
    cells: &[String],
    widths: &[usize],
    band: std::ops::Range<usize>,
) {
    let mut line = format!("{name:width$}");
    for (cell, width) in cells.iter().zip(widths).take(band.end).skip(band.start) {
        line.push_str(&format!("  {cell:width$}"));
    }
    text.push_str(line.trim_end());
    text.push('\n');
}

/// The names with commas, in lines of at most `width`.
fn wrap(names: &[String], width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for (n, name) in names.iter().enumerate() {
        let comma = if n + 1 < names.len() { "," } else { "" };
        let Some(line) = lines.last_mut() else { break };
        if line.is_empty() {
            line.push_str(&format!("{name}{comma}"));
        } else if chars(line) + 1 + chars(name) + comma.len() <= width {
            line.push_str(&format!(" {name}{comma}"));
        } else {
            lines.push(format!("{name}{comma}"));
        }
    }
    lines
}

fn chars(text: &str) -> usize {
    text.chars().count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(count: usize) -> Vec<String> {
        (0..count).map(|n| format!("host{n}/net0")).collect()
    }

    #[test]
    fn every_name_is_there_in_lines_that_fit() {
        for width in [40, 57, 80, 200] {
            for count in [1, 2, 7, 300] {
                let names = names(count);
                let text = list("hosts A: ", &names, width);
                assert!(text.lines().all(|line| line.chars().count() <= width), "{text}");
                let shown = text.trim_start_matches("hosts A:").split_whitespace();
                let shown: Vec<&str> = shown.map(|name| name.trim_end_matches(',')).collect();
                assert_eq!(shown, names);
            }
        }
    }

    #[test]
    fn a_table_goes_on_below_what_fits() {
        let cell = |n: usize| vec![format!("no (a-code-of-some-length-{n:02},"), "    another-code)".into()];
        for (width, columns) in [(40, 1), (80, 5), (100, 20), (300, 3)] {
            let heads: Vec<String> = (0..columns).map(|n| format!("C{n}")).collect();
            let rows: Vec<TableRow> =
                [1, 40].map(|count| (names(count), (0..columns).map(cell).collect())).into();
            let text = table("device", &heads, &rows, width);
            assert!(text.lines().all(|line| line.chars().count() <= width.max(62)), "{width}: {text}");
            for (n, head) in heads.iter().enumerate() {
                assert_eq!(text.matches(&format!("-{n:02},")).count(), 2, "{text}");
                assert!(text.contains(head));
            }
            assert!(text.contains("host39/net0"), "{text}");
        }
    }
}
