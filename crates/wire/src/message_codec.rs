//! Payloads of control messages.

use vfio_migration_types::{AttemptId, Epoch, Failure, GuestOutcome, MigrationState, Phase, Side, VmId};

use crate::cursor::{Cursor, Put};
use crate::error::WireError;
use crate::kind::Kind;
use crate::limits;
use crate::message::{
    Accept, Applied, Commit, DeviceTotal, Final, FinalEnd, Hello, HelloReply, Lease, Message, Offer,
    RamDigests, Ready, Running, VersionRange,
};
use crate::reason_codec::{decode_reasons, encode_reasons};

/// Appends the payload to `out`; gives the frame's type.
pub(crate) fn encode(message: &Message, out: &mut Vec<u8>) -> Result<Kind, WireError> {
    Ok(match message {
        Message::Hello(hello) => {
            check_versions(hello.versions)?;
            out.put_u16(hello.versions.min);
            out.put_u16(hello.versions.max);
            out.put_reserved::<4>();
            out.put_u64(hello.features);
            out.put(&hello.vm.0);
            out.put(&hello.attempt.0);
            out.put_u64(hello.epoch.0);
            Kind::Hello
        }
        Message::HelloReply(reply) => {
            check_version(reply.version)?;
            out.put_u16(reply.version);
            out.put_reserved::<6>();
            out.put_u64(reply.features);
            Kind::HelloReply
        }
        Message::Offer(offer) => {
            encode_names(offer, out)?;
            encode_configuration(offer, out)?;
            encode_manifest(Kind::Offer, &offer.manifest, out)?;
            Kind::Offer
        }
        Message::Accept(accept) => {
            out.put(&accept.lease.id);
            out.put_u32(accept.lease.valid_ms);
            encode_reasons(&accept.reasons, out);
            encode_manifest(Kind::Accept, &accept.manifest, out)?;
            Kind::Accept
        }
        Message::Refuse(reasons) => {
            encode_reasons(reasons, out);
            Kind::Refuse
        }
        Message::Begin { lease } => {
            out.put(lease);
            Kind::Begin
        }
        Message::Begun => Kind::Begun,
        Message::InitialSent { device, generation } => {
            encode_initial(Kind::InitialSent, *device, *generation, out)?
        }
        Message::InitialLoaded { device, generation } => {
            encode_initial(Kind::InitialLoaded, *device, *generation, out)?
        }
        Message::EndIteration { iteration } => {
            out.put_u32(*iteration);
            Kind::EndIteration
        }
        Message::Applied(applied) => {
            out.put_u32(applied.iteration);
            out.put_reserved::<4>();
            out.put_u64(applied.device_bytes);
            out.put_u64(applied.device_ns);
            Kind::Applied
        }
        Message::Credit { device, bytes } => {
            check_device(Kind::Credit, *device)?;
            out.put_u16(*device);
            out.put_reserved::<6>();
            out.put_u64(*bytes);
            Kind::Credit
        }
        Message::Final(last) => {
            out.put_u8(last.guest_ran.into());
            out.put_u8(last.suspend.into());
            out.put_reserved::<2>();
            out.put(&last.identity);
            Kind::Final
        }
        Message::LocksFree => Kind::LocksFree,
        Message::FinalEnd(end) => {
            out.put_u64(end.ram_pages);
            out.put_u32(end.sections);
            out.put_u8(end.ram_digest.is_some().into());
            out.put_reserved::<1>();
            encode_devices(Kind::FinalEnd, end.ram_digest, &end.devices, out)?
        }
        Message::DigestRam { first, count } => {
            check_pages(Kind::DigestRam, *first, *count)?;
            out.put_u64(*first);
            out.put_u64(*count);
            Kind::DigestRam
        }
        Message::RamDigests(digests) => encode_ram_digests(digests, out)?,
        Message::Ready(ready) => {
            out.put_u64(ready.ram_pages);
            out.put_u64(ready.verify_ns);
            out.put_u32(ready.sections);
            out.put_u32(ready.vectors);
            out.put_reserved::<4>();
            out.put_u8(ready.ram_digest.is_some().into());
            out.put_reserved::<1>();
            encode_devices(Kind::Ready, ready.ram_digest, &ready.devices, out)?
        }
        Message::Commit(commit) => {
            out.put_u64(commit.epoch.0);
            out.put(&commit.attempt.0);
            Kind::Commit
        }
        Message::Declined(error) => {
            encode_error(error, out);
            Kind::Declined
        }
        Message::Running(running) => {
            out.put_u64(running.epoch.0);
            out.put(&running.boot_id);
            out.put_u64(running.at_ns);
            encode_guest(&running.guest, out);
            Kind::Running
        }
        Message::Abort(error) => {
            encode_error(error, out);
            Kind::Abort
        }
        Message::Query { vm, attempt, epoch, proof } => {
            out.put(&vm.0);
            out.put(&attempt.0);
            out.put_u64(epoch.0);
            out.put(proof);
            Kind::Query
        }
        Message::LimitsUnmet(error) => {
            encode_error(error, out);
            Kind::LimitsUnmet
        }
        Message::EndRehearsal { obstacle } => {
            encode_error_if_any(obstacle.as_ref(), out);
            Kind::EndRehearsal
        }
        Message::Rehearsed { left_undone } => {
            encode_error_if_any(left_undone.as_ref(), out);
            Kind::Rehearsed
        }
        Message::Ping { token } => {
            out.put_u64(*token);
            Kind::Ping
        }
        Message::Pong { token } => {
            out.put_u64(*token);
            Kind::Pong
        }
    })
}

/// Decodes a payload whose length is within the limits of `kind`.
pub(crate) fn decode(kind: Kind, payload: &[u8], from_side: Side) -> Result<Message, WireError> {
    let mut cursor = Cursor::new(kind.name(), payload);
    let message = match kind {
        Kind::Hello => Message::Hello(decode_hello(&mut cursor)?),
        Kind::HelloReply => {
            let version = cursor.u16("version")?;
            check_version(version)?;
            cursor.reserved::<6>()?;
            Message::HelloReply(HelloReply { version, features: cursor.u64("features")? })
        }
        Kind::Offer => {
            let (names, configuration) = decode_names(&mut cursor)?;
            let (configuration, configuration_digest) = decode_configuration(&mut cursor, configuration)?;
            let manifest = decode_manifest(&mut cursor)?;
            Message::Offer(Offer { names, configuration, configuration_digest, manifest })
        }
        Kind::Accept => {
            let lease = Lease { id: cursor.array("lease.id")?, valid_ms: cursor.u32("lease.valid_ms")? };
            let reasons = decode_reasons(&mut cursor)?;
            Message::Accept(Accept { lease, reasons, manifest: decode_manifest(&mut cursor)? })
        }
        Kind::Refuse => Message::Refuse(decode_reasons(&mut cursor)?),
        Kind::Begin => Message::Begin { lease: cursor.array("lease")? },
        Kind::Begun => Message::Begun,
        Kind::InitialSent => {
            let (device, generation) = decode_initial(kind, &mut cursor)?;
            Message::InitialSent { device, generation }
        }
        Kind::InitialLoaded => {
            let (device, generation) = decode_initial(kind, &mut cursor)?;
            Message::InitialLoaded { device, generation }
        }
        Kind::EndIteration => Message::EndIteration { iteration: cursor.u32("iteration")? },
        Kind::Applied => {
            let iteration = cursor.u32("iteration")?;
            cursor.reserved::<4>()?;
            let (device_bytes, device_ns) = (cursor.u64("device_bytes")?, cursor.u64("device_ns")?);
            Message::Applied(Applied { iteration, device_bytes, device_ns })
        }
        Kind::Credit => {
            let device = cursor.u16("device")?;
            cursor.reserved::<6>()?;
            check_device(kind, device)?;
            Message::Credit { device, bytes: cursor.u64("bytes")? }
        }
        Kind::Final => {
            let guest_ran = cursor.bool("guest_ran")?;
            let suspend = cursor.bool("suspend")?;
            cursor.reserved::<2>()?;
            Message::Final(Final { guest_ran, suspend, identity: cursor.array("identity")? })
        }
        Kind::LocksFree => Message::LocksFree,
        Kind::FinalEnd => Message::FinalEnd(decode_final_end(&mut cursor)?),
        Kind::DigestRam => {
            let (first, count) = decode_stretch(kind, &mut cursor)?;
            Message::DigestRam { first, count }
        }
        Kind::RamDigests => Message::RamDigests(decode_ram_digests(&mut cursor)?),
        Kind::Ready => Message::Ready(decode_ready(&mut cursor)?),
        Kind::Commit => {
            let epoch = Epoch(cursor.u64("epoch")?);
            Message::Commit(Commit { epoch, attempt: AttemptId(cursor.array("attempt")?) })
        }
        Kind::Declined => Message::Declined(decode_error(&mut cursor, from_side)?),
        Kind::Running => Message::Running(decode_running(&mut cursor, from_side)?),
        Kind::Abort => Message::Abort(decode_error(&mut cursor, from_side)?),
        Kind::Query => Message::Query {
            vm: VmId(cursor.array("vm")?),
            attempt: AttemptId(cursor.array("attempt")?),
            epoch: Epoch(cursor.u64("epoch")?),
            proof: cursor.array("proof")?,
        },
        Kind::LimitsUnmet => Message::LimitsUnmet(decode_error(&mut cursor, from_side)?),
        Kind::EndRehearsal => {
            Message::EndRehearsal { obstacle: decode_error_if_any(&mut cursor, from_side)? }
        }
        Kind::Rehearsed => Message::Rehearsed { left_undone: decode_error_if_any(&mut cursor, from_side)? },
        Kind::Ping => Message::Ping { token: cursor.u64("token")? },
        Kind::Pong => Message::Pong { token: cursor.u64("token")? },
        Kind::Pages | Kind::ZeroPages | Kind::DeviceData | Kind::DeviceEnd | Kind::Section => {
            // `Frame::decode` gives these to the other codec.
            return Err(WireError::UnknownFrame(kind.facts().number));
        }
    };
    cursor.finish()?;
    Ok(message)
}

/// A device's index is below [`limits::DEVICES`].
pub(crate) fn check_device(kind: Kind, device: u16) -> Result<(), WireError> {
    if device < limits::DEVICES {
        Ok(())
    } else {
        Err(WireError::Value { frame: kind.name(), field: "device", value: device.into() })
    }
}

/// At least one page, every page's number below [`limits::PAGE_NUMBERS`], and a body of at most [`limits::PAGES`].
pub(crate) fn check_pages(kind: Kind, first: u64, count: u64) -> Result<(), WireError> {
    let refuse = |field, value| Err(WireError::Value { frame: kind.name(), field, value });
    if count == 0 || (kind.has_body() && count > limits::PAGES.into()) {
        return refuse("count", count);
    }
    match first.checked_add(count) {
        Some(end) if end <= limits::PAGE_NUMBERS => Ok(()),
        _ => refuse("first", first),
    }
}

pub(crate) fn encode_total(total: DeviceTotal, out: &mut Vec<u8>) {
    out.put_u64(total.bytes);
    out.put(&total.digest);
}

pub(crate) fn decode_total(cursor: &mut Cursor<'_>) -> Result<DeviceTotal, WireError> {
    Ok(DeviceTotal { bytes: cursor.u64("total.bytes")?, digest: cursor.array("total.digest")? })
}

fn decode_hello(cursor: &mut Cursor<'_>) -> Result<Hello, WireError> {
    let versions = VersionRange { min: cursor.u16("versions.min")?, max: cursor.u16("versions.max")? };
    check_versions(versions)?;
    cursor.reserved::<4>()?;
    Ok(Hello {
        versions,
        features: cursor.u64("features")?,
        vm: VmId(cursor.array("vm")?),
        attempt: AttemptId(cursor.array("attempt")?),
        epoch: Epoch(cursor.u64("epoch")?),
    })
}

/// There is no version 0, and no range inside out.
fn check_versions(versions: VersionRange) -> Result<(), WireError> {
    let refuse =
        |field, value: u16| Err(WireError::Value { frame: Kind::Hello.name(), field, value: value.into() });
    match versions {
        VersionRange { min: 0, .. } => refuse("versions.min", 0),
        VersionRange { min, max } if max < min => refuse("versions.max", max),
        _ => Ok(()),
    }
}

fn check_version(version: u16) -> Result<(), WireError> {
    if version != 0 {
        Ok(())
    } else {
        Err(WireError::Value { frame: Kind::HelloReply.name(), field: "version", value: 0 })
    }
}

/// Names are neither cut nor left out: a device under half a name is another.
fn encode_names(offer: &Offer, out: &mut Vec<u8>) -> Result<(), WireError> {
    let names = &offer.names;
    let refuse =
        |field, value: usize| WireError::Value { frame: Kind::Offer.name(), field, value: value as u64 };
    let count = u16::try_from(names.len())
        .ok()
        .filter(|count| *count <= limits::DEVICES)
        .ok_or(refuse("names", names.len()))?;
    let configuration = u16::try_from(offer.configuration.len())
        .map_err(|_| refuse("configuration", offer.configuration.len()))?;
    out.put_u16(count);
    out.put_u16(configuration);
    for name in names.iter().flat_map(|(source, destination)| [source, destination]) {
        if name.len() > limits::DEVICE_NAME {
            return Err(refuse("name", name.len()));
        }
        out.put_text(name, limits::DEVICE_NAME);
    }
    Ok(())
}

/// The names, and the length of the configuration behind them.
fn decode_names(cursor: &mut Cursor<'_>) -> Result<(Vec<(String, String)>, u16), WireError> {
    let count = cursor.u16("names")?;
    if count > limits::DEVICES {
        return Err(cursor.value("names", count.into()));
    }
    let configuration = cursor.u16("configuration")?;
    let mut name = || Ok(cursor.text("name", limits::DEVICE_NAME)?.to_owned());
    let names = (0..count).map(|_| Ok((name()?, name()?))).collect::<Result<_, WireError>>()?;
    Ok((names, configuration))
}

/// Nothing where there is none: an offer without one is what it was before there were any.
fn encode_configuration(offer: &Offer, out: &mut Vec<u8>) -> Result<(), WireError> {
    if !offer.configuration.is_empty() {
        out.put(&offer.configuration_digest);
        out.put(&offer.configuration);
    } else if offer.configuration_digest != [0; 32] {
        let frame = Kind::Offer.name();
        return Err(WireError::Value { frame, field: "configuration_digest", value: 0 });
    }
    Ok(())
}

fn decode_configuration(cursor: &mut Cursor<'_>, length: u16) -> Result<(Vec<u8>, [u8; 32]), WireError> {
    if length == 0 {
        return Ok((Vec::new(), [0; 32]));
    }
    let digest = cursor.array("configuration_digest")?;
    Ok((cursor.slice("configuration", length.into())?.to_vec(), digest))
}

/// The rest of the payload.
fn encode_manifest(kind: Kind, manifest: &[u8], out: &mut Vec<u8>) -> Result<(), WireError> {
    if !(2..=limits::MANIFEST).contains(&manifest.len()) {
        let value = manifest.len() as u64;
        return Err(WireError::Value { frame: kind.name(), field: "manifest", value });
    }
    out.put(manifest);
    Ok(())
}

fn decode_manifest(cursor: &mut Cursor<'_>) -> Result<Vec<u8>, WireError> {
    let manifest = cursor.rest();
    if (2..=limits::MANIFEST).contains(&manifest.len()) {
        Ok(manifest.to_vec())
    } else {
        Err(cursor.value("manifest", manifest.len() as u64))
    }
}

fn encode_initial(kind: Kind, device: u16, generation: u32, out: &mut Vec<u8>) -> Result<Kind, WireError> {
    check_device(kind, device)?;
    out.put_u16(device);
    out.put_reserved::<2>();
    out.put_u32(generation);
    Ok(kind)
}

fn decode_initial(kind: Kind, cursor: &mut Cursor<'_>) -> Result<(u16, u32), WireError> {
    let device = cursor.u16("device")?;
    cursor.reserved::<2>()?;
    check_device(kind, device)?;
    Ok((device, cursor.u32("generation")?))
}

/// The common end of FINAL_END and READY: the number of devices, the digest (zero when there is none), the devices.
fn encode_devices(
    kind: Kind,
    digest: Option<[u8; 32]>,
    devices: &[DeviceTotal],
    out: &mut Vec<u8>,
) -> Result<Kind, WireError> {
    let count = u16::try_from(devices.len())
        .ok()
        .filter(|count| *count <= limits::DEVICES)
        .ok_or(WireError::Value { frame: kind.name(), field: "devices", value: devices.len() as u64 })?;
    out.put_u16(count);
    out.put(&digest.unwrap_or_default());
    devices.iter().for_each(|total| encode_total(*total, out));
    Ok(kind)
}

type DigestAndDevices = (Option<[u8; 32]>, Vec<DeviceTotal>);

fn decode_devices(has_digest: bool, cursor: &mut Cursor<'_>) -> Result<DigestAndDevices, WireError> {
    let count = cursor.u16("devices")?;
    if count > limits::DEVICES {
        return Err(cursor.value("devices", count.into()));
    }
    let digest = cursor.array("ram_digest")?;
    if !has_digest {
        cursor.absent(digest, [0; 32])?;
    }
    let devices = (0..count).map(|_| decode_total(cursor)).collect::<Result<_, _>>()?;
    Ok((has_digest.then_some(digest), devices))
}

fn decode_final_end(cursor: &mut Cursor<'_>) -> Result<FinalEnd, WireError> {
    let (ram_pages, sections) = (cursor.u64("ram_pages")?, cursor.u32("sections")?);
    let has_digest = cursor.bool("has_digest")?;
    cursor.reserved::<1>()?;
    let (ram_digest, devices) = decode_devices(has_digest, cursor)?;
    Ok(FinalEnd { ram_pages, ram_digest, sections, devices })
}

fn decode_ready(cursor: &mut Cursor<'_>) -> Result<Ready, WireError> {
    let (ram_pages, verify_ns) = (cursor.u64("ram_pages")?, cursor.u64("verify_ns")?);
    let (sections, vectors) = (cursor.u32("sections")?, cursor.u32("vectors")?);
    cursor.reserved::<4>()?;
    let has_digest = cursor.bool("has_digest")?;
    cursor.reserved::<1>()?;
    let (ram_digest, devices) = decode_devices(has_digest, cursor)?;
    Ok(Ready { ram_pages, ram_digest, verify_ns, sections, devices, vectors })
}

fn encode_ram_digests(digests: &RamDigests, out: &mut Vec<u8>) -> Result<Kind, WireError> {
    let kind = Kind::RamDigests;
    check_pages(kind, digests.first, digests.count)?;
    let number = u16::try_from(digests.digests.len()).ok().filter(|number| *number <= limits::RAM_DIGESTS);
    let value = digests.digests.len() as u64;
    let number = number.ok_or(WireError::Value { frame: kind.name(), field: "digests", value })?;
    out.put_u64(digests.first);
    out.put_u64(digests.count);
    out.put_u16(number);
    out.put_reserved::<6>();
    digests.digests.iter().for_each(|digest| out.put(digest));
    out.put_text(&digests.logs, limits::DIRTY_LOGS);
    Ok(kind)
}

fn decode_ram_digests(cursor: &mut Cursor<'_>) -> Result<RamDigests, WireError> {
    let (first, count) = decode_stretch(Kind::RamDigests, cursor)?;
    let number = cursor.u16("digests")?;
    if number > limits::RAM_DIGESTS {
        return Err(cursor.value("digests", number.into()));
    }
    cursor.reserved::<6>()?;
    let digests = (0..number).map(|_| cursor.array("digest")).collect::<Result<_, _>>()?;
    Ok(RamDigests { first, count, digests, logs: cursor.text("logs", limits::DIRTY_LOGS)?.to_owned() })
}

fn decode_stretch(kind: Kind, cursor: &mut Cursor<'_>) -> Result<(u64, u64), WireError> {
    let (first, count) = (cursor.u64("first")?, cursor.u64("count")?);
    check_pages(kind, first, count)?;
    Ok((first, count))
}

fn decode_running(cursor: &mut Cursor<'_>, from_side: Side) -> Result<Running, WireError> {
    let epoch = Epoch(cursor.u64("epoch")?);
    let (boot_id, at_ns) = (cursor.array("boot_id")?, cursor.u64("at_ns")?);
    let number = cursor.u8("guest")?;
    cursor.reserved::<7>()?;
    let guest = match number {
        PAUSED => GuestOutcome::Paused,
        RUNNING => GuestOutcome::Running,
        NOT_STARTED => GuestOutcome::NotStarted(Box::new(decode_error(cursor, from_side)?)),
        UNKNOWN => GuestOutcome::Unknown,
        other => return Err(cursor.value("guest", other.into())),
    };
    Ok(Running { epoch, guest, boot_id, at_ns })
}

/// What became of the guest, as RUNNING has it.
const PAUSED: u8 = 0;
const RUNNING: u8 = 1;
const NOT_STARTED: u8 = 2;
const UNKNOWN: u8 = 3;

fn encode_guest(guest: &GuestOutcome, out: &mut Vec<u8>) {
    out.put_u8(match guest {
        GuestOutcome::Paused => PAUSED,
        GuestOutcome::Running => RUNNING,
        GuestOutcome::NotStarted(_) => NOT_STARTED,
        GuestOutcome::Unknown => UNKNOWN,
    });
    out.put_reserved::<7>();
    if let Some(failure) = guest.failure() {
        encode_error(failure, out);
    }
}

/// Absent fields are zero, and three booleans say which are there.
fn encode_error(error: &Failure, out: &mut Vec<u8>) {
    let (from, to) = error.arc.map_or((0, 0), |(from, to)| (from as u32, to as u32));
    out.put_u8(error.phase as u8);
    out.put_u8(error.device.is_some().into());
    out.put_u8(error.arc.is_some().into());
    out.put_u8(error.errno.is_some().into());
    out.put_u32(from);
    out.put_u32(to);
    out.put_u32(error.errno.unwrap_or(0));
    out.put_text(error.device.as_deref().unwrap_or_default(), limits::ERROR_DEVICE);
    out.put_text(&error.text, limits::ERROR_TEXT);
    out.put_text(&error.remedy, limits::ERROR_REMEDY);
}

fn encode_error_if_any(error: Option<&Failure>, out: &mut Vec<u8>) {
    out.put_u8(error.is_some().into());
    out.put_reserved::<3>();
    if let Some(error) = error {
        encode_error(error, out);
    }
}

fn decode_error_if_any(cursor: &mut Cursor<'_>, from_side: Side) -> Result<Option<Failure>, WireError> {
    let has_error = cursor.bool("has_error")?;
    cursor.reserved::<3>()?;
    has_error.then(|| decode_error(cursor, from_side)).transpose()
}

fn decode_error(cursor: &mut Cursor<'_>, from_side: Side) -> Result<Failure, WireError> {
    let number = cursor.u8("phase")?;
    let phase = Phase::ALL.get(usize::from(number)).copied().ok_or(cursor.value("phase", number.into()))?;
    let has_device = cursor.bool("has_device")?;
    let has_arc = cursor.bool("has_arc")?;
    let has_errno = cursor.bool("has_errno")?;
    let (from, to, errno) = (cursor.u32("arc.from")?, cursor.u32("arc.to")?, cursor.u32("errno")?);
    if !has_arc {
        cursor.absent((from, to), (0, 0))?;
    }
    if !has_errno {
        cursor.absent(errno, 0)?;
    }
    let state =
        |field, number: u32| MigrationState::try_from(number).map_err(|_| cursor.value(field, number.into()));
    let arc = (state("arc.from", from)?, state("arc.to", to)?);
    let device = cursor.text("device", limits::ERROR_DEVICE)?;
    if !has_device {
        cursor.absent(device, "")?;
    }
    Ok(Failure {
        side: from_side,
        phase,
        device: has_device.then(|| device.to_owned()),
        arc: has_arc.then_some(arc),
        errno: has_errno.then_some(errno),
        text: cursor.text("text", limits::ERROR_TEXT)?.to_owned(),
        remedy: cursor.text("remedy", limits::ERROR_REMEDY)?.to_owned(),
    })
}
