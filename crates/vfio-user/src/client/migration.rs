//! Requests about migration: state, data, DMA logging, and what the extension adds.

use super::connection::Client;
use super::device::size_u32;
use crate::codec::{
    self, Command, Feature, FeatureHead, FeatureOp, LoggingControl, LoggingReport, MigDataHead,
    MigStatePayload, PrecopyPayload,
};
use crate::error::ClientError;
use crate::migration_state::{MigrationFlags, MigrationState};
use crate::model::{IovaRange, PrecopyInfo};

/// The largest manifest that is taken from a server, in bytes.
pub(crate) const MAX_MANIFEST: usize = 1 << 20;

impl Client {
    /// Whether the device supports `op` on `feature`.
    ///
    /// # Errors
    /// The connection failed, or the server lost step, see [`migration_flags`](Self::migration_flags).
    pub fn probe_feature(&self, feature: Feature, op: FeatureOp) -> Result<bool, ClientError> {
        match self.feature(feature, op.bits() | codec::FEATURE_PROBE, &[], 0) {
            Ok(_) => Ok(true),
            Err(ClientError::Refused { errno: Some(_), .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// What migration the device supports; `None` when it has none. P2P is set only where the extension is in force.
    ///
    /// # Errors
    /// [`ClientError::ConnectionLost`] when the server drops the connection on being asked, or refuses without an errno:
    /// servers that know no migration do that and lose step. [`Client::connect`] has found that out, connected anew, and this
    /// is `None` then; with [`Client::from_stream`] it is not known before it happens.
    pub fn migration_flags(&self) -> Result<Option<MigrationFlags>, ClientError> {
        let reply = match self.feature(Feature::MIGRATION, codec::FEATURE_GET, &[], 8) {
            Ok(reply) => reply,
            Err(ClientError::Refused { errno: Some(_), .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let bits = self.parse(&reply, |body| codec::decode_u64(codec::after_feature_head(body)?))?;
        let Some(flags) = MigrationFlags::from_bits(bits) else {
            return Err(self.lie(&reply, format!("migration flags {bits:#x} without STOP_COPY")));
        };
        Ok(Some(MigrationFlags { p2p: flags.p2p && self.negotiated.extension.p2p, ..flags }))
    }

    /// The state that the device is in.
    pub fn mig_state(&self) -> Result<MigrationState, ClientError> {
        let reply =
            self.feature(Feature::MIG_DEVICE_STATE, codec::FEATURE_GET, &[], MigStatePayload::SIZE)?;
        let state = self
            .parse(&reply, |body| MigStatePayload::decode_prefix(codec::after_feature_head(body)?))?
            .device_state;
        MigrationState::try_from(state).map_err(|unknown| self.lie(&reply, unknown.to_string()))
    }

    /// Moves the device to `to` and returns when it is there.
    ///
    /// # Errors
    /// After a refusal the device may be anywhere on the way: ask with [`mig_state`](Self::mig_state). The peer-to-peer
    /// states need the extension ([`ClientError::NotNegotiated`]).
    pub fn set_mig_state(&self, to: MigrationState) -> Result<(), ClientError> {
        let p2p = matches!(to, MigrationState::RunningP2p | MigrationState::PreCopyP2p);
        if p2p && !self.negotiated.extension.p2p {
            return Err(ClientError::NotNegotiated("the peer-to-peer states"));
        }
        let ask = MigStatePayload { device_state: to as u32, data_fd: u32::MAX };
        let op = codec::FEATURE_SET;
        let reply = self.feature(Feature::MIG_DEVICE_STATE, op, &ask.to_vec(), MigStatePayload::SIZE)?;
        // The echo is no proof of the state, but an echo of another request is proof of a muddle.
        let echo =
            self.parse(&reply, |body| MigStatePayload::decode_prefix(codec::after_feature_head(body)?))?;
        if echo.device_state != to as u32 {
            return Err(self.lie(&reply, format!("state {} after SET {to}", echo.device_state)));
        }
        Ok(())
    }

    /// Reads migration data into the front of `into`, by one message of at most the negotiated size, and returns how
    /// much came. 0: there is no more (in PRE_COPY: for now). Less than asked for is no proof of the end.
    pub fn mig_data_read(&self, into: &mut [u8]) -> Result<usize, ClientError> {
        let want = into.len().min(self.piece());
        let size = size_u32(want);
        let ask = MigDataHead { argsz: size_u32(MigDataHead::SIZE + want), size };
        let reply = self.request(Command::MIG_DATA_READ, &ask.to_vec(), &[], MigDataHead::SIZE + want)?;
        // libvfio-user pads the message to the size that was asked for: only `size` tells the truth.
        let (head, data) = self.parse(&reply, MigDataHead::decode_with_rest)?;
        let got = usize::try_from(head.size).unwrap_or(usize::MAX);
        if got > want {
            return Err(
                self.lie(&reply, format!("{got} bytes of migration data where {want} were asked for"))
            );
        }
        let Some(data) = data.get(..got) else {
            return Err(self
                .lie(&reply, format!("{} bytes of migration data where {got} were announced", data.len())));
        };
        // `got` is at most `want`, which is at most the buffer.
        into.get_mut(..got).unwrap_or_default().copy_from_slice(data);
        self.conn.recycle(reply);
        Ok(got)
    }

    /// Writes all of `from` as migration data, in pieces of at most the negotiated size, and of at most 32 KiB to a server
    /// that does not speak the extension.
    pub fn mig_data_write(&self, from: &[u8]) -> Result<(), ClientError> {
        for piece in from.chunks(self.piece_behind(MigDataHead::SIZE)) {
            // Servers disagree on what argsz means here; the request's own length satisfies all.
            let argsz = size_u32(MigDataHead::SIZE + piece.len());
            let head = MigDataHead { argsz, size: size_u32(piece.len()) };
            // Replies have no payload; a server that echoes the head does no harm.
            self.request_parts(Command::MIG_DATA_WRITE, &[&head.to_vec(), piece], &[], MigDataHead::SIZE)?;
        }
        Ok(())
    }

    /// Starts logging the device's DMA writes to `ranges` (everything, when empty) in pages of about `page_size`
    /// bytes; returns the page size that the device chose. Where one request does not hold so many ranges (2045, to a server
    /// that does not speak the extension), everything is logged.
    pub fn dma_logging_start(&self, page_size: u64, ranges: &[IovaRange]) -> Result<u64, ClientError> {
        self.fit("DMA logging ranges", ranges.len(), codec::MAX_LOGGING_RANGES)?;
        let head = FeatureHead::SIZE + LoggingControl::SIZE;
        let most = self.longest_payload().saturating_sub(head) / codec::LOGGING_RANGE_SIZE;
        let ranges = if ranges.len() > most { &[] } else { ranges };
        let num_ranges = size_u32(ranges.len());
        let mut data = LoggingControl { page_size, num_ranges, reserved: 0 }.to_vec();
        codec::encode_ranges(ranges, &mut data);
        let reply = self.feature(Feature::DMA_LOGGING_START, codec::FEATURE_SET, &data, data.len())?;
        // The reply repeats the request; one that repeats only its head changed nothing.
        let body = reply.body.get(FeatureHead::SIZE..).unwrap_or_default();
        let chosen =
            if body.is_empty() { page_size } else { self.parse(&reply, |_| codec::decode_u64(body))? };
        if !chosen.is_power_of_two() {
            return Err(self.lie(&reply, format!("a DMA log with pages of {chosen} bytes")));
        }
        Ok(chosen)
    }

    /// Stops the log of the device's DMA writes.
    pub fn dma_logging_stop(&self) -> Result<(), ClientError> {
        self.feature(Feature::DMA_LOGGING_STOP, codec::FEATURE_SET, &[], 0).map(drop)
    }

    /// ORs into `bitmap` which pages of `page_size` bytes of `range` the device wrote since the last report: bit
    /// `n % 64` of word `n / 64` is the `n`-th page from `range.iova`. The server forgets them.
    ///
    /// libvfio-user wants `range` to be a prefix of one DMA mapping that has a descriptor: report per mapping.
    ///
    /// # Errors
    /// [`ClientError::Limit`] if `bitmap` is too short for the range. After any other error the log is not to be believed any more.
    pub fn dma_logging_report(
        &self,
        range: IovaRange,
        page_size: u64,
        bitmap: &mut [u64],
    ) -> Result<(), ClientError> {
        let pages = codec::pages(range.len, page_size).ok_or(ClientError::Limit {
            what: "the page size of a report (a power of two is wanted)",
            value: page_size,
            limit: 1 << 63,
        })?;
        let words = pages.div_ceil(64);
        let words =
            self.fit("the bitmap of a report, in words", words, bitmap.len().min(codec::MAX_BITMAP_WORDS))?;
        let words = usize::try_from(words).unwrap_or(usize::MAX);
        let ask = LoggingReport { iova: range.iova, length: range.len, page_size };
        let room = LoggingReport::SIZE + words * 8;
        let reply = self.feature(Feature::DMA_LOGGING_REPORT, codec::FEATURE_GET, &ask.to_vec(), room)?;
        let (echo, bits) =
            self.parse(&reply, |body| LoggingReport::decode_with_rest(codec::after_feature_head(body)?))?;
        if echo != ask || bits.len() != words * 8 {
            return Err(self.lie(&reply, format!("a bitmap of {} bytes for {pages} pages", bits.len())));
        }
        codec::or_bitmap(bits, pages, bitmap);
        self.conn.recycle(reply);
        Ok(())
    }

    /// Pre-copy estimates. Needs the extension's `precopy_info`; legal in PRE_COPY and PRE_COPY_P2P.
    pub fn precopy_info(&self) -> Result<PrecopyInfo, ClientError> {
        if !self.negotiated.extension.precopy_info {
            return Err(ClientError::NotNegotiated("pre-copy progress"));
        }
        let ask = PrecopyPayload { argsz: size_u32(PrecopyPayload::SIZE), ..PrecopyPayload::default() };
        let reply = self.request(Command::X_PRECOPY_INFO, &ask.to_vec(), &[], PrecopyPayload::SIZE)?;
        let info = self.parse(&reply, PrecopyPayload::decode_prefix)?;
        Ok(PrecopyInfo {
            initial_bytes: info.initial_bytes,
            dirty_bytes: info.dirty_bytes,
            reinit: info.flags & codec::PRECOPY_REINIT != 0,
        })
    }

    /// Estimated bytes of STOP_COPY data, in any state: a hint. Needs the extension's `data_size`.
    pub fn mig_data_size(&self) -> Result<u64, ClientError> {
        if !self.negotiated.extension.data_size {
            return Err(ClientError::NotNegotiated("the size estimate"));
        }
        let reply = self.feature(Feature::MIG_DATA_SIZE, codec::FEATURE_GET, &[], 8)?;
        self.parse(&reply, |body| codec::decode_u64(codec::after_feature_head(body)?))
    }

    /// What the device says of itself: JSON text, unchecked beyond its size (at most 1 MiB). Needs the extension's `manifest`.
    pub fn device_manifest(&self) -> Result<Vec<u8>, ClientError> {
        if !self.negotiated.extension.manifest {
            return Err(ClientError::NotNegotiated("the device's manifest"));
        }
        Ok(self.request(Command::X_MANIFEST, &[], &[], MAX_MANIFEST)?.body)
    }
}
