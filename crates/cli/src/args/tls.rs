//! The command line of `tls`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use vfio_migration::Pin;

/// Options of `tls`.
#[derive(Args, Clone, Debug)]
#[command(
    disable_help_subcommand = true,
    after_help = "A CA is made once, on a host that is well kept; `tls host` there makes what a host needs, to be copied to it and to no other. docs/security.md \
shows it from nothing to two hosts that trust each other. What a CA has issued is noted in its folder `issued`, for `tls revoke`.\nExit codes: 0 done, 1 failed, or what is shown cannot be used, 2 usage."
)]
pub(crate) struct TlsCommand {
    #[command(subcommand)]
    pub(crate) what: TlsVerb,
}

/// What to do with certificates.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum TlsVerb {
    /// Make a private CA: ca-cert.pem, and ca-key.pem, which is not to leave its host.
    Init {
        /// The folder. It is made if it is not there.
        #[arg(value_name = "DIR")]
        dir: PathBuf,
        /// Days for which the CA's certificate is valid.
        #[arg(long, default_value_t = 3650, value_parser = clap::value_parser!(u32).range(1..=36500), value_name = "N")]
        days: u32,
        /// Print what was made as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Make the certificates and keys of a host, by a CA that `tls init` made.
    Host {
        /// The host's name, or IP address, as sources connect to it.
        #[arg(value_name = "NAME")]
        name: String,
        /// Folder of the CA.
        #[arg(long, default_value = ".", value_name = "DIR")]
        ca: PathBuf,
        /// Folder to write into: it is what --tls-creds takes. Without it: NAME.
        #[arg(short, long, value_name = "DIR")]
        output: Option<PathBuf>,
        /// A further name or address of the host. May be given more than once.
        #[arg(long = "also", value_name = "NAME")]
        also: Vec<String>,
        /// Days for which the certificates are valid, if their CA is.
        #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=3650), value_name = "N")]
        days: u32,
        /// Replace the files that are there: a `vm` that waits takes the new ones for its next connection.
        #[arg(long)]
        force: bool,
        /// Print what was made as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Take the certificates of a host back: no host that has the ca-crl.pem that this writes beside its ca-cert.pem takes them any more.
    ///
    /// Without a host and a certificate it renews the list as it is.
    Revoke {
        /// The host, as it was named to `tls host`: all certificates that the CA has made for it.
        #[arg(value_name = "NAME")]
        host: Option<String>,
        /// A file of certificates of this CA. May be given more than once.
        #[arg(long = "cert", value_name = "FILE")]
        certificates: Vec<PathBuf>,
        /// Folder of the CA. What was revoked before stays so.
        #[arg(long, default_value = ".", value_name = "DIR")]
        ca: PathBuf,
        /// Days after which the list counts no more, and with it no certificate of the CA where it lies: renew it before.
        #[arg(long, default_value_t = 3650, value_parser = clap::value_parser!(u32).range(1..=36500), value_name = "N")]
        days: u32,
        /// Print what was made as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Say what certificates a folder has, for whom, until when, and whether they can be used.
    Show {
        /// The folder, as --tls-creds takes it.
        #[arg(value_name = "DIR")]
        dir: PathBuf,
        /// A key that peers are trusted by, as at `vm`: with one, no CA is needed. May be given more than once.
        #[arg(long = "tls-pin", value_name = "PIN")]
        tls_pins: Vec<Pin>,
        /// Print it as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print the pins of a folder's keys, for --tls-pin at the other host.
    Pin {
        /// The folder, as --tls-creds takes it.
        #[arg(value_name = "DIR")]
        dir: PathBuf,
        /// Print them as JSON.
        #[arg(long)]
        json: bool,
    },
}

impl TlsCommand {
    /// Whether a program reads the answer.
    pub(crate) fn json(&self) -> bool {
        match &self.what {
            TlsVerb::Init { json, .. }
            | TlsVerb::Host { json, .. }
            | TlsVerb::Revoke { json, .. }
            | TlsVerb::Show { json, .. }
            | TlsVerb::Pin { json, .. } => *json,
        }
    }
}
