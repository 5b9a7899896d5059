//! Certificates for tests: a CA, and hosts that it vouches for, in directories as hosts have them.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::SystemTime;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyIdMethod, KeyPair, RevokedCertParams, SerialNumber, date_time_ymd,
};
use tempfile::TempDir;
use vfio_migration::{CA_FILE, TlsRole, issued_certificates};

/// Where hosts of tests are reached.
pub const HOST: &str = "127.0.0.1";

/// The folder of a host at [`HOST`] that sends and receives, and trusts those who have the same. It stays for this user's other
/// programs of tests. Not in the tree, which may be another user's: certificates in it are refused then.
pub fn own_host() -> &'static Path {
    static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
        let parent = std::env::temp_dir();
        let made = TempDir::new_in(&parent).unwrap();
        let user = made.path().metadata().unwrap().uid();
        let folder = parent.join(format!("vfio-migrate-tests-{user}-host-{HOST}"));
        if !folder.metadata().is_ok_and(|found| found.uid() == user) {
            Ca::new().equip(made.path(), &Host::named(HOST));
            // Unless another was there first.
            if std::fs::rename(made.path(), &folder).is_ok() {
                let _ = made.keep();
            }
        }
        folder
    });
    &FOLDER
}

/// A CA of our own.
pub struct Ca {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

/// What a host's certificates say. Begin with [`Host::named`].
pub struct Host {
    pub names: Vec<String>,
    /// First and last year of validity.
    pub years: (i32, i32),
    /// What the server's certificate may be used for, and the client's.
    pub purposes: (ExtendedKeyUsagePurpose, ExtendedKeyUsagePurpose),
    /// What else is changed of them.
    pub alter: fn(&mut CertificateParams),
}

impl Host {
    pub fn named(name: &str) -> Self {
        Self {
            names: vec![name.to_owned()],
            years: (2020, 2090),
            purposes: (ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth),
            alter: |_| {},
        }
    }
}

impl Ca {
    pub fn new() -> Self {
        Self::named("a CA for tests")
    }

    pub fn named(name: &str) -> Self {
        Self::altered(name, |_| {})
    }

    /// One whose certificate is another than a CA's should be.
    pub fn altered(name: &str, alter: impl FnOnce(&mut CertificateParams)) -> Self {
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        alter(&mut params);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// A CA that this one has issued: certificates of it need its own beside them ([`add_to`](Self::add_to)).
    pub fn below(&self, name: &str, alter: impl FnOnce(&mut CertificateParams)) -> Self {
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        alter(&mut params);
        let key = KeyPair::generate().unwrap();
        let pem = params.signed_by(&key, &self.issuer).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// Puts its certificate behind those of the host in `directory`.
    pub fn add_to(&self, directory: &Path) {
        for role in [TlsRole::Server, TlsRole::Client] {
            let file = directory.join(role.certificate_file());
            let text = std::fs::read_to_string(&file).unwrap();
            std::fs::write(file, text + &self.pem).unwrap();
        }
    }

    /// A directory with all that `host` needs, in which this CA is trusted.
    pub fn host(&self, host: &Host) -> TempDir {
        let directory = TempDir::new().unwrap();
        self.equip(directory.path(), host);
        directory
    }

    /// Writes all that `host` needs into a directory; this CA is trusted there.
    pub fn equip(&self, directory: &Path, host: &Host) {
        std::fs::write(directory.join(CA_FILE), &self.pem).unwrap();
        self.certify(directory, host);
    }

    /// A revocation list, good until `until`, with both certificates of each of these hosts.
    pub fn list(&self, revoked: &[&Path], until: SystemTime) -> String {
        let since_1970 = until.duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let roles = [TlsRole::Server, TlsRole::Client];
        let files = revoked.iter().flat_map(|host| roles.map(|role| host.join(role.certificate_file())));
        let certificates = files.flat_map(|file| issued_certificates(&file).unwrap());
        CertificateRevocationListParams {
            this_update: date_time_ymd(2001, 1, 1),
            next_update: date_time_ymd(1970, 1, 1) + since_1970,
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: certificates
                .map(|certificate| RevokedCertParams {
                    serial_number: SerialNumber::from_slice(&certificate.serial),
                    revocation_time: date_time_ymd(2001, 1, 1),
                    reason_code: None,
                    invalidity_date: None,
                })
                .collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        }
        .signed_by(&self.issuer)
        .unwrap()
        .pem()
        .unwrap()
    }

    /// Gives the host of `directory` certificates of this CA; whom it trusts stays.
    pub fn certify(&self, directory: &Path, host: &Host) {
        let (server, client) = &host.purposes;
        for (role, purpose) in [(TlsRole::Server, server), (TlsRole::Client, client)] {
            let mut params = CertificateParams::new(host.names.clone()).unwrap();
            params.not_before = date_time_ymd(host.years.0, 1, 1);
            params.not_after = date_time_ymd(host.years.1, 1, 1);
            params.extended_key_usages = vec![purpose.clone()];
            (host.alter)(&mut params);
            let key = KeyPair::generate().unwrap();
            let certificate = params.signed_by(&key, &self.issuer).unwrap();
            std::fs::write(directory.join(role.certificate_file()), certificate.pem()).unwrap();
            write_key(&directory.join(role.key_file()), &key.serialize_pem());
        }
    }
}

/// Writes a private key as its owner alone may read it.
pub fn write_key(path: &Path, pem: &str) {
    std::fs::write(path, pem).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
}
