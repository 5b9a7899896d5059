//! A device whose sessions are listened to, and meddled with, on their way to the driver.

use std::borrow::Cow;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use vfio_migration_device::{Device, DeviceError, DeviceObserver, KernelDevice, Position, WatchedDevice};
use vfio_migration_types::{DeviceId, MigrationState};

/// What a tap hears, of all devices that it is on.
#[derive(Debug, Default)]
pub(super) struct Tap {
    heard: Mutex<Vec<(String, Position)>>,
    /// The byte of the stream that is altered as the driver takes it, and how many were written so far.
    alter: Option<(usize, Mutex<usize>)>,
}

impl Tap {
    /// One that alters this byte of a device's stream as the driver takes it.
    pub(super) fn altering(byte: usize) -> Self {
        Self { alter: Some((byte, Mutex::default())), ..Self::default() }
    }

    /// Puts it on a device.
    pub(super) fn on(self: &Arc<Self>, device: KernelDevice) -> Arc<dyn Device> {
        Arc::new(WatchedDevice::new(Arc::new(device), self.clone()))
    }

    /// Each place that a device's saving session came to, in order.
    pub(super) fn heard(&self) -> Vec<(String, Position)> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl DeviceObserver for Tap {
    fn went(&self, device: &DeviceId, to: MigrationState, _reset: bool, _took: Duration) {
        if let Some(position) = Position::of(to) {
            self.heard.lock().unwrap_or_else(PoisonError::into_inner).push((device.to_string(), position));
        }
    }

    fn writing<'a>(&self, _device: &DeviceId, bytes: &'a [u8]) -> Result<Cow<'a, [u8]>, DeviceError> {
        let Some((victim, at)) = &self.alter else { return Ok(Cow::Borrowed(bytes)) };
        let mut at = at.lock().unwrap_or_else(PoisonError::into_inner);
        let here = victim.checked_sub(*at);
        *at += bytes.len();
        let mut bytes = bytes.to_vec();
        if let Some(byte) = here.and_then(|here| bytes.get_mut(here)) {
            *byte ^= 0x20;
        }
        Ok(Cow::Owned(bytes))
    }
}
