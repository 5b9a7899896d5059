//! `device`: serves the sample device.

use vfio_migration_sim::{Fault, Options, serve};

use crate::args::serve::DeviceCommand;
use crate::exit::{CliError, Exit};
use crate::interrupt::UserInterrupt;

pub(crate) fn run(options: &DeviceCommand, interrupt: &UserInterrupt) -> Result<Exit, CliError> {
    let usage = |text: String| CliError::new(Exit::Usage, text);
    let faults = options
        .fault
        .iter()
        .map(|text| text.parse::<Fault>().map_err(|error| usage(error.to_string())))
        .collect::<Result<Vec<_>, _>>()?;
    let (version, patch) = version(&options.model_version).ok_or_else(|| {
        usage(format!(
            "'{}' is no version (want MAJOR.MINOR.PATCH, each at most 65535)",
            options.model_version
        ))
    })?;
    if options.parameters.iter().any(|(name, _)| name == "state_size") {
        return Err(usage("--param: state_size is what --state-size says".into()));
    }
    let config_byte = |text: &String| {
        config_byte(text).ok_or_else(|| {
            usage(format!("--config-byte: '{text}' is no byte (want OFFSET=VALUE, each at most 255 or 0xff)"))
        })
    };
    let config_bytes = options.config_byte.iter().map(config_byte).collect::<Result<_, _>>()?;
    let device = Options {
        state_size: options.state_size,
        state_dirty_rate: options.state_dirty_rate,
        dma_interval: options.dma_interval,
        migration: !options.no_migration,
        precopy: !options.no_precopy,
        p2p: !options.no_p2p,
        extension: !options.no_extension,
        dirty_log: !options.no_dirty_log,
        model: options.model.clone(),
        parameters: options.parameters.iter().cloned().collect(),
        fields: options.fields.iter().cloned().collect(),
        version,
        patch,
        config_bytes,
        faults,
        ..Options::default()
    };
    device.check().map_err(|error| usage(error.to_string()))?;
    let stop = vfio_user_peer::StopHandle::new().map_err(|error| CliError::caused("cannot begin", &error))?;
    let ended = stop.clone();
    interrupt.on_end(options.exit_with_stdin, move |_| ended.stop())?;
    serve(&options.socket, device, &stop)
        .map_err(|error| CliError::caused(&format!("cannot serve {}", options.socket.display()), &error))?;
    Ok(Exit::Done)
}

/// An offset in config space and the byte there, decimal or 0x.
fn config_byte(text: &str) -> Option<(u8, u8)> {
    let number = |text: &str| match text.strip_prefix("0x") {
        Some(digits) => u8::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    };
    let (offset, value) = text.split_once('=')?;
    Some((number(offset)?, number(value)?))
}

/// Major and minor, and the patch, which may be left out.
fn version(text: &str) -> Option<((u16, u16), u16)> {
    let mut numbers = text.split('.').map(|number| number.parse().ok());
    let (major, minor, patch) = (numbers.next()??, numbers.next()??, numbers.next().unwrap_or(Some(0))?);
    numbers.next().is_none().then_some(((major, minor), patch))
}
