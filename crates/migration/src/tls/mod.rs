//! TLS 1.3 with certificates on both sides: who a peer is, and what is trusted.
//!
//! The bytes of a connection are [`channel::tls`](crate::channel)'s; here is what a connection is made with. Nothing secret is
//! ever part of an error, a log line or `Debug`.

pub(crate) mod asked;
pub(crate) mod authorities;
pub(crate) mod certificate;
pub(crate) mod chain;
pub(crate) mod config;
pub(crate) mod crl;
pub(crate) mod error;
pub(crate) mod examination;
pub(crate) mod files;
pub(crate) mod identity;
pub(crate) mod layout;
pub(crate) mod library_texts;
pub(crate) mod name_constraints;
pub(crate) mod own;
pub(crate) mod own_refusal;
pub(crate) mod remedy;
pub(crate) mod security;
pub(crate) mod server_configs;
pub(crate) mod signature;
pub(crate) mod stamps;
pub(crate) mod trust;
