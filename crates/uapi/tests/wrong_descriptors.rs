//! What every call makes of a descriptor that is no VFIO device, and of arguments that the kernel must not see.

use std::fs::OpenOptions;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use vfio_migration_types::{Granule, Iova, MigrationState, Range};
use vfio_migration_uapi::{
    Access, Feature, UapiError, attach, bind_iommufd, detach, device_info, device_state, disable_irqs,
    group_device, group_status, irq_info, mask_irq, migration_flags, opt_in_precopy_info_v2, precopy_info,
    probe, region_info, report_dma_logging, reset, set_device_state, set_irq_eventfds,
    set_irq_unmask_eventfd, start_dma_logging, stop_copy_size, stop_dma_logging, trigger_irq,
    unset_container,
};

fn range(iova: u64, len: u64) -> Range<Iova> {
    Range::new(Iova(iova), len).unwrap()
}

/// Every call but the two that answer with a bool; each failed.
fn failures(fd: BorrowedFd<'_>) -> Vec<UapiError> {
    let ranges = [range(0, 1 << 20), range(4 << 30, 1 << 20)];
    let mut errors = vec![
        migration_flags(fd).unwrap_err(),
        device_state(fd).unwrap_err(),
        stop_copy_size(fd).unwrap_err(),
        precopy_info(fd).unwrap_err(),
        reset(fd).unwrap_err(),
        start_dma_logging(fd, Granule::PAGE, &ranges).unwrap_err(),
        start_dma_logging(fd, Granule::PAGE, &[]).unwrap_err(),
        stop_dma_logging(fd).unwrap_err(),
        report_dma_logging(fd, ranges[0], Granule::PAGE, &mut [0; 4]).unwrap_err(),
    ];
    errors.extend([
        device_info(fd).unwrap_err(),
        region_info(fd, 0).unwrap_err(),
        irq_info(fd, 0).unwrap_err(),
        set_irq_eventfds(fd, 2, 0, &[None]).unwrap_err(),
        set_irq_unmask_eventfd(fd, 0, 0, None).unwrap_err(),
        disable_irqs(fd, 0).unwrap_err(),
        trigger_irq(fd, 0, 0).unwrap_err(),
        mask_irq(fd, 0, 0, true).unwrap_err(),
        group_status(fd).unwrap_err(),
        unset_container(fd).unwrap_err(),
        group_device(fd, c"0000:00:00.0").unwrap_err(),
        bind_iommufd(fd, fd).unwrap_err(),
        attach(fd, 1).unwrap_err(),
        detach(fd).unwrap_err(),
    ]);
    errors.extend(MigrationState::ALL.map(|state| set_device_state(fd, state).unwrap_err()));
    errors
}

const FEATURES: [Feature; 7] = [
    Feature::Migration,
    Feature::MigDeviceState,
    Feature::DmaLoggingStart,
    Feature::DmaLoggingStop,
    Feature::DmaLoggingReport,
    Feature::MigDataSize,
    Feature::MigPrecopyInfoV2,
];

#[test]
fn what_is_no_device_is_unsupported() {
    let null = OpenOptions::new().read(true).write(true).open("/dev/null").unwrap();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let socket: OwnedFd = std::os::unix::net::UnixStream::pair().unwrap().0.into();
    let memory = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    for fd in [null.as_fd(), reader.as_fd(), writer.as_fd(), socket.as_fd(), memory.as_fd(), event.as_fd()] {
        for error in failures(fd) {
            assert_eq!(error.errno(), Some(Errno::NOTTY), "{error:?}");
            assert!(error.is_unsupported());
            assert!(std::error::Error::source(&error).is_some(), "errno is the source");
        }
        for feature in FEATURES {
            assert!(!probe(fd, feature, Access::Get).unwrap() && !probe(fd, feature, Access::Set).unwrap());
        }
        assert!(!opt_in_precopy_info_v2(fd).unwrap());
    }
}

#[test]
fn other_errors_keep_their_errno() {
    // A descriptor that allows no ioctl at all.
    let path = rustix::fs::open("/", rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
    for error in failures(path.as_fd()) {
        assert_eq!(error.errno(), Some(Errno::BADF), "{error:?}");
        assert!(!error.is_unsupported());
    }
    let errno = |result: Result<bool, UapiError>| result.unwrap_err().errno();
    assert_eq!(errno(probe(path.as_fd(), Feature::Migration, Access::Get)), Some(Errno::BADF));
    assert_eq!(errno(opt_in_precopy_info_v2(path.as_fd())), Some(Errno::BADF));
}

#[test]
fn a_report_that_does_not_fit_never_reaches_the_kernel() {
    let null = std::fs::File::open("/dev/null").unwrap();
    let report = |range, granule, words: usize| {
        let mut bitmap = vec![0; words];
        report_dma_logging(null.as_fd(), range, granule, &mut bitmap).unwrap_err()
    };
    let pages = |n: u64| range(1 << 30, n << 12);
    for (n, words) in [(1, 0), (64, 0), (65, 1), (1 << 30, 16)] {
        let error = report(pages(n), Granule::PAGE, words);
        assert!(matches!(error, UapiError::BitmapTooSmall { .. }), "{n}: {error:?}");
    }
    // The control: with one word more it does reach it.
    for (n, words) in [(1, 1), (64, 1), (65, 2)] {
        assert_eq!(report(pages(n), Granule::PAGE, words).errno(), Some(Errno::NOTTY), "{n}");
    }
    let big = Granule::new(2 << 20).unwrap();
    for bad in [range(4096, 2 << 20), range(0, 4096), range(0, (2 << 20) + 4096)] {
        assert!(matches!(report(bad, big, 64), UapiError::Misaligned { .. }), "{bad:?}");
    }
    assert!(matches!(report(range(0, 100), Granule::PAGE, 1), UapiError::Misaligned { .. }));
}
