//! QEMU's own vfio-user client, `vfio-user-pci`, at the command's sample device: no guest runs, the test is the guest, by
//! qtest. `cargo xtask test qemu-peer` fetches QEMU and says where it is; without that these tests do nothing, loudly.

mod drives;
mod function;
mod machine;
