//! Two machines, booted at once and joined by a network link. Each runs its half of every test.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use super::boot::{Plugged, boot};
use super::console::{Report, Test, heard};

/// The machines: what each is told to be, and the address of its network card.
const MACHINES: [(&str, &str); 2] = [("source", "52:54:00:00:00:01"), ("destination", "52:54:00:00:00:02")];

/// Boots both until both are off; the tests that they ran together. `all`: every test was to be run.
pub(super) fn run(kernel: &Path, image: &Path, words: &str, all: bool) -> Result<Vec<Test>, String> {
    let (one, other) = UnixStream::pair().map_err(|error| format!("joining two machines: {error}"))?;
    let failed = AtomicBool::new(false);
    let machine = |(role, address), socket| {
        let words = format!("{words} ktest.role={role}");
        let ended = boot(kernel, image, &words, Plugged::Link { socket, address }, &failed)
            .and_then(|text| heard(&text, all))
            .map_err(|why| format!("{role}: {why}"));
        // The other would wait for it.
        failed.fetch_or(ended.is_err(), Ordering::Relaxed);
        ended
    };
    let [first, second] = MACHINES;
    let (source, destination) = std::thread::scope(|scope| {
        let source = scope.spawn(|| machine(first, one));
        let destination = machine(second, other);
        (source.join(), destination)
    });
    let source = source.map_err(|_| "the thread of the source's machine failed")?;
    match (source, destination) {
        (Ok(source), Ok(destination)) => joined(source, destination),
        (Err(why), Err(other)) => Err(format!("{why}\n{other}")),
        (Err(why), Ok(_)) | (Ok(_), Err(why)) => Err(why),
    }
}

/// Each test once: it has passed if both its halves have.
fn joined(source: Report, destination: Report) -> Result<Vec<Test>, String> {
    let names = |report: &Report| report.tests.iter().map(|test| test.name.clone()).collect::<Vec<_>>();
    let (left, right) = (names(&source), names(&destination));
    if left != right {
        return Err(format!("the source ran {left:?}, and the destination {right:?}"));
    }
    let halves = source.tests.into_iter().zip(destination.tests);
    Ok(halves.map(|(left, right)| Test { failure: both(left.failure, right.failure), ..left }).collect())
}

fn both(source: Option<String>, destination: Option<String>) -> Option<String> {
    let said = |role: &str, failure: Option<String>| failure.map(|why| format!("{role}: {why}"));
    let failures: Vec<String> =
        [said("source", source), said("destination", destination)].into_iter().flatten().collect();
    (!failures.is_empty()).then(|| failures.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "KTEST-PLAN one\nKTEST-PLAN two\nKTEST-OK one 1\nKTEST-OK two 2\nKTEST-END 2\n";

    #[test]
    fn a_test_passes_if_both_halves_do() {
        let tests = joined(Report::parse(GOOD), Report::parse(GOOD)).unwrap();
        assert_eq!(
            tests,
            ["one", "two"].map(|name| Test { name: name.into(), failure: None }),
            "each once, and passed"
        );
        let bad = GOOD.replace("OK two 2", "FAILED two 2 it broke");
        for (source, destination, why) in [
            (GOOD, bad.as_str(), "destination: it broke"),
            (&bad, GOOD, "source: it broke"),
            (&bad, &bad, "source: it broke; destination: it broke"),
        ] {
            let tests = joined(Report::parse(source), Report::parse(destination)).unwrap();
            assert_eq!(tests[0].failure, None);
            assert_eq!(tests[1].failure.as_deref(), Some(why));
        }
    }

    #[test]
    fn halves_of_different_tests_are_no_test() {
        let fewer = "KTEST-PLAN one\nKTEST-OK one 1\nKTEST-END 1\n";
        let others = GOOD.replace("two", "three");
        for other in [fewer, &others, ""] {
            assert!(joined(Report::parse(GOOD), Report::parse(other)).is_err());
            assert!(joined(Report::parse(other), Report::parse(GOOD)).is_err());
        }
    }
}
