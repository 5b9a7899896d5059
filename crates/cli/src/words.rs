//! Words of the command line that several verbs take: their syntax, and what they name.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use clap::builder::{PathBufValueParser, TypedValueParser};
use vfio_migration::{
    FileError, Uri, UriError, open_regular, open_regular_to_append, refuse_changeable, unix_address,
};
use vfio_migration_compat::{DeviceMap, MaskRule, Policy};
use vfio_migration_device::host::Roots;
use vfio_migration_types::{DeviceId, VmId, VmIdError, error_chain};
use vfio_migration_vmm::layout::{RAM_MAX, RAM_MIN};

use crate::exit::{CliError, Exit};
use crate::units::format_size;

pub(crate) const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 usage, 3 incompatible, 4 ownership unresolved, 5 moved but not running there.";
pub(crate) const UNITS_AND_EXIT_CODES: &str = "Sizes take K, M, G (powers of two); times take us, ms, s.\n\
Exit codes: 0 done, 1 failed, 2 usage, 3 incompatible, 4 ownership unresolved, 5 moved but not running there.";

/// RAM comes in steps of this size.
const RAM_STEP: u64 = 2 << 20;

/// Which host is looked at.
#[derive(Args, Clone, Debug)]
pub(crate) struct HostRoot {
    /// Folder that has another host's sys, dev, proc, boot and lib/modules, for tests.
    #[arg(long = "root", hide = true, value_name = "DIR")]
    dir: Option<PathBuf>,
}

impl HostRoot {
    pub(crate) fn roots(&self) -> Roots {
        self.dir.as_deref().map_or_else(Roots::default, Roots::under)
    }
}

/// Parses `A=B`, two names or a name and a value.
pub(crate) fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((from, to)) if !from.is_empty() && !to.is_empty() => Ok((from.into(), to.into())),
        _ => Err("it is not of the form NAME=NAME".into()),
    }
}

pub(crate) fn uri(text: &str) -> Result<Uri, CliError> {
    text.parse().map_err(|error: UriError| CliError::new(Exit::Usage, error.to_string()))
}

/// Refuses a size of RAM that the machine cannot have on any host.
pub(crate) fn check_memory(memory: u64) -> Result<(), CliError> {
    let usage = |text: String| Err(CliError::new(Exit::Usage, format!("--memory: {text}")));
    if !(RAM_MIN..=RAM_MAX).contains(&memory) {
        let (min, max) = (format_size(RAM_MIN), format_size(RAM_MAX));
        return usage(format!("the machine takes {min} to {max}, not {}", format_size(memory)));
    }
    if !memory.is_multiple_of(RAM_STEP) {
        return usage(format!("{memory} bytes are no multiple of {}", format_size(RAM_STEP)));
    }
    Ok(())
}

/// Parses `OFFSET+LEN=compare|ignore`, numbers decimal or 0x, within config space.
pub(crate) fn config_rule(text: &str) -> Option<MaskRule> {
    let (place, verb) = text.split_once('=')?;
    format!("{verb} {place}").parse().ok()
}

/// The identity of a VM.
pub(crate) fn vm_id(text: &str) -> Result<VmId, String> {
    let id: VmId = text.parse().map_err(|error: VmIdError| error.to_string())?;
    if id.names_a_vm() { Ok(id) } else { Err("the nil UUID names no VM".into()) }
}

/// Reads a policy's file.
pub(crate) fn policy(path: &Path) -> Result<Policy, CliError> {
    let bytes = read_capped(path, Policy::MAX_BYTES)?;
    Policy::parse(&bytes, &path.display().to_string()).map_err(|error| CliError::caused("no policy", &error))
}

/// Checks pairs of names, at the source and at the destination.
pub(crate) fn device_map(pairs: &[(String, String)]) -> Result<DeviceMap, CliError> {
    pairs.iter().map(|(from, to)| Ok((device_id(from)?, device_id(to)?))).collect()
}

/// The bytes of a regular file, at most one more than `most`. Anything else, which could keep whoever opens it waiting, is refused.
pub(crate) fn read_capped(path: &Path, most: usize) -> Result<Vec<u8>, CliError> {
    let file = open_regular(path).map_err(|error| CliError::failed(error_chain(&error)))?;
    read_opened(path, file, most)
}

/// The same of a file that decides who may come: anybody who could change it would decide that.
pub(crate) fn read_capped_by_owner(path: &Path, most: usize) -> Result<Vec<u8>, CliError> {
    let failed = |error: FileError| CliError::failed(error_chain(&error));
    let file = open_regular(path).map_err(failed)?;
    refuse_changeable(path, &file).map_err(failed)?;
    read_opened(path, file, most)
}

fn read_opened(path: &Path, file: std::fs::File, most: usize) -> Result<Vec<u8>, CliError> {
    let failed = |error: std::io::Error| CliError::caused(&path.display().to_string(), &error);
    let mut bytes = Vec::new();
    file.take(most as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

/// Writes a regular file that may be half written when that fails. Anything else at its path is refused.
pub(crate) fn write_regular(path: &Path, bytes: &[u8]) -> Result<(), CliError> {
    let failed = |error: std::io::Error| CliError::caused(&path.display().to_string(), &error);
    let mut file = open_regular_to_append(path).map_err(|error| CliError::failed(error_chain(&error)))?;
    file.set_len(0).and_then(|()| file.write_all(bytes)).map_err(failed)
}

/// Refuses a path that can be no socket's, since it is too long.
pub(crate) fn check_socket_path(path: &Path) -> Result<(), CliError> {
    let refused = |error| CliError::new(Exit::Usage, format!("{}: {error}", path.display()));
    unix_address(path).map(drop).map_err(refused)
}

/// Takes a word for the path of a socket.
pub(crate) fn socket_path() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().try_map(|path| unix_address(&path).map(|_| path))
}

pub(crate) fn device_id(name: &str) -> Result<DeviceId, CliError> {
    DeviceId::new(name)
        .map_err(|error| CliError::new(Exit::Usage, format!("'{name}' is no name of a device: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_of_config_space() {
        assert_eq!(config_rule("0x40+8=ignore"), Some(MaskRule { offset: 0x40, len: 8, compare: false }));
        assert_eq!(config_rule("16+1=compare"), Some(MaskRule { offset: 16, len: 1, compare: true }));
        for bad in [
            "",
            "40",
            "40+8",
            "40=ignore",
            "x+1=ignore",
            "0+1=maybe",
            "70000+1=ignore",
            "0+0=ignore",
            "4095+2=ignore",
        ] {
            assert_eq!(config_rule(bad), None, "{bad}");
        }
    }
}
