//! The progress of a migration on stderr: one line that fits the terminal, or now and then a plain one where there is none.

use std::fmt::Display;
use std::io::IsTerminal;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::control::protocol::{MigrationInfo, MigrationStatus};
use crate::output::{LINE_EVERY, eprintln_line};
use crate::units::format_size;

/// Longest and shortest bar, in columns.
const BAR: std::ops::RangeInclusive<usize> = 8..=30;
/// Columns of a terminal that does not say how many it has.
const COLUMNS: usize = 80;

/// The display of a migration as it goes, on stderr.
#[derive(Debug)]
pub(crate) struct ProgressDisplay {
    bar: Option<ProgressBar>,
    lines: Option<Instant>,
    columns: fn() -> usize,
}

impl ProgressDisplay {
    /// A display, or one that prints nothing unless `wanted`.
    pub(crate) fn new(wanted: bool) -> Self {
        if !wanted {
            return Self { bar: None, lines: None, columns };
        }
        if !std::io::stderr().is_terminal() {
            return Self { bar: None, lines: Some(Instant::now() + LINE_EVERY), columns };
        }
        Self::on(ProgressDrawTarget::stderr(), columns)
    }

    fn on(target: ProgressDrawTarget, columns: fn() -> usize) -> Self {
        let bar = ProgressBar::with_draw_target(None, target);
        if let Ok(style) = ProgressStyle::with_template("{msg}") {
            bar.set_style(style);
        }
        Self { bar: Some(bar), lines: None, columns }
    }

    /// Shows the migration as it is now.
    pub(crate) fn update(&mut self, info: &MigrationInfo) {
        self.show(|columns| migration_line(info, columns));
    }

    /// Shows the progress of one device: what was `done`, and what is left as far as is known.
    pub(crate) fn update_bytes(&mut self, done: &str, moved: u64, left: u64) {
        let text = match (moved, left) {
            (0, 0) => format!("nothing {done} yet"),
            _ => format!("{} {done}, {} left", format_size(moved), format_size(left)),
        };
        self.show(|columns| fitted(&Fraction::of(moved, left), &[part(0, &*text, &*text)], columns));
    }

    /// Prints a line of its own above the display.
    pub(crate) fn message(&self, line: impl Display) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln_line(line)),
            None => eprintln_line(line),
        }
    }

    fn show(&mut self, line: impl FnOnce(Option<usize>) -> String) {
        if let Some(bar) = &self.bar {
            // The last column stays free: a terminal may go on to the next line after it.
            bar.set_message(line(Some((self.columns)().saturating_sub(1))));
        } else if let Some(due) = self.lines.filter(|due| Instant::now() >= *due) {
            eprintln_line(line(None));
            self.lines = Some(due + LINE_EVERY);
        }
    }
}

impl Drop for ProgressDisplay {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Columns of the terminal, which may have changed since the last line.
fn columns() -> usize {
    let size = rustix::termios::tcgetwinsize(std::io::stderr());
    size.map_or(COLUMNS, |size| usize::from(size.ws_col)).max(1)
}

/// How much is done.
struct Fraction {
    done: u64,
    all: u64,
}

impl Fraction {
    fn of(done: u64, left: u64) -> Self {
        Self { done, all: done.saturating_add(left) }
    }

    /// `done` as a part of `scale`, rounded down; nothing of nothing.
    fn of_scale(&self, scale: u64) -> u64 {
        let part = u128::from(self.done) * u128::from(scale) / u128::from(self.all.max(1));
        u64::try_from(part).unwrap_or(scale)
    }

    fn bar(&self, columns: usize) -> String {
        let full = usize::try_from(self.of_scale(columns as u64)).unwrap_or(0).min(columns);
        "█".repeat(full) + &"░".repeat(columns - full)
    }
}

/// A part of the line: at full length, and as short as it can be said.
struct LinePart {
    /// How dispensable it is where there is little room.
    rank: u8,
    long: String,
    short: String,
}

fn part(rank: u8, long: impl Into<String>, short: impl Into<String>) -> LinePart {
    LinePart { rank, long: long.into(), short: short.into() }
}

/// The migration on one line of at most `columns`, or however long.
fn migration_line(info: &MigrationInfo, columns: Option<usize>) -> String {
    let moved = info.transferred;
    let done = moved.ram.saturating_add(moved.device_precopy).saturating_add(moved.device_stopcopy);
    let mut parts = vec![phase(info)];
    let told = |text: &str| part(0, text, text);
    if info.status == MigrationStatus::PreSwitchover {
        parts.push(told("waits for `continue`"));
    }
    if info.status == MigrationStatus::Cancelling {
        parts.push(told("cancelling"));
    }
    if let Some(failure) = info.failure.as_ref().filter(|_| info.status == MigrationStatus::Failing) {
        parts.push(part(
            0,
            format!("failed, and being undone: {}", failure.text),
            "failed, and being undone",
        ));
    }
    // Whoever waits too is told for what.
    parts.extend(info.waits_for.first().map(|awaited| told(&awaited.to_string())));
    parts.push(part(7, format!("{} moved", format_size(done)), format!("{} moved", short_size(done))));
    if let Some(left) = info.remaining {
        parts.push(part(3, format!("{} left", format_size(left)), format!("{} left", short_size(left))));
    }
    parts.push(part(5, format!("{}/s", format_size(info.rate)), format!("{}/s", short_size(info.rate))));
    let elapsed = format!("{} s", info.total_ms / 1000);
    parts.push(part(6, &*elapsed, &*elapsed));
    if info.phase.as_deref() == Some("P3") && info.status == MigrationStatus::Active {
        // Before anything has moved the rate says nothing.
        let told = |seconds: &u64| *seconds < 24 * 3600;
        let left = info.remaining.filter(|left| *left > 0).and_then(|left| left.checked_div(info.rate));
        parts.extend(left.filter(told).map(|seconds| {
            let seconds = seconds.saturating_add(1);
            part(4, format!("pass ends in {seconds} s"), format!("{seconds} s to go"))
        }));
    }
    if let Some(predicted) = info.expected_downtime_ms {
        let limit = |of: &str| info.downtime_limit_ms.map_or(String::new(), |limit| format!("{of}{limit}"));
        let (long, short) = (limit(" of "), limit("/"));
        parts.push(part(
            2,
            format!("downtime {predicted}{long} ms"),
            format!("downtime {predicted}{short} ms"),
        ));
    }
    let fraction = info.remaining.map_or(Fraction::of(0, 0), |left| Fraction::of(done, left));
    fitted(&fraction, &parts, columns)
}

/// The phase by name, as part of what it is part of.
fn phase(info: &MigrationInfo) -> LinePart {
    let name = info.phase_name.as_deref().unwrap_or("begins");
    match info.phase.as_deref() {
        Some("P3") => {
            let pass = info.iterations.max(1);
            part(1, format!("{name}, pass {pass}"), format!("{name} {pass}"))
        }
        Some("P4" | "P5" | "P6" | "P7" | "P8") => part(1, format!("switchover: {name}"), name),
        _ => part(1, name, name),
    }
}

/// A size in a few columns.
fn short_size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let (mut size, mut unit) = (bytes, 0);
    while size >= 1024 && unit + 1 < UNITS.len() {
        (size, unit) = (size / 1024, unit + 1);
    }
    format!("{size} {}", UNITS.get(unit).unwrap_or(&"B"))
}

/// The parts, in their order, on one line, and a bar where there is room for that too. Where there is not, the bar goes first; then all
/// is said shorter; then the most dispensable parts go.
fn fitted(fraction: &Fraction, parts: &[LinePart], columns: Option<usize>) -> String {
    let percent = format!("{:>3}%", fraction.of_scale(100));
    let line = |most: u8, text: fn(&LinePart) -> &str| {
        let kept = parts.iter().filter(|part| part.rank <= most).map(text);
        format!("{percent}  {}", kept.collect::<Vec<_>>().join(", "))
    };
    let long = line(u8::MAX, |part| &part.long);
    let Some(columns) = columns else { return long };
    let width = |text: &str| text.chars().count();
    if width(&long) <= columns {
        let left = columns.saturating_sub(width(&long) + 2).min(*BAR.end());
        return if BAR.contains(&left) { format!("{}  {long}", fraction.bar(left)) } else { long };
    }
    let most = parts.iter().map(|part| part.rank).max().unwrap_or(0);
    let short = |most| line(most, |part: &LinePart| &part.short);
    let text = (0..=most).rev().map(short).find(|text| width(text) <= columns);
    text.unwrap_or_else(|| short(0)).chars().take(columns).collect()
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use indicatif::TermLike;

    use super::*;
    use crate::control::protocol::TransferInfo;

    fn info(moved: u64, left: u64) -> MigrationInfo {
        MigrationInfo {
            direction: Some("outgoing".into()),
            phase: Some("P3".into()),
            phase_name: Some("pre-copy".into()),
            total_ms: 12_345,
            expected_downtime_ms: Some(35),
            downtime_limit_ms: Some(300),
            iterations: 1,
            transferred: TransferInfo { ram: moved, ..TransferInfo::default() },
            remaining: Some(left),
            rate: 12 << 20,
            ..MigrationInfo::new(MigrationStatus::Active)
        }
    }

    #[test]
    fn a_line_says_what_fits() {
        let info = info(56 << 20, 72 << 20);
        assert_eq!(
            migration_line(&info, Some(199)),
            "█████████████░░░░░░░░░░░░░░░░░   43%  pre-copy, pass 1, 56.00 MiB moved, 72.00 MiB left, 12.00 MiB/s, 12 s, \
             pass ends in 7 s, downtime 35 of 300 ms"
        );
        assert_eq!(
            migration_line(&info, Some(79)),
            " 43%  pre-copy 1, 72 MiB left, 12 MiB/s, 12 s, 7 s to go, downtime 35/300 ms"
        );
        assert_eq!(migration_line(&info, Some(39)), " 43%  pre-copy 1, downtime 35/300 ms");
        // The bar is the first to go, and what no terminal is too narrow for is the downtime that would be too long.
        let late = MigrationInfo { expected_downtime_ms: Some(6386), ..info.clone() };
        for columns in 38..=200 {
            let line = migration_line(&late, Some(columns));
            assert!(line.contains("downtime 6386"), "{columns}: {line}");
            let whole = ["moved", "left", "MiB/s", "12 s", "7 s"].iter().all(|part| line.contains(part));
            assert!(whole || !line.contains('█'), "{columns}: {line}");
            assert!(
                columns < 79 || ["left", "MiB/s", "12 s", "7 s"].iter().all(|part| line.contains(part)),
                "{line}"
            );
        }
        let waits = MigrationInfo { status: MigrationStatus::PreSwitchover, ..info };
        for columns in [39, 79, 199] {
            let line = migration_line(&waits, Some(columns));
            assert!(line.contains("waits for `continue`"), "{line}");
        }
    }

    #[test]
    fn what_is_not_known_is_not_told() {
        for unknown in [
            MigrationInfo { direction: Some("incoming".into()), remaining: None, ..info(7 << 20, 0) },
            MigrationInfo {
                phase: Some("P0".into()),
                phase_name: Some("plan".into()),
                remaining: None,
                ..info(0, 0)
            },
        ] {
            for columns in [39, 79, 199] {
                let line = migration_line(&unknown, Some(columns));
                assert!(!line.contains("left") && !line.contains("ends in"), "{line}");
            }
        }
    }

    #[test]
    fn every_line_fits_and_the_bar_is_empty_before_anything_moved() {
        let states = [MigrationStatus::Active, MigrationStatus::PreSwitchover];
        for columns in 1..=200 {
            for (moved, left) in [(0, 0), (0, 128 << 20), (1 << 50, 1), (u64::MAX, u64::MAX)] {
                for status in states {
                    let info = MigrationInfo { status, ..info(moved, left) };
                    let line = migration_line(&info, Some(columns));
                    assert!(line.chars().count() <= columns, "{columns}: {line}");
                }
            }
        }
        let nothing = migration_line(&info(0, 128 << 20), Some(199));
        assert!(nothing.starts_with('░') && nothing.contains("  0%") && !nothing.contains('█'), "{nothing}");
        let unknown = migration_line(&info(0, 0), Some(199));
        assert!(unknown.contains("  0%") && !unknown.contains('█'), "{unknown}");
    }

    #[test]
    fn phases_of_the_switchover_are_said_to_be() {
        let at = |code: &str, name: &str| {
            let info =
                MigrationInfo { phase: Some(code.into()), phase_name: Some(name.into()), ..info(1, 1) };
            migration_line(&info, None)
        };
        assert!(at("P5", "final").contains("switchover: final"));
        assert!(at("P1", "hello").contains("%  hello, "));
        assert!(!at("P1", "hello").contains("pass"));
    }

    /// A terminal of some width, as far as indicatif moves about in it. A line that is too long goes on in the next row.
    #[derive(Clone, Debug)]
    struct Grid(Arc<Mutex<Rows>>);

    #[derive(Debug)]
    struct Rows {
        width: usize,
        rows: Vec<Vec<char>>,
        at: (usize, usize),
    }

    impl Grid {
        fn new(width: usize) -> Self {
            Self(Arc::new(Mutex::new(Rows { width, rows: vec![Vec::new()], at: (0, 0) })))
        }

        /// What is to be seen, row by row, without empty rows.
        fn seen(&self) -> Vec<String> {
            let rows = self.0.lock().unwrap();
            let text = rows.rows.iter().map(|row| row.iter().collect::<String>().trim_end().to_owned());
            text.filter(|row| !row.is_empty()).collect()
        }
    }

    impl TermLike for Grid {
        fn width(&self) -> u16 {
            u16::try_from(self.0.lock().unwrap().width).unwrap()
        }

        fn move_cursor_up(&self, n: usize) -> io::Result<()> {
            self.0.lock().unwrap().at.0 -= n;
            Ok(())
        }

        fn move_cursor_down(&self, n: usize) -> io::Result<()> {
            self.0.lock().unwrap().at.0 += n;
            Ok(())
        }

        fn move_cursor_right(&self, n: usize) -> io::Result<()> {
            self.0.lock().unwrap().at.1 += n;
            Ok(())
        }

        fn move_cursor_left(&self, n: usize) -> io::Result<()> {
            let mut rows = self.0.lock().unwrap();
            rows.at.1 = rows.at.1.saturating_sub(n);
            Ok(())
        }

        fn write_line(&self, text: &str) -> io::Result<()> {
            self.write_str(text)?;
            self.write_str("\n")
        }

        fn write_str(&self, text: &str) -> io::Result<()> {
            let mut grid = self.0.lock().unwrap();
            for c in text.chars() {
                match c {
                    '\r' => grid.at.1 = 0,
                    '\n' => grid.at = (grid.at.0 + 1, 0),
                    c => {
                        if grid.at.1 == grid.width {
                            grid.at = (grid.at.0 + 1, 0);
                        }
                        let (row, column) = grid.at;
                        let rows = grid.rows.len().max(row + 1);
                        grid.rows.resize(rows, Vec::new());
                        let columns = grid.rows[row].len().max(column + 1);
                        grid.rows[row].resize(columns, ' ');
                        grid.rows[row][column] = c;
                        grid.at.1 += 1;
                    }
                }
            }
            Ok(())
        }

        fn clear_line(&self) -> io::Result<()> {
            let mut grid = self.0.lock().unwrap();
            let row = grid.at.0;
            if let Some(cells) = grid.rows.get_mut(row) {
                cells.clear();
            }
            grid.at.1 = 0;
            Ok(())
        }

        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    fn narrow() -> usize {
        40
    }

    fn usual() -> usize {
        80
    }

    fn wide() -> usize {
        200
    }

    #[test]
    fn a_terminal_shows_one_line_and_none_afterwards() {
        for columns in [narrow as fn() -> usize, usual, wide] {
            let grid = Grid::new(columns());
            let target = ProgressDrawTarget::term_like(Box::new(grid.clone()));
            let mut display = ProgressDisplay::on(target, columns);
            let mut lines = 0;
            for moved in 0..200_u64 {
                let all = 200 << 20;
                display.update(&info(moved << 20, all - (moved << 20)));
                if let Some(bar) = &display.bar {
                    bar.force_draw();
                }
                let seen = grid.seen();
                assert_eq!(seen.len(), 1, "{} columns: {seen:?}", columns());
                assert!(seen[0].contains("pre-copy"), "{seen:?}");
                lines += 1;
            }
            assert_eq!(lines, 200);
            drop(display);
            assert_eq!(grid.seen(), [""; 0], "{} columns", columns());
        }
    }
}
