//! Protocol versions and features, and how the two sides agree on them.

use crate::message::VersionRange;

/// The version of the protocol that this crate speaks.
pub const PROTOCOL_VERSION: u16 = 1;

/// Versions that this crate can speak, to be offered or selected from.
pub const VERSIONS: VersionRange = VersionRange { min: PROTOCOL_VERSION, max: PROTOCOL_VERSION };

/// Feature: digests of all RAM are compared before COMMIT ([`FinalEnd::ram_digest`](crate::FinalEnd::ram_digest)).
pub const FEATURE_VERIFY: u64 = 1 << 0;

/// Feature: pages of a running guest carry a CRC too, at the price of a copy on the sending side.
pub const FEATURE_RAM_CRC: u64 = 1 << 1;

/// Feature: nothing moves. All is done up to a point, and undone ([`Message::EndRehearsal`](crate::Message::EndRehearsal)); there is
/// no COMMIT, and no journal is written.
pub const FEATURE_REHEARSE: u64 = 1 << 2;

/// Feature, beside [`FEATURE_REHEARSE`]: the source only asks. It wants ACCEPT or REFUSE, says no BEGIN, and may name no VM.
pub const FEATURE_ASK: u64 = 1 << 3;

/// Every feature that this version knows. The destination selects `offered & FEATURES`, or less.
pub const FEATURES: u64 = FEATURE_VERIFY | FEATURE_RAM_CRC | FEATURE_REHEARSE | FEATURE_ASK;

/// The newest version both sides speak, or `None` when they have none in common (also when a range is inside out).
pub fn negotiate(offered: VersionRange, ours: VersionRange) -> Option<u16> {
    let newest = offered.max.min(ours.max);
    (newest >= offered.min && newest >= ours.min).then_some(newest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_common_version_is_taken() {
        let range = |min, max| VersionRange { min, max };
        for (offered, ours, want) in [
            (range(1, 1), range(1, 1), Some(1)),
            (range(1, 4), range(2, 3), Some(3)),
            (range(2, 3), range(1, 4), Some(3)),
            (range(1, 2), range(2, 5), Some(2)),
            (range(1, 1), range(2, 2), None),
            (range(3, 4), range(1, 2), None),
            (range(4, 3), range(1, 9), None),
            (range(1, 9), range(4, 3), None),
        ] {
            assert_eq!(negotiate(offered, ours), want, "{offered:?} {ours:?}");
        }
    }
}
