//! What drivers of the kernel's tree check by themselves when they load a stream, known beforehand.
//!
//! A driver with a rule here needs no strict equality of what its rule covers: where its stream carries a version of
//! its own, another version of the module is a warning; where the firmware judges the state, so is other firmware.

use super::DevicePair;
use crate::codes::{self, ReasonCode};
use crate::device::DeviceManifest;
use crate::findings::Findings;
use crate::scalar::Scalar;
use crate::tree::json;
use crate::version::ModelVersion;

/// A driver and what it compares.
struct Rule {
    driver: &'static str,
    /// It refuses a stream of a version that it does not know.
    versioned: bool,
    /// The device's firmware judges the state when it is loaded.
    firmware: bool,
    facts: &'static [(&'static str, Compare)],
}

/// How a fact of the source must stand to that of the destination.
enum Compare {
    Equal(ReasonCode),
    SameMajor(ReasonCode),
    /// The destination's is at least the source's.
    AtMost(ReasonCode),
    /// The destination has all bits of the source, and more of them are a warning.
    Superset(ReasonCode, ReasonCode),
}

/// Where each is checked, in Linux 7.3.
static RULES: &[Rule] = &[
    // samples/vfio-mdev/mtty.c, mtty_load_data_validate: magic, major, minor, nr_ports, flags, all exactly.
    Rule {
        driver: "mtty",
        versioned: true,
        firmware: false,
        facts: &[
            ("stream_version", Compare::Equal(&codes::MTTY_VERSION)),
            ("ports", Compare::Equal(&codes::MTTY_PORTS)),
        ],
    },
    // kernel/migdev of this project: a newer version of the stream is refused, and so is another size of state.
    Rule {
        driver: "migdev",
        versioned: true,
        firmware: false,
        facts: &[
            ("stream_version", Compare::AtMost(&codes::MIGDEV_VERSION)),
            ("state_size", Compare::Equal(&codes::MIGDEV_STATE_SIZE)),
        ],
    },
    // drivers/vfio/pci/hisilicon/hisi_acc_vfio_pci.c, vf_qm_check_match: major, device id, queue pairs, isolation.
    Rule {
        driver: "hisi_acc_vfio_pci",
        versioned: true,
        firmware: false,
        facts: &[
            ("stream_version", Compare::SameMajor(&codes::HISI_VERSION)),
            ("dev_id", Compare::Equal(&codes::HISI_DEVICE)),
            ("qp_num", Compare::Equal(&codes::HISI_QUEUES)),
            ("isolation", Compare::Equal(&codes::HISI_ISOLATION)),
        ],
    },
    // drivers/crypto/intel/qat/qat_common/adf_gen4_vf_mig.c: the capability mask, and the sizes of sections.
    Rule {
        driver: "qat_vfio_pci",
        versioned: true,
        firmware: false,
        facts: &[
            ("capabilities", Compare::Superset(&codes::QAT_CAPABILITIES, &codes::QAT_SUPERSET)),
            ("state_size", Compare::AtMost(&codes::QAT_STATE_SIZE)),
        ],
    },
    // drivers/gpu/drm/xe/xe_sriov_migration_data.c: the descriptor's device and revision ids.
    Rule {
        driver: "xe_vfio_pci",
        versioned: true,
        firmware: false,
        facts: &[
            ("devid", Compare::Equal(&codes::XE_DEVICE)),
            ("revid", Compare::Equal(&codes::XE_REVISION)),
        ],
    },
    // drivers/vfio/pci/mlx5/main.c: records without a version; the firmware judges at load.
    Rule { driver: "mlx5_vfio_pci", versioned: true, firmware: true, facts: &[] },
    // drivers/vfio/pci/virtio/migrate.c: the same records; the device validates its parts.
    Rule { driver: "virtio_vfio_pci", versioned: true, firmware: true, facts: &[] },
    // drivers/vfio/pci/pds: an opaque piece of the firmware's.
    Rule { driver: "pds_vfio_pci", versioned: true, firmware: true, facts: &[] },
];

/// Applies the rule of the driver that both have.
pub(crate) fn compare(pair: DevicePair<'_>, findings: &mut Findings<'_>) {
    let Some(rule) = rule(pair) else { return };
    for (name, how) in rule.facts {
        if findings.is_decided() {
            return;
        }
        let (from, to) = (fact(pair.source, name), fact(pair.destination, name));
        let code = match (&from, &to) {
            (None, None) => continue,
            (Some(from), Some(to)) => match how.breach(from, to) {
                Some(code) => code,
                None => continue,
            },
            _ => &codes::UNKNOWN_DRIVER_FACT,
        };
        let what = || match *name {
            "ports" => "the number of ports".to_owned(),
            name => format!("{}'s {name}", rule.driver),
        };
        let values = || (json(&from), json(&to));
        // The rule is the driver's own, whatever else is strict.
        DevicePair { strict: false, ..pair }.differs(
            findings,
            code,
            || format!("facts.{name}"),
            what,
            values,
        );
    }
}

/// Whether the driver of both judges versions of its stream by itself.
pub(crate) fn versioned_stream(pair: DevicePair<'_>) -> bool {
    rule(pair).is_some_and(|rule| rule.versioned)
}

/// Whether the firmware of both judges the state when it is loaded.
pub(crate) fn firmware_decides(pair: DevicePair<'_>) -> bool {
    rule(pair).is_some_and(|rule| rule.firmware)
}

/// Whether the rule of the driver of both covers a fact.
pub(crate) fn knows_fact(pair: DevicePair<'_>, name: &str) -> bool {
    rule(pair).is_some_and(|rule| rule.facts.iter().any(|(known, _)| *known == name))
}

/// The rule for the driver that both have. Some drivers call themselves with dashes.
fn rule(pair: DevicePair<'_>) -> Option<&'static Rule> {
    let name = pair.source.driver_name()?;
    let same = pair.destination.driver_name() == Some(name);
    let called = |known: &str| {
        let letters = name.bytes().map(|letter| if letter == b'-' { b'_' } else { letter });
        known.len() == name.len() && known.bytes().eq(letters)
    };
    RULES.iter().find(|rule| same && called(rule.driver))
}

/// A fact, or what the PCI identity says in its place.
fn fact(device: &DeviceManifest, name: &str) -> Option<Scalar> {
    let stated = device.facts.get(name).cloned();
    stated.or_else(|| match name {
        "dev_id" | "devid" => Some(Scalar::Int(device.pci?.device.into())),
        "revid" => Some(Scalar::Int(device.pci?.revision.into())),
        _ => None,
    })
}

impl Compare {
    /// The code of the reason when the two do not stand as they must.
    fn breach(&self, from: &Scalar, to: &Scalar) -> Option<ReasonCode> {
        if from == to {
            return None;
        }
        match self {
            Self::Equal(code) => Some(code),
            Self::SameMajor(code) => (major(from).is_none() || major(from) != major(to)).then_some(code),
            Self::AtMost(code) => (!at_most(from, to)).then_some(code),
            Self::Superset(lacks, more) => match (from, to) {
                (Scalar::Int(from), Scalar::Int(to)) if from & !to == 0 => Some(more),
                _ => Some(lacks),
            },
        }
    }
}

fn major(version: &Scalar) -> Option<u32> {
    match version {
        Scalar::Int(major) => u32::try_from(*major).ok(),
        Scalar::Text(text) => text.parse::<ModelVersion>().ok().map(|version| version.major),
        Scalar::Bool(_) => None,
    }
}

fn at_most(from: &Scalar, to: &Scalar) -> bool {
    match (from, to) {
        (Scalar::Int(from), Scalar::Int(to)) => from <= to,
        (Scalar::Text(from), Scalar::Text(to)) => {
            match (from.parse::<ModelVersion>(), to.parse::<ModelVersion>()) {
                (Ok(from), Ok(to)) => from <= to,
                _ => false,
            }
        }
        _ => false,
    }
}
