//! The test programs: builds them all, and runs their tests side by side, each in a process of its own.
//!
//! `cargo test` runs one program after another, and at the end of each waits for its longest test. Here all tests wait in
//! one line, longest first by what they took the last time, and each processor takes the next.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::bounded::{self, End};
use crate::run::BUILT;

/// Several times what the longest test takes beside other load.
const BOUND: Duration = Duration::from_secs(300);

/// One test.
pub(crate) struct Test {
    /// The folder of its crate.
    pub(crate) home: String,
    /// Crate, program where that is not the library's own, and test.
    pub(crate) title: String,
    /// How long it took the last time, if it ran here before.
    pub(crate) last: Option<Duration>,
    /// Its name in its program.
    name: String,
    program: PathBuf,
    folder: PathBuf,
}

/// Test programs of the command that a ring of their own runs, and that ring.
const OWN_RINGS: [(&str, &str); 2] = [("qemu_peer", "qemu-peer"), ("python_peers", "python-peers")];

/// How tests ended.
#[derive(Default)]
pub(crate) struct Ended {
    pub(crate) passed: u64,
    pub(crate) ignored: u64,
    /// Titles.
    pub(crate) failed: Vec<String>,
    pub(crate) took: Vec<(Duration, String)>,
}

/// Builds every test program of the workspace, and asks each for its tests.
pub(crate) fn build(top: &Path) -> Result<Vec<Test>, String> {
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(top).args(["test", "--no-run", "--message-format=json-render-diagnostics"]);
    let output = command
        .args(BUILT)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| format!("cannot start cargo test: {error}"))?;
    if !output.status.success() {
        return Err(format!("building the tests: {}", output.status));
    }
    let times = read_times(top);
    let mut tests = Vec::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let Some(program) = program(line)? else { continue };
        tests.extend(list(&program, &times)?);
    }
    if tests.is_empty() {
        return Err("cargo named no test program".into());
    }
    Ok(tests)
}

impl Test {
    /// The ring that this test is run by, where that is not the ring `test`: its program's name says it.
    pub(crate) fn ring(&self) -> Option<&'static str> {
        let mut words = self.title.split(' ');
        (words.next() == Some("cli")).then(|| words.next()).flatten().and_then(|program| {
            OWN_RINGS.into_iter().find(|(name, _)| *name == program).map(|(_, ring)| ring)
        })
    }
}

/// Runs them, as many at a time as there are processors, each with `variable` in its environment. What a test says is shown if
/// it fails.
pub(crate) fn run(
    top: &Path,
    mut tests: Vec<Test>,
    variable: Option<(&str, &Path)>,
) -> Result<Ended, String> {
    // What never ran here may be long, and goes first.
    tests.sort_by_key(|test| std::cmp::Reverse(test.last.unwrap_or(Duration::MAX)));
    let said = top.join("target/test-output");
    std::fs::create_dir_all(&said).map_err(|error| format!("{}: {error}", said.display()))?;
    let waiting = Mutex::new(VecDeque::from(tests));
    let ended = Mutex::new(Ended::default());
    let lanes = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for lane in 0..lanes {
            let (waiting, ended, said) = (&waiting, &ended, said.join(lane.to_string()));
            scope.spawn(move || {
                loop {
                    // Taken in a statement of its own: the line is free while the test runs.
                    let next = waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                    let Some(test) = next else { break };
                    let began = Instant::now();
                    let verdict = run_one(&test, &said, variable);
                    let took = began.elapsed();
                    ended.lock().unwrap_or_else(PoisonError::into_inner).note(&test.title, took, verdict);
                }
            });
        }
    });
    let ended = ended.into_inner().unwrap_or_else(PoisonError::into_inner);
    write_times(top, &ended.took)?;
    Ok(ended)
}

impl Ended {
    fn note(&mut self, title: &str, took: Duration, verdict: Result<Verdict, String>) {
        let seconds = took.as_secs_f64();
        match verdict {
            Ok(Verdict::Passed) => {
                println!("ok      {seconds:>6.1} s  {title}");
                self.passed += 1;
                self.took.push((took, title.into()));
            }
            Ok(Verdict::Ignored) => {
                println!("ignored           {title}");
                self.ignored += 1;
            }
            Err(said) => {
                println!("FAILED  {seconds:>6.1} s  {title}\n{said}");
                self.failed.push(title.into());
            }
        }
    }
}

enum Verdict {
    Passed,
    Ignored,
}

/// A test program.
struct Program {
    home: String,
    title: String,
    at: PathBuf,
    folder: PathBuf,
}

/// The test program that a line of cargo's messages tells of, if it does.
fn program(line: &str) -> Result<Option<Program>, String> {
    let artifact = line.starts_with(r#"{"reason":"compiler-artifact""#);
    let profile = line.split(r#""profile":{"#).nth(1).and_then(|rest| rest.split('}').next());
    if !artifact || !profile.is_some_and(|profile| profile.contains(r#""test":true"#)) {
        return Ok(None);
    }
    let Some(at) = field(line, "executable")? else { return Ok(None) };
    let manifest = field(line, "manifest_path")?.ok_or("cargo named a program without a manifest")?;
    let folder = Path::new(manifest).parent().unwrap_or(Path::new("/")).to_path_buf();
    let home = folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let of_its_own = line.contains(r#""kind":["test"]"#);
    let target = line.split(r#""target":{"#).nth(1).unwrap_or_default();
    let title = match field(target, "name")? {
        Some(name) if of_its_own && name != home.replace('-', "_") => format!("{home} {name}"),
        _ => home.clone(),
    };
    Ok(Some(Program { home, title, at: at.into(), folder }))
}

/// The text of a field of a JSON object, unless it is no text.
fn field<'a>(json: &'a str, name: &str) -> Result<Option<&'a str>, String> {
    let Some((_, rest)) = json.split_once(&format!(r#""{name}":""#)) else { return Ok(None) };
    let text = rest.split('"').next().unwrap_or_default();
    if text.contains('\\') {
        Err(format!("a {name} with special characters: {text}"))
    } else {
        Ok(Some(text))
    }
}

fn list(program: &Program, times: &BTreeMap<String, Duration>) -> Result<Vec<Test>, String> {
    let said = Command::new(&program.at)
        .args(["--list", "--format", "terse"])
        .current_dir(&program.folder)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("cannot start {}: {error}", program.at.display()))?;
    if !said.status.success() {
        return Err(format!("{} does not list its tests: {}", program.at.display(), said.status));
    }
    let said = String::from_utf8_lossy(&said.stdout);
    let names = said.lines().filter_map(|line| line.strip_suffix(": test"));
    Ok(names
        .map(|name| {
            let title = format!("{} {name}", program.title);
            Test {
                home: program.home.clone(),
                last: times.get(&title).copied(),
                title,
                name: name.into(),
                program: program.at.clone(),
                folder: program.folder.clone(),
            }
        })
        .collect())
}

/// What it says goes into a file, not through a pipe: a process that outlives a test would keep the pipe open.
fn run_one(test: &Test, said: &Path, variable: Option<(&str, &Path)>) -> Result<Verdict, String> {
    let to = File::create(said).and_then(|file| Ok((file.try_clone()?, file)));
    let (out, err) = to.map_err(|error| format!("{}: {error}", said.display()))?;
    let end = Command::new(&test.program)
        .args(["--exact", &test.name])
        .envs(variable)
        .current_dir(&test.folder)
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        .spawn()
        .and_then(|child| bounded::wait(child, BOUND))
        .map_err(|error| format!("cannot run {}: {error}", test.program.display()))?;
    let text = std::fs::read(said).map_err(|error| format!("{}: {error}", said.display()))?;
    let text = String::from_utf8_lossy(&text);
    let status = match end {
        End::Status(status) => status,
        End::Hung(doing) => return Err(format!("not ended within {BOUND:?}, and killed\n{doing}{text}")),
    };
    // Its word too, so that a test that was not found is none that passed.
    match text.rsplit("test result: ").next() {
        Some(end) if status.success() && end.starts_with("ok. 1 passed; 0 failed") => Ok(Verdict::Passed),
        Some(end) if status.success() && end.starts_with("ok. 0 passed; 0 failed; 1 ignored") => {
            Ok(Verdict::Ignored)
        }
        _ => Err(format!("{status}\n{text}")),
    }
}

/// Where it stands how long each test took.
fn times(top: &Path) -> PathBuf {
    top.join("target/test-times")
}

fn read_times(top: &Path) -> BTreeMap<String, Duration> {
    // Without it nothing is known, and all are run in any order.
    let text = std::fs::read_to_string(times(top)).unwrap_or_default();
    text.lines()
        .filter_map(|line| {
            let (millis, title) = line.split_once(' ')?;
            Some((title.into(), Duration::from_millis(millis.parse().ok()?)))
        })
        .collect()
}

fn write_times(top: &Path, took: &[(Duration, String)]) -> Result<(), String> {
    let mut all = read_times(top);
    all.extend(took.iter().map(|(took, title)| (title.clone(), *took)));
    let text: String = all.iter().map(|(title, took)| format!("{} {title}\n", took.as_millis())).collect();
    std::fs::write(times(top), text).map_err(|error| format!("{}: {error}", times(top).display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_program_is_known_by_its_message() {
        let line = r#"{"reason":"compiler-artifact","manifest_path":"/w/crates/cli/Cargo.toml","target":{"kind":["test"],"name":"process","test":true},"profile":{"opt_level":"3","test":true},"filenames":["/w/t/x"],"executable":"/w/t/x","fresh":true}"#;
        let found = program(line).unwrap().unwrap();
        assert_eq!((found.home.as_str(), found.title.as_str()), ("cli", "cli process"));
        assert_eq!((found.at, found.folder), ("/w/t/x".into(), "/w/crates/cli".into()));
        // The program under test itself, and a library.
        let bin = line.replace(r#""3","test":true"#, r#""3","test":false"#);
        assert!(program(&bin).unwrap().is_none());
        let lib = line.replace(r#""executable":"/w/t/x""#, r#""executable":null"#);
        assert!(program(&lib).unwrap().is_none());
        assert!(program(&line.replace("/w/t", r"/w\\t")).is_err());
    }
}
