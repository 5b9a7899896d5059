//! What a directory of certificates is worth, file by file, by the judgement that its connections are made with.

use std::path::PathBuf;
use std::time::SystemTime;

use vfio_migration_types::rfc3339;

use crate::tls::authorities::{Authorities, TrustedAuthority, trusted_authorities};
use crate::tls::certificate::subject;
use crate::tls::chain::Chain;
use crate::tls::config::{Security, TlsDirectory, own_identity};
use crate::tls::crl::{RevocationList, revocation_lists};
use crate::tls::error::TlsError;
use crate::tls::files::{ca_path, certificates};
use crate::tls::identity::{EXPIRES_SOON, PeerIdentity, system_time};
use crate::tls::layout::{CRL_FILE, TlsRole};
use crate::tls::remedy::TlsRemedy;

/// What can be used today, and is to be seen to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsWarning {
    /// The file that it is in.
    pub file: PathBuf,
    /// What is to be known of it, in a sentence.
    pub text: String,
    /// What is to be done.
    pub remedy: TlsRemedy,
}

/// What a directory of certificates is worth.
#[derive(Clone, Debug)]
pub struct TlsExamination {
    /// The CAs that are trusted; `None`: keys are pinned, and no CA is asked.
    pub authorities: Option<Result<Vec<TrustedAuthority>, TlsError>>,
    /// What they have taken back; `None`: no CA is asked, or there is none that could have.
    pub lists: Option<Result<Vec<RevocationList>, TlsError>>,
    /// Our own certificate for guests that arrive; `None`: there is none, and one for guests that leave.
    pub server: Option<Result<PeerIdentity, TlsError>>,
    /// The same for guests that leave.
    pub client: Option<Result<PeerIdentity, TlsError>>,
    /// What can be used, and is to be seen to.
    pub warnings: Vec<TlsWarning>,
}

impl TlsExamination {
    /// All that cannot be used, each told once.
    pub fn errors(&self) -> impl Iterator<Item = &TlsError> {
        fn of<T>(part: Option<&Result<T, TlsError>>) -> Option<&TlsError> {
            part.and_then(|part| part.as_ref().err())
        }
        let (authorities, lists) = (of(self.authorities.as_ref()), of(self.lists.as_ref()));
        [authorities, of(self.server.as_ref()), of(self.client.as_ref()), lists].into_iter().flatten()
    }
}

impl TlsDirectory {
    /// Judges all that is there, for connections of either role.
    pub fn examine(&self) -> TlsExamination {
        let pinned = !self.pins.is_empty();
        let authorities = (!pinned).then(|| trusted_authorities(&self.path));
        let usable = authorities.as_ref().is_some_and(Result::is_ok);
        let lists = usable.then(|| revocation_lists(&self.path));
        // What is wrong with the CAs, or with the list, is told once, of them.
        let judged = pinned || lists.as_ref().is_some_and(Result::is_ok);
        let own = |role| {
            let found = if judged { self.check(role) } else { own_identity(&self.path, role) };
            (!self.is_left_out(role)).then_some(found)
        };
        let mut warnings = self.warnings(TlsRole::Server);
        warnings.extend(self.warnings(TlsRole::Client));
        let mut told: Vec<TlsWarning> = Vec::new();
        for warning in warnings {
            if !told.contains(&warning) {
                told.push(warning);
            }
        }
        TlsExamination {
            authorities,
            lists,
            server: own(TlsRole::Server),
            client: own(TlsRole::Client),
            warnings: told,
        }
    }

    /// Whether a host has nothing for this role, and something for the other: it only sends, or only receives.
    fn is_left_out(&self, role: TlsRole) -> bool {
        let has = |name: String| self.path.join(name).symlink_metadata().is_ok();
        let other = match role {
            TlsRole::Server => TlsRole::Client,
            TlsRole::Client => TlsRole::Server,
        };
        !has(role.certificate_file()) && !has(role.key_file()) && has(other.certificate_file())
    }

    /// What connections of this role can use, and is to be seen to: what ends within [`EXPIRES_SOON`], and CAs that are left out.
    pub fn warnings(&self, role: TlsRole) -> Vec<TlsWarning> {
        let file = self.path.join(role.certificate_file());
        let warning = |file: &PathBuf, text, remedy| TlsWarning { file: file.clone(), text, remedy };
        let mut found = Vec::new();
        if let Ok(own) = own_identity(&self.path, role)
            && own.expires_soon()
        {
            let text = format!("the certificate expires at {}: make a new one", rfc3339(own.not_after));
            found.push(warning(&file, text, TlsRemedy::NewCertificates));
        }
        if !self.pins.is_empty() {
            return found;
        }
        let Ok(authorities) = Authorities::of(&self.path) else { return found };
        let now = SystemTime::now();
        let soon = |end: SystemTime| (now..now + EXPIRES_SOON).contains(&end);
        if let Ok(own) = certificates(&file)
            && let Some((leaf, intermediates)) = own.split_first()
        {
            for ca in (Chain { leaf, intermediates, authorities: &authorities }).between(now) {
                let end = system_time(ca.validity().not_after);
                if soon(end) {
                    let text = format!(
                        "the CA {} between the host and a trusted one ends at {}: get its certificate anew, and put it behind the host's",
                        subject(&ca),
                        rfc3339(end)
                    );
                    found.push(warning(&file, text, TlsRemedy::NewChain));
                }
            }
        }
        let file = ca_path(&self.path);
        for ca in authorities.all() {
            let until = rfc3339(ca.identity.not_after);
            match ca.problem(now) {
                Some(why) => {
                    found.push(warning(
                        &file,
                        format!("a CA is left out: {why}"),
                        TlsRemedy::RemoveAuthority,
                    ));
                }
                None if ca.identity.expires_soon() => found.push(warning(
                    &file,
                    format!(
                        "the CA {} ends at {until}, and nobody of it is taken from then on: make a new one",
                        ca.name()
                    ),
                    TlsRemedy::NewAuthority,
                )),
                None => {}
            }
        }
        for list in revocation_lists(&self.path).iter().flatten().filter(|list| list.expires_soon()) {
            let text = format!("the revocation list expires at {}: get a new one", rfc3339(list.next_update));
            found.push(warning(&self.path.join(CRL_FILE), text, TlsRemedy::NewList));
        }
        found
    }
}

impl Security {
    /// Says what connections of this role can use, and is to be seen to.
    pub(crate) fn warn_of_expiry(&self, role: TlsRole) {
        if let Self::Directory(directory) = self {
            for TlsWarning { file, text, .. } in directory.warnings(role) {
                tracing::warn!(file = %file.display(), "{text}");
            }
        }
    }
}
