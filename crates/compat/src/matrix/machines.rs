//! Which machine can go to which host, or where no host is given, to which other machine.

use super::table::{Answers, Cell, Matrix, MatrixHost, MatrixMachine};
use super::work::{self, MatrixError};
use crate::check::compare_machines;
use crate::findings::{Comparing, Findings};
use crate::host::HostManifest;
use crate::machine::MachineManifest;
use crate::placement::place_machine;
use crate::policy::{DeviceMap, Policy};

/// A machine of a pool, by a name that its manifest does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolMachine {
    /// Name of the machine, as reports call it.
    pub name: String,
    /// The machine with all its devices.
    pub manifest: MachineManifest,
}

/// Asks for each machine whether each host could take it, as [`check_placement`](crate::check_placement) does; or without a host,
/// whether each machine could go to each, as [`check_machines`](crate::check_machines) does. What is taken on a host already is
/// not looked at.
///
/// # Errors
/// There is too much to compare.
pub fn machine_matrix(
    machines: &[PoolMachine],
    hosts: &[HostManifest],
    policy: &Policy,
) -> Result<Matrix, MatrixError> {
    let comparing = Comparing::under(policy);
    let map = DeviceMap::new();
    let columns: Vec<String> = if hosts.is_empty() {
        machines.iter().map(|machine| machine.name.clone()).collect()
    } else {
        hosts.iter().map(|host| host.name.clone()).collect()
    };
    let answer = |source: &MachineManifest, to: usize| {
        let mut findings = Findings::codes(policy, &comparing);
        if let Some(host) = hosts.get(to) {
            place_machine(source, host, &mut findings, &comparing);
        } else if let Some(destination) = machines.get(to) {
            compare_machines(source, &destination.manifest.with_ram_of(source), &map, &mut findings);
        }
        work::check(&comparing, work::MAX_WORK).map(|()| Cell::of(findings))
    };
    let mut answers = Answers::default();
    let mut rows = Vec::with_capacity(machines.len());
    for machine in machines {
        let cells = (0..columns.len()).map(|to| answer(&machine.manifest, to));
        rows.push(answers.row(cells.collect::<Result<Vec<_>, _>>()?.into_iter()));
    }
    let comparisons = rows.len() * columns.len();
    let (groups, merged, cells) = answers.table(&rows, columns.len());
    let machines = machines.iter().zip(groups);
    let machines =
        machines.map(|(machine, group)| MatrixMachine { name: machine.name.clone(), group }).collect();
    let hosts = columns.into_iter().zip(merged).map(|(name, group)| MatrixHost { name, group }).collect();
    Ok(Matrix { machines, hosts, cells, comparisons, ..Matrix::default() })
}
