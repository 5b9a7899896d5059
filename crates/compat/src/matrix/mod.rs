//! What of a pool can go where: devices to hosts, machines to hosts or to each other.

mod devices;
mod machines;
mod table;
mod work;

pub use devices::matrix;
pub use machines::{PoolMachine, machine_matrix};
pub use table::{Cell, Matrix, MatrixDevice, MatrixHost, MatrixMachine};
pub use work::MatrixError;
