//! Whose processes may be at the other end of a unix socket: the options of what opens connections, or takes them.

use clap::Args;
use vfio_migration::AllowedUnixPeers;

use crate::accounts::{gid, uid};
use crate::exit::CliError;

/// Options of a process that opens connections, or takes them.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct PeerOptions {
    /// User, by name (qemu) or number (107), whose process may be at the other end of a migration's unix socket, as those of this process's own
    /// user and of root may. May be given more than once.
    #[arg(long = "allow-uid", value_name = "USER")]
    pub(crate) allow_uids: Vec<String>,
    /// Group, by name (kvm) or number (36), that a process has which may be at the other end of a migration's unix socket. May be given more
    /// than once.
    #[arg(long = "allow-gid", value_name = "GROUP")]
    pub(crate) allow_gids: Vec<String>,
}

impl PeerOptions {
    /// Who may be there beside this process's own user and root.
    pub(crate) fn allowed(&self) -> Result<AllowedUnixPeers, CliError> {
        let mut allowed = AllowedUnixPeers::default();
        for user in &self.allow_uids {
            allowed.uids.insert(uid("--allow-uid", user)?);
        }
        for group in &self.allow_gids {
            allowed.gids.insert(gid("--allow-gid", group)?);
        }
        Ok(allowed)
    }
}
