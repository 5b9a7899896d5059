//! The client: a VMM's end of a vfio-user connection.

mod connection;
mod device;
mod dma;
mod handshake;
mod migration;
mod options;
mod question;
mod recovery;
mod request;

pub use self::connection::{Client, Negotiated};
pub use self::options::{ClientOptions, DmaHandler, OnConnect};
pub use self::question::QuestionLimit;
pub use self::recovery::Recovery;
