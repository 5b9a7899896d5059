//! DEVICE_FEATURE, migration data, and the extension's commands.

use rustix::io::Errno;

use super::argsz::{check_feature, fits};
use super::commands::{bad, size_u32};
use super::session::{Logging, Reply, Session, to_usize};
use crate::codec::{
    self, FEATURE_GET, FEATURE_INDEX, FEATURE_PROBE, FEATURE_SET, Feature, FeatureHead, LoggingControl,
    LoggingReport, MAX_BITMAP_WORDS, MigDataHead, MigStatePayload, PrecopyPayload,
};
use crate::migration_state::{MigrationFlags, MigrationState};
use crate::model::IovaRange;

type Answer = Result<Reply, Errno>;

/// The largest manifest that is sent.
const MAX_MANIFEST: usize = 1 << 20;

impl Session<'_> {
    /// The kernel's order of checks (`vfio_ioctl_device_feature`, `vfio_check_feature`): argsz of the head (before this is
    /// called), flags, support, operation, argsz of the feature, payload.
    pub(super) fn feature(&mut self, body: &[u8]) -> Answer {
        let (head, data) = FeatureHead::decode_with_rest(body).map_err(bad)?;
        let op = head.flags & !FEATURE_INDEX;
        let number = u16::try_from(head.flags & FEATURE_INDEX).map_err(|_| Errno::INVAL)?;
        let (get, set, probe) = (op & FEATURE_GET != 0, op & FEATURE_SET != 0, op & FEATURE_PROBE != 0);
        if op & !(FEATURE_GET | FEATURE_SET | FEATURE_PROBE) != 0 || (get && set && !probe) {
            return Err(Errno::INVAL);
        }
        let feature = Feature(number);
        let (may_get, may_set) = self.supported(feature)?;
        if (get && !may_get) || (set && !may_set) {
            return Err(Errno::INVAL);
        }
        if probe {
            return Ok(body.to_vec().into());
        }
        if !get && !set {
            return Err(Errno::INVAL);
        }
        check_feature(feature, head.argsz)?;
        match feature {
            Feature::MIGRATION => {
                let flags = self.flags()?.bits();
                self.got(&head, &flags.to_ne_bytes())
            }
            Feature::MIG_DEVICE_STATE if get => {
                let state = self.shown(self.backend.mig_state()?);
                let state = MigStatePayload { device_state: state as u32, data_fd: u32::MAX };
                self.got(&head, &state.to_vec())
            }
            Feature::MIG_DEVICE_STATE => {
                self.set_state(data)?;
                Ok(body.to_vec().into())
            }
            Feature::DMA_LOGGING_START => self.logging_start(&head, data),
            Feature::DMA_LOGGING_STOP => {
                // Stopping what was not started succeeds, as with every driver in the kernel.
                if self.logging.is_some() {
                    self.backend.dma_logging_stop()?;
                    self.logging = None;
                }
                Ok(body.to_vec().into())
            }
            Feature::DMA_LOGGING_REPORT => self.logging_report(&head, data),
            Feature::MIG_DATA_SIZE => {
                let size = self.backend.mig_data_size()?;
                self.got(&head, &size.to_ne_bytes())
            }
            _ => Err(Errno::NOTTY),
        }
    }

    pub(super) fn mig_data_read(&mut self, body: &[u8]) -> Answer {
        let ask = MigDataHead::decode_prefix(body).map_err(bad)?;
        let size = to_usize(ask.size);
        let room = MigDataHead::SIZE.saturating_add(size);
        if size > self.terms.max_mig_data {
            return Err(Errno::INVAL);
        }
        if !self.backend.mig_state()?.is_saving() {
            return Err(Errno::INVAL);
        }
        let mut out = self.take_scratch();
        out.resize(room, 0);
        let got = self.backend.mig_data_read(out.get_mut(MigDataHead::SIZE..).unwrap_or_default())?;
        if got > size {
            // A device that claims more than it was given room for has nothing to be believed.
            return Err(Errno::IO);
        }
        // Exactly what there is: no padding.
        out.truncate(MigDataHead::SIZE + got);
        let head = MigDataHead { argsz: size_u32(MigDataHead::SIZE + got), size: size_u32(got) };
        out.get_mut(..MigDataHead::SIZE).unwrap_or_default().copy_from_slice(&head.to_vec());
        Ok(out.into())
    }

    pub(super) fn mig_data_write(&self, body: &[u8]) -> Answer {
        let (head, data) = MigDataHead::decode_with_rest(body).map_err(bad)?;
        if to_usize(head.size) != data.len() || data.len() > self.terms.max_mig_data {
            return Err(Errno::INVAL);
        }
        if self.backend.mig_state()? != MigrationState::Resuming {
            return Err(Errno::INVAL);
        }
        if !data.is_empty() {
            self.backend.mig_data_write(data)?;
        }
        Ok(Reply::default())
    }

    pub(super) fn precopy_info(&self, body: &[u8]) -> Answer {
        PrecopyPayload::decode_prefix(body).map_err(bad)?;
        if !matches!(self.backend.mig_state()?, MigrationState::PreCopy | MigrationState::PreCopyP2p) {
            return Err(Errno::INVAL);
        }
        let info = self.backend.precopy_info()?;
        let reply = PrecopyPayload {
            argsz: size_u32(PrecopyPayload::SIZE),
            flags: if info.reinit { codec::PRECOPY_REINIT } else { 0 },
            initial_bytes: info.initial_bytes,
            dirty_bytes: info.dirty_bytes,
        };
        Ok(reply.to_vec().into())
    }

    pub(super) fn manifest(&self, body: &[u8]) -> Answer {
        if !body.is_empty() {
            return Err(Errno::INVAL);
        }
        let manifest = self.backend.manifest()?;
        if manifest.len() > MAX_MANIFEST { Err(Errno::OVERFLOW) } else { Ok(manifest.into()) }
    }

    /// Whether a feature may be got and set here.
    ///
    /// # Errors
    /// The device does not have it.
    fn supported(&self, feature: Feature) -> Result<(bool, bool), Errno> {
        match feature {
            Feature::MIGRATION => self.backend.migration_flags().map(|_| (true, false)),
            Feature::MIG_DEVICE_STATE => self.backend.migration_flags().map(|_| (true, true)),
            Feature::DMA_LOGGING_START | Feature::DMA_LOGGING_STOP
                if self.backend.dma_logging_supported() =>
            {
                Ok((false, true))
            }
            Feature::DMA_LOGGING_REPORT if self.backend.dma_logging_supported() => Ok((true, false)),
            Feature::MIG_DATA_SIZE if self.terms.extension.data_size => {
                self.backend.migration_flags().map(|_| (true, false))
            }
            _ => Err(Errno::NOTTY),
        }
    }

    /// The device's flags, as far as the client may know them.
    fn flags(&self) -> Result<MigrationFlags, Errno> {
        let flags = self.backend.migration_flags()?;
        Ok(MigrationFlags { p2p: flags.p2p && self.terms.extension.p2p, ..flags })
    }

    /// The reply to a GET: the request's head and the data, whose length is added to `argsz`.
    #[expect(clippy::unused_self, reason = "reads as the other steps of a feature")]
    fn got(&self, head: &FeatureHead, data: &[u8]) -> Answer {
        let need = FeatureHead::SIZE + data.len();
        let mut out = FeatureHead { argsz: size_u32(need), flags: head.flags }.to_vec();
        out.extend_from_slice(data);
        Ok(out.into())
    }

    /// The state as the client may know it. The two peer-to-peer states exist for clients with the extension alone; to
    /// others they are the states that they belong to, from which they differ in what the device does to other devices.
    fn shown(&self, state: MigrationState) -> MigrationState {
        match state {
            MigrationState::RunningP2p if !self.terms.extension.p2p => MigrationState::Running,
            MigrationState::PreCopyP2p if !self.terms.extension.p2p => MigrationState::PreCopy,
            state => state,
        }
    }

    /// Walks to the state asked for, one arc at a time, and stays where an arc fails; where that is a state that does not
    /// exist for the client, it goes back to the last one on the way that does.
    fn set_state(&self, data: &[u8]) -> Result<(), Errno> {
        let ask = MigStatePayload::decode_prefix(data).map_err(bad)?;
        let to = MigrationState::try_from(ask.device_state).map_err(|_| Errno::INVAL)?;
        // A state that this client must not know of does not exist for it.
        if !self.flags()?.has_state(to) {
            return Err(Errno::INVAL);
        }
        let flags = self.backend.migration_flags()?;
        let from = self.backend.mig_state()?;
        let mut known = self.shown(from);
        for state in from.path_to(to, flags).map_err(|_| Errno::INVAL)? {
            let failed = match self.backend.set_mig_state(state) {
                Ok(()) => {
                    known = if self.shown(state) == state { state } else { known };
                    continue;
                }
                Err(failed) => failed,
            };
            let stays = self.backend.mig_state()?;
            if self.shown(stays) != stays {
                let back = stays.path_to(known, flags).unwrap_or_default();
                // One that does not go back either is in the state that is shown for it.
                let _ = back.into_iter().try_for_each(|state| self.backend.set_mig_state(state));
            }
            return Err(failed);
        }
        Ok(())
    }

    fn logging_start(&mut self, head: &FeatureHead, data: &[u8]) -> Answer {
        let (control, ranges) = LoggingControl::decode_with_rest(data).map_err(bad)?;
        let ranges = codec::decode_ranges(control.num_ranges, ranges).map_err(bad)?;
        let page = control.page_size;
        if !page.is_power_of_two() {
            return Err(Errno::INVAL);
        }
        if ranges.iter().any(|range| !range.iova.is_multiple_of(page) || !range.len.is_multiple_of(page)) {
            return Err(Errno::INVAL);
        }
        let chosen = match &self.logging {
            // The log goes on; only what it covers already can be asked for.
            Some(logging) if logging.covers(page, &ranges) => logging.chosen,
            Some(_) => return Err(Errno::INVAL),
            None => {
                let chosen = self.backend.dma_logging_start(page, &ranges)?;
                self.logging = Some(Logging { asked: page, chosen, ranges: ranges.clone() });
                chosen
            }
        };
        let mut out = head.to_vec();
        LoggingControl { page_size: chosen, ..control }.encode(&mut out);
        codec::encode_ranges(&ranges, &mut out);
        Ok(out.into())
    }

    fn logging_report(&mut self, head: &FeatureHead, data: &[u8]) -> Answer {
        let ask = LoggingReport::decode_prefix(data).map_err(bad)?;
        if self.logging.is_none() || ask.length == 0 || ask.page_size < 4096 {
            return Err(Errno::INVAL);
        }
        let pages = codec::pages(ask.length, ask.page_size).ok_or(Errno::INVAL)?;
        ask.iova.checked_add(ask.length - 1).ok_or(Errno::OVERFLOW)?;
        let words = usize::try_from(pages.div_ceil(64)).map_err(|_| Errno::INVAL)?;
        if words > MAX_BITMAP_WORDS {
            return Err(Errno::TOOBIG);
        }
        let need = FeatureHead::SIZE + LoggingReport::SIZE + words * 8;
        fits(need, head.argsz)?;
        let mut bitmap = vec![0u64; words];
        let range = IovaRange { iova: ask.iova, len: ask.length };
        self.backend.dma_logging_report(range, ask.page_size, &mut bitmap)?;
        // Bits outside the range are zero, whatever the device did.
        if let (Some(last), tail @ 1..) = (bitmap.last_mut(), pages % 64) {
            *last &= (1 << tail) - 1;
        }
        let mut out = self.take_scratch();
        FeatureHead { argsz: size_u32(need), flags: head.flags }.encode(&mut out);
        ask.encode(&mut out);
        bitmap.iter().for_each(|word| out.extend_from_slice(&word.to_ne_bytes()));
        Ok(out.into())
    }
}

impl Logging {
    /// Whether a START with this page size and these ranges asks for nothing new. No ranges means everything.
    fn covers(&self, page: u64, ranges: &[IovaRange]) -> bool {
        let same_page = page == self.asked || page == self.chosen;
        let inside = |range: &IovaRange| {
            self.ranges.iter().any(|whole| {
                let end = |range: &IovaRange| range.iova.saturating_add(range.len - 1);
                whole.iova <= range.iova && end(range) <= end(whole)
            })
        };
        same_page && (self.ranges.is_empty() || (!ranges.is_empty() && ranges.iter().all(inside)))
    }
}
