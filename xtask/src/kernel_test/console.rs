//! What the tests said on the machine's console.

use crate::command::tail;

/// The report on a console, if it is one. `all`: every test was to be run.
pub(super) fn heard(text: &str, all: bool) -> Result<Report, String> {
    let report = Report::parse(text);
    match report.sound(all || report.any()) {
        Ok(()) => Ok(report),
        Err(why) => Err(format!("{why}; the end of its console:\n{}", tail(text))),
    }
}

/// One test's end.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Test {
    pub(super) name: String,
    pub(super) failure: Option<String>,
}

/// Everything that was said.
#[derive(Debug, Default)]
pub(super) struct Report {
    pub(super) tests: Vec<Test>,
    planned: Vec<String>,
    ended: Option<usize>,
    broken: Option<String>,
}

impl Report {
    /// Reads a console: the kernel's own messages and escape sequences stand between the tests' lines, or before them in
    /// the same line.
    pub(super) fn parse(text: &str) -> Self {
        let mut report = Self::default();
        for line in text.lines() {
            let Some(at) = line.find("KTEST-") else { continue };
            let mut words = line[at..].trim_end().splitn(4, ' ');
            let (kind, name) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            let rest = words.nth(1);
            match kind {
                "KTEST-PLAN" => report.planned.push(name.into()),
                "KTEST-OK" => report.tests.push(Test { name: name.into(), failure: None }),
                "KTEST-FAILED" => {
                    let failure = Some(rest.unwrap_or("no reason").into());
                    report.tests.push(Test { name: name.into(), failure });
                }
                "KTEST-END" => report.ended = name.parse().ok(),
                "KTEST-BROKEN" => report.broken = Some(line[at..].into()),
                _ => {}
            }
        }
        report
    }

    /// Whether a test was announced, or ended.
    fn any(&self) -> bool {
        !self.planned.is_empty() || !self.tests.is_empty()
    }

    /// Whether it is a report at all: every test that was announced ended once, and then the end was said.
    /// `any`: there has to be a test.
    fn sound(&self, any: bool) -> Result<(), String> {
        if let Some(broken) = &self.broken {
            return Err(format!("the tests could not be set up: {broken}"));
        }
        if any && self.planned.is_empty() {
            return Err("no test was announced".into());
        }
        for name in &self.planned {
            let ends = self.tests.iter().filter(|test| test.name == *name).count();
            if ends != 1 {
                return Err(format!("{name} was announced and ended {ends} times"));
            }
        }
        match self.ended {
            Some(count) if count == self.planned.len() && count == self.tests.len() => Ok(()),
            Some(count) => Err(format!("{count} tests were said to have run, of {}", self.planned.len())),
            None => Err("the machine was off before its tests were done".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "\u{1b}[2JKTEST-PLAN one\r\nKTEST-PLAN two\r\nKTEST-OK one 12\r\n[ 1.2] noise\r\n\
        KTEST-FAILED two 3 it broke: why\r\nKTEST-END 2\r\n";

    #[test]
    fn hears_every_test() {
        let report = Report::parse(GOOD);
        assert_eq!(report.sound(true), Ok(()));
        let failed = Test { name: "two".into(), failure: Some("it broke: why".into()) };
        assert_eq!(report.tests, [Test { name: "one".into(), failure: None }, failed]);
    }

    #[test]
    fn a_report_with_a_piece_missing_is_none() {
        for (gone, instead) in [
            ("KTEST-OK one 12\r\n", ""),
            ("KTEST-END 2\r\n", ""),
            ("KTEST-END 2", "KTEST-END 1"),
            ("KTEST-END 2", "KTEST-OK one 1\r\nKTEST-END 2"),
            ("KTEST-PLAN one\r\n", ""),
            ("KTEST-PLAN one\r\n", "KTEST-BROKEN no modules\r\n"),
            (GOOD, "KTEST-END 0"),
            (GOOD, ""),
        ] {
            assert!(GOOD.contains(gone));
            assert!(
                Report::parse(&GOOD.replace(gone, instead)).sound(true).is_err(),
                "{gone:?} → {instead:?}"
            );
        }
    }
}
