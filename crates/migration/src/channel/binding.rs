//! What binds a further connection to the session that it speaks of.
//!
//! A certificate says who a peer is, and not of which session. Both ends of a session's TLS connection can derive a secret from it that
//! nobody else has (exporters, RFC 8446 section 7.5), and likewise one from each further connection. The first, applied to the second, is a proof
//! that is good on that connection alone: it can be neither made by a host that was not in the session, nor carried over from elsewhere.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use vfio_migration_types::AttemptId;
use zeroize::Zeroizing;

use crate::channel::link::Link;

/// Labels of the two exporters. `EXPERIMENTAL` is what RFC 5705 has for those that nobody registers.
const SESSION: &[u8] = b"EXPERIMENTAL-vfio-migrate-session";
const CONNECTION: &[u8] = b"EXPERIMENTAL-vfio-migrate-connection";
/// The proof of a connection that has none.
pub(crate) const NO_PROOF: [u8; 32] = [0; 32];

/// The secret that the two ends of a session share.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct SessionKey(Zeroizing<[u8; 32]>);

impl SessionKey {
    /// The secret of the session over `link`; `None` where no TLS of ours is under it.
    pub(crate) fn of(link: &Link, attempt: AttemptId) -> Option<Self> {
        link.export(SESSION, &attempt.0).map(Zeroizing::new).map(Self)
    }

    /// What says on `link` that we were in the session.
    pub(crate) fn proof(&self, link: &Link) -> Option<[u8; 32]> {
        let connection = link.export(CONNECTION, &[])?;
        Some(*blake3::keyed_hash(&self.0, &connection).as_bytes())
    }

    /// Whether `said`, on `link`, proves that the peer was in the session.
    pub(crate) fn is_proved(&self, link: &Link, said: [u8; 32]) -> bool {
        // Hashes are compared in constant time, arrays are not.
        self.proof(link)
            .is_some_and(|proof| blake3::Hash::from_bytes(proof) == blake3::Hash::from_bytes(said))
    }
}

impl fmt::Debug for SessionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionKey(..)")
    }
}

impl Serialize for SessionKey {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&blake3::Hash::from_bytes(*self.0).to_hex())
    }
}

impl<'de> Deserialize<'de> for SessionKey {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = Zeroizing::new(String::deserialize(from)?);
        let hash = blake3::Hash::from_hex(text.as_bytes()).map_err(serde::de::Error::custom)?;
        Ok(Self(Zeroizing::new(*hash.as_bytes())))
    }
}
