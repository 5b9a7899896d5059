//! Why the program cannot run.

/// The guest program cannot run in a machine as it is asked to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GuestImageError {
    /// More devices than it drives.
    #[error("{0} devices: a guest takes {max}", max = crate::map::DEVICES_MAX)]
    TooManyDevices(u64),
    /// RAM of so many regions.
    #[error("the guest program cannot use {0} RAM regions")]
    Regions(usize),
    /// RAM at other addresses.
    #[error("the guest program cannot use this layout of RAM")]
    Layout,
    /// RAM in which its own tables leave no page.
    #[error(
        "{} MiB of memory are too few for {devices} devices: the guest program keeps {} MiB for each below 4 GiB, and {} MiB besides",
        memory >> 20, crate::map::DEVICE_STRIDE >> 20, besides.div_ceil(1 << 20)
    )]
    TooLittleMemory {
        /// Bytes of RAM.
        memory: u64,
        /// Number of devices.
        devices: u64,
        /// Bytes that the program needs beside what it keeps for each device.
        besides: u64,
    },
    /// RAM that its page tables do not reach.
    #[error("the guest's page tables do not reach all of its RAM")]
    TooMuchMemory,
    /// The program does not fit into its place.
    #[error("the guest program has {0} bytes")]
    ProgramTooLong(usize),
    /// A number of the boot page.
    #[error("the guest program cannot run with {what} of {value}: it takes {takes}")]
    OutOfRange {
        /// What the number is.
        what: &'static str,
        /// The number.
        value: u64,
        /// What it may be.
        takes: &'static str,
    },
}
