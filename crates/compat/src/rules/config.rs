//! Which bytes of config space a migration compares, as far as manifests tell them: the identity, and where capabilities are.
//!
//! While the guest is paused its VMM compares the bytes themselves, under the rules that [`exemptions`](crate::exemptions) gives.

use std::collections::BTreeSet;

use serde_json::Value;

use super::DevicePair;
use crate::codes;
use crate::device::{Capability, PciIdentity};
use crate::findings::Findings;
use crate::mask::MaskRule;
use crate::policy::Policy;

/// Past the last byte of config space.
pub(crate) const END: u16 = 4096;

/// The rules for a pair of devices: the destination's own, those of its VM, and those of the site that asks. Later ones win.
pub(crate) struct ConfigMask(pub(crate) Vec<MaskRule>);

impl ConfigMask {
    pub(crate) fn of(pair: DevicePair<'_>, policy: &Policy) -> Self {
        let (pci, mut rules) = (pair.destination.pci, pair.destination.config_mask.clone());
        let site = pair.site.iter().filter(|rules| rules.concern(pci));
        rules.extend(site.flat_map(|rules| &rules.rules));
        Self(policy.mask_rules(pci, &rules))
    }

    /// Whether the byte is compared, where a rule says so or not.
    pub(crate) fn say(&self, offset: u16) -> Option<bool> {
        self.0.iter().rev().find(|rule| rule.covers(offset)).map(|rule| rule.compare)
    }

    /// Whether each of these bytes, of which there are some, is left out.
    pub(crate) fn exempt(&self, bytes: impl IntoIterator<Item = u16>) -> bool {
        let mut bytes = bytes.into_iter().peekable();
        bytes.peek().is_some() && bytes.all(|offset| self.say(offset) == Some(false))
    }

    /// Number of rules.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

/// Bytes of the identity that differ, by their offsets.
pub(crate) fn identity_bytes(from: PciIdentity, to: PciIdentity) -> Vec<u16> {
    let bytes = |pci: PciIdentity| -> Vec<(u16, u8)> {
        let words =
            [(0x00, pci.vendor), (0x02, pci.device), (0x2c, pci.subsystem_vendor), (0x2e, pci.subsystem)];
        let [class0, class1, class2, _] = pci.class.to_le_bytes();
        let words = words.into_iter().flat_map(|(offset, word)| {
            let [low, high] = word.to_le_bytes();
            [(offset, low), (offset + 1, high)]
        });
        let single = [(0x08, pci.revision), (0x09, class0), (0x0a, class1), (0x0b, class2)];
        words.chain(single).collect()
    };
    let pairs = bytes(from).into_iter().zip(bytes(to));
    pairs.filter(|(from, to)| from != to).map(|(from, _)| from.0).collect()
}

/// The bytes that say what a capability is and where the next is.
pub(crate) fn header(capability: &Capability) -> impl Iterator<Item = u16> + use<> {
    let len = if capability.extended { 4 } else { 2 };
    capability.offset..capability.offset.saturating_add(len).min(END)
}

/// Notes a rule by which bytes are compared that no manifest tells: that it is obeyed is seen when the guest is paused.
pub(crate) fn untold(pair: DevicePair<'_>, findings: &mut Findings<'_>) {
    let rules = ConfigMask::of(pair, findings.policy());
    findings.look_at(rules.len());
    let told = |offset: u16| matches!(offset, 0x00..=0x03 | 0x08..=0x0b | 0x2c..=0x2f);
    // A receiver that judges tells its own rules, and has them.
    let asked: BTreeSet<MaskRule> = rules.0.iter().filter(|rule| rule.compare).copied().collect();
    for rule in asked {
        let mut bytes = rule.offset..rule.offset.saturating_add(rule.len);
        if bytes.all(|offset| told(offset) || rules.say(offset) != Some(true)) {
            continue;
        }
        let text = || {
            format!(
                "a rule compares {} bytes of config space at {:#x}, which manifests do not tell: whether they are equal is \
                 found out when the guest is paused",
                rule.len, rule.offset
            )
        };
        let pair = DevicePair { strict: false, ..pair };
        pair.say(
            findings,
            &codes::CONFIG_UNTOLD,
            "config_mask",
            (Value::Null, Value::from(rule.to_string())),
            text,
        );
    }
}
