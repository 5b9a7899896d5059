//! Interrupts of a device: what kinds there are, and where they go.

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, Updater, opcode};
use vfio_bindings::bindings::vfio as uapi;

use crate::error::UapiError;
use crate::feature::argsz;

/// `_IO(VFIO_TYPE, VFIO_BASE + 9)`.
const DEVICE_GET_IRQ_INFO: Opcode = opcode::none(uapi::VFIO_TYPE, 109);
/// `_IO(VFIO_TYPE, VFIO_BASE + 10)`.
const DEVICE_SET_IRQS: Opcode = opcode::none(uapi::VFIO_TYPE, 110);

/// Most interrupts of one call: as many as MSI-X has vectors.
const EVENTFDS_MAX: usize = 2048;

/// A kind of interrupts: `struct vfio_irq_info`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Irqs {
    /// Index of the interrupt type, `VFIO_PCI_*_IRQ_INDEX`.
    pub index: u32,
    /// Number of interrupts; 0 where the device has none of this kind.
    pub count: u32,
    /// The interrupts can be signalled by eventfd.
    pub eventfd: bool,
    /// The interrupts can be masked.
    pub maskable: bool,
    /// The interrupts are masked as they are signalled (level interrupts), and wait to be unmasked.
    pub automasked: bool,
    /// `VFIO_IRQ_INFO_NORESIZE`: the number in use changes only by disabling all of them first.
    pub noresize: bool,
}

/// The fields of `vfio_irq_set` besides its data.
#[derive(Clone, Copy)]
struct Request {
    /// `VFIO_IRQ_SET_DATA_*` and `VFIO_IRQ_SET_ACTION_*`.
    flags: u32,
    index: u32,
    start: u32,
    count: u32,
}

/// Interrupts of kind `index` of `device`.
///
/// # Errors
/// EINVAL for an index that the device does not have.
pub fn irq_info(device: BorrowedFd<'_>, index: u32) -> Result<Irqs, UapiError> {
    let mut info = uapi::vfio_irq_info {
        argsz: const { argsz(size_of::<uapi::vfio_irq_info>()) },
        index,
        ..Default::default()
    };
    // SAFETY: the structure that the uAPI gives this ioctl, of plain integers; the kernel writes at most argsz bytes.
    unsafe { rustix::ioctl::ioctl(device, Updater::<DEVICE_GET_IRQ_INFO, _>::new(&mut info)) }
        .map_err(|source| UapiError::System { doing: "asking for the device's interrupts", source })?;
    let has = |flag: u32| info.flags & flag != 0;
    Ok(Irqs {
        index,
        count: info.count,
        eventfd: has(uapi::VFIO_IRQ_INFO_EVENTFD),
        maskable: has(uapi::VFIO_IRQ_INFO_MASKABLE),
        automasked: has(uapi::VFIO_IRQ_INFO_AUTOMASKED),
        noresize: has(uapi::VFIO_IRQ_INFO_NORESIZE),
    })
}

/// Connects interrupts `start ..` of kind `index` to eventfds, all by one call; `None` disconnects that one. Enables
/// the kind when it was not. The device keeps a reference of its own to each.
///
/// # Errors
/// [`UapiError::FewerInterrupts`]: the host has not so many, and none is connected. EINVAL for interrupts that the device does not have, and, with [`Irqs::noresize`], for more than were there first.
pub fn set_irq_eventfds(
    device: BorrowedFd<'_>,
    index: u32,
    start: u32,
    eventfds: &[Option<BorrowedFd<'_>>],
) -> Result<(), UapiError> {
    let request = Request {
        flags: uapi::VFIO_IRQ_SET_DATA_EVENTFD | uapi::VFIO_IRQ_SET_ACTION_TRIGGER,
        index,
        start,
        count: count(eventfds.len())?,
    };
    set_irqs(device, request, &numbers(eventfds), "connecting interrupts to eventfds")
}

/// The eventfd by which a level interrupt is unmasked (KVM's resamplefd); `None` takes it away.
///
/// # Errors
/// Also where the kind cannot be unmasked so: with vfio-pci, all but INTx.
pub fn set_irq_unmask_eventfd(
    device: BorrowedFd<'_>,
    index: u32,
    vector: u32,
    eventfd: Option<BorrowedFd<'_>>,
) -> Result<(), UapiError> {
    let flags = uapi::VFIO_IRQ_SET_DATA_EVENTFD | uapi::VFIO_IRQ_SET_ACTION_UNMASK;
    let request = Request { flags, index, start: vector, count: 1 };
    set_irqs(device, request, &numbers(&[eventfd]), "connecting the eventfd that unmasks an interrupt")
}

/// Disconnects all interrupts of kind `index` and disables it. For a kind that is not enabled, drivers differ:
/// vfio-pci refuses with EINVAL what another kind holds.
pub fn disable_irqs(device: BorrowedFd<'_>, index: u32) -> Result<(), UapiError> {
    let flags = uapi::VFIO_IRQ_SET_DATA_NONE | uapi::VFIO_IRQ_SET_ACTION_TRIGGER;
    set_irqs(device, Request { flags, index, start: 0, count: 0 }, &[], "disabling interrupts")
}

/// Signals the eventfd of one interrupt as if the device had raised it.
pub fn trigger_irq(device: BorrowedFd<'_>, index: u32, vector: u32) -> Result<(), UapiError> {
    let flags = uapi::VFIO_IRQ_SET_DATA_NONE | uapi::VFIO_IRQ_SET_ACTION_TRIGGER;
    set_irqs(device, Request { flags, index, start: vector, count: 1 }, &[], "raising an interrupt")
}

/// Masks or unmasks one interrupt.
///
/// # Errors
/// ENOTTY where the kind cannot be masked: with vfio-pci, MSI and MSI-X.
pub fn mask_irq(device: BorrowedFd<'_>, index: u32, vector: u32, masked: bool) -> Result<(), UapiError> {
    let action = if masked { uapi::VFIO_IRQ_SET_ACTION_MASK } else { uapi::VFIO_IRQ_SET_ACTION_UNMASK };
    let request = Request { flags: uapi::VFIO_IRQ_SET_DATA_NONE | action, index, start: vector, count: 1 };
    set_irqs(device, request, &[], "masking or unmasking an interrupt")
}

fn count(len: usize) -> Result<u32, UapiError> {
    let count = u32::try_from(len).ok().filter(|_| len <= EVENTFDS_MAX);
    count.ok_or(UapiError::TooManyInterrupts(len))
}

/// As the kernel wants them: -1 for none.
fn numbers(eventfds: &[Option<BorrowedFd<'_>>]) -> Vec<i32> {
    eventfds.iter().map(|eventfd| eventfd.map_or(-1, |eventfd| eventfd.as_raw_fd())).collect()
}

fn set_irqs(
    device: BorrowedFd<'_>,
    request: Request,
    data: &[i32],
    doing: &'static str,
) -> Result<(), UapiError> {
    const HEADER: usize = size_of::<uapi::vfio_irq_set>();
    const WORDS: usize = HEADER / 4 + EVENTFDS_MAX;
    let len =
        u32::try_from(HEADER + size_of_val(data)).map_err(|_| UapiError::TooManyInterrupts(data.len()))?;
    if data.len() > EVENTFDS_MAX {
        return Err(UapiError::TooManyInterrupts(data.len()));
    }
    let header = [len, request.flags, request.index, request.start, request.count].map(u32::cast_signed);
    let mut words = [0_i32; WORDS];
    for (word, value) in words.iter_mut().zip(header.iter().chain(data)) {
        *word = *value;
    }
    // SAFETY: `words` begins with `struct vfio_irq_set` and its data, argsz bytes of it, which the kernel only reads.
    let answer = unsafe { rustix::ioctl::ioctl(device, SetIrqs(words)) }
        .map_err(|source| UapiError::System { doing, source })?;
    all_enabled(answer, request)
}

/// A positive answer is no success: so many interrupts the host has, fewer than it was asked for, and none is enabled
/// (`vfio_pci_intrs.c`, `vfio_msi_enable`). Counted from the first of the kind, whatever the call began at.
fn all_enabled(answer: i32, request: Request) -> Result<(), UapiError> {
    match u32::try_from(answer) {
        Ok(possible) if possible > 0 => {
            let wanted = request.start.saturating_add(request.count);
            Err(UapiError::FewerInterrupts { wanted, possible })
        }
        _ => Ok(()),
    }
}

/// `VFIO_DEVICE_SET_IRQS`, with the number that it answers.
struct SetIrqs<const WORDS: usize>([i32; WORDS]);

// SAFETY: the ioctl takes a pointer to `struct vfio_irq_set`, which the words begin with, and only reads it.
unsafe impl<const WORDS: usize> Ioctl for SetIrqs<WORDS> {
    type Output = i32;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        DEVICE_SET_IRQS
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        self.0.as_mut_ptr().cast()
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut std::ffi::c_void) -> Result<i32, rustix::io::Errno> {
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_sizes_are_the_uapis() {
        assert_eq!((DEVICE_GET_IRQ_INFO, DEVICE_SET_IRQS), (0x3b6d, 0x3b6e));
        assert_eq!(size_of::<uapi::vfio_irq_info>(), 16);
        assert_eq!(size_of::<uapi::vfio_irq_set>(), 20);
        assert_eq!(std::mem::offset_of!(uapi::vfio_irq_set, data), 20);
    }

    #[test]
    fn an_answer_that_is_a_number_is_a_refusal() {
        let request = Request { flags: 0, index: 1, start: 2, count: 6 };
        assert!(all_enabled(0, request).is_ok());
        for possible in [1, 3, 7] {
            let refused = all_enabled(possible, request).unwrap_err();
            assert!(
                matches!(refused, UapiError::FewerInterrupts { wanted: 8, possible: said } if said == possible.cast_unsigned())
            );
        }
        assert_eq!(
            all_enabled(1, request).unwrap_err().to_string(),
            "the host has 1 of the 8 interrupts asked for, and enabled none"
        );
    }

    #[test]
    fn no_more_interrupts_than_there_can_be() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let device = std::os::fd::AsFd::as_fd(&null);
        let most = vec![None; EVENTFDS_MAX];
        let refused = set_irq_eventfds(device, 2, 0, &most).unwrap_err();
        assert_eq!(refused.errno(), Some(rustix::io::Errno::NOTTY));
        let more = vec![None; EVENTFDS_MAX + 1];
        assert!(matches!(set_irq_eventfds(device, 2, 0, &more), Err(UapiError::TooManyInterrupts(2049))));
    }
}
