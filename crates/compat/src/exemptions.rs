//! The rules for config space under which a guest is restored, made from the verdict: what was let pass ahead of the pause is not
//! refused in it.

use crate::device::{Capability, DeviceManifest};
use crate::findings::Findings;
use crate::mask::MaskRule;
use crate::policy::{MaskPolicy, Policy};
use crate::rules::config::{ConfigMask, END, identity_bytes};
use crate::rules::{DevicePair, layout};
use crate::severity::Severity;

/// Pointer to the first capability (PCI Local Bus Specification 3.0, 6.7).
const CAPABILITY_LIST: u16 = 0x34;
/// First byte of extended config space, where its first capability is.
const EXTENDED: u16 = 0x100;

/// The rules under which the config space of `source` goes into `destination`: those that were given (`site` by the destination's
/// VM), and on top an exemption for each byte in which the two may differ because the rules of this crate, or a policy, let
/// that pass.
pub fn exemptions(
    source: &DeviceManifest,
    destination: &DeviceManifest,
    site: &[MaskPolicy],
    policy: &Policy,
) -> Vec<MaskRule> {
    let strict = source.model.is_none() && destination.model.is_none();
    let pair = DevicePair { source, destination, strict, site };
    let mut rules = ConfigMask::of(pair, policy).0;
    let passes = |rule: fn(DevicePair<'_>, &mut Findings<'_>)| {
        let mut findings = Findings::new(policy);
        rule(pair, &mut findings);
        findings.reasons.iter().all(|reason| reason.severity <= Severity::Warning)
    };
    let ignore = |offset: u16, len: u16| MaskRule { offset, len, compare: false };
    if let (Some(from), Some(to)) = (source.pci, destination.pci)
        && passes(layout::identity)
    {
        rules.extend(identity_bytes(from, to).into_iter().map(|offset| ignore(offset, 1)));
    }
    if let (Some(from), Some(to)) = (&source.capabilities, &destination.capabilities)
        && from.iter().any(|one| !to.contains(one)) | to.iter().any(|one| !from.contains(one))
        && passes(layout::capabilities)
    {
        // Both chains run otherwise where either has a link that the other lacks.
        rules.push(ignore(CAPABILITY_LIST, 1));
        for (one, others) in from.iter().map(|one| (one, to)).chain(to.iter().map(|one| (one, from))) {
            let here = others.iter().any(|other| is_the_same(one, other));
            match (here, one.extended) {
                (true, false) => rules.push(ignore(one.offset + 1, 1)),
                (true, true) => rules.push(ignore(one.offset + 2, 2)),
                // What it holds is its own too.
                (false, _) => rules.push(ignore(one.offset, end_of(one, to) - one.offset)),
            }
        }
    }
    rules.retain(|rule| rule.len > 0);
    rules
}

/// Whether a capability is at the same place on the other side, and of the same length as far as that is known.
fn is_the_same(one: &Capability, other: &Capability) -> bool {
    let len = one.len.zip(other.len).is_none_or(|(one, other)| one == other);
    len && Capability { len: None, ..*one } == Capability { len: None, ..*other }
}

/// Where a capability ends at the latest: by its own word, at the next one of `all`, or where its part of config space does.
fn end_of(capability: &Capability, all: &[Capability]) -> u16 {
    let last = if capability.offset < EXTENDED { EXTENDED } else { END };
    let next = all.iter().map(|one| one.offset).filter(|offset| *offset > capability.offset).min();
    let own = capability.len.map(|len| capability.offset.saturating_add(len.max(2)));
    [next, own].into_iter().flatten().fold(last, u16::min)
}
