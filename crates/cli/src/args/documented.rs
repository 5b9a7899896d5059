//! Every command line that README and docs show is one that the parser takes, and every option that they name in a verb's
//! words is an option of that verb.

use std::fs::read_to_string;
use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory, Parser};
use schemars::{JsonSchema, schema_for};
use serde_json::Value;

use super::Cli;
use crate::control::protocol::{ControlVerb, MigrationStatus};

/// The pages for users, with their texts. CHANGELOG.md tells what is gone, and decisions what was.
fn pages() -> Vec<(PathBuf, String)> {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut paths: Vec<PathBuf> =
        ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"].map(|page| top.join(page)).into();
    let docs = std::fs::read_dir(top.join("docs")).unwrap().map(|entry| entry.unwrap().path());
    paths.extend(docs.filter(|path| path.extension().is_some_and(|extension| extension == "md")));
    assert!(paths.len() > 10, "{paths:?}");
    paths.into_iter().map(|path| (path.clone(), read_to_string(&path).unwrap())).collect()
}

/// The lines of a page's code blocks, fenced or indented, with continued lines joined; and its code spans.
fn code(page: &str) -> (Vec<String>, Vec<String>) {
    let (mut lines, mut spans) = (Vec::<String>::new(), Vec::new());
    let (mut fenced, mut continued, mut prose) = (false, false, String::new());
    for line in page.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        } else if fenced || line.starts_with("    ") {
            let text = line.trim();
            let (text, more) = text.strip_suffix('\\').map_or((text, false), |text| (text, true));
            match lines.last_mut().filter(|_| continued) {
                Some(last) => last.push_str(text),
                None => lines.push(text.to_owned()),
            }
            continued = more;
        } else {
            prose.push_str(line);
            prose.push('\n');
        }
    }
    // Between paragraphs, so that a stray backtick spoils no more than its own.
    for paragraph in prose.split("\n\n") {
        let cells = paragraph.split('`').skip(1).step_by(2);
        spans.extend(cells.map(|span| span.split_whitespace().collect::<Vec<_>>().join(" ")));
    }
    (lines, spans)
}

/// The words of a command line up to a comment, a pipe, a redirection or `&`.
fn words(line: &str) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    for word in line.split_whitespace() {
        if matches!(word, "&" | "&&" | "||" | "|" | ";" | ">" | "<" | "2>&1") || word.starts_with('#') {
            break;
        }
        words.push(word.trim_matches(['\'', '"']).to_owned());
    }
    words
}

/// Whether the line shows a form, with parts that may be left out or words that stand for others, and not one command.
fn is_form(words: &[String]) -> bool {
    let placeholder = |word: &str| word.len() > 1 && word.chars().all(|c| c.is_ascii_uppercase());
    words.iter().any(|word| word.contains(['[', ']', '…', '|', '<', '$']) || placeholder(word))
}

/// The options among the words that the verb, the first of them, does not have.
fn unknown_options(cli: &Command, words: &[String]) -> Vec<String> {
    let verb = words.first().and_then(|verb| cli.find_subcommand(verb)).expect("a verb");
    // `tls host`
    let verb = words.get(1).and_then(|part| verb.find_subcommand(part)).unwrap_or(verb);
    let known = |name: &str| {
        let options = verb.get_arguments().chain(cli.get_arguments());
        ["help", "version"].contains(&name)
            || options.filter_map(|option| option.get_long()).any(|long| long == name)
    };
    let named = words.iter().flat_map(|word| word.split(['[', ']', '|', '(', ')', ',']));
    let options =
        named.filter_map(|word| word.strip_prefix("--")).map(|word| word.split('=').next().unwrap());
    options.filter(|name| !name.is_empty() && !known(name)).map(|name| format!("--{name}")).collect()
}

/// What is wrong with a command line, without the command's name.
fn wrong(cli: &Command, words: &[String]) -> Option<String> {
    let verb = words.first()?;
    if cli.find_subcommand(verb).is_none() {
        // An option of the command itself, or a form of all verbs.
        let any = verb.starts_with("--")
            || verb.starts_with('$')
            || verb.chars().all(|c| c.is_uppercase() || c == '…');
        return (!any).then(|| format!("there is no verb {verb}"));
    }
    let line = std::iter::once("vfio-migrate").chain(words.iter().map(String::as_str));
    let error = Cli::try_parse_from(line).err()?;
    if !is_form(words) {
        return Some(error.to_string());
    }
    let unknown = unknown_options(cli, words);
    (!unknown.is_empty()).then(|| format!("{verb} has no {}", unknown.join(", ")))
}

#[test]
fn documented_command_lines_are_taken() {
    let mut cli = Cli::command();
    cli.build();
    let (mut bad, mut seen) = (Vec::new(), 0);
    for (path, text) in pages() {
        let (lines, spans) = code(&text);
        let lines = lines.iter().map(|line| line.strip_prefix("$ ").unwrap_or(line).to_owned());
        let lines = lines.map(|line| line.replace("cargo run --release -- ", "vfio-migrate "));
        let whole = lines
            .chain(spans.iter().cloned())
            .filter_map(|line| line.strip_prefix("vfio-migrate ").map(|rest| (line.clone(), words(rest))));
        for (line, words) in whole {
            seen += 1;
            bad.extend(wrong(&cli, &words).map(|why| format!("{}: {line}: {why}", path.display())));
        }
        // `save --device`, in the middle of a sentence.
        for span in spans {
            let words = words(&span);
            if words.first().is_some_and(|verb| cli.find_subcommand(verb).is_some()) {
                seen += 1;
                let unknown = unknown_options(&cli, &words);
                bad.extend(unknown.iter().map(|option| format!("{}: {span}: no {option}", path.display())));
            }
        }
    }
    assert!(bad.is_empty(), "{}", bad.join("\n"));
    assert!(seen > 100, "{seen} command lines");
}

#[test]
fn a_stale_command_line_is_found() {
    let mut cli = Cli::command();
    cli.build();
    for stale in [
        "save --control a -o f --allow-all-dirty",
        "set --control a --bandwidth 0",
        "migrate --control a",
        "save [--allow-all-dirty]",
        "forget --control a",
    ] {
        assert!(wrong(&cli, &words(stale)).is_some(), "{stale}");
    }
    assert_eq!(unknown_options(&cli, &words("save --allow-all-dirty")), ["--allow-all-dirty"]);
    for good in ["save --control a -o f &", "status --watch --control a # note", "history … [--last N]"] {
        assert_eq!(wrong(&cli, &words(good)), None, "{good}");
    }
}

/// The words that stand for the values of an enum in JSON, in the order of their letters.
fn words_of<T: JsonSchema>() -> Vec<String> {
    fn collect(schema: &Value, words: &mut Vec<String>) {
        match schema {
            Value::Object(members) => {
                words.extend(members.get("const").and_then(Value::as_str).map(str::to_owned));
                let listed = members.get("enum").and_then(Value::as_array).into_iter().flatten();
                words.extend(listed.filter_map(Value::as_str).map(str::to_owned));
                members.values().for_each(|member| collect(member, words));
            }
            Value::Array(items) => items.iter().for_each(|item| collect(item, words)),
            _ => {}
        }
    }
    let mut words = Vec::new();
    collect(schema_for!(T).as_value(), &mut words);
    words.sort();
    words
}

/// The code spans in the first cells of the table that comes after `heading`, but for its head, in the order of their letters.
fn first_cells(page: &str, heading: &str) -> Vec<String> {
    let (_, after) = page.split_once(heading).expect("the heading of the table");
    let rows =
        after.lines().skip_while(|line| !line.starts_with('|')).take_while(|line| line.starts_with('|'));
    let cells = rows.skip(2).filter_map(|row| row.split('|').nth(1));
    let mut spans: Vec<String> =
        cells.flat_map(|cell| cell.split('`').skip(1).step_by(2)).map(str::to_owned).collect();
    spans.sort();
    spans
}

fn page(name: &str) -> String {
    read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(name)).unwrap()
}

#[test]
fn lists_of_verbs_and_statuses_are_whole() {
    let cli = Cli::command();
    let mut verbs: Vec<&str> =
        cli.get_subcommands().filter(|verb| !verb.is_hide_set()).map(Command::get_name).collect();
    verbs.sort_unstable();
    let readme = page("README.md");
    let row = readme
        .lines()
        .find(|line| line.contains("the command `vfio-migrate`: "))
        .expect("the row of the command");
    let mut listed: Vec<&str> =
        row.split('`').skip(1).step_by(2).filter(|word| *word != "vfio-migrate").collect();
    listed.sort_unstable();
    assert_eq!(listed, verbs, "README's verbs");

    let control = page("docs/control.md");
    assert_eq!(first_cells(&control, "A request is an object."), words_of::<ControlVerb>());
    let mut ended = words_of::<MigrationStatus>();
    ended.retain(|word| !["active", "cancelling", "failing", "pre-switchover"].contains(&word.as_str()));
    assert_eq!(first_cells(&control, "## How a migration ended"), ended);
}
