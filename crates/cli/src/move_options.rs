//! Options of sessions that send a guest: each of them is declared here once, for the command line, for the control socket and
//! its schemas, and for the session itself.

use std::num::NonZeroU64;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use vfio_migration::{Pin, SaveOptions, Security, SourceOptions};

use crate::bandwidth::Bandwidth;
use crate::exit::CliError;
use crate::tls_options::{AskedSecurity, absolute};
use crate::units;
use crate::words::{device_map, pair};

/// Limits and permissions of `migrate` and `rehearse`.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct MoveOptions {
    /// Longest time that the guest may be paused, in milliseconds. Default 300.
    #[arg(
        long,
        default_value = "300ms",
        value_parser = units::some_time,
        value_name = "TIME",
        help = "Longest time the guest may be paused. A ceiling, not a target"
    )]
    #[serde(default, with = "units::whole_milliseconds")]
    #[schemars(with = "Option<NonZeroU64>")]
    pub(crate) downtime_limit: Option<Duration>,
    /// Bytes each second at most while the guest runs; absent or `"none"`: no cap.
    #[arg(
        long = "bandwidth",
        value_name = "SIZE|none",
        help = "Bytes each second at most, while the guest runs. Without it, or with none, there is no cap"
    )]
    #[serde(default)]
    pub(crate) max_bandwidth: Option<Bandwidth>,
    /// Give up when the guest still runs here after this many milliseconds. Time in which only `migrate-continue` is waited
    /// for does not count.
    #[arg(
        long = "give-up",
        value_parser = units::some_time,
        value_name = "TIME",
        help = "Give up when the guest is still running here after this time, not counting the time in which only `continue` is waited for; a rehearsal ends with what it has found"
    )]
    #[serde(default, with = "units::whole_milliseconds")]
    #[schemars(with = "Option<NonZeroU64>")]
    pub(crate) give_up_after: Option<Duration>,
    /// Devices that have another name at the destination.
    #[arg(
        long = "map",
        value_parser = pair,
        value_name = "NAME=NAME",
        help = "A device that has another name at the destination. May be given more than once"
    )]
    #[serde(default, with = "name_pairs")]
    #[schemars(with = "std::collections::BTreeMap<String, String>")]
    pub(crate) device_map: Vec<(String, String)>,
    /// Move devices that log no DMA too.
    #[arg(long, help = "Move even a device that logs no DMA: all of RAM is sent while the guest is paused")]
    #[serde(default)]
    pub(crate) allow_all_dirty: bool,
    /// Absolute path of the folder of certificates for this session, instead of that of `vm --tls-creds`.
    #[arg(
        long,
        value_parser = absolute,
        value_name = "DIR",
        help = "Folder of certificates and keys for this session, instead of that of vm --tls-creds"
    )]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tls_creds: Option<PathBuf>,
    /// Name that the destination's certificate must have, where it is not the host in its address.
    #[arg(
        long,
        value_name = "NAME",
        help = "Name that the destination's certificate must have, where it is not the host in its address"
    )]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tls_hostname: Option<String>,
    /// Public keys by one of which the destination is trusted, whatever its certificate says; absent: those of `vm --tls-pin`.
    #[arg(
        long = "tls-pin",
        value_name = "PIN",
        help = "Trust the destination by this public key, as `tls pin` prints it there. May be given more than once"
    )]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(with = "Vec<String>")]
    pub(crate) tls_pins: Vec<Pin>,
    /// The connection is to go in plain text: whoever is on the way reads and changes the guest. Absent: as `vm --insecure-plaintext`
    /// says. Where neither is said and there are no certificates, nothing goes over TCP (`"TlsRequired"`).
    #[arg(
        long,
        conflicts_with_all = ["tls_creds", "tls_hostname", "tls_pins"],
        help = "Let the connection go in plain text: whoever is on the way reads and changes the guest"
    )]
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) insecure_plaintext: bool,
    /// Checksum RAM while the guest runs too. Absent: where the connection is in plain text over TCP.
    #[arg(
        long,
        value_parser = on_off(),
        value_name = "SWITCH",
        help = "Checksum RAM while the guest runs too, at the price of a copy. Default: on in plain text over TCP, off over TLS, which checks every byte, and over unix sockets"
    )]
    #[serde(default)]
    pub(crate) ram_crc: Option<bool>,
}

/// `on` or `off`.
fn on_off() -> impl TypedValueParser<Value = bool> {
    PossibleValuesParser::new(["on", "off"]).map(|word| word == "on")
}

impl MoveOptions {
    /// How the session's connection is secured, in a process that was started with `process`.
    pub(crate) fn security(&self, process: Option<Security>) -> Result<Option<Security>, CliError> {
        let asked = AskedSecurity {
            creds: self.tls_creds.as_ref(),
            hostname: self.tls_hostname.as_ref(),
            pins: &self.tls_pins,
            insecure_plaintext: self.insecure_plaintext,
        };
        asked.over(process)
    }

    pub(crate) fn into_source_options(self) -> Result<SourceOptions, CliError> {
        let mut options = SourceOptions::default();
        if let Some(limit) = self.downtime_limit {
            options.downtime_limit = limit;
        }
        options.bandwidth = self.max_bandwidth.and_then(Bandwidth::cap);
        options.give_up_after = self.give_up_after;
        options.device_map = device_map(&self.device_map)?;
        options.allow_all_dirty = self.allow_all_dirty;
        options.ram_crc = self.ram_crc;
        Ok(options)
    }
}

/// Options of `migrate` alone: how the guest is handed over.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct SwitchoverOptions {
    /// Wait for `migrate-continue` before the guest is paused.
    #[arg(
        long,
        help = "Stop before the switchover and wait for `continue`; the guest keeps running meanwhile"
    )]
    #[serde(default)]
    pub(crate) pause_before_switchover: bool,
    /// The guest arrives paused; if it does not move, it runs on here.
    #[arg(
        long,
        help = "Have the guest arrive paused: `cont` there lets it run. If it does not move, it runs on here"
    )]
    #[serde(default)]
    pub(crate) suspend: bool,
    /// Compare digests of all RAM.
    #[arg(
        long,
        help = "Compare digests of all RAM before the guest runs at the destination; the guest is paused meanwhile"
    )]
    #[serde(default)]
    pub(crate) verify: bool,
    /// Refused: post-copy is not possible for VFIO devices.
    #[arg(
        long,
        hide = true,
        help = "Post-copy is not possible for VFIO devices, and refused with the reason"
    )]
    #[serde(default)]
    pub(crate) post_copy: bool,
}

impl SwitchoverOptions {
    /// Adds them to `options`.
    pub(crate) fn into_source_options(self, mut options: SourceOptions) -> Result<SourceOptions, CliError> {
        if self.post_copy {
            return Err(CliError::failed(
                "post-copy is not possible with VFIO devices: a device may touch any page at any time and cannot wait for \
                 one that is still on its way",
            ));
        }
        options.pause_before_switchover = self.pause_before_switchover;
        options.suspend = self.suspend;
        options.verify = self.verify;
        Ok(options)
    }
}

/// Options of `save`, of a guest.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct FileOptions {
    /// Replace a regular file that is there, or that a symbolic link there leads to.
    #[arg(long, help = "Replace a regular file that is there, or that a symbolic link there leads to")]
    #[serde(default)]
    pub(crate) force: bool,
    /// End the guest here; otherwise it goes on.
    #[arg(long, help = "End the guest here: from then on it lives in the file. Otherwise it goes on")]
    #[serde(default)]
    pub(crate) stop: bool,
    /// Write a digest of all RAM too.
    #[arg(
        long,
        help = "Write a digest of all RAM too, which the restore compares; the guest is paused meanwhile"
    )]
    #[serde(default)]
    pub(crate) verify: bool,
    /// Most bytes of state that each device may give: absent, 16 times what the device estimates, and at least 1 GiB; 64 GiB
    /// for one that does not estimate it.
    #[arg(
        long,
        value_parser = units::some_size,
        value_name = "SIZE",
        help = "Most bytes of state that each device may give, so that one whose state has no end does not fill the disk. \
                Default: 16 times what the device estimates, and at least 1G; 64G for one that does not estimate it"
    )]
    #[serde(default)]
    pub(crate) state_limit: Option<NonZeroU64>,
}

impl FileOptions {
    pub(crate) fn into_source_options(self) -> (SourceOptions, SaveOptions) {
        let mut options = SourceOptions::default().for_saving();
        options.verify = self.verify;
        let mut how = SaveOptions::default();
        (how.force, how.stop) = (self.force, self.stop);
        how.state_limit = self.state_limit.map(NonZeroU64::get);
        (options, how)
    }
}

/// Pairs of names as a JSON object.
mod name_pairs {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(
        pairs: &[(String, String)],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let map: BTreeMap<&String, &String> = pairs.iter().map(|(from, to)| (from, to)).collect();
        map.serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<(String, String)>, D::Error> {
        BTreeMap::deserialize(deserializer).map(|map: BTreeMap<_, _>| map.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use serde_json::json;

    use super::*;
    use crate::args::{Cli, CliVerb};
    use crate::control::protocol::MigrateArguments;
    use crate::control::rehearsal::RehearseArguments;

    fn parsed(words: &[&str]) -> CliVerb {
        Cli::try_parse_from([&["vfio-migrate"], words].concat()).unwrap().verb
    }

    #[test]
    fn the_command_line_and_the_control_socket_say_the_same() {
        let words = "migrate --control c tcp:h:1 --downtime-limit 1.5ms --bandwidth 1K --give-up 2s --map a=b \
                     --allow-all-dirty --ram-crc on --suspend --verify --tls-creds /etc/pki/qemu --tls-hostname host-b \
                     --tls-pin sha256:00000000000000000000000000000000000000000000000000000000000000ff";
        let CliVerb::Migrate(command) = parsed(&words.split(' ').collect::<Vec<_>>()) else {
            panic!("no migrate")
        };
        let asked =
            MigrateArguments { uri: command.uri, options: command.options, switchover: command.switchover };
        let document = json!(asked);
        assert_eq!(
            document,
            json!({
                "uri": "tcp:h:1", "downtime-limit": 2, "max-bandwidth": 1024, "give-up-after": 2000,
                "device-map": {"a": "b"}, "allow-all-dirty": true, "verify": true,
                "pause-before-switchover": false, "post-copy": false, "ram-crc": true, "suspend": true,
                "tls-creds": "/etc/pki/qemu", "tls-hostname": "host-b",
                "tls-pins": ["sha256:00000000000000000000000000000000000000000000000000000000000000ff"],
            })
        );
        let heard: MigrateArguments = serde_json::from_value(document).unwrap();
        assert_eq!(heard.options.downtime_limit, Some(Duration::from_millis(2)), "rounded up");
        let options = heard.options.into_source_options().unwrap();
        let options = heard.switchover.into_source_options(options).unwrap();
        assert_eq!(options.bandwidth, Some(1024));
        assert_eq!((options.ram_crc, options.suspend), (Some(true), true));
        assert_eq!((options.verify, options.allow_all_dirty, options.device_map.0.len()), (true, true, 1));
    }

    #[test]
    fn what_is_left_out_has_a_default_and_what_is_not_known_is_refused() {
        let heard: RehearseArguments =
            serde_json::from_value(json!({"uri": "u", "downtime-limit": null})).unwrap();
        assert_eq!(heard.options, MoveOptions::default());
        let options = heard.options.into_source_options().unwrap();
        assert_eq!(options.downtime_limit, Duration::from_millis(300));
        // A rehearsal compares no digests, and has no switchover to wait before.
        for unknown in ["verify", "colour"] {
            let heard = serde_json::from_value::<RehearseArguments>(json!({"uri": "u", unknown: true}));
            assert!(heard.unwrap_err().to_string().contains(unknown));
        }
        let post_copy = SwitchoverOptions { post_copy: true, ..SwitchoverOptions::default() };
        assert!(post_copy.into_source_options(SourceOptions::default()).is_err());
    }
}
