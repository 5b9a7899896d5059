//! Why a peer's certificate is refused by a rule of ours, and by none of the TLS library's.

/// The rule that it breaks.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OwnRefusal {
    #[error("no certificate of a peer can be judged, since ca-cert.pem holds no CA that can be used: {0}")]
    NoAuthority(String),
    #[error("the peer's certificate is of a CA that is not taken any more: ca-cert.pem: {0}")]
    EndedAuthority(String),
    /// What is wrong with it, as the sentence goes on.
    #[error("the peer's certificate {0}")]
    Certificate(String),
    /// What is wrong with a CA on its way to one that is trusted.
    #[error("the peer's certificate is issued by way of {0}")]
    Between(String),
    #[error("the peer's key {0} is not among those that are pinned")]
    NotPinned(String),
}
