//! The check of `argsz`, the first field of every request that says how much room its client has.

use rustix::io::Errno;

use crate::codec::{
    Command, DmaMapPayload, DmaUnmapPayload, Feature, FeatureHead, InfoPayload, IoFdsPayload, IrqSetPayload,
    LoggingControl, LoggingReport, MigDataHead, MigStatePayload, PrecopyPayload, RegionInfoPayload, split,
};

/// Refuses a request whose `argsz` is below its fixed part, as the kernel does before it looks at anything else. Where
/// data is part of the request (SET_IRQS, DEVICE_FEATURE, whose replies may repeat it), that counts too.
pub(super) fn check_request(command: Command, body: &[u8]) -> Result<(), Errno> {
    let need = match command {
        Command::DMA_MAP => DmaMapPayload::SIZE,
        Command::DMA_UNMAP => DmaUnmapPayload::SIZE,
        Command::DEVICE_GET_INFO | Command::DEVICE_GET_IRQ_INFO => InfoPayload::SIZE,
        Command::DEVICE_GET_REGION_INFO => RegionInfoPayload::SIZE,
        Command::DEVICE_GET_REGION_IO_FDS => IoFdsPayload::SIZE,
        Command::DEVICE_SET_IRQS => IrqSetPayload::SIZE.max(body.len()),
        Command::DEVICE_FEATURE => FeatureHead::SIZE.max(body.len()),
        Command::MIG_DATA_READ => {
            let head = MigDataHead::decode_prefix(body).map_err(|_| Errno::INVAL)?;
            MigDataHead::SIZE.saturating_add(usize::try_from(head.size).unwrap_or(usize::MAX))
        }
        Command::X_PRECOPY_INFO => PrecopyPayload::SIZE,
        // MIG_DATA_WRITE has one too, of which specification and implementations say different things.
        _ => return Ok(()),
    };
    let (argsz, _) = split::<4>(body).map_err(|_| Errno::INVAL)?;
    fits(need, u32::from_ne_bytes(*argsz))
}

/// Refuses a GET or SET of `feature` whose `argsz` has no room for it: what the kernel's `vfio_check_feature` does once it
/// knows that the feature has the operation, and that this is no PROBE.
pub(super) fn check_feature(feature: Feature, argsz: u32) -> Result<(), Errno> {
    let payload = match feature {
        Feature::MIGRATION | Feature::MIG_DATA_SIZE => size_of::<u64>(),
        Feature::MIG_DEVICE_STATE => MigStatePayload::SIZE,
        Feature::DMA_LOGGING_START => LoggingControl::SIZE,
        // And room for the bitmap, whose length only the request's numbers tell.
        Feature::DMA_LOGGING_REPORT => LoggingReport::SIZE,
        _ => 0,
    };
    fits(FeatureHead::SIZE.saturating_add(payload), argsz)
}

/// Whether `need` bytes fit the room that the client has.
pub(super) fn fits(need: usize, argsz: u32) -> Result<(), Errno> {
    if usize::try_from(argsz).is_ok_and(|room| room < need) { Err(Errno::INVAL) } else { Ok(()) }
}
