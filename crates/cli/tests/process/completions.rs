//! Completion in the shells that people use: each real shell loads the script that the command prints for it, and completes
//! every option of every verb and the values of those that have a list. What it offers is what `--help` shows.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::support::run;

/// Prints what bash offers for each line of stdin, and `==` behind each.
const BASH: &str = r#"
source "$1"
function=$(complete -p vfio-migrate | sed 's/.*-F \([^ ]*\).*/\1/')
while IFS= read -r line; do
    read -ra COMP_WORDS <<< "$line"
    [[ $line == *" " ]] && COMP_WORDS+=("")
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMP_LINE=$line COMP_POINT=${#line} COMPREPLY=()
    $function vfio-migrate "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
    printf '%s\n' "${COMPREPLY[@]}" "=="
done
"#;

/// The same of fish, which puts a tab and a description behind each.
const FISH: &str = r#"
source $argv[1]
while read --local line
    complete --do-complete $line
    echo "=="
end
"#;

/// The same of zsh, which completes in interactive shells alone: one runs behind a pseudo terminal, and its `compadd` tells
/// what it is given. The key that completes also tells the end: a line that came behind it could come in between.
const ZSH: &str = r#"
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell "PROMPT= RPROMPT=; fpath=(${(q)1:h} \$fpath); autoload -U compinit; compinit -u -D"
zpty -w shell 'compadd() {
  if [[ ${@[1,(i)(-|--)]} == *-(O|A|D)\ * ]]; then builtin compadd "$@"; return $?; fi
  typeset -a found; builtin compadd -A found "$@"
  for word in $found; do print -r -- "<<$word>>"; done
}
tell() { zle complete-word; BUFFER=; print -r -- "<<==>>" }
zle -N tell
bindkey "^I" tell
stty -echo; print RE""ADY'
while zpty -r shell output; do [[ $output == *READY* ]] && break; done
while IFS= read -r line; do
  zpty -w -n shell "$line"$'\t'
  word=
  while [[ $word != "==" ]] && zpty -r shell output; do
    while [[ $output == *\<\<*\>\>* ]]; do
      word=${output#*<<}
      word=${word%%>>*}
      print -r -- "$word"
      output=${output#*>>}
    done
  done
done
"#;

/// What `--help` of a verb shows.
#[derive(Debug, Default)]
struct Help {
    options: BTreeSet<String>,
    /// Options with a list of values, and the list.
    values: Vec<(String, BTreeSet<String>)>,
}

fn help(words: &[&str]) -> String {
    let output = run(&[words, &["-h"]].concat());
    assert!(output.status.success(), "{words:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The verbs that the command's help lists.
fn verbs() -> Vec<String> {
    let text = help(&[]);
    let (_, rest) = text.split_once("Commands:\n").unwrap();
    let (list, _) = rest.split_once("\n\n").unwrap();
    // What a line goes on with is indented further.
    let lines = list.lines().filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    let verbs: Vec<String> = lines
        .map(|line| line.split_whitespace().next().unwrap().to_owned())
        .filter(|verb| verb != "help")
        .collect();
    assert!(verbs.len() > 15 && verbs.contains(&"migrate".into()), "{verbs:?}");
    verbs
}

fn options(verb: &str) -> Help {
    let text = help(&[verb]);
    let (_, list) = text.split_once("\nOptions:\n").unwrap();
    let list = list.split("\n\n").next().unwrap();
    let mut help = Help::default();
    for entry in entries(list) {
        let Some(at) = entry.find("--") else { continue };
        let end = |character: char| {
            !(character.is_ascii_lowercase() || character.is_ascii_digit() || character == '-')
        };
        let name = entry[at..].split(end).next().unwrap().to_owned();
        if let Some((_, values)) = entry.split_once("[possible values: ") {
            let values = values.split(']').next().unwrap();
            help.values
                .push((name.clone(), values.split(',').map(|value| value.trim().to_owned()).collect()));
        }
        help.options.insert(name);
    }
    help
}

/// The options of a list, each with its description, on one line.
fn entries(list: &str) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for line in list.lines() {
        let text = line.trim_start();
        let indent = line.len() - text.len();
        match found.last_mut() {
            Some(entry) if indent > 6 || !text.starts_with('-') => {
                entry.push(' ');
                entry.push_str(text);
            }
            _ => found.push(text.to_owned()),
        }
    }
    found
}

/// What the shell offers for each line, in order.
fn offered(shell: &str, script: &str, file: &Path, lines: &[String]) -> Vec<BTreeSet<String>> {
    let dir = file.parent().unwrap();
    let driver = dir.join("driver");
    std::fs::write(&driver, script).unwrap();
    let quiet: &[&str] = match shell {
        "bash" => &["--norc", "--noprofile"],
        "fish" => &["--no-config"],
        _ => &["-f"],
    };
    let mut child = Command::new(shell)
        .args(quiet)
        .args([&driver, file])
        .env("HOME", dir)
        .env("TERM", "xterm")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let asked = lines.join("\n") + "\n";
    let writer = std::thread::spawn(move || stdin.write_all(asked.as_bytes()));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mut answers: Vec<BTreeSet<String>> = Vec::new();
    let mut answer = BTreeSet::new();
    for line in text.lines() {
        match line.trim_end_matches('\r') {
            "==" => answers.push(std::mem::take(&mut answer)),
            word => answer.extend(word.split('\t').next().filter(|word| !word.is_empty()).map(str::to_owned)),
        }
    }
    assert_eq!(answers.len(), lines.len(), "{shell}: {text}");
    answers
}

/// Asks a shell for all there is to complete. A shell that is not installed is left out, loudly.
fn completes(shell: &str, script: &str, name_of_file: &str) {
    if let Err(error) = Command::new(shell).arg("--version").stdout(Stdio::null()).status() {
        eprintln!("SKIPPED SHELL: {shell} ({error})");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(name_of_file);
    std::fs::write(&file, run(&["completions", shell]).stdout).unwrap();
    let (mut lines, mut expected) = (vec!["vfio-migrate ".to_owned()], vec![BTreeSet::new()]);
    for verb in verbs() {
        expected[0].insert(verb.clone());
        let help = options(&verb);
        lines.push(format!("vfio-migrate {verb} --"));
        expected.push(help.options);
        for (option, values) in help.values {
            lines.push(format!("vfio-migrate {verb} {option} "));
            expected.push(values);
        }
    }
    assert!(lines.iter().any(|line| line.ends_with("describe --format ")), "{lines:?}");
    assert!(lines.iter().any(|line| line.ends_with("demo --break ")), "{lines:?}");
    let found = offered(shell, script, &file, &lines);
    for ((line, mut found), expected) in lines.iter().zip(found).zip(expected) {
        if line == "vfio-migrate " {
            // Options of the command itself may be offered as well, and its own help.
            found.retain(|word| !word.starts_with('-') && word != "help");
        }
        assert_eq!(found, expected, "{shell}: {line}");
    }
}

#[test]
fn bash_completes_what_the_help_shows() {
    completes("bash", BASH, "vfio-migrate.bash");
}

#[test]
fn zsh_completes_what_the_help_shows() {
    completes("zsh", ZSH, "_vfio-migrate");
}

#[test]
fn fish_completes_what_the_help_shows() {
    completes("fish", FISH, "vfio-migrate.fish");
}
