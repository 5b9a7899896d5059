//! Whose signature a certificate or a revocation list has, by the same algorithms as the TLS library judges certificates.

use rustls::crypto::aws_lc_rs::default_provider;
use x509_parser::asn1_rs::{Any, FromDer};
use x509_parser::prelude::SubjectPublicKeyInfo;

/// What a signature is to a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Signed {
    /// It was made by this key.
    Yes,
    /// It was not.
    No,
    /// It is of a kind, or the key is, that is not judged here: MD5 and SHA-1 among them.
    Unknown,
}

/// Whether `key` has signed this certificate or list, in DER.
pub(crate) fn signed(document: &[u8], key: &SubjectPublicKeyInfo<'_>) -> Signed {
    let (Some(document), Some(key_kind)) = (Document::of(document), algorithm_of(key.raw)) else {
        return Signed::No;
    };
    let provider = default_provider();
    let kinds = provider.signature_verification_algorithms.all;
    let fitting = kinds.iter().filter(|kind| {
        kind.signature_alg_id().as_ref() == document.algorithm
            && kind.public_key_alg_id().as_ref() == key_kind
    });
    let mut known = Signed::Unknown;
    for kind in fitting {
        known = Signed::No;
        if kind.verify_signature(&key.subject_public_key.data, document.content, document.signature).is_ok() {
            return Signed::Yes;
        }
    }
    known
}

/// What both kinds of document are made of (RFC 5280, 4.1 and 5.1): the content, an algorithm, and a signature by it.
struct Document<'a> {
    /// With its header: what is signed.
    content: &'a [u8],
    algorithm: &'a [u8],
    signature: &'a [u8],
}

impl<'a> Document<'a> {
    fn of(der: &'a [u8]) -> Option<Self> {
        let (_, whole) = Any::from_der(der).ok()?;
        let (after, _) = Any::from_der(whole.data).ok()?;
        let content = whole.data.get(..whole.data.len().checked_sub(after.len())?)?;
        let (after, algorithm) = Any::from_der(after).ok()?;
        let (_, signature) = Any::from_der(after).ok()?;
        // A bit string begins with the number of bits that are left out at its end.
        let signature = signature.data.strip_prefix(&[0])?;
        Some(Self { content, algorithm: algorithm.data, signature })
    }
}

/// The algorithm of a public key (SubjectPublicKeyInfo in DER).
fn algorithm_of(spki: &[u8]) -> Option<&[u8]> {
    let (_, whole) = Any::from_der(spki).ok()?;
    Any::from_der(whole.data).ok().map(|(_, algorithm)| algorithm.data)
}
