//! The ways in which a socket ends, or a wait on it.

/// The reason for which a socket is of no more use, or a wait ended.
#[derive(Debug)]
pub(crate) enum ConnError {
    /// The deadline passed.
    Timeout,
    /// The interrupt descriptor became readable.
    Interrupted,
    /// The stream ended, or the system refused.
    Closed(String),
    /// The peer sent what cannot be followed.
    Violation(String),
}

impl ConnError {
    pub(crate) fn closed(why: impl Into<String>) -> Self {
        Self::Closed(why.into())
    }

    /// The failure in words.
    pub(crate) fn why(&self) -> String {
        match self {
            Self::Timeout => "a time limit passed".into(),
            Self::Interrupted => "it was stopped".into(),
            Self::Closed(why) => why.clone(),
            Self::Violation(why) => format!("the peer broke the protocol: {why}"),
        }
    }
}
