//! What fails in this VMM.

/// An error of this VMM.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A step failed, because of something.
    #[error("{0} failed")]
    Failed(&'static str, #[source] Box<dyn std::error::Error + Send + Sync>),
    /// A fact that stands in the way.
    #[error("{0}")]
    Text(&'static str),
}

impl Error {
    /// `doing` failed because of what follows.
    pub(crate) fn other<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
        doing: &'static str,
    ) -> impl Fn(E) -> Self {
        move |error| Self::Failed(doing, error.into())
    }
}

/// `doing` failed as errno says.
pub(crate) fn system(doing: &'static str) -> Error {
    Error::Failed(doing, std::io::Error::last_os_error().into())
}
