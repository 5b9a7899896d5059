//! The table of answers, in which rows that are alike are one, and so are columns.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Serialize;

use crate::findings::Findings;
use crate::report::Verdict;

/// What can go where: for all of one group, the same answer. Rows are devices, or machines where machines were asked about;
/// columns are hosts, or machines where there was no host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Matrix {
    /// The devices that are rows, by host and name.
    pub devices: Vec<MatrixDevice>,
    /// The machines that are rows, in the order given.
    pub machines: Vec<MatrixMachine>,
    /// The hosts that are columns, in the order given; of machines among each other, the machines.
    pub hosts: Vec<MatrixHost>,
    /// The answers: by group of rows, then by group of columns.
    pub cells: Vec<Vec<Cell>>,
    /// How many pairs were compared: of devices, or of machines with what they would go to.
    pub comparisons: usize,
}

/// A device of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct MatrixDevice {
    /// Name of the host that has the device.
    pub host: String,
    /// Name of the device on that host.
    pub device: String,
    /// Which row of the cells is its.
    pub group: usize,
}

/// A machine that could go somewhere, as a row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct MatrixMachine {
    /// Name of the machine: what it was asked by, as a manifest names none.
    pub name: String,
    /// Which row of the cells is its.
    pub group: usize,
}

/// A host, or a machine, that something could go to, as a column.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct MatrixHost {
    /// Name of the host, or of the machine.
    pub name: String,
    /// Which column of the cells is its.
    pub group: usize,
}

/// Whether something can go somewhere.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, JsonSchema)]
pub struct Cell {
    /// The best that one of the host's devices or offers gives, or for a machine all of them together.
    pub verdict: Verdict,
    /// Codes of the reasons of the best, in order, each once.
    pub codes: Vec<&'static str>,
}

impl Matrix {
    /// Whether the `device`th device can go to the `host`th host.
    pub fn cell(&self, device: usize, host: usize) -> Option<&Cell> {
        self.answer(self.devices.get(device)?.group, host)
    }

    /// Whether the `machine`th machine can go to the `host`th host.
    pub fn machine_cell(&self, machine: usize, host: usize) -> Option<&Cell> {
        self.answer(self.machines.get(machine)?.group, host)
    }

    fn answer(&self, row: usize, host: usize) -> Option<&Cell> {
        self.cells.get(row)?.get(self.hosts.get(host)?.group)
    }
}

impl Cell {
    pub(super) fn of(mut findings: Findings<'_>) -> Self {
        let verdict = findings.verdict();
        let mut codes = std::mem::take(&mut findings.codes);
        codes.sort_unstable();
        codes.dedup();
        Self { verdict, codes }
    }
}

/// Answers as they come, row by row. Each that came before is a number: what is kept grows with what differs.
#[derive(Default)]
pub(super) struct Answers {
    cells: Numbered<Cell>,
    rows: Numbered<Vec<usize>>,
}

impl Answers {
    /// The number of a row, by its answers to each column.
    pub(super) fn row(&mut self, cells: impl Iterator<Item = Cell>) -> usize {
        let row = cells.map(|cell| self.cells.number(cell)).collect();
        self.rows.number(row)
    }

    /// The table of these rows, by the numbers they were given, and of as many columns: the group of each, and the cells.
    pub(super) fn table(self, rows: &[usize], columns: usize) -> (Vec<usize>, Vec<usize>, Vec<Vec<Cell>>) {
        // By the place where a group's first member stands.
        let (numbered, cells) = (self.rows.in_order(), self.cells.in_order());
        let mut order = Numbered::default();
        let groups: Vec<usize> = rows.iter().map(|row| order.number(*row)).collect();
        let distinct: Vec<&Vec<usize>> =
            order.in_order().into_iter().filter_map(|row| numbered.get(row)).collect();
        let mut alike = Numbered::default();
        let column = |n: usize| distinct.iter().map(|row| row.get(n).copied()).collect::<Vec<_>>();
        let merged: Vec<usize> = (0..columns).map(|n| alike.number(column(n))).collect();
        let first: Vec<usize> =
            (0..alike.len()).filter_map(|n| merged.iter().position(|own| *own == n)).collect();
        let answer = |row: &[usize], n: usize| row.get(n).and_then(|cell| cells.get(*cell)).cloned();
        let table = distinct.iter().map(|row| first.iter().filter_map(|n| answer(row, *n)).collect());
        (groups, merged, table.collect())
    }
}

/// Things numbered in the order they came, like ones alike.
pub(super) struct Numbered<T>(BTreeMap<T, usize>);

impl<T: Ord> Default for Numbered<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T: Ord> Numbered<T> {
    pub(super) fn number(&mut self, thing: T) -> usize {
        let next = self.0.len();
        *self.0.entry(thing).or_insert(next)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn in_order(self) -> Vec<T> {
        let mut all: Vec<(usize, T)> = self.0.into_iter().map(|(thing, n)| (n, thing)).collect();
        all.sort_unstable_by_key(|(n, _)| *n);
        all.into_iter().map(|(_, thing)| thing).collect()
    }
}
