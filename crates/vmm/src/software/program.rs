//! The program: a turn of its loop at a time, everything it knows in guest RAM.

use std::time::Duration;

use super::cpu::Cpu;
use super::driver;
use super::orders::{BootOrders, ProgramFailure, word};
use crate::guest::map::{Areas, BOOT_INFO, DATA, REPORT};
use crate::guest::{BOOT_MAGIC, GAP_WORD, REPORT_MAGIC, REQUEST_WORD};
use crate::platform::{CLOCK_HIGH, CLOCK_LOW, FAILURE};

/// Variables of the program, in guest RAM.
const STAMP: u64 = DATA;
const OWED: u64 = DATA + 8;
const WRITE_PAGE: u64 = DATA + 16;
const CHECK_PAGE: u64 = DATA + 24;
const TICK_REST: u64 = DATA + 32;
/// Nanoseconds in which the guest ran: gaps count for little.
const RUN_CLOCK: u64 = DATA + 40;

/// A gap counts for so much of the run clock, and owes so many pages, at most.
const GAP_COUNTS: u64 = 50_000_000;
const PAGES_PER_TURN: u64 = 1024;
const CHECKS_PER_TURN: u64 = 512;
const PAGE: u64 = 4096;
const SECOND: u64 = 1_000_000_000;
/// In the table of stamps: the page was found wrong, and has not been written since.
const KNOWN_LOST: u64 = 1 << 63;

/// Place in the program where the guest is. The numbers are saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pc {
    Off,
    Boot,
    Loop,
    Failed,
}

impl Pc {
    pub(super) fn number(self) -> u32 {
        match self {
            Self::Off => 0,
            Self::Boot => 1,
            Self::Loop => 2,
            Self::Failed => 3,
        }
    }

    pub(super) fn of(number: u32) -> Option<Self> {
        [Self::Off, Self::Boot, Self::Loop, Self::Failed].into_iter().find(|pc| pc.number() == number)
    }
}

#[derive(Debug)]
pub(super) struct Program {
    cpu: Cpu,
}

impl Program {
    pub(super) fn new(cpu: Cpu) -> Self {
        Self { cpu }
    }

    /// One turn from `pc`; where it stands afterwards.
    pub(super) fn turn(&self, pc: Pc) -> Pc {
        let result = match pc {
            Pc::Off | Pc::Failed => return pc,
            Pc::Boot => self.boot(),
            Pc::Loop => self.work(),
        };
        match result {
            Ok(()) => Pc::Loop,
            Err(failure) => {
                self.set(word::FAILURE, failure.code.into());
                self.set(word::DETAIL, failure.detail);
                self.set(word::STAGE, 0xdead);
                self.cpu.port_out(FAILURE, failure.code);
                Pc::Failed
            }
        }
    }

    /// Waits for an interrupt, for a tick at most.
    pub(super) fn idle(&self) {
        let micros = self.orders().map_or(1000, |orders| orders.tick_us);
        self.cpu.backend.wait(Duration::from_micros(micros.clamp(100, 1_000_000)));
    }

    fn boot(&self) -> Result<(), ProgramFailure> {
        self.cpu.store64(REPORT, REPORT_MAGIC);
        self.set(word::STAGE, 1);
        let orders = self.orders()?;
        driver::start(&self.cpu, &orders)?;
        self.set(word::STAGE, 2);
        self.set(word::LAST_CLOCK, self.clock());
        self.set(word::STAGE, 3);
        Ok(())
    }

    fn work(&self) -> Result<(), ProgramFailure> {
        let orders = self.orders()?;
        self.count(word::LOOPS, 1);
        let ran = self.look_at_clock(&orders);
        driver::serve(&self.cpu, &orders, self.cpu.load64(RUN_CLOCK))?;
        self.write_pages(&orders, ran);
        self.check_pages(&orders);
        Ok(())
    }

    fn orders(&self) -> Result<BootOrders, ProgramFailure> {
        let word = |index: u64| self.cpu.load64(BOOT_INFO + 8 * index);
        if word(0) != BOOT_MAGIC {
            return Err(ProgramFailure { code: 1, detail: word(0) });
        }
        let areas = Areas {
            stamps: word(11),
            low_start: word(2),
            low_pages: word(3),
            high_start: word(4),
            high_pages: word(5),
        };
        Ok(BootOrders {
            pages_per_second: word(1),
            areas,
            devices: word(6),
            block_len: u32::try_from(word(7)).map_err(|_| ProgramFailure { code: 1, detail: word(7) })?,
            in_flight: word(8),
            p2p: word(9) != 0,
            tick_us: word(10),
        })
    }

    fn clock(&self) -> u64 {
        let low = self.cpu.port_in(CLOCK_LOW);
        u64::from(self.cpu.port_in(CLOCK_HIGH)) << 32 | u64::from(low)
    }

    /// Measures the gap since the last look. Returns for how much of it the guest counts as having run.
    fn look_at_clock(&self, orders: &BootOrders) -> u64 {
        let now = self.clock();
        let gap = now.saturating_sub(self.get(word::LAST_CLOCK));
        self.set(word::LAST_CLOCK, now);
        if self.get(REQUEST_WORD) != 0 {
            self.set(GAP_WORD, 0);
            self.set(REQUEST_WORD, 0);
        } else if gap > self.get(GAP_WORD) {
            self.set(GAP_WORD, gap);
        }
        let ran = gap.min(GAP_COUNTS);
        self.cpu.add(RUN_CLOCK, ran);
        let tick = orders.tick_us.max(1) * 1000;
        let rest = self.cpu.load64(TICK_REST) + ran;
        self.count(word::TICKS, rest / tick);
        self.cpu.store64(TICK_REST, rest % tick);
        ran
    }

    /// Numbers pages at the ordered rate, one after the other and round again.
    fn write_pages(&self, orders: &BootOrders, ran: u64) {
        let most = orders.pages_per_second.saturating_mul(GAP_COUNTS);
        let owed =
            self.cpu.load64(OWED).saturating_add(orders.pages_per_second.saturating_mul(ran)).min(most);
        let pages = (owed / SECOND).min(PAGES_PER_TURN);
        self.cpu.store64(OWED, owed - pages * SECOND);
        let mut number = self.cpu.load64(WRITE_PAGE);
        let mut stamp = self.cpu.load64(STAMP);
        for _ in 0..pages {
            let Some(page) = orders.areas.page(number) else { break };
            stamp += 1;
            self.cpu.store64(page, stamp);
            self.cpu.store64(page + 8, number);
            self.cpu.store64(page + PAGE - 8, stamp);
            self.cpu.store64(orders.areas.stamps + 8 * number, stamp);
            number = (number + 1) % orders.areas.pages();
        }
        self.cpu.store64(WRITE_PAGE, number);
        self.cpu.store64(STAMP, stamp);
        self.count(word::PAGES_WRITTEN, pages);
    }

    /// Compares some of the pages that were ever written; the others are not touched.
    fn check_pages(&self, orders: &BootOrders) {
        let (mut checked, mut lost, mut passes) = (0, 0, 0);
        let mut number = self.cpu.load64(CHECK_PAGE);
        for _ in 0..CHECKS_PER_TURN.min(orders.areas.pages()) {
            let expected = self.cpu.load64(orders.areas.stamps + 8 * number);
            if expected != 0 && expected & KNOWN_LOST == 0 {
                checked += 1;
                let page = orders.areas.page(number).unwrap_or(0);
                let found = [page, page + 8, page + PAGE - 8].map(|gpa| self.cpu.load64(gpa));
                if found != [expected, number, expected] {
                    lost += 1;
                    tracing::warn!(number, expected, ?found, "software guest: a page is lost");
                    self.cpu.store64(orders.areas.stamps + 8 * number, expected | KNOWN_LOST);
                }
            }
            number += 1;
            if number == orders.areas.pages() {
                number = 0;
                passes += 1;
            }
        }
        self.cpu.store64(CHECK_PAGE, number);
        self.count(word::PAGES_CHECKED, checked);
        self.count(word::PAGES_LOST, lost);
        self.count(word::PAGE_PASSES, passes);
    }

    fn get(&self, index: u64) -> u64 {
        self.cpu.load64(REPORT + 8 * index)
    }

    fn set(&self, index: u64, value: u64) {
        self.cpu.store64(REPORT + 8 * index, value);
    }

    fn count(&self, index: u64, more: u64) {
        self.cpu.add(REPORT + 8 * index, more);
    }
}
