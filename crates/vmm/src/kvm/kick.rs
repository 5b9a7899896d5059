//! Getting a vCPU thread out of the guest: a signal whose handler sets the vCPU's `immediate_exit`.
//!
//! The signal ends a `KVM_RUN` that is under way; the byte ends the next one at once, should the signal arrive just
//! before it. So one kick is enough, whenever it comes (`Documentation/virt/kvm/api.rst`, "immediate_exit").

use std::cell::Cell;
use std::ptr;
use std::sync::OnceLock;
use std::thread::JoinHandle;

use vmm_sys_util::signal::{Killable, SIGRTMIN};

use crate::error::VmmError;

thread_local! {
    /// The `immediate_exit` byte of the vCPU that this thread runs. Constant-initialised and without a destructor, so
    /// that the signal handler may read it.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// Which byte a kick of the calling thread sets, until it is dropped.
#[derive(Debug)]
pub(super) struct KickTarget(());

impl KickTarget {
    /// # Safety
    /// `byte` must stay valid for writes by this thread until the value is dropped, on this thread.
    pub(super) unsafe fn new(byte: *mut u8) -> Self {
        IMMEDIATE_EXIT.set(byte);
        Self(())
    }
}

impl Drop for KickTarget {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}

/// Installs the handler, once per process.
pub(super) fn install_handler() -> Result<(), VmmError> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| {
        let handler = || {
            let byte = IMMEDIATE_EXIT.get();
            if !byte.is_null() {
                // SAFETY: the thread that set the pointer is the one that the handler interrupts, and it keeps the
                // byte valid for as long as the pointer is there.
                unsafe { byte.write_volatile(1) };
            }
        };
        // SAFETY: the handler reads a constant-initialised thread local and writes a byte: both async-signal-safe.
        unsafe { signal_hook::low_level::register(SIGRTMIN(), handler) }
            .map(drop)
            .map_err(|error| error.raw_os_error().unwrap_or_default())
    });
    installed.map_err(|errno| VmmError::Io {
        doing: "installing the vCPU signal's handler".to_owned(),
        source: std::io::Error::from_raw_os_error(errno),
    })
}

/// Kicks all `threads`. One that has ended already is no error.
pub(super) fn all(threads: &[JoinHandle<()>]) {
    for thread in threads {
        if let Err(error) = thread.kill(SIGRTMIN()) {
            tracing::debug!(%error, "a vCPU thread cannot be signalled");
        }
    }
}
